"""Exact match: what counts as the same answer, figures by category, and files that do not fit."""

import json

import pytest

from llava_jax.evaluate.exact_match import evaluate, normalise, score, table
from llava_jax.types import InputError

QUESTIONS = [
    {"question_id": 1, "text": "What colour?", "answer": "red", "category": "colour"},
    {"question_id": 2, "text": "What colour?", "answer": "Top left", "category": "position"},
    {"question_id": 3, "text": "How many?", "answer": "two", "category": "colour"},
    {"question_id": 4, "text": "How many?", "answer": "three", "category": "colour"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_files_may_begin_with_a_byte_order_mark(tmp_path, questions):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("\ufeff" + json.dumps({"question_id": 1, "text": "red"}) + "\n", encoding="utf-8")
    assert score(questions, str(answers))["right"] == 1


@pytest.fixture
def questions(tmp_path):
    return write(tmp_path / "questions.jsonl", QUESTIONS)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("Red", "red", True),
        (" red.\n", "red", True),
        ("red .", "red", True),
        ("red..", "red", False),
        ("the red", "red", False),
        ("top  left", "top left", False),
        ("U.S.", "u.s.", True),
    ],
)
def test_normalise(one, other, same):
    assert (normalise(one) == normalise(other)) is same


def test_figures_by_category_and_over_all_questions(tmp_path, questions):
    rows = [(3, "two."), (1, "RED"), (2, "bottom left")]
    answers = write(tmp_path / "answers.jsonl", [{"question_id": key, "text": text} for key, text in rows])
    figures = score(questions, answers)
    assert (figures["asked"], figures["right"], figures["missing"]) == (4, 2, 1)
    assert figures["accuracy"] == 50.0
    assert figures["categories"]["colour"] == {"asked": 3, "right": 2, "missing": 1, "accuracy": 200 / 3}
    assert figures["categories"]["position"] == {"asked": 1, "right": 0, "missing": 0, "accuracy": 0.0}


def test_table_shows_every_figure_and_what_is_missing(tmp_path, questions, capsys):
    answers = write(tmp_path / "answers.jsonl", [{"question_id": 1, "text": "red"}])
    figures = evaluate(questions, answers, str(tmp_path / "figures.json"))
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == figures
    assert table({"exact match": figures}) in capsys.readouterr().out
    lines = table({"mine": figures, "yours": {**figures, "missing": 0}}).splitlines()
    assert lines[0].split() == ["mine", "yours", "questions"]
    assert [line.split() for line in lines[2:4]] == [["colour", "33.3", "33.3", "3"], ["position", "0.0", "0.0", "1"]]
    assert lines[5].split() == ["all", "25.0", "25.0", "4"]
    assert lines[6:] == ["mine: 3 questions have no answer and count as wrong"]


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([{"question_id": 9, "text": "red"}], "answers question 9"),
        ([{"question_id": 1, "text": "red"}, {"question_id": 1, "text": "blue"}], "line 2: question 1 is there twice"),
        ([{"question_id": 1, "text": None}], "line 1: text is None"),
        ([{"text": "red"}], "line 1: no question_id"),
        ([], "holds no rows"),
    ],
)
def test_answers_that_do_not_fit(tmp_path, questions, rows, problem):
    with pytest.raises(InputError, match=problem):
        score(questions, write(tmp_path / "answers.jsonl", rows))


def test_questions_without_a_right_answer(tmp_path):
    plain = write(tmp_path / "questions.jsonl", [{"question_id": 1, "text": "What?"}])
    with pytest.raises(InputError, match="questions.jsonl line 1: no answer"):
        score(plain, write(tmp_path / "answers.jsonl", [{"question_id": 1, "text": "red"}]))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n", encoding="utf-8")
    with pytest.raises(InputError, match="broken.jsonl line 1: not JSON"):
        score(str(broken), plain)
