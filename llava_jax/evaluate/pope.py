"""POPE: does the model see objects that are not there? Yes or no, in three splits of rising difficulty."""

import os
import re
from typing import Any

from llava_jax.evaluate.answers import REFUSE, SCORES, Figures, field, match, read_rows
from llava_jax.io import read_lines
from llava_jax.types import InputError

NAME = re.compile(r"coco_pope_(\w+)\.json")
NO = ("No", "not", "no")


def score(annotations_folder: str, questions_path: str, answers_path: str, missing: str = REFUSE) -> Figures:
    """Score an answers file.

    The annotations are POPE's coco_pope_SPLIT.json; the questions of a split (their `category`) stand in the order of
    its file. Returns for each split `accuracy`, `precision`, `recall`, `f1` and `yes_ratio`, and `mean_f1`, all as
    shares; a precision or F1 without a single yes is 0. A missing answer that counts as wrong is the opposite of the
    right one. Raises InputError.
    """
    questions = read_rows(questions_path, ("category", "text"))
    labels = {split: read_labels(path) for split, path in split_files(annotations_folder).items()}
    asked: dict[str, list[str]] = {split: [] for split in labels}
    for key, row in questions.items():
        if row["category"] not in asked:
            raise InputError(
                f"{questions_path}: question {key} has category {row['category']!r}, for which {annotations_folder} "
                "has no file; expected questions and annotations of one release"
            )
        asked[row["category"]].append(key)
    texts = match(answers_path, questions, questions_path, missing=missing)
    figures: Figures = {}
    scores: dict[Any, float] = {}
    for split, keys in asked.items():
        _check_same(split, [questions[key] for key in keys], labels[split], annotations_folder)
        right = [label["label"] == "yes" for label in labels[split]]
        said = [says_yes(texts[key]) if key in texts else not yes for key, yes in zip(keys, right, strict=True)]
        figures[split] = _figures(said, right)
        scores |= {key: float(one == yes) for key, one, yes in zip(keys, said, right, strict=True)}
    mean = sum(one["f1"] for one in figures.values()) / len(figures)
    return {**figures, "mean_f1": mean, "missing": len(questions) - len(texts), SCORES: scores}


def says_yes(text: str) -> bool:
    """Return whether an answer counts as yes: its first sentence has none of the words No, not, no."""
    return not set(text.split(".")[0].replace(",", "").split(" ")) & set(NO)


def split_files(folder: str) -> dict[str, str]:
    """Return the annotation file of each split. Raises InputError where the folder has none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = {name[1]: os.path.join(folder, name[0]) for name in map(NAME.fullmatch, names) if name}
    if not found:
        raise InputError(f"{folder}: no coco_pope_SPLIT.json in it; give the folder of POPE's annotations")
    return found


def read_labels(path: str) -> list[dict[str, Any]]:
    """Return the rows of a split, each with image, text and label. Raises InputError."""
    rows = []
    for where, row in read_lines(path, "an object with image, text, label"):
        for name in ("image", "text", "label"):
            field(row, name, str, where)
        if row["label"] not in ("yes", "no"):
            raise InputError(f"{where}: label is {row['label']!r}, expected yes or no")
        rows.append(row)
    return rows


def _check_same(split: str, questions: list[dict[str, Any]], labels: list[dict[str, Any]], folder: str) -> None:
    """Raise InputError where the questions of a split are not those of its annotations."""
    if len(questions) != len(labels):
        raise InputError(
            f"{folder}: {len(labels)} annotations of split {split} and {len(questions)} questions; expected those of "
            "one release"
        )
    for question, label in zip(questions, labels, strict=True):
        if not question["text"].startswith(label["text"]) or question.get("image") != label["image"]:
            raise InputError(
                f"{folder}: split {split} has {label['text']!r} about {label['image']} where question "
                f"{question['question_id']} has {question['text']!r:.60} about {question.get('image')}; expected "
                "questions and annotations of one release"
            )


def _figures(said: list[bool], right: list[bool]) -> dict[str, float]:
    both = sum(one and yes for one, yes in zip(said, right, strict=True))
    return {
        "accuracy": sum(one == yes for one, yes in zip(said, right, strict=True)) / len(right),
        "precision": both / max(sum(said), 1),
        "recall": both / max(sum(right), 1),
        "f1": 2 * both / max(sum(said) + sum(right), 1),
        "yes_ratio": sum(said) / len(said),
    }
