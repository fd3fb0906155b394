"""MME: two questions to each image, answered yes or no; a category's score is accuracy plus accuracy of both."""

from typing import Any

from llava_jax.evaluate.answers import (
    REFUSE,
    SCORES,
    Figures,
    by_id,
    by_prompt,
    by_text,
    match,
    percent,
    read_rows,
)
from llava_jax.types import InputError

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def score(questions_path: str, answers_path: str, missing: str = REFUSE) -> Figures:
    """Score an answers file on the questions that `prepare mme` writes, which hold the right answers.

    Returns `perception` (at most 2000) and `cognition` (at most 800), and for each category `accuracy`,
    `accuracy_plus` (both questions of an image right) and their sum, `score`. Raises InputError.
    """
    questions = read_rows(questions_path, ("image", "text", "category", "answer"), by_text)
    by_ids = {str(row["question_id"]): row for row in questions.values()}
    plain = len(by_ids) == len(questions)
    if plain:  # each question has an id of its own: prompts need not agree
        questions = by_ids
    texts = match(answers_path, questions, questions_path, missing=missing, key=by_id if plain else by_prompt)
    images: dict[str, dict[str, list[float]]] = {}
    scores = {}
    for key, row in questions.items():
        scores[key] = float(key in texts and verdict(texts[key]) == row["answer"].strip().lower())
        images.setdefault(row["category"], {}).setdefault(row["image"], []).append(scores[key])
    categories = {name: _category(name, found, questions_path) for name, found in images.items()}
    total = {
        kind: sum(categories[name]["score"] for name in names if name in categories)
        for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {
        **total,
        "count": len(questions),
        "missing": len(questions) - len(texts),
        "categories": categories,
        SCORES: scores,
    }


def verdict(text: str) -> str:
    """Return yes or no where it stands among the first four letters of an answer, `other` for another."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def _category(name: str, images: dict[str, list[float]], path: str) -> dict[str, Any]:
    if name not in PERCEPTION + COGNITION:
        raise InputError(f"{path}: no category {name!r} in MME; expected {', '.join(PERCEPTION + COGNITION)}")
    for image, scores in images.items():
        if len(scores) != 2:
            raise InputError(f"{path}: {len(scores)} questions about {image}, expected two to each image of MME")
    accuracy = percent([score for scores in images.values() for score in scores])
    plus = percent([min(scores) for scores in images.values()])
    return {"accuracy": accuracy, "accuracy_plus": plus, "score": accuracy + plus}
