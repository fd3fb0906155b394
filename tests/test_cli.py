"""The command line: what it lists, what it hands on, and one clear line with exit code 2 for everything it refuses."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from llava_jax.cli import main, train
from llava_jax.settings import settings_from_dict
from tests.tiny_llava import write_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
LLAMA = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def row(number: int, question: str = "<image>\nWhat is it?", answer: str = "A red square.", **others) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"row-{number}", "image": "a.jpg", "conversations": turns} | others


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    """A folder with a decoder's config and tokenizer, two images (one cut short) and four good rows."""
    folder = tmp_path_factory.mktemp("world")
    write_tokenizer(str(folder / "llm"))
    (folder / "llm" / "config.json").write_text(json.dumps(LLAMA))
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "images" / "a.jpg")
    whole = (folder / "images" / "a.jpg").read_bytes()
    (folder / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "rows.json").write_text(json.dumps([row(number) for number in range(4)]))
    (folder / "empty").mkdir()
    return folder


def train_words(
    world: pathlib.Path, workdir: pathlib.Path, *changes: str, rows: pathlib.Path | None = None
) -> list[str]:
    return [
        "train",
        f"--config={ROOT}/configs/llava_v1_5.py:stage=pretrain",
        f"--workdir={workdir}",
        "--config.model.vision=random:tiny",
        f"--config.model.llm=random:{world}/llm/config.json",
        f"--config.data.annotations={rows or world / 'rows.json'}",
        f"--config.data.images={world}/images",
        "--config.data.workers=0",
        "--config.data.template=v1",
        "--config.data.max_length=400",
        "--config.train.batch_size=2",
        "--config.train.steps=2",
        "--config.train.dtype=float32",
        "--config.train.remat=none",
        *changes,
    ]


def refused(words: list[str], capsys) -> str:
    """The one line that a command line is refused with."""
    assert main.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- what is listed -------------------------------------------------------------------------------------------------


def test_alone_lists_every_command(capsys):
    assert main.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[2:-2]] == [
        f"{name:<22}{command.summary}" for name, command in main.COMMANDS.items()
    ]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    assert f"example:\n  llava-jax {name} " in capsys.readouterr().out


def test_help_imports_no_jax():
    code = "import sys; from llava_jax.cli import main; main.main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "llava_jax", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no command 'trian': did you mean train?\n")


# ---- the config -----------------------------------------------------------------------------------------------------


def test_both_forms_of_a_flag():
    words = ["--config", "f.py:size=7b", "--workdir", "w", "--config.model.feature_layer", "-3", "--config.seed=1"]
    passed, ours = main.split_passed(words, "--config")
    assert passed == ["--config=f.py:size=7b", "--config.model.feature_layer=-3", "--config.seed=1"]
    assert ours == ["--workdir", "w"]


def test_overrides_reach_the_settings():
    words = ["--config.optim.lr=1", "--config.train.epochs=3", "--config.data.shuffle=false", "--config.seed=7"]
    config = train.load_config([*words, f"--config={ROOT}/configs/llava_v1_5.py:stage=pretrain"])
    settings = settings_from_dict(config.to_dict())
    assert (settings.stage, settings.optim.lr, settings.train.epochs) == ("pretrain", 1.0, 3.0)
    assert (settings.data.shuffle, settings.seed) == (False, 7)


def test_config_imports_what_lies_next_to_it(tmp_path):
    (tmp_path / "neighbour.py").write_text("SEED = 5\n")
    text = "import neighbour\nfrom ml_collections import ConfigDict\n\n"
    text += "def get_config():\n    return ConfigDict({'seed': neighbour.SEED})\n"
    (tmp_path / "mine.py").write_text(text)
    before = list(sys.path)
    assert train.load_config([f"--config={tmp_path}/mine.py"]).seed == 5
    assert sys.path == before


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_c]*.py")), ids=lambda path: path.name)
def test_every_config_is_complete(path):
    for stage in ("pretrain", "finetune"):
        config = train.load_config([f"--config={path}:stage={stage}"])
        assert settings_from_dict(config.to_dict()).stage == stage


