"""The recipes of docs/howto/python.md run, in their order, on a model from the demo's backbones."""

import pathlib

import numpy as np
import pytest

from llava_jax.data.tokenize import load_tokenizer
from llava_jax.demo.story import BACKBONES
from llava_jax.models.llava import build
from llava_jax.types import ModelConfig
from llava_jax.weights import hf, name_table
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras
from tests.test_docs import DOCS, blocks
from tests.tiny_llava import draw_image


def write_demo(folder: str) -> None:
    """Write the demo's tower and decoder with a random projector, whose answers are words all the same."""
    vision, vision_params = hf.read_clip(str(BACKBONES / "clip"))
    llm, llm_params = hf.read_llama(str(BACKBONES / "llama"))
    tokenizer = load_tokenizer(str(BACKBONES / "llama"))
    config = ModelConfig(vision=vision, llm=llm, image_token_id=tokenizer.image_token_id(llm.vocab_size))
    rng = np.random.default_rng(0)
    shapes = name_table.flatten(build(config)[1]["projector"])
    projector = {path: 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    params = {"vision": vision_params, "llm": llm_params, "projector": name_table.unflatten(projector)}
    extras = LlavaExtras("v1", "pad", tokenizer=str(BACKBONES / "llama"), vision=str(BACKBONES / "clip"))
    write_llava(folder, config, params, extras)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with the model and the images that the recipes name."""
    write_demo(str(tmp_path / "demo_run" / "finetune"))
    for index, name in enumerate(("scene.png", "other.png")):
        draw_image(index).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_recipes(folder, capsys):
    recipes, names = blocks((DOCS / "howto" / "python.md").read_text(encoding="utf-8")), {}
    assert len(recipes) == 10
    for recipe in recipes:
        exec(recipe, names)
    assert "user: <image> What shape is the red object?\nassistant: " in capsys.readouterr().out
    page = names["talk"]._repr_html_()
    assert page.count("<img src=") == 1 and page.count("<b>assistant</b>") == len(names["talk"].messages) // 2
