"""Settings: every wrong value is refused with one line that names the key."""

import dataclasses
import json
import re

import pytest

from configs import tiny
from llava_jax import settings as S
from llava_jax.train.checkpoint import absolute_paths
from llava_jax.types import InputError


def values(**changes) -> dict:
    tree = tiny.get_config("stage=finetune").to_dict()
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (tree[group] if group else tree)[name] = value
    return tree


def test_round_trip_through_the_file(tmp_path):
    made = S.settings_from_dict(values(optim__lr=1, data__annotations="a.json"))
    assert made.optim.lr == 1.0 and isinstance(made.optim.lr, float)
    S.write_settings(str(tmp_path / "config.json"), made)
    assert S.read_settings(str(tmp_path / "config.json")) == made
    assert dataclasses.asdict(made) == values(optim__lr=1.0, data__annotations="a.json")


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(optim__lrr=1.0), "unknown config key optim.lrr: did you mean lr?"),
        (dict(zzzz=1), "unknown config key zzzz"),
        (dict(seed=1.5), "config key seed: expected int, got 1.5 (float)"),
        (dict(seed=True), "config key seed: expected int, got True (bool)"),
        (dict(data__exif="turn"), "config key data.exif: expected one of apply, ignore, got 'turn'"),
        (dict(data__shuffle=1), "config key data.shuffle: expected bool, got 1"),
        (dict(model=3), "config key model: expected a group of keys"),
        (dict(stage="align"), "config key stage: expected one of pretrain, mid, finetune, lora"),
        (dict(train__loss_norm="mean"), "train.loss_norm: expected one of global_token, rank_mean"),
        (dict(optim__b2=1.0), "config key optim.b2: expected a number in [0, 1), got 1.0"),
        (dict(optim__lr=float("nan")), "config key optim.lr"),
        (dict(train__keep=0), "config key train.keep"),
        (dict(train__steps=0, train__epochs=0.0), "train.steps and train.epochs are both 0"),
        (
            dict(train__remat="attention+z"),
            "train.remat: expected one of none, dots, minimal, full, or names of minimal, attention",
        ),
        (dict(train__remat="full+down_weight"), "joined by '+', got 'full+down_weight'"),
        (
            dict(data__pack=True, train__loss_norm="rank_mean"),
            "set --config.data.pack=False, or leave loss_norm at global_token",
        ),
        (dict(data__pack_length=512), "set --config.data.pack=True, or both to 0"),
        (
            dict(data__group_by="modality_length", data__pack=True),
            "data.pack=True each order the rows: set --config.data.pack=False",
        ),
        (dict(data__group_by="modality_length", data__shuffle=False), "data.shuffle=False each order the rows"),
        (dict(mesh__data=-1), "at most one axis can be -1"),
        (dict(mesh__tensor=0), "config key mesh.tensor"),
        (dict(mesh__tensor=-2), "config key mesh.tensor: expected 1 or more devices, or -1 for what is left, got -2"),
        (dict(mesh__fsdp_inner=-1), "config key mesh.fsdp_inner: expected a number in [1, inf), got -1"),
        (dict(optim__groups="projector"), "optim.groups: 'projector'"),
        (dict(optim__groups="(=1e-3"), "optim.groups: '(=1e-3'"),
        (dict(optim__groups="llm=-1"), "optim.groups: 'llm=-1'"),
    ],
)
def test_wrong_values_are_named(change, says):
    with pytest.raises(InputError) as error:
        S.settings_from_dict(values(**change))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["train.keep", "data.exif", "mesh.fsdp_inner"])
def test_absent_key_is_named(key):
    tree, (group, name) = values(), key.split(".")
    del tree[group][name]
    with pytest.raises(InputError, match=f"config key {key} is absent"):
        S.settings_from_dict(tree)


def test_a_run_from_before_a_key_did_what_was_done_then(tmp_path):
    tree = values()
    assert tree["data"].pop("exif") == "apply" and tree["mesh"].pop("fsdp_inner") == 1
    (tmp_path / "config.json").write_text(json.dumps(tree))
    run = S.read_settings(str(tmp_path / "config.json"))
    assert (run.data.exif, run.mesh.fsdp_inner) == ("ignore", 1)


def test_groups_keep_their_order():
    groups = S.parse_groups("llm/layers/.*/q=1e-4, projector=2e-5")
    assert [(pattern.pattern, lr) for pattern, lr in groups] == [("llm/layers/.*/q", 1e-4), ("projector", 2e-5)]


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not JSON (Expecting property name"),
        ("", "not JSON (Expecting value"),
        ("[1]", "config key config: expected a group of keys, got [1]"),
        ('{"stage": "finetune", "sed": 1}', "unknown config key sed: did you mean seed?"),
        (json.dumps(values(train__keep=0)), "config key train.keep: expected a number in [1, inf), got 0"),
    ],
)
def test_broken_config_json_is_named(tmp_path, text, says):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}: {says}")):
        S.read_settings(str(path))


def test_missing_config_json_is_named(tmp_path):
    with pytest.raises(InputError, match="missing.json: no such file; expected the config.json of a training run"):
        S.read_settings(str(tmp_path / "missing.json"))


def test_paths_become_absolute_and_named_sizes_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = S.settings_from_dict(
        values(model__vision="random:tiny", model__llm="random:d/config.json", init__model="hf:m", data__images="i/")
    )
    made = absolute_paths(made)
    assert (made.model.vision, made.model.llm) == ("random:tiny", f"random:{tmp_path}/d/config.json")
    assert (made.init.model, made.init.projector) == (f"hf:{tmp_path}/m", "")
    assert made.data.images == f"{tmp_path}/i" and absolute_paths(made) == made
