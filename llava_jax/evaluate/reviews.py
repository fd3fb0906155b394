"""A judge's reviews of a candidate next to a reference, summarised: 100 * mean(candidate) / mean(reference).

A judging without scores is excluded and counted. The published summary averages (-1, -1) in for it; `published` is the
figure by that rule.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llava_jax.evaluate.answers import SCORES, Figures, by_id, read_rows
from llava_jax.evaluate.judge import mean_and_sd
from llava_jax.io import read_lines
from llava_jax.types import InputError

FAILED = (-1.0, -1.0)


class Review(NamedTuple):
    """One judging: scores of reference and candidate, or None where it failed; `repeat` counts judgings of all."""

    question: str
    category: str
    scores: tuple[float, float] | None
    repeat: int = 0


def summarise(reviews: Sequence[Review]) -> Figures:
    """Return `overall` and, by `categories`, relative score, mean scores times ten, and counts.

    With several repeats the relative score is the mean of theirs, next to its standard deviation `sd`.
    """
    categories = sorted({one.category for one in reviews if one.category})
    figures: Figures = {"overall": _group(reviews)}
    figures["categories"] = {name: _group([one for one in reviews if one.category == name]) for name in categories}
    found: dict[str, list[float]] = {}
    for one in reviews:
        if one.scores is not None:
            found.setdefault(one.question, []).append(one.scores[1] / 10)
    return {**figures, SCORES: {question: statistics.fmean(scores) for question, scores in found.items()}}


def read_reviews(path: str, questions_path: str | None = None) -> list[Review]:
    """Return the reviews of a JSONL file, in the layout of LLaVA-Bench (`tuple`) or of the older one (`score`).

    `questions_path` names the categories of reviews that do not. Raises InputError.
    """
    rows = {} if questions_path is None else read_rows(questions_path, ("category",))
    reviews: dict[tuple, Review] = {}
    for where, row in read_lines(path, "a review"):
        question = by_id(row, where)
        if rows and question not in rows:
            raise InputError(f"{where}: question {question} is not in {questions_path}; give the questions reviewed")
        given = row.get("tuple", row.get("score")) if row.get("tuple", 0) is not None else FAILED
        category = row.get("category") or rows.get(question, {}).get("category") or ""
        repeat = row.get("repeat", 0)
        if not _is_pair(given) or not isinstance(repeat, int) or not isinstance(category, str):
            raise InputError(f"{where}: scores {given!r:.60}, expected two numbers in `tuple`, or in `score`")
        key = (question, repeat, row.get("swapped", False))
        if key in reviews:
            raise InputError(f"{where}: question {question} is reviewed twice, expected each once")
        scores = None if min(given) < 0 else (float(given[0]), float(given[1]))
        reviews[key] = Review(question, category, scores, repeat)
    return list(reviews.values())


def _is_pair(given: Any) -> bool:
    return isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(one, int | float) for one in given)


def _group(reviews: Sequence[Review]) -> dict[str, Any]:
    """Return the figures of some reviews."""
    by_repeat: dict[int, list[tuple[float, float]]] = {}
    for one in reviews:
        if one.scores is not None:
            by_repeat.setdefault(one.repeat, []).append(one.scores)
    good = [pair for pairs in by_repeat.values() for pair in pairs]
    relative, sd = mean_and_sd([_relative(pairs) for pairs in by_repeat.values()])
    return {
        "relative": relative,
        "sd": sd,
        "reference": 10 * statistics.fmean(pair[0] for pair in good) if good else None,
        "candidate": 10 * statistics.fmean(pair[1] for pair in good) if good else None,
        "count": len(good),
        "failed": len(reviews) - len(good),
        "published": _relative([one.scores or FAILED for one in reviews]),
    }


def _relative(pairs: Iterable[tuple[float, float]]) -> float | None:
    reference, candidate = (sum(scores) for scores in zip(*pairs, strict=True))
    return 100.0 * candidate / reference if reference else None
