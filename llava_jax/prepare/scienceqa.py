"""ScienceQA's problems as rows of LLaVA, in the prompt formats of the released converter.

A format is INPUT-OUTPUT, each a word whose letters stand for question, context, options (M), lecture, explanation (the
solution), answer, and P for the plan of QCM-LEPA. Source: LLaVA's scripts/convert_sqa_to_llava*.py, string for string,
with what looks odd in them: `AL` gives the solution and `AE` the lecture, two blanks become one in a single pass, and
the words "Question: " and "Answer: " go wherever they stand once they stand in front.
"""

import os
from typing import Any

from llava_jax.data.rows import check_unicode, single_turn
from llava_jax.io import read_json
from llava_jax.settings import nearest
from llava_jax.types import IMAGE_PLACEHOLDER, InputError

FILES = ("pid_splits.json", "problems.json")
LETTERS = "ABCDE"
BECAUSE = "BECAUSE:"

INPUTS = {
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {options}\n",
    "QCM": "Question: {question}\nContext: {context}\nOptions: {options}\n",
    "QCML": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture}\n",
    "QCME": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {solution}\n",
    "QCMLE": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture} {solution}\n",
    "QCLM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture}\nOptions: {options}\n",
    "QCEM": "Question: {question}\nContext: {context}\nBECAUSE: {solution}\nOptions: {options}\n",
    "QCLEM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture} {solution}\nOptions: {options}\n",
}
OUTPUTS = {
    "A": "Answer: The answer is {answer}.",
    "AL": "Answer: The answer is {answer}. BECAUSE: {solution}",
    "AE": "Answer: The answer is {answer}. BECAUSE: {lecture}",
    "ALE": "Answer: The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "Answer: The answer is {answer}. BECAUSE: {solution} {lecture}",
    "LA": "Answer: {lecture} The answer is {answer}.",
    "EA": "Answer: {solution} The answer is {answer}.",
    "LEA": "Answer: {lecture} {solution} The answer is {answer}.",
    "ELA": "Answer: {solution} {lecture} The answer is {answer}.",
    "LEPA": "{lecture_line}{solution_line}###\nANSWER: {answer}.",
}


def convert(folder: str, split: str, prompt_format: str, *, subset: str = "all", newlines: str = "keep") -> list[dict]:
    """Return the rows of a split of `folder` (problems.json and pid_splits.json), in the order of the split.

    `subset` takes all problems, or those with an image, or those without; `newlines` are those of lecture and
    solution: kept, or written as backslash and n. Images are named ID/image.png, as ScienceQA's folders have them.
    """
    question, answer = formats(prompt_format)
    problems = load_split(folder, split)
    wanted = {"all": (True, False), "image": (True,), "text": (False,)}[subset]
    kept = [(name, problem) for name, problem in problems if bool(problem.get("image")) in wanted]
    if not kept:
        raise InputError(f"{folder}: split {split} has no problem of subset {subset}; expected at least one")
    return [row_of(name, problem, question, answer, newlines) for name, problem in kept]


def formats(prompt_format: str) -> tuple[str, str]:
    """Return the two texts of a format such as QCM-LEA. Raises InputError, which lists what exists, for another one."""
    given, dash, asked = prompt_format.partition("-")
    if given not in INPUTS or asked not in OUTPUTS or not dash:
        raise InputError(
            f"--format={prompt_format}: expected INPUT-OUTPUT, INPUT one of {', '.join(INPUTS)}, OUTPUT one of "
            f"{', '.join(OUTPUTS)}"
        )
    return INPUTS[given], OUTPUTS[asked]


def load_split(folder: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (id, entry) of the problems that pid_splits.json names under `split`: train, val, test, minival, …"""
    lists, by_id = (os.path.join(folder, name) for name in FILES)
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
            f"{folder}: {len(missing)} ids of split {split} are not in problems.json, the first {missing[0]!r}: "
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


def row_of(name: str, problem: dict[str, Any], question: str, answer: str, newlines: str) -> dict:
    """Return the row of a problem, by the two texts of its format."""
    fields = dict(
        question=problem["question"],
        context=problem["hint"].strip() or "N/A",
        options=" ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)),
        answer=LETTERS[problem["answer"]],
        lecture=lines_of(problem["lecture"], newlines),
        solution=lines_of(problem["solution"], newlines),
    )
    for key in ("lecture", "solution"):
        fields[f"{key}_line"] = f"{key.upper()}: {fields[key]}\n" if fields[key].strip() else ""
    asked = tidy(question.format(**fields), "Question: ")
    replied = tidy(answer.format(**fields), "Answer: ")
    if not problem.get("image"):
        return single_turn(name, None, asked, replied)
    return single_turn(name, f"{name}/{problem['image']}", f"{asked}\n{IMAGE_PLACEHOLDER}", replied)


def lines_of(text: str, newlines: str) -> str:
    # The converter writes newlines as backslash and n and back again, which also fixes those that the text spells out.
    return text.replace("\n", "\\n") if newlines == "escape" else text.replace("\\n", "\n")


def tidy(text: str, label: str) -> str:
    text = text.replace("  ", " ").strip()
    text = text.replace(BECAUSE, "").strip() if text.endswith(BECAUSE) else text
    return text.replace(label, "") if text.startswith(label) else text
