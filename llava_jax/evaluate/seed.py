"""SEED-Bench: multiple choice about images and videos; an answer counts when it is the letter and nothing else."""

from typing import Any

from llava_jax.evaluate.answers import REFUSE, SCORES, Figures, field, groups, match, percent
from llava_jax.io import read_json
from llava_jax.types import InputError

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def score(annotations_path: str, answers_path: str, missing: str = REFUSE) -> Figures:
    """Return `all`, `image` and `video` (percent; None without questions of that kind) and `types`.

    The annotations are SEED-Bench.json. Raises InputError.
    """
    questions, names = read_annotations(annotations_path)
    texts = match(answers_path, questions, annotations_path, missing=missing)
    scores = {key: float(texts.get(key) == entry["answer"]) for key, entry in questions.items()}
    media = groups(scores, {key: entry["data_type"] for key, entry in questions.items()})
    types = groups(scores, {key: names[entry["question_type_id"]] for key, entry in questions.items()})
    return {
        "all": percent(scores.values()),
        "image": media.get("image"),
        "video": media.get("video"),
        "count": len(scores),
        "missing": len(questions) - len(texts),
        "types": types,
        SCORES: scores,
    }


def submission(annotations_path: str, answers_path: str) -> list[dict[str, Any]]:
    """Return the rows that the leaderboard takes. Raises InputError."""
    questions, _ = read_annotations(annotations_path)
    texts = match(answers_path, questions, annotations_path)
    return [{"question_id": entry["question_id"], "prediction": texts[key]} for key, entry in questions.items()]


def read_annotations(path: str) -> tuple[dict[Any, dict[str, Any]], dict[int, str]]:
    """Return (entries by question_id, names of the question types by their number). Raises InputError."""
    content = read_json(path, "SEED-Bench.json")
    names = {number: name for name, number in field(content, "question_type", dict, path).items()}
    questions: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(field(content, "questions", list, path)):
        where = f"{path}: question {number}"
        key = str(field(entry, "question_id", str | int, where))
        for name in ("question", "data_id", *CHOICES, "answer"):
            field(entry, name, str | int if name in ("data_id", *CHOICES) else str, where)
        if entry.get("data_type") not in ("image", "video") or entry.get("question_type_id") not in names:
            kind = f"data_type {entry.get('data_type')!r}, question_type_id {entry.get('question_type_id')!r}"
            raise InputError(f"{where}: {kind}; expected those of SEED-Bench 1")
        if key in questions:
            raise InputError(f"{where}: question {key} is there twice, expected each once")
        questions[key] = entry
    if not questions:
        raise InputError(f"{path}: questions is empty, expected at least one")
    return questions, names
