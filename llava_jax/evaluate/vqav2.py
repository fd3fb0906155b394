"""VQAv2: the file its server takes, and the official accuracy where the people's answers are published."""

from typing import Any

from llava_jax.evaluate.answers import REFUSE, SCORES, WRONG, Figures, field, groups, match, percent, read_rows
from llava_jax.evaluate.vqa import normalise, official, people_of
from llava_jax.io import read_json
from llava_jax.types import InputError


def score(annotations_path: str, answers_path: str, missing: str = REFUSE) -> Figures:
    """Return `accuracy` (percent), `count` and `types` (yes/no, number, other). Raises InputError."""
    people, types = {}, {}
    for number, entry in enumerate(read_list(annotations_path, "annotations")):
        where = f"{annotations_path}: annotation {number}"
        key = str(field(entry, "question_id", int, where))
        if key in people:
            raise InputError(f"{where}: question {key} is there twice, expected each once")
        people[key], types[key] = people_of(entry, where), field(entry, "answer_type", str, where)
    texts = match(answers_path, people, annotations_path, missing=missing)
    return accuracy(people, texts, types)


def accuracy(people: dict[str, list[str]], texts: dict[str, str], types: dict[str, str]) -> Figures:
    """Return the figures of answers by question, given those of the people and the type of each question."""
    scores = {key: official(normalise(texts[key]), people[key]) if key in texts else 0.0 for key in people}
    figures = {"accuracy": percent(scores.values()), "count": len(scores), "missing": len(people) - len(texts)}
    return {**figures, "types": groups(scores, types), SCORES: scores}


def submission(questions_path: str | None, answers_path: str) -> tuple[list[dict[str, Any]], int]:
    """Return (what the server takes, how many of its answers are empty because there is none).

    Questions are those of the whole split, as `prepare vqav2` writes them; without them it has the answers alone.
    Raises InputError.
    """
    path = questions_path or answers_path
    rows = read_rows(path, ())
    texts = match(answers_path, rows, path, missing=WRONG)
    found = [
        {"question_id": row["question_id"], "answer": normalise(texts[key]) if key in texts else ""}
        for key, row in rows.items()
    ]
    return found, len(rows) - len(texts)


def read_list(path: str, name: str) -> list[Any]:
    """Return the list that a JSON file holds under a name. Raises InputError."""
    found = field(read_json(path, f"an object with {name}"), name, list, path)
    if not found:
        raise InputError(f"{path}: {name} is empty, expected at least one")
    return found
