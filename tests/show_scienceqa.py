"""ScienceQA's own problems through `prepare scienceqa`, each string held against the rule written out anew.

`python -m tests.show_scienceqa --source=DIR --split=test`, DIR with problems.json and pid_splits.json, does it for
three published formats (LLaVA's scripts/convert_sqa_to_llava.py) and prints how many rows differ.
"""

import argparse
import json
import pathlib

from llava_jax.prepare.scienceqa import convert

FORMATS = ("QCM-LEA", "QCM-LEPA", "CQM-A")


def expected(problem: dict, prompt_format: str) -> list[str]:
    """Question and answer of a problem of problems.json, without blanks around them."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDE", problem["choices"], strict=False))
    question, context = problem["question"], f"Context: {problem['hint'].strip() or 'N/A'}"
    asked = (
        f"{context}\nQuestion: {question}\nOptions: {options}"
        if prompt_format.startswith("CQM")
        else f"{question}\n{context}\nOptions: {options}"
    )
    asked += "\n<image>" if problem["image"] else ""
    letter, lecture, solution = "ABCDE"[problem["answer"]], problem["lecture"], problem["solution"]
    replies = {
        "QCM-LEA": f"{lecture} {solution} The answer is {letter}.",
        "QCM-LEPA": (f"LECTURE: {lecture}\n" if lecture.strip() else "")
        + (f"SOLUTION: {solution}\n" if solution.strip() else "")
        + f"###\nANSWER: {letter}.",
        "CQM-A": f"The answer is {letter}.",
    }
    reply = replies[prompt_format]
    # Two blanks become one, once; "Answer: ", which opens all replies but LEPA's, is taken out wherever it stands.
    reply = reply if prompt_format.endswith("LEPA") else reply.replace("Answer: ", "")
    return [text.replace("  ", " ").strip() for text in (asked.replace("Answer: ", ""), reply)]


def show(source: str, split: str) -> int:
    """How many rows of all formats differ from the rule; prints the first of each format."""
    problems = json.loads((pathlib.Path(source) / "problems.json").read_text(encoding="utf-8"))
    different = 0
    for prompt_format in FORMATS:
        rows = convert(source, split, prompt_format)
        wrong = [
            row["id"]
            for row in rows
            if [turn["value"].strip() for turn in row["conversations"]] != expected(problems[row["id"]], prompt_format)
        ]
        print(f"{prompt_format}: {len(rows)} rows, {len(wrong)} different {wrong[:3]}")
        different += len(wrong)
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="DIR")
    parser.add_argument("--split", default="test")
    given = parser.parse_args()
    raise SystemExit(bool(show(given.source, given.split)))
