"""TextVQA's validation split (0.5.1): the share of ten people who read the same, with and without OCR tokens."""

from typing import Any

from llava_jax.evaluate.answers import REFUSE, SCORES, Figures, by_id, field, match, percent, with_text
from llava_jax.evaluate.prompts import SHORT_ANSWER
from llava_jax.evaluate.vqa import agreement, normalise, people_of
from llava_jax.evaluate.vqav2 import read_list
from llava_jax.types import InputError

OCR = "\nReference OCR token:"


def score(annotations_path: str, answers_path: str, missing: str = REFUSE) -> Figures:
    """Return `accuracy` (percent) and `count`. Raises InputError."""
    annotations = read_annotations(annotations_path)
    texts = match(answers_path, annotations, annotations_path, missing=missing, key=_key)
    scores = {}
    for key, entry in annotations.items():
        people = [normalise(answer) for answer in people_of(entry, f"{annotations_path}: question {key}")]
        scores[key] = agreement(normalise(texts[key]), people) if key in texts else 0.0
    lost = len(annotations) - len(texts)
    return {"accuracy": percent(scores.values()), "count": len(scores), "missing": lost, SCORES: scores}


def read_annotations(path: str) -> dict[str, dict[str, Any]]:
    """Return the entries of TextVQA_0.5.1_val.json by (image_id, question in small letters). Raises InputError."""
    entries: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(read_list(path, "data")):
        where = f"{path}: question {number}"
        key = with_text(field(entry, "image_id", str, where), field(entry, "question", str, where).lower().strip())
        if key in entries:
            raise InputError(f"{where}: question {key} is there twice, expected each once")
        entries[key] = entry
    return entries


def question_of(prompt: str) -> str:
    """Return the question in a prompt, without OCR tokens and the line that asks for a short answer."""
    return prompt.removesuffix(SHORT_ANSWER).strip().partition(OCR)[0].strip()


def _key(row: Any, where: str) -> str:
    """Return the key of an answer, by its prompt: the questions about one image share their id."""
    question = question_of(field(row, "prompt", str, where)).lower()
    if not question:
        raise InputError(f"{where}: prompt is {row['prompt']!r:.60}, expected the question and what was asked with it")
    return with_text(by_id(row, where), question)
