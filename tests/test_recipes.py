"""The recipes of docs/howto/python.md run, in their order, on a model from the demo's backbones."""

import pathlib

import pytest

from tests.ecosystem.make_export import write_export
from tests.test_docs import DOCS, blocks
from tests.tiny_llava import draw_image


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with the model and the images that the recipes name."""
    write_export(str(tmp_path / "demo_run" / "finetune"))
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
