"""GQA: the share of answers that are the annotated word, over all questions, binary ones and open ones."""

from typing import Any

from llava_jax.evaluate.answers import REFUSE, SCORES, Figures, field, groups, match, percent, read_rows
from llava_jax.io import read_json
from llava_jax.types import InputError


def score(questions_path: str, answers_path: str, missing: str = REFUSE) -> Figures:
    """Return `accuracy` (percent), `count` and `types`.

    Questions are GQA's own JSON, or the JSONL that `prepare gqa` writes. Raises InputError.
    """
    questions = read_questions(questions_path)
    texts = match(answers_path, questions, questions_path, missing=missing)
    scores = {key: float(normalise(texts.get(key, "")) == entry["answer"]) for key, entry in questions.items()}
    kinds = {key: entry["category"] for key, entry in questions.items()}
    lost = len(questions) - len(texts)
    types = groups(scores, kinds)
    return {"accuracy": percent(scores.values()), "count": len(scores), "missing": lost, "types": types, SCORES: scores}


def read_questions(path: str) -> dict[str, dict[str, Any]]:
    """Return question, image, answer and category (binary or open) by id. Raises InputError."""
    if path.endswith(".jsonl"):
        return read_rows(path, ("answer", "category"))
    found = read_json(path, "GQA's questions by id")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: expected GQA's questions by id, or JSON Lines in a file named .jsonl")
    return {key: _question(entry, f"{path}: question {key}") for key, entry in found.items()}


def normalise(text: str) -> str:
    """Return an answer as it is compared."""
    return text.rstrip(".").lower()


def _question(entry: Any, where: str) -> dict[str, Any]:
    kind = field(entry, "types", dict, where).get("structural")
    return {
        "question": field(entry, "question", str, where),
        "image": f"{field(entry, 'imageId', str, where)}.jpg",
        "answer": field(entry, "answer", str, where),
        "category": "open" if kind == "query" else "binary",
    }