@pytest.mark.parametrize(
    "words, says",
    [
        (["trian"], "did you mean train?"),
        (["prepare"], "expected one of verify"),
        (["prepare", "verfy"], "did you mean verify?"),
        (["generate", "--modle=x", "--model=x"], "did you mean --model?"),
        (["generate", "--prompt=x"], "--model"),
        (["generate", "--model=x", "--top_p=much", "--prompt=x"], "'much'"),
        (["generate", "--model=x"], "--prompt"),
        (["generate", "--model=x", "--questions=q"], "--images"),
        (["generate", "--model=x", "--prompt=x", "--image=no.jpg"], "no.jpg"),
        (["generate", "--model=x", "--prompt=x", "--top_p=3"], "top_p"),
        (["generate", "--model={empty}", "--prompt=x"], "{empty}"),
        (["generate", "--model={world}/nothing", "--prompt=x"], "nothing"),
        (["generate", "--model=zip:{empty}", "--prompt=x"], "zip"),
        (["chat", "--model={empty}"], "{empty}"),
        (["convert", "--from={empty}", "--to=hf:{world}/out"], "{empty}"),
        (["synthesize", "--contexts=no.jsonl", "--kind=detail", "--output=o"], "no.jsonl"),
        (["synthesize", "--contexts=no.jsonl", "--kind=details", "--output=o"], "'details'"),
        (["evaluate", "exact_match", "--questions=no.jsonl", "--answers=no.jsonl"], "no.jsonl"),
        (["train", "--config=no.py", "--workdir=w"], "no.py"),
        (["train", "--config=llava_v15:size=7b", "--workdir=w"], "did you mean llava_v1_5?"),
        (["train", "--config=configs/tyny.py", "--workdir=w"], "did you mean tiny?"),
        (["configs", "--copy=llava_v15"], "did you mean llava_v1_5?"),
        (["configs", "--to=w"], "--copy=NAME"),
        (["train", "--workdir=w"], "--config"),
        (["prepare", "verify", "--images=i"], "--annotations and --tokenizer and --template"),
        (["train", "--config={broken}", "--workdir=w"], "ZeroDivisionError"),
        (["train", "--config={syntax}", "--workdir=w"], "SyntaxError"),
        (["train", "--config={none}", "--workdir=w"], "NoneType"),
        (["train", "--config={v15}:size=8b", "--workdir=w"], "size is one of 7b, 13b"),
        (["train", "--config={v15}", "--workdir=w", "--config.optim.lrr=1"], "did you mean optim.lr?"),
        (["train", "--config={v15}", "--workdir=w", "--config.optim.lr"], "no value"),
        (["train", "--config={v15}", "--workdir=w", "--config.optim.lr=fast"], "fast"),
        (["train", "--config={v15}", "--workdir=w", "--config.train.steps=1.5"], "1.5"),
        (["train", "--config={v15}", "--workdir=w", "--config.stage=both"], "pretrain, mid, finetune"),
        (["train", "--config={v15}", "--workdir=w", "--confg.seed=1"], "--config"),
    ],
)
def test_bad_command_line(words, says, world, tmp_path, capsys):
    for name, text in {
        "broken": "def get_config():\n    return 1 / 0\n",
        "syntax": "def get_config(:\n",
        "none": "def get_config():\n    pass\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    files = {name: str(tmp_path / f"{name}.py") for name in ("broken", "syntax", "none")}
    places = files | {"world": str(world), "empty": str(world / "empty"), "v15": f"{ROOT}/configs/llava_v1_5.py"}
    assert says.format(**places) in refused([word.format(**places) for word in words], capsys)


# ---- bad data, through the two commands that read it ----------------------------------------------------------------

NO_PICTURE = row(0, image="nowhere.jpg")
UNKNOWN_ROLE = row(0) | {"conversations": [{"from": "user", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yes."}]}
TOO_MANY_MARKS = row(0, question="<image>\n<image>\nWhat is it?")
NO_TARGET_LEFT = row(0, question="<image>\n" + "Why? " * 80)
BAD_ROWS = {
    "missing image": (NO_PICTURE, "nowhere.jpg"),
    "truncated JPEG": (row(0, image="cut.jpg"), "cut.jpg"),
    "unknown role": (UNKNOWN_ROLE, "'user'"),
    "placeholder count": (TOO_MANY_MARKS, "<image>"),
    "no target within max_length": (NO_TARGET_LEFT, "max_length"),
}


def verify_words(world: pathlib.Path, rows: pathlib.Path, *changes: str) -> list[str]:
    words = ["prepare", "verify", f"--annotations={rows}", f"--images={world}/images", f"--tokenizer={world}/llm"]
    return [*words, "--max_length=400", "--patches=16", "--template=v1", *changes]


# An image that is cut short is found when it is read, which takes a compiled step: tests/test_pipeline.py.
@pytest.mark.parametrize("bad, says", [BAD_ROWS[name] for name in BAD_ROWS if name != "truncated JPEG"])
def test_bad_row_stops_training(bad, says, world, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([bad]))
    line = refused(train_words(world, tmp_path / "run", rows=rows), capsys)
    assert says in line and "row-0" in line


@pytest.mark.parametrize("bad, says", BAD_ROWS.values(), ids=BAD_ROWS)
def test_verify_names_the_bad_row_and_keeps_the_others(bad, says, world, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row(1), bad, row(2)]))
    assert main.main(verify_words(world, rows)) == 2
    out, err = capsys.readouterr()
    assert says in out and "row-0" in out and "2 of 3 rows can be trained" in out
    assert err.startswith(f"error: 1 of 3 rows of {rows} cannot be trained: row 1 (id 'row-0'): ") and says in err
    assert err.endswith("; fix or remove them\n") and err.count("\n") == 1


def test_verify_tells_the_first_of_several_bad_rows(world, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row(1), row(2, image="no.jpg"), row(3, answer=" ")]))
    assert main.main(verify_words(world, rows)) == 2
    out, err = capsys.readouterr()
    assert "row-2" in out and "row-3" in out and "row-3" not in err
    assert "2 of 3 rows" in err and "no.jpg" in err and "(the first of them)" in err


