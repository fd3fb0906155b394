"""SRC: one reading of how a model is named."""

import os

import pytest

from llava_jax.types import InputError
from llava_jax.weights import source


@pytest.fixture
def folders(tmp_path):
    for name in ("model", "a:b", "run", "whole", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "whole" / "weights").mkdir()
    (tmp_path / "whole" / "weights" / "_METADATA").touch()
    return tmp_path


@pytest.mark.parametrize(
    "given, form, name",
    [
        ("hf:{0}/model", "hf", "model"),
        ("{0}/model", "hf", "model"),
        ("orbax:{0}/run", "run", "run"),
        ("orbax:{0}/whole", "orbax", "whole"),
        ("{0}/whole", "orbax", "whole"),
        ("{0}/run", "run", "run"),
        ("{0}/a:b", "hf", "a:b"),
        ("hf:{0}/a:b", "hf", "a:b"),
    ],
)
def test_forms(folders, given, form, name):
    assert source.parse(given.format(folders)) == (form, str(folders / name))


@pytest.mark.parametrize(
    "given, says",
    [
        ("zip:{0}/model", "--from=zip:.*: form 'zip' is not read; expected hf:DIR"),
        ("hf:{0}/run", "the folder holds a workdir of train"),
        ("hf:{0}/whole", "the folder holds a whole model as orbax"),
        ("orbax:{0}/model", "the folder holds a config.json without checkpoints/"),
        ("{0}/empty", "the folder holds none of them"),
        ("{0}/c:d", "no folder '.*/c:d'"),
        ("hf:", "no folder ''"),
        ("", "no folder ''"),
    ],
)
def test_what_is_none(folders, given, says):
    with pytest.raises(InputError, match=says):
        source.parse(given.format(folders), "--from")


def test_absolute(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert source.absolute("hf:model") == f"hf:{os.getcwd()}/model"
    assert source.absolute("a:b") == f"{os.getcwd()}/a:b"
    assert source.absolute("run/") == f"{os.getcwd()}/run" and source.absolute("") == ""
