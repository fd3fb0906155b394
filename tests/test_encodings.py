"""Text that is no Unicode at each entrance, and terminals that cannot show all of it."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from llava_jax.cli.main import main
from llava_jax.evaluate.exact_match import score
from llava_jax.infer.chat import chat
from llava_jax.prepare.captions import read_captions
from llava_jax.prepare.scienceqa import convert
from llava_jax.synthesize.context import open_contexts
from llava_jax.types import InputError, Sampling

ROOT = pathlib.Path(__file__).parent.parent
CUT = "a\ud83d"  # an emoji cut in two
PROBLEM = {
    "question": "Which?",
    "hint": "",
    "lecture": "",
    "solution": "",
    "choices": ["a", "b"],
    "answer": 0,
    "image": None,
}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "changes", [{"question": CUT}, {"hint": CUT}, {"solution": CUT}, {"choices": [CUT, "b"]}, {"image": CUT}]
)
def test_a_scienceqa_problem_with_half_a_character_is_named(changes, tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM | changes}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"]}))
    with pytest.raises(InputError, match="problem '7'.*lone surrogate"):
        convert(str(tmp_path), "train", "QCM-LEA")


def test_a_scienceqa_id_with_half_a_character_is_named(tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps({CUT: PROBLEM}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": [CUT]}))
    with pytest.raises(InputError, match="lone surrogate"):
        convert(str(tmp_path), "train", "QCM-LEA")


@pytest.mark.parametrize(
    "question, answer",
    [
        ({"category": CUT}, {}),
        ({"answer": CUT}, {}),
        ({}, {"text": CUT}),
        ({"question_id": CUT}, {"question_id": CUT}),
    ],
)
def test_evaluate_names_the_line(question, answer, tmp_path):
    asked = {"question_id": 1, "answer": "red", "category": "colour"} | question
    questions = lines(tmp_path / "q.jsonl", asked)
    with pytest.raises(InputError, match=r"jsonl line 1: .*lone surrogate"):
        score(questions, lines(tmp_path / "a.jsonl", {"question_id": 1, "text": "red"} | answer))


class Asked:
    """A model that checks its messages as any other does, and answers Yes."""

    def prompt(self, messages):
        from llava_jax.api import read_messages

        return read_messages(messages)

    def stream(self, messages, **sampling):
        self.prompt(messages)
        yield "Yes."


def test_chat_forgets_what_is_no_text_and_continues():
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe bad\nIs it?\n/quit\n"), "utf-8", errors="surrogateescape")
    output = io.StringIO()
    chat(Asked(), (), typed, output, Sampling())
    assert "byte 0xFF" in output.getvalue() and output.getvalue().count("Yes.") == 1


def test_the_lines_typed_are_never_an_error_of_python(monkeypatch, capsys):
    """`main` reads stdin byte by byte as it comes: what is no UTF-8 is told by the command."""
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdin", typed)
    assert main([]) == 0
    assert sys.stdin.readline() == "\udcff\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_letter_still_gets_the_report(encoding, tmp_path):
    rows = [{"image": f"猫-{number}.jpg", "caption": ""} for number in range(3)] + [{"image": "a.jpg", "caption": "猫"}]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    words = ["prepare", "captions", f"--captions={tmp_path}/c.json", f"--output={tmp_path}/猫.json"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", "llava_jax", *words], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\\u732b") == 5
    words[-1] = f"--output={tmp_path}/猫/none.json"
    done = subprocess.run([sys.executable, "-m", "llava_jax", *words], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 2 and b"\\u732b" in done.stderr and done.stderr.startswith(b"error: ")


# ---- white space in captions ----------------------------------------------------------------------------------------


def test_a_caption_is_one_line(tmp_path):
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}],
        "annotations": [
            {"id": 11, "image_id": 1, "caption": "A cat\nsits."},
            {"id": 12, "image_id": 1, "caption": "Two\r\n cats.\n"},
        ],
    }
    boxes = coco | {"categories": [{"id": 1, "name": "cat"}]}
    boxes["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}]
    (tmp_path / "captions_t.json").write_text(json.dumps(coco))
    (tmp_path / "instances_t.json").write_text(json.dumps(boxes))
    (context,) = list(open_contexts(str(tmp_path)))
    assert context.captions == ("A cat sits.", "Two cats.")
    row = {"id": 1, "image": "a.jpg", "captions": ["A cat\nsits.", "\n", "Two\u2028cats."]}
    (context,) = list(open_contexts(lines(tmp_path / "c.jsonl", row)))
    assert context.captions == ("A cat sits.", "Two cats.")
    captions = read_captions(str(tmp_path / "captions_t.json"), [])
    assert [caption.text for caption in captions] == ["A cat sits.", "Two cats."]
