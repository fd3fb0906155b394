"""ScienceQA: accuracy in the paper's columns, alone and in its two ensembles with a language-only model.

An answer is read as the published scorer reads it. Where that draws a choice at random, in an ensemble for an answer of
ours that names no letter, `correct` counts it as wrong and `expected` as one of its choices.
"""

import re
from collections.abc import Mapping
from typing import Any

from llava_jax.evaluate.answers import REFUSE, SCORES, Figures, field, match, percent
from llava_jax.evaluate.prompts import LETTERS
from llava_jax.io import check_unicode, read_json
from llava_jax.settings import nearest
from llava_jax.types import InputError

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
# Of an answer in words; any character may follow the letter, as in the published scorer.
SENTENCE = re.compile(r"The answer is ([A-Z]).")
Problem = dict[str, Any]


def score(
    problems_path: str,
    splits_path: str,
    split: str,
    answers_path: str,
    missing: str = REFUSE,
    *,
    gpt4_path: str | None = None,
    requery_path: str | None = None,
) -> Figures:
    """Score an answers file on a split.

    Args:
      problems_path, splits_path: problems.json and pid_splits.json.
      split: test, val, …
      answers_path: JSONL with question_id and text.
      missing: "refuse" or "wrong", see `match`.
      gpt4_path: JSON whose `outputs` are the language-only model's texts by id; gives `complement`.
      requery_path: JSONL of its answers when it was shown both; gives `judge`, which needs gpt4_path.

    Returns `correct`, `count`, `columns` (percent), `unread` (answers that name no letter), `missing`; each ensemble
    has the same columns. Raises InputError.
    """
    problems = dict(load_split(splits_path, problems_path, split))
    for name, problem in problems.items():
        _check_columns(name, problem)
    splits = read_json(splits_path, "ScienceQA's lists of ids by split")
    others = {str(key): f"it is of split {other}" for other, keys in splits.items() for key in keys}
    texts = match(answers_path, problems, f"split {split}", missing=missing, elsewhere=others)
    letters = {name: letter(texts[name]) for name in problems if name in texts}
    read = {name: choice(letters.get(name), problem) for name, problem in problems.items()}
    figures = {
        **_figures(problems, read),
        "unread": sum(one is None for one in letters.values()),
        "missing": len(problems) - len(texts),
    }
    if requery_path and not gpt4_path:
        raise InputError(f"--requery={requery_path}: needs --gpt4=FILE next to it, the answers before the requery")
    if gpt4_path:
        gpt4 = _outputs(gpt4_path, problems)
        figures["complement"] = _ensemble(problems, read, gpt4)
        if requery_path:
            again = match(requery_path, problems, f"split {split}", missing="wrong")
            figures["judge"] = _ensemble(problems, read, {name: letter(text) for name, text in again.items()})
        upper = sum(
            problem["answer"] in (read[name], choice(gpt4[name], problem)) for name, problem in problems.items()
        )
        figures["upper_bound"] = 100.0 * upper / len(problems)
    figures[SCORES] = {name: float(read[name] == problem["answer"]) for name, problem in problems.items()}
    return figures


def letter(text: str) -> str | None:
    """Return the letter that an answer names: it alone, `B. …`, or `The answer is B.` said once; None for another."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def choice(named: str | None, problem: Problem) -> int | None:
    """Return the index of the choice with that letter, None where there is none."""
    given = LETTERS[: len(problem["choices"])]
    return given.index(named) if named and named in given else None


def columns(problems: Mapping[str, Problem], scores: Mapping[str, float]) -> dict[str, float]:
    """Return the percentage in each column of the paper: subject, context (text, image, none), grade, all."""
    found: dict[str, list[float]] = {name: [] for name in (*SUBJECTS.values(), "TXT", "IMG", "NO", "G1-6", "G7-12")}
    for name, problem in problems.items():
        text, image = bool(problem["hint"]), bool(problem.get("image"))
        of = [SUBJECTS[problem["subject"]], "G1-6" if _grade(problem) <= 6 else "G7-12"]
        of += ["TXT"] * text + ["IMG"] * image + ["NO"] * (not text and not image)
        for column in of:
            found[column].append(scores[name])
    return {**{column: percent(found[column]) for column in found}, "Avg": percent(scores.values())}


def _figures(problems: Mapping[str, Problem], read: Mapping[str, int | None]) -> Figures:
    scores = {name: float(read[name] == problem["answer"]) for name, problem in problems.items()}
    return {"correct": int(sum(scores.values())), "count": len(scores), "columns": columns(problems, scores)}


def _ensemble(
    problems: Mapping[str, Problem], ours: Mapping[str, int | None], theirs: Mapping[str, str | None]
) -> Figures:
    """Return the figures of the other model's answers, and of ours where it names no letter or was not asked."""
    taken = {
        name: ours[name] if theirs.get(name) is None else choice(theirs[name], problem)
        for name, problem in problems.items()
    }
    figures = _figures(problems, taken)
    drawn = sum(1 / len(problems[name]["choices"]) for name, one in taken.items() if one is None)
    return {**figures, "expected": figures["correct"] + drawn, "ours": sum(theirs.get(n) is None for n in problems)}


