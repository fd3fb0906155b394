"""ScienceQA's own problems through `prepare scienceqa` and `evaluate scienceqa`, held against rules written out anew.

`python -m tests.show_scienceqa --source=DIR --split=test`, DIR with problems.json and pid_splits.json, does it for
three published formats (LLaVA's scripts/convert_sqa_to_llava.py) and prints how many rows differ. With `--answers=FILE`
it counts a published file of predictions in every column of the paper, twice.
"""

import argparse
import collections
import json
import pathlib

from llava_jax.evaluate.scienceqa import score
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


def count(source: str, split: str, answers: str) -> int:
    """Whether any column differs from a count of sentences alone; prints all."""
    folder = pathlib.Path(source)
    problems, splits = (json.loads((folder / name).read_text("utf-8")) for name in ("problems.json", "pid_splits.json"))
    right, asked = collections.Counter(), collections.Counter()
    for line in pathlib.Path(answers).read_text("utf-8").splitlines():
        row = json.loads(line)
        problem = problems[row["question_id"]]
        if row["question_id"] not in splits[split]:
            continue
        said = [part[0] for part in row["text"].split("The answer is ")[1:] if len(part) > 1 and part[0].isupper()]
        good = said == ["ABCDE"[problem["answer"]]]
        of = {"natural": "NAT", "social": "SOC", "language": "LAN"}[problem["subject"].split()[0]]
        young = problem["grade"] in [f"grade{number}" for number in range(1, 7)]
        context = (["TXT"] if problem["hint"] else []) + (["IMG"] if problem["image"] else [])
        for column in [of, "G1-6" if young else "G7-12", "Avg", *(context or ["NO"])]:
            asked[column] += 1
            right[column] += good
    figures = score(str(folder / "problems.json"), str(folder / "pid_splits.json"), split, answers)
    different = False
    for column, found in figures["columns"].items():
        here = 100 * right[column] / max(asked[column], 1)
        different |= abs(found - here) > 1e-9
        print(f"{column:<6}{found:8.2f}{here:8.2f}  {right[column]} of {asked[column]}")
    print(f"{figures['correct']} of {figures['count']} right")
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="DIR")
    parser.add_argument("--split", default="test")
    parser.add_argument("--answers", metavar="FILE")
    given = parser.parse_args()
    differs = count(given.source, given.split, given.answers) if given.answers else show(given.source, given.split)
    raise SystemExit(bool(differs))
