"""Configs: complete, refusing what they do not know, and equal to the published recipes."""

import ast
import pathlib
import subprocess
import sys

import pytest

from configs import common, llava_qwen, llava_v1, llava_v1_5, llava_v1_6, tiny
from llava_jax.cli import main
from llava_jax.cli.train import load_config
from llava_jax.settings import STAGES, settings_from_dict
from llava_jax.train.optim import warmup_steps
from llava_jax.train.setup import total_steps
from llava_jax.types import InputError, Settings

CONFIGS = [tiny, llava_v1, llava_v1_5, llava_v1_6, llava_qwen]
# The published data sets: rows -> steps, warmup, batch, lr, epochs, template, aspect, projector, clipping, image size.
RECIPES = [
    (llava_v1, "pretrain", 595_375, 4_652, 140, 128, 2e-3, 1, "v0", "crop", "linear", 1.0, ""),
    (llava_v1, "finetune", 157_712, 14_787, 444, 32, 2e-5, 3, "v0", "crop", "linear", 1.0, ""),
    (llava_v1_5, "pretrain", 558_128, 2_181, 66, 256, 1e-3, 1, "plain", "crop", "mlp2x_gelu", 0.0, "-336"),
    (llava_v1_5, "finetune", 665_298, 5_198, 156, 128, 2e-5, 1, "v1", "pad", "mlp2x_gelu", 0.0, "-336"),
    (llava_v1_6, "pretrain", 558_128, 2_181, 66, 256, 1e-3, 1, "plain", "crop", "mlp2x_gelu", 0.0, "-336"),
    (llava_v1_6, "finetune", 779_000, 6_086, 183, 128, 1e-5, 1, "v1", "anyres", "mlp2x_gelu", 0.0, "-336"),
]


