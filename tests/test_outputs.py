"""What commands write: never a file that they read, nor one written twice, nor a folder named like a bucket."""

import json
import os
import pathlib
import re

import pytest

from llava_jax.cli import main
from llava_jax.cli.flags import Parser
from llava_jax.cli.train import find_config

WRITTEN = re.compile(
    r"--(\w+)(?: \S+)?\s+(?:written|to be written|folder of the run|folder for everything|folder to copy into)"
)
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def files(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder, the current one, with a file for every input; none of them is ever looked into."""
    for name in ("rows.json", "q.jsonl", "a.jsonl", "peer", "llm/tokenizer.json", "images/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"[] {name}")
    for name in ("coco/captions_val.json", "coco/instances_val.json", "sqa/problems.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{{}} {name}")
    (tmp_path / "cfg.py").write_text((ROOT / "configs" / "tiny.py").read_text())
    (tmp_path / "common.py").write_text((ROOT / "configs" / "common.py").read_text())
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "system.txt").write_text("Say.")
    os.symlink("rows.json", tmp_path / "link.json")
    os.link(tmp_path / "rows.json", tmp_path / "hard.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words: list[str], capsys) -> str:
    assert main.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


VERIFY = "prepare verify --annotations=rows.json --images=images --tokenizer=llm --template=v1"
SYNTHESIZE = "synthesize --kind=detail --teacher=t --endpoint=http://localhost:1/v1"
FINETUNE = "--config=cfg.py:stage=finetune"
JUDGE = (
    "evaluate llava_bench --questions=rows.json --context=peer --rules=cfg.py --answers=a.jsonl --answers=q.jsonl "
    "--judge=j --endpoint=http://localhost:1/v1"
)


@pytest.mark.parametrize(
    "line, flags",
    [
        (f"{VERIFY} --dump=rows.json", ("--dump", "--annotations")),
        (f"{VERIFY} --dump=./images/../rows.json", ("--dump", "--annotations")),
        (f"{VERIFY} --dump=link.json", ("--dump", "--annotations")),
        (f"{VERIFY} --dump=hard.json", ("--dump", "--annotations")),
        (f"{VERIFY.replace('rows.json', 'rows.json:1,q.jsonl:2')} --dump=q.jsonl", ("--dump", "--annotations")),
        (f"{VERIFY} --dump=llm/tokenizer.json", ("--dump", "--tokenizer")),
        (f"{VERIFY} --dump=images/a.jpg", ("--dump", "--images")),
        (f"prepare verify {FINETUNE} --config.data.annotations=rows.json --dump=hard.json", ("--dump", "annotations")),
        (f"prepare verify {FINETUNE} --config.model.llm=llm --dump=llm/tokenizer.json", ("--dump", "model.llm")),
        ("evaluate exact_match --questions=q.jsonl --answers=a.jsonl --json=a.jsonl", ("--json", "--answers")),
        ("evaluate exact_match --questions=q.jsonl --answers=a.jsonl --json=q.jsonl", ("--json", "--questions")),
        ("evaluate gqa --questions=q.jsonl --answers=a.jsonl --json=a.jsonl", ("--json", "--answers")),
        ("evaluate seed --annotations=rows.json --answers=a.jsonl --submission=hard.json", ("--submission",)),
        (f"{JUDGE} --output=q.jsonl", ("--output", "--answers")),
        (f"{JUDGE} --output=out.jsonl --json=out.journal.jsonl", ("--json", "--output")),
        ("prepare gqa --source=rows.json --output=hard.json", ("--output", "--source")),
        (f"compile {FINETUNE} --json=cfg.py", ("--json", "--config")),
        (f"compile {FINETUNE} --hlo=cfg.py", ("--hlo", "--config")),
        (f"compile {FINETUNE} --json=new --hlo=images/../new", ("--hlo", "--json")),
        ("benchmark train --peer --peer_python=peer --json=peer", ("--json", "--peer_python")),
        ("generate --model=m --questions=q.jsonl --images=images --answers=q.jsonl", ("--answers", "--questions")),
        ("prepare captions --captions=rows.json --output=hard.json", ("--output", "--captions")),
        ("prepare concepts --captions=rows.json --output=new --json=new", ("--json", "--output")),
        ("prepare scienceqa --source=sqa --split=train --output=sqa/problems.json", ("--output", "--source")),
        (f"{SYNTHESIZE} --contexts=q.jsonl --output=q.jsonl", ("--output", "--contexts")),
        (f"{SYNTHESIZE} --contexts=coco --output=coco/captions_val.json", ("--output", "--contexts")),
        (
            f"{SYNTHESIZE} --contexts=coco/captions_val.json --output=coco/instances_val.json",
            ("--output", "--contexts"),
        ),
        (f"{SYNTHESIZE} --contexts=o.journal.jsonl --output=o.json", ("--output", "--contexts")),
        (f"{SYNTHESIZE} --contexts=q.jsonl --output=o.json --batch_input=o.json", ("--batch_input", "--output")),
        (
            f"{SYNTHESIZE} --contexts=q.jsonl --output=a.jsonl --batch_output=new.jsonl,a.jsonl",
            ("--output", "--batch_output"),
        ),
        (f"{SYNTHESIZE} --contexts=q.jsonl --prompts=prompts --output=prompts/system.txt", ("--output", "--prompts")),
    ],
)
def test_an_input_is_not_written_over(line, flags, files, capsys):
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    said = refused(line.split(), capsys)
    assert "names another file of this command" in said
    assert all(flag in said for flag in flags), said
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


def test_every_flag_that_is_written_is_guarded():
    """A flag whose help says that it is written is declared as an output of its command."""
    for name, command in main.COMMANDS.items():
        parser = Parser(name, command.summary, command.example)
        command.add_flags(parser)
        written = WRITTEN.findall(parser.format_help())
        assert set(written) == set(command.writes), name


@pytest.mark.parametrize(
    "line",
    [
        "train --config=cfg.py:stage=finetune --workdir=s3://bucket/run",
        "demo --workdir=gs://bucket/run",
        "configs --copy=tiny --to=gs://bucket/configs",
        "convert --from=m --to=hf:gs://bucket/m",
        "convert --from=s3://bucket/m --to=hf:m",
        "generate --model=hf:s3://bucket/m --prompt=x",
        "generate --model=m --questions=q.jsonl --images=images --answers=gs://bucket/a.jsonl",
        "compile --config=cfg.py:stage=finetune --json=gs://bucket/a.json",
        f"{VERIFY} --dump=gs://bucket/dump.jsonl",
        f"{VERIFY.replace('=images', '=s3://bucket/images')}",
        "prepare captions --captions=rows.json --output=gs://bucket/rows.json",
        "prepare arrayrecord --annotations=rows.json --images=images --output=gs://bucket/rows",
        "train --config=cfg.py:stage=finetune --workdir=w --config.model.llm=s3://bucket/llm",
        "train --config=cfg.py:stage=finetune --workdir=w --config.init.model=hf:s3://bucket/llm",
        "train --config=cfg.py:stage=finetune --workdir=w --config.data.images=s3://bucket/images",
        "train --config=cfg.py:stage=finetune --workdir=w --config.model.vision=random:gs://bucket/clip.json",
        "generate --model=m --image=gs://bucket/a.png --prompt=x",
    ],
)
def test_a_bucket_is_refused_by_name(line, files, capsys):
    before = set(files.rglob("*"))
    said = refused(line.split(), capsys)
    assert "://bucket" in said and "folder of this machine" in said
    assert set(files.rglob("*")) == before


def test_a_run_from_its_own_config_is_no_conflict(files, capsys):
    """The config.json of a workdir starts its run again: what is read there is not written over by a report."""
    (files / "own").mkdir()
    (files / "own" / "config.json").write_text(json.dumps({"stage": "none"}))
    assert "names another file" not in refused("train --config=own/config.json --workdir=own".split(), capsys)


def test_a_named_size_is_no_file(files, capsys):
    """`random:tiny` names a size, and a workdir may have the same name."""
    sizes = "--config.model.vision=random:tiny --config.model.llm=random:vicuna-7b"
    said = refused(f"train --config=cfg.py:stage=pretrain {sizes} --workdir=tiny".split(), capsys)
    assert "data.annotations is empty" in said
    said = refused(f"compile --config=cfg.py:stage=pretrain {sizes} --json=vicuna-7b --slices=0".split(), capsys)
    assert "--slices=0" in said
    sizes = sizes.replace("vicuna-7b", "rows.json")
    said = refused(f"compile --config=cfg.py:stage=pretrain {sizes} --json=rows.json".split(), capsys)
    assert "--json=rows.json: names another file of this command, too (model.llm=rows.json)" in said


@pytest.mark.parametrize(
    "line, says",
    [
        ("train --workdir=w", "data.annotations is empty"),
        ("prepare verify --dump=d.jsonl", "data.annotations is empty"),
        ("compile --json=new --slices=0", "--slices=0"),
    ],
)
def test_a_config_file_runs_once(line, says, files, capsys):
    with (files / "cfg.py").open("a") as config:
        config.write("\nopen('ran', 'a').write('once ')\n")
    sizes = "--config.model.vision=random:tiny --config.model.llm=random:tiny"
    assert says in refused(f"{line} {FINETUNE} {sizes}".split(), capsys)
    assert (files / "ran").read_text() == "once "


def test_a_recipe_of_the_package_is_an_input_as_well(files, capsys):
    recipe = str(find_config("tiny"))
    before = pathlib.Path(recipe).read_bytes()
    said = refused(["compile", "--config=tiny:stage=finetune", f"--json={recipe}"], capsys)
    assert "names another file of this command" in said and pathlib.Path(recipe).read_bytes() == before