def test_verify_of_a_config_checks_what_train_would(world, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row(1), row(2, question="<image>\n" + "Why? " * 30)]))
    words = [word for word in train_words(world, tmp_path / "run", rows=rows) if word.startswith("--config")]
    assert main.main(["prepare", "verify", *words]) == 0
    assert "400 tokens, 16 of them for each image" in capsys.readouterr().out
    assert "row-2" in refused(["prepare", "verify", *words, "--config.data.max_length=200"], capsys)
    assert "nowhere" in refused(["prepare", "verify", *words, "--config.data.images=nowhere"], capsys)
    assert "--patches" in refused(["prepare", "verify", *words, "--patches=4"], capsys)


def test_verify_refuses_what_train_refuses(world, tmp_path, capsys):
    """A decoder with fewer positions than the rows have tokens, one of another vocabulary, a batch that cannot be."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row(1), row(2, answer="Red. " * 40)]))
    words = [word for word in train_words(world, tmp_path / "run", rows=rows) if word.startswith("--config")]

    run = f"--workdir={tmp_path}/run"

    def both(*changes: str) -> str:
        lines = [refused([*command, *words, *changes], capsys) for command in (["prepare", "verify"], ["train", run])]
        assert lines[0] == lines[1]
        return lines[0]

    for name, change in {"short": {"max_position_embeddings": 64}, "other": {"vocab_size": 128}}.items():
        shutil.copytree(world / "llm", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    says = {"short": "64 positions (max_position_embeddings); lower data.max_length", "other": "embedding 128 rows"}
    for name, text in says.items():
        assert text in both(f"--config.model.llm={tmp_path}/{name}")
        assert text in refused(verify_words(world, rows, f"--tokenizer={tmp_path}/{name}"), capsys)
    alone = "--config.data.pack=False"
    assert "expected a multiple of 3" in both(alone, "--config.train.accumulate=3", "--config.train.batch_size=4")
    assert "data.pack_length=64: row 1" in both("--config.data.pack=True", "--config.data.pack_length=64")
    weights = f"--config.data.annotations={rows}:1,{world}/rows.json:1"
    assert "group_by=modality_length orders all" in both(weights, alone, "--config.data.group_by=modality_length")


def test_verify_takes_the_patches_from_a_clip_folder(world, tmp_path, capsys):
    sizes = {"model_type": "clip_vision_model", "image_size": 40, "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    words = [word for word in verify_words(world, world / "rows.json") if not word.startswith("--patches")]
    assert main.main([*words, f"--vision={tmp_path}"]) == 0
    assert "25 of them for each image" in capsys.readouterr().out
    assert "one of them" in refused([*words, f"--vision={tmp_path}", "--patches=25"], capsys)
    assert "--template" in refused([word for word in words if not word.startswith("--template")], capsys)


def test_verify_dumps_what_is_trained(world, tmp_path, capsys):
    dump = tmp_path / "dump.jsonl"
    assert main.main(verify_words(world, world / "rows.json", f"--dump={dump}")) == 0
    assert "4 of 4 rows can be trained" in capsys.readouterr().out
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"row-{number}" for number in range(4)]
    assert lines[0]["text"] == "A red square.</s>" and lines[0]["tokens"].count(-200) == 1


def test_annotations_that_are_not_json(world, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text('[{"id": 1,,')
    assert "rows.json" in refused(verify_words(world, rows), capsys)
    assert "rows.json" in refused(train_words(world, tmp_path / "run", rows=rows), capsys)


def test_unknown_template(world, tmp_path, capsys):
    assert "vicuna_v2" in refused(verify_words(world, world / "rows.json", "--template=vicuna_v2"), capsys)
    words = train_words(world, tmp_path / "run", "--config.data.template=vicuna_v2")
    assert "vicuna_v2" in refused(words, capsys)


def test_model_folder_that_is_none(world, tmp_path, capsys):
    empty = world / "empty"
    assert "empty" in refused(train_words(world, tmp_path / "run", f"--config.model.llm={empty}"), capsys)
    assert "empty" in refused(train_words(world, tmp_path / "run", f"--config.model.vision={empty}"), capsys)
    assert "empty" in refused(verify_words(world, world / "rows.json", f"--tokenizer={empty}"), capsys)


# ---- one run through the commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world) -> pathlib.Path:
    assert main.main(train_words(world, world / "run")) == 0
    return world / "run"


def test_train_writes_its_workdir(trained):
    assert {"checkpoints", "config.json", "metrics.jsonl"} <= set(os.listdir(trained))
    assert [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_config_json_of_a_run_is_a_config(trained, tmp_path, capsys):
    given = f"--config={trained}/config.json"
    settings = train.load_settings([given, "--config.optim.lr=3", "--config.data.template=v0"])
    saved = json.loads((trained / "config.json").read_text())
    saved["optim"]["lr"], saved["data"]["template"] = 3.0, "v0"
    assert dataclasses.asdict(settings) == saved
    assert main.main(["train", given, f"--workdir={trained}"]) == 0
    assert "resuming at step 2" in capsys.readouterr().out
    for words, says in {
        (given, "--config.optim.lrr=1"): "did you mean optim.lr?",
        (given, "--config.train.steps=1.5"): "1.5",
        (f"{given}:stage=pretrain",): "takes no argument",
        (f"--config={tmp_path}/broken.json",): "broken.json",
    }.items():
        (tmp_path / "broken.json").write_text("{")
        assert says in refused(["train", *words, f"--workdir={tmp_path}/run"], capsys)


@pytest.fixture(scope="module")
def exported(trained, world) -> pathlib.Path:
    assert main.main(["convert", f"--from=orbax:{trained}", f"--to=hf:{world}/exported"]) == 0
    return world / "exported"


LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
LIMITED += "from llava_jax.cli.main import main; sys.exit(main(sys.argv[2:]))"


def test_a_full_disk_is_told_in_a_line(tmp_path):
    """A limit on the size of files gives the errors of a full disk. Convert and train: tests/test_forms.py."""
    asked = [{"question_id": number, "text": "no", "answer": "no", "category": "a"} for number in range(9)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    evaluate = ["evaluate", "exact_match", f"--questions={tmp_path}/q.jsonl", f"--answers={tmp_path}/q.jsonl"]
    command = [sys.executable, "-c", LIMITED, "100", *evaluate, f"--json={tmp_path}/f"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    line = f"error: {tmp_path}/f: cannot be written (File too large); make room, run again"
    assert done.returncode == 2 and line in done.stderr, done.stderr


def test_convert_writes_a_hugging_face_folder(exported):
    written = json.loads((exported / "config.json").read_text())
    assert written["architectures"] == ["LlavaForConditionalGeneration"]
    assert written["llava_jax"]["template"] == "v1"


def test_generate_answers_one_question(trained, exported, world, capsys):
    words = ["--image", str(world / "images" / "a.jpg"), "--prompt", "What is it?", "--max_new_tokens", "4"]
    answers = []
    for source in (f"orbax:{trained}", f"hf:{exported}"):
        capsys.readouterr()
        assert main.main(["generate", "--model", source, *words]) == 0
        said, read, answer = capsys.readouterr().out.split("\n\n")
        assert "at most 4 tokens" in said
        facts = dict(re.split(" {2,}", line.strip()) for line in read.splitlines()[1:])
        exif = "apply (images are turned upright)"
        wanted = {"template": "v1", "aspect": "crop", "image position": "front", "exif": exif, "dtype": "float32"}
        assert facts == wanted
        answers.append(answer)
    assert answers[0] == answers[1]


def test_an_assumed_template_is_told(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    del config["llava_jax"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    words = [f"--model={folder}", "--prompt=What?", "--max_new_tokens=4"]
    for more, told in ([], "v1 (assumed)\n"), (["--template=v1"], "v1\n"):
        assert main.main(["generate", *words, *more]) == 0
        assert f"template        {told}" in capsys.readouterr().out.partition("model foreign")[2]


def test_a_prompt_that_the_template_leaves_out_is_told(exported, world, capsys):
    words = [f"--model={exported}", f"--image={world}/images/a.jpg", "--prompt=What?", "--max_new_tokens=4"]
    assert main.main(["generate", *words, "--template=plain"]) == 0
    assert "the prompt is not used" in capsys.readouterr().out
    assert main.main(["generate", *words]) == 0
    assert "the prompt is not used" not in capsys.readouterr().out


def test_generate_answers_a_file(exported, world, tmp_path):
    questions = [{"question_id": number, "image": "a.jpg", "text": f"What is {number}?"} for number in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    words = ["generate", f"--model={exported}", f"--questions={tmp_path}/q.jsonl", f"--images={world}/images"]
    assert main.main([*words, f"--answers={tmp_path}/a.jsonl", "--max_new_tokens=4", "--batch_size=1"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [0, 1, 2]


def test_generate_refuses_a_image_that_is_cut_short(exported, world, capsys):
    words = ["generate", f"--model={exported}", f"--image={world}/images/cut.jpg", "--prompt=What is it?"]
    assert "cut.jpg" in refused(words, capsys)


def test_evaluate_scores_answers(tmp_path, capsys):
    questions = [{"question_id": number, "category": "colour", "answer": "red"} for number in range(2)]
    answers = [{"question_id": number, "text": text} for number, text in enumerate(("Red.", "blue"))]
    for name, rows in (("q", questions), ("a", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--questions={tmp_path}/q.jsonl", f"--answers={tmp_path}/a.jsonl", f"--json={tmp_path}/figures.json"]
    assert main.main(["evaluate", "exact_match", *words]) == 0
    assert "50.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["accuracy"] == 50.0


def test_interruption_is_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(main.COMMANDS, "demo", dataclasses.replace(main.COMMANDS["demo"], run=interrupted))
    assert main.main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