def load(config, arg: str) -> Settings:
    return settings_from_dict(config.get_config(arg).to_dict())


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r[0].__name__}-{r[1]}")
def test_published_recipe(recipe, size):
    config, stage, rows, steps, warmup, batch, lr, epochs, template, aspect, projector, clip, vision = recipe
    s = load(config, f"size={size},stage={stage}")
    assert total_steps(s.train, rows) == steps
    assert warmup_steps(s.optim, steps) == warmup
    assert (s.train.batch_size, s.optim.lr, s.train.epochs) == (batch, lr, epochs)
    assert (s.data.template, s.data.aspect, s.model.projector, s.optim.clip_norm) == (template, aspect, projector, clip)
    assert (s.optim.b1, s.optim.b2, s.optim.eps, s.optim.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    tower_learns = config is llava_v1_6 and stage == "finetune"
    assert (s.optim.schedule, s.optim.warmup_ratio) == ("cosine", 0.03)
    assert s.optim.groups == ("^vision/=2e-6" if tower_learns else "")
    assert s.train.trainable == (STAGES["mid"] if tower_learns else "")
    length = 4096 if tower_learns else 2048
    assert (s.data.max_length, s.model.feature_layer, s.seed, s.train.dtype) == (length, -2, 42, "bfloat16")
    assert s.model.vision.endswith(f"clip-vit-large-patch14{vision}") and size in s.model.llm
    assert s.data.image_position == ("keep" if config is llava_v1 else "front")
    assert bool(s.init.projector) == (stage == "finetune") and s.stage == stage


def test_recipe_of_newer_backbones():
    """LLaVA-OneVision's stages: the projector, then all of it twice, the tower at a fifth of the rate."""
    stages = {stage: load(llava_qwen, f"size=0.6b,stage={stage}") for stage in ("pretrain", "mid", "finetune")}
    assert [(s.stage, s.optim.lr, s.optim.groups, s.train.trainable) for s in stages.values()] == [
        ("pretrain", 1e-3, "", ""),
        ("mid", 1e-5, "^vision/=2e-6", STAGES["mid"]),
        ("finetune", 1e-5, "^vision/=2e-6", STAGES["mid"]),
    ]
    assert stages["mid"].init.projector and stages["finetune"].init.model == "orbax:runs/llava_qwen_0.6b_mid"
    assert [s.data.template for s in stages.values()] == ["plain", "tokenizer", "tokenizer"]
    assert all(s.model.llm == "weights/Qwen3-0.6B" and "siglip2" in s.model.vision for s in stages.values())


def test_recipes_change_only_keys_every_config_has():
    keys = {key for key, _ in flat(common.default_config())}
    given = ((llava_v1, "stage=pretrain"), (llava_v1_5, "stage=finetune"), (tiny, "stage=pretrain"))
    for config, arg in (*given, (llava_v1_6, ""), (llava_qwen, "")):
        assert {key for key, _ in flat(config.get_config(arg))} == keys
    settings_from_dict(common.default_config().to_dict())


def flat(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize(
    "arg, says",
    [("stage=align", "stage is one of finetune, pretrain"), ("sise=7b", "expected size=…, stage=…"), ("7b", "size=…")],
)
def test_unknown_arguments_are_refused(arg, says):
    with pytest.raises(ValueError, match=says):
        llava_v1_5.get_config(arg)


def test_arguments_have_defaults():
    assert load(llava_v1_5, "").stage == load(tiny, None).stage == "finetune"
    assert "13b" in load(llava_v1, "size=13b").model.llm


@pytest.mark.parametrize(
    "config", [tiny, llava_v1, llava_v1_5, llava_v1_6, llava_qwen], ids=lambda config: config.__name__
)
def test_a_config_prints_itself(config, tmp_path):
    path = pathlib.Path(config.__file__).resolve()
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{config.get_config()}\n", "")


@pytest.mark.parametrize(
    "config", [common, tiny, llava_v1, llava_v1_5, llava_v1_6, llava_qwen], ids=lambda config: config.__name__
)
def test_a_config_imports_nothing_but_ml_collections(config):
    names = set()
    for node in ast.walk(ast.parse(pathlib.Path(config.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert names <= {"ml_collections", "configs.common", "common"}


# ---- recipes by name (tests/installed.py does the same where the package is installed) ----------------------------


def test_a_recipe_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arg = "size=13b,stage=pretrain"
    assert load_config([f"--config=llava_v1:{arg}"]).to_dict() == llava_v1.get_config(arg).to_dict()


def test_a_file_wins_over_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'seed': 5})\n"
    (tmp_path / "tiny.py").write_text(text)
    assert load_config(["--config=tiny.py"]).to_dict() == {"seed": 5}
    assert load_config(["--config=tiny"]).to_dict() == tiny.get_config().to_dict()


def test_modules_of_a_package_hide_no_others_from_its_configs(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("import hidden\n")
    (tmp_path / "hidden.py").write_text("def get_config():\n    pass\n")
    (tmp_path / "__init__.py").touch()
    with pytest.raises(InputError, match="No module named 'hidden'"):
        load_config([f"--config={tmp_path}/configs/mine.py"])


def test_configs_lists_each_recipe_with_one_line(capsys):
    assert main.main(["configs"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == ["llava_qwen", "llava_v1", "llava_v1_5", "llava_v1_6", "tiny"]
    assert all(len(line.split()) > 5 for line in lines)


def test_copies_run_and_replace_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["configs", "--copy=llava_v1_5", "--to=mine"]) == 0
    assert main.main(["configs", "--copy=tiny", "--to=mine"]) == 0  # the same common.py is there already
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["common.py", "llava_v1_5.py", "tiny.py"]
    done = subprocess.run([sys.executable, "mine/tiny.py"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{tiny.get_config()}\n", "")
    for changed, asked in (("tiny.py", "tiny"), ("common.py", "llava_v1")):
        (tmp_path / "mine" / changed).write_text("# mine\n")
        capsys.readouterr()
        assert main.main(["configs", f"--copy={asked}", "--to=mine"]) == 2
        assert changed in capsys.readouterr().err
        assert (tmp_path / "mine" / changed).read_text() == "# mine\n"
    assert not (tmp_path / "mine" / "llava_v1.py").exists()
