"""ScienceQA's problems as rows of LLaVA, in the prompt formats of the released converter.

A format is INPUT-OUTPUT, each a word whose letters stand for question, context, options (M), lecture, explanation (the
solution), answer, and P for the plan of QCM-LEPA. Source: LLaVA's scripts/convert_sqa_to_llava*.py, string for string,
with what looks odd in them: `AL` gives the solution and `AE` the lecture, two blanks become one in a single pass, and
the words "Question: " and "Answer: " go wherever they stand once they stand in front.
"""

import os
from typing import Any

from llava_jax.data.rows import single_turn
from llava_jax.evaluate.prompts import LETTERS
from llava_jax.evaluate.scienceqa import load_split
from llava_jax.types import IMAGE_PLACEHOLDER, InputError

FILES = ("pid_splits.json", "problems.json")
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
    problems = load_split(*(os.path.join(folder, name) for name in FILES), split)
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
