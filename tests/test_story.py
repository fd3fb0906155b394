"""The demo's story: its commands are ones the command line takes, what is done is not done again, the end is told."""

import json
import pathlib

import pytest

from llava_jax.cli import main, train
from llava_jax.cli.flags import Parser
from llava_jax.demo import story
from llava_jax.io import read_lines
from llava_jax.settings import settings_from_dict
from llava_jax.types import InputError

SIZES = story.Sizes(
    vision="random:tiny",
    llm="random:tiny",
    train_scenes=30,
    held_out_scenes=30,
    detail_rows=10,
    reasoning_rows=10,
)


def parse(name, words):
    """The flags of one of our commands, as the command line reads them."""
    command = main.COMMANDS[name]
    parser = Parser(name, command.summary, command.example)
    command.add_flags(parser)
    passed, ours = main.split_passed(words, command.passes) if command.passes else ([], words)
    args = parser.parse(ours)
    args.passed = passed
    return args


class Quick(story.Story):
    """The story on real data with trainings and answers made up: both stages answer right, the others nothing."""

    def __init__(self, workdir, sizes=SIZES, stop_at=None):
        super().__init__(workdir, sizes)
        self.commands, self.stop_at = [], stop_at

    def command(self, name, *words):
        args = parse(name, words)
        if name == "synthesize":
            assert main.COMMANDS[name].run(args) == 0
            return
        self.commands.append((name, args))
        if len(self.commands) - 1 == self.stop_at:
            raise InputError("stopped")
        if name == "train":
            folder = pathlib.Path(args.workdir)
            folder.mkdir()
            rows = [json.dumps({"step": step, "loss": 3.0 - step}) + "\n" for step in range(3)]
            (folder / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
        else:
            lines = []
            for _, row in read_lines(args.questions, "questions"):
                right = row["question_id"].startswith(("both_stages/", "read_as_text/"))
                answer = {"question_id": row["question_id"], "text": row["answer"] if right else "?"}
                lines.append(json.dumps(answer) + "\n")
            pathlib.Path(args.answers).write_text("".join(lines), encoding="utf-8")


def test_the_whole_story(tmp_path, capsys):
    played = Quick(str(tmp_path / "run"))
    content = story.play(played)
    assert [name for name, _ in played.commands] == ["train"] * 3 + ["generate"] * 3
    assert content == json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert [goal["met"] for goal in content["goals"]] == [True] * 5
    assert content["data"] == {
        "train_scenes": 30,
        "held_out_scenes": 30,
        "caption_rows": 150,
        "instruction_rows": 50,
    }
    screen = capsys.readouterr().out
    for told in ("[1/8]", "[8/8]", "both stages  shuffled", "report.html", content["chat"]):
        assert told in screen
    assert "100.0" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    # What was told as a command has to work as one.
    chat = content["chat"].split(" -m llava_jax chat ")[1]
    assert [pathlib.Path(path).is_file() for path in parse("chat", chat.split()).image] == [True]


def test_the_trainings_are_the_two_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    played = Quick(str(tmp_path / "run"))
    story.play(played)
    pretrain, finetune, without = (
        settings_from_dict(train.load_config(args.passed).to_dict())
        for name, args in played.commands
        if name == "train"
    )
    assert (pretrain.stage, pretrain.data.template, pretrain.init.projector) == ("pretrain", "plain", "")
    assert (finetune.stage, finetune.data.template) == ("finetune", "")  # its decoder has no template of its own: v1
    assert finetune.init.projector == "run/pretrain"
    assert without == settings_from_dict(
        {**json.loads(json.dumps(finetune, default=vars)), "init": {"model": "", "projector": ""}}
    )
    assert len({settings.model for settings in (pretrain, finetune, without)}) == 1


def test_a_stopped_demo_goes_on_where_it_was(tmp_path, capsys):
    folder = str(tmp_path / "run")
    with pytest.raises(InputError, match="stopped"):
        story.play(Quick(folder, stop_at=1))
    capsys.readouterr()
    again = Quick(folder)
    story.play(again)
    assert len(again.commands) == 5  # the first training was done
    assert "[3/8] stage 1, pretrain: done before" in capsys.readouterr().out
    last = Quick(folder)
    story.play(last)
    assert last.commands == []
    assert capsys.readouterr().out.count("done before") == 8


def test_a_workdir_of_something_else_is_refused(tmp_path):
    story.play(Quick(str(tmp_path / "run")))
    with pytest.raises(InputError, match="holds a demo of other sizes"):
        Quick(str(tmp_path / "run"), story.Sizes(vision="random:tiny", llm="random:tiny"))
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="holds no demo"):
        Quick(str(tmp_path))


def test_backbones_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="nowhere.*backbone is not there"):
        Quick(str(tmp_path), story.Sizes(vision=str(tmp_path / "nowhere"), llm="random:tiny"))


def test_a_command_that_fails_ends_the_story(tmp_path, capfd):
    with pytest.raises(InputError, match="`llava-jax prepare` ended with exit code 2"):
        story.Story(str(tmp_path), SIZES).command("prepare", "nothing")
    assert "'nothing'" in capfd.readouterr().err
