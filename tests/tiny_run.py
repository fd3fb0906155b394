"""A training run small enough for tests: eight rows, four images, a tokenizer, configs of tiny towers, a whole model.

`python -m tests.tiny_run CONFIG_JSON WORKDIR …` trains one such pair after the other: what the tests kill and start
again.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image

from configs import tiny
from llava_jax.models.llava import build
from llava_jax.parallel.distributed import connected
from llava_jax.settings import read_settings, settings_from_dict
from llava_jax.train.loop import train
from llava_jax.types import ModelConfig, Settings
from llava_jax.weights.hf_config import clip_config, llama_config
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras
from tests.make_tokenizers import trained_llama

VISION = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
LLM = dict(
    model_type="llama",
    vocab_size=704,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
ANSWERS = ("A red square.", "A blue circle stands left.", "Two dogs.", "The car is parked on the road.")


def make_inputs(folder: pathlib.Path) -> None:
    """Writes rows.json, captions.json, images, tokenizer and tower configs into `folder`."""
    trained_llama(folder / "llm", legacy=True)
    (folder / "llm" / "config.json").write_text(json.dumps(LLM))
    (folder / "vision.json").write_text(json.dumps(VISION))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows, captions = [], []
    for i in range(8):
        answer = ANSWERS[i % 4] * (1 + i // 4)
        turns = [("human", "<image>\nWhat is this?"), ("gpt", answer)]
        if i == 5:
            turns = [("human", "How many people are visible?"), ("gpt", answer)]
        row = {"id": f"row-{i}", "conversations": [{"from": who, "value": text} for who, text in turns]}
        if i != 5:
            row["image"] = f"{i % 4}.png"
            caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": answer}]
            captions.append({"id": f"caption-{i}", "image": f"{i % 4}.png", "conversations": caption})
        rows.append(row)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "captions.json").write_text(json.dumps(captions))
    config = ModelConfig(clip_config(VISION, "VISION"), llama_config(LLM, "LLM"), image_token_id=LLM["vocab_size"])
    extras = LlavaExtras(aspect="pad", tokenizer=str(folder / "llm"))
    write_llava(str(folder / "llava"), config, make_params(config), extras)


def make_params(config: ModelConfig) -> dict:
    """Random parameters from numpy: `models.llava.init` takes seconds to compile."""
    rng = np.random.default_rng(1)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0, 0.1, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, build(config)[1])


def make_settings(folder: pathlib.Path, stage: str, **changes: object) -> Settings:
    """Settings of a run from the whole model of `make_inputs`; in `changes` __ stands for the dot: train__steps=8."""
    values = tiny.get_config(f"stage={stage}").to_dict()
    rows = "captions.json" if stage == "pretrain" else "rows.json"
    values["init"] |= dict(model=f"hf:{folder}/llava")
    values["data"] |= dict(annotations=f"{folder}/{rows}", images=f"{folder}/images", max_length=112, pack=False)
    values["data"]["template"] = values["data"]["template"] or "v1"
    values["train"] |= dict(batch_size=4, steps=4)
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (values[group] if group else values)[name] = value
    return settings_from_dict(values)


def change(settings: Settings, group: str, **changes: object) -> Settings:
    """The settings with keys of one group changed."""
    return dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **changes)})


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second", "mfu", "data_wait", "compile_seconds", "time", "goodput")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def watched_steps(compile_step: Callable) -> tuple[Callable, list]:
    """Return a `compile_step` that compiles once, and a list of (frozen, params) before and after each of its steps."""
    compiled, seen = [], []

    def once(*args):
        compiled.extend([] if compiled else [compile_step(*args)])
        step, *said = compiled[0]

        def watched(state, frozen, batch):
            before = jax.tree.map(np.array, (frozen, state.params))
            state, values = step(state, frozen, batch)
            seen.append((before, jax.tree.map(np.array, (frozen, state.params))))
            return state, values

        return watched, *said

    return once, seen


if __name__ == "__main__":
    with connected():
        for config, workdir in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            train(read_settings(config), workdir)