def _outputs(path: str, problems: Mapping[str, Problem]) -> dict[str, str | None]:
    outputs = field(read_json(path, "an object whose outputs are texts by id"), "outputs", dict, path)
    lost = [name for name in problems if not isinstance(outputs.get(name), str)]
    if lost:
        raise InputError(f"{path}: outputs has no text for {len(lost)} problems, the first {lost[0]}; expected all")
    return {name: letter(outputs[name]) for name in problems}


def _grade(problem: Problem) -> int:
    return int(problem["grade"].removeprefix("grade"))


def _check_columns(name: str, problem: Problem) -> None:
    subject, grade = problem.get("subject"), str(problem.get("grade"))
    if subject not in SUBJECTS or not grade.removeprefix("grade").isdecimal():
        raise InputError(f"problem {name!r}: subject {subject!r}, grade {grade!r}; expected those of ScienceQA")


# ---- its files, which `prepare scienceqa` reads as well --------------------------------------------------------------


def load_split(lists: str, by_id: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (id, entry) of the problems that pid_splits.json names under `split`: train, val, test, minival, …"""
    splits = read_json(lists, "ScienceQA's lists of ids by split")
    problems = read_json(by_id, "ScienceQA's problems by id")
    for path, content in ((lists, splits), (by_id, problems)):
        if not isinstance(content, dict):
            raise InputError(f"{path}: a {type(content).__name__}, expected a JSON object")
    if split not in splits:
        raise InputError(f"--split={split}: not in {lists}{nearest(split, (*splits,))}")
    if not isinstance(splits[split], list) or not all(isinstance(name, str) for name in splits[split]):
        raise InputError(f"{lists}: {split} is {splits[split]!r:.60}, expected a list of ids")
    missing = [name for name in splits[split] if name not in problems]
    if missing:
        raise InputError(
            f"{by_id}: {len(missing)} ids of split {split} are not in problems.json, the first {missing[0]!r}: "
            "expected both files of one release"
        )
    for name in splits[split]:
        check_problem(name, problems[name])
    return [(name, problems[name]) for name in splits[split]]


def check_problem(name: str, given: Any) -> None:
    """Raise InputError for an entry of problems.json, naming it and the field that is wrong."""
    where = f"problem {name!r}"
    if not isinstance(given, dict):
        raise InputError(f"{where}: a {type(given).__name__}, expected an object")
    texts = ("question", "hint", "lecture", "solution")
    for key in texts:
        if not isinstance(given.get(key), str):
            raise InputError(f"{where}: {key} is {given.get(key)!r}, expected text")
    choices, answer, image = given.get("choices"), given.get("answer"), given.get("image")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{where}: choices is {choices!r}, expected a list of texts")
    if len(choices) > len(LETTERS):
        raise InputError(f"{where}: {len(choices)} choices, expected at most {len(LETTERS)} ({LETTERS})")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(f"{where}: answer is {answer!r}, expected the index of one of {len(choices)} choices")
    if image is not None and not isinstance(image, str):
        raise InputError(f"{where}: image is {image!r}, expected a file name or nothing")
    for text in (name, *(given[key] for key in texts), *choices, image or ""):
        check_unicode(text, where)
