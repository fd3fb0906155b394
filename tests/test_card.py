"""The model card of an export: what it repeats of a run or of a folder's own card, and that it invents nothing."""

import json
import pathlib

import pytest
from huggingface_hub import metadata_load

from llava_jax.cli.main import main
from llava_jax.settings import read_settings, write_settings
from llava_jax.train.loop import train
from llava_jax.weights.convert import MADE, made_from, read_card
from tests.tiny_run import change, make_inputs, make_settings

CARD = "---\nlicense: llama2\ndatasets: [a/b]\n---\n\n# The model\n\nBy someone.\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    (folder / "llava" / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, pathlib.Path]:
    """A run of stage 1, and one of adapters from its projector."""
    made = {stage: tmp_path_factory.mktemp(stage) / "run" for stage in ("pretrain", "lora")}
    train(make_settings(inputs, "pretrain", train__steps=1), str(made["pretrain"]))
    train(make_settings(inputs, "lora", init__projector=str(made["pretrain"]), train__steps=2), str(made["lora"]))
    return made


def exported(source: pathlib.Path, target: str, folder: pathlib.Path) -> str:
    """The card that convert writes."""
    assert main(["convert", f"--from={source}", f"--to={target}:{folder}"]) == 0
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_run_says_stages_data_recipe_and_last_figures(runs, inputs, tmp_path):
    text = exported(runs["lora"], "hf", tmp_path / "mine")
    stages = ("pretrain`, 1 update\n", "lora`, 2 updates\n")
    first, second = (text.index(f"### Stage `{stage}") for stage in stages)
    assert first < second and "- `llava`, licence llama2" in text
    assert "Data: `captions.json`, 7 rows." in text[first:second] and "Data: `rows.json`, 8 rows." in text[second:]
    settings = read_settings(str(runs["lora"] / "config.json"))
    for key, value in (("optim.lr", settings.optim.lr), ("lora.rank", settings.lora.rank), ("train.batch_size", 4)):
        assert f"\n{key}: {value}\n" in text[second:]
    assert "lora." not in text[first:second]
    last = json.loads((runs["lora"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"Logged last, at update 2: loss {last['loss']:.4g}, gradient norm {last['grad_norm']:.4g}." in text
    assert str(inputs) not in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    "form, library, loads",
    [
        ("hf", "transformers", 'LlavaForConditionalGeneration.from_pretrained("mine")'),
        ("llava", None, "--model-path mine"),
        ("orbax", None, "llava-jax generate --model=mine --image"),
        ("peft", "peft", 'PeftModel.from_pretrained(model, "mine")'),
    ],
)
def test_every_form_has_a_card_that_says_how_it_is_loaded(runs, tmp_path, form, library, loads):
    text = exported(runs["lora"], form, tmp_path / "mine")
    front = metadata_load(tmp_path / "mine" / "README.md")
    assert front["pipeline_tag"] == "image-text-to-text" and front.get("library_name") == library
    assert front["license"] == "llama2" and "base_model" not in front  # `llava` is a folder and no name on the Hub
    assert loads in text


def test_an_older_checkpoint_has_its_own_figures(runs, inputs, tmp_path):
    settings = make_settings(inputs, "finetune", train__checkpoint_every=1, train__steps=2)
    train(settings, str(tmp_path / "run"))
    write_settings(str(tmp_path / "run" / "config.until-1.json"), change(settings, "optim", lr=0.5, clip_norm=9.0))
    text = made_from(str(tmp_path / "run"), "--from", step=1).text
    assert "`, 1 update\n" in text and "at update 1:" in text
    assert "\nUntil update 1: optim.lr 0.5, optim.clip_norm 9.0.\n" in text


def test_what_is_not_known_is_left_out(inputs, tmp_path):
    workdir = tmp_path / "run"
    train(make_settings(inputs, "finetune", train__steps=1), str(workdir))
    meta = workdir / "checkpoints" / "1" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"rows"', '"other"'))  # as runs of before were written
    (workdir / "metrics.jsonl").unlink()
    recorded = read_settings(str(workdir / "config.json"))
    write_settings(str(workdir / "config.json"), change(recorded, "init", model="hf:gone/model@" + 40 * "0"))
    made = made_from(str(workdir), "--from")
    assert made.metadata == {"base_model": ["gone/model"]}
    assert "Data: `rows.json`.\n" in made.text and "Logged" not in made.text
    assert f"[gone/model](https://huggingface.co/gone/model) at `{40 * '0'}`\n" in made.text


@pytest.mark.parametrize(
    "front", ["---\nlicense: [mit\n---\n", "---\n- mit\n---\n", "no front matter", "---\nli\xff---"]
)
def test_a_card_that_cannot_be_read_is_named_and_ends_nothing(tmp_path, capsys, front):
    (tmp_path / "README.md").write_bytes(front.encode("latin-1"))
    assert read_card(str(tmp_path))[0] == {}
    assert ("README.md: its front matter cannot be read" in capsys.readouterr().out) == front.startswith("---")


def test_a_card_goes_along_from_form_to_form(runs, inputs, tmp_path):
    first = exported(runs["lora"], "orbax", tmp_path / "one")
    again = exported(tmp_path / "one", "hf", tmp_path / "two")
    assert again[again.index(MADE) :] == first[first.index(MADE) :]
    foreign = exported(inputs / "llava", "hf", tmp_path / "three")
    front = metadata_load(tmp_path / "three" / "README.md")
    assert (front["license"], front["datasets"]) == ("llama2", ["a/b"])
    assert "Converted by llava-jax from\n\n- model: `llava`" in foreign and "By someone" not in foreign
