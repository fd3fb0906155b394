"""VizWiz: the file its server takes, and the official accuracy where the people's answers are published."""

from typing import Any

from llava_jax.evaluate import vqav2
from llava_jax.evaluate.answers import REFUSE, Figures, field, match, read_rows
from llava_jax.evaluate.vqa import normalise, people_of
from llava_jax.io import read_json
from llava_jax.types import InputError


def score(annotations_path: str, answers_path: str, missing: str = REFUSE) -> Figures:
    """Return `accuracy` (percent), `count` and `types`; a question's id is its image's name. Raises InputError."""
    people, types = {}, {}
    for entry in read_entries(annotations_path):
        where = f"{annotations_path}: {entry['image']}"
        people[entry["image"]], types[entry["image"]] = people_of(entry, where), field(entry, "answer_type", str, where)
    texts = match(answers_path, people, annotations_path, missing=missing)
    return vqav2.accuracy(people, texts, types)


def submission(questions_path: str | None, answers_path: str) -> list[dict[str, Any]]:
    """Return what the server takes, which wants an answer to every question; without questions, the answers alone.

    Raises InputError.
    """
    path = questions_path or answers_path
    rows = read_rows(path, ())
    texts = match(answers_path, rows, path)
    return [{"image": row.get("image") or key, "answer": normalise(texts[key])} for key, row in rows.items()]


def read_entries(path: str) -> list[dict[str, Any]]:
    """Return the entries of VizWiz's JSON, each with image and question. Raises InputError."""
    entries = read_json(path, "VizWiz's list of questions")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: {type(entries).__name__}, expected VizWiz's list of questions")
    images = set()
    for number, entry in enumerate(entries):
        where = f"{path}: question {number}"
        for name in ("image", "question"):
            field(entry, name, str, where)
        if entry["image"] in images:
            raise InputError(f"{where}: image {entry['image']} is there twice, expected each once")
        images.add(entry["image"])
    return entries
