"""Exact match of short answers: the share of questions whose answer is the right one, over all and by category."""

from collections.abc import Mapping
from typing import Any

from llava_jax.evaluate.answers import SCORES, WRONG, aligned, match, read_rows
from llava_jax.io import write_json


def normalise(text: str) -> str:
    """Return the answer as it is compared: case, surrounding space and one final full stop do not count."""
    return text.strip().removesuffix(".").rstrip().casefold()


def score(questions_path: str, answers_path: str) -> dict[str, Any]:
    """Score an answers file against the questions it answers.

    Questions are JSONL with question_id, answer and category; answers are JSONL with question_id and text. A question
    without an answer counts as wrong. Returns `asked`, `right`, `missing` (counts), `accuracy` (percent),
    `categories`, which holds the same figures for each category, and `scores`. Raises InputError.
    """
    questions = read_rows(questions_path, ("answer", "category"))
    answers = match(answers_path, questions, questions_path, missing=WRONG)
    categories: dict[str, dict[str, Any]] = {}
    scores = {}
    for key, question in questions.items():
        scores[key] = float(key in answers and normalise(answers[key]) == normalise(question["answer"]))
        figures = categories.setdefault(question["category"], {"asked": 0, "right": 0, "missing": 0})
        figures["asked"] += 1
        if key not in answers:
            figures["missing"] += 1
        figures["right"] += int(scores[key])
    total = {name: sum(figures[name] for figures in categories.values()) for name in ("asked", "right", "missing")}
    shares = {name: _with_accuracy(item) for name, item in categories.items()}
    return {**_with_accuracy(total), "categories": shares, SCORES: scores}


def evaluate(questions_path: str, answers_path: str, json_path: str | None = None) -> dict[str, Any]:
    """Score, print the table, write the figures to `json_path` when it is given, and return them."""
    figures = score(questions_path, answers_path)
    print(table({"exact match": figures}))
    if json_path is not None:
        write_json(json_path, figures)
    return figures


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one or several results of `score` on the same questions as text: a line a category, a column a result."""
    first = next(iter(results.values()))
    rows = [("", *results, "questions")]
    for name in first["categories"]:
        cells = [f"{result['categories'][name]['accuracy']:.1f}" for result in results.values()]
        rows.append((name, *cells, str(first["categories"][name]["asked"])))
    rows.append(("all", *(f"{result['accuracy']:.1f}" for result in results.values()), str(first["asked"])))
    head, *lines, total = aligned(rows).split("\n")
    rule = "-" * len(head)
    lines = [head, rule, *lines, rule, total]
    for name, result in results.items():
        if result["missing"]:
            lines.append(f"{name}: {result['missing']} questions have no answer and count as wrong")
    return "\n".join(lines)


def _with_accuracy(figures: dict[str, int]) -> dict[str, Any]:
    return {**figures, "accuracy": 100.0 * figures["right"] / figures["asked"]}
