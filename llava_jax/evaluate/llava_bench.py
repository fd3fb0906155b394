"""LLaVA-Bench (COCO and In-the-Wild): a judge that reads captions scores a reference and a candidate next to it.

Prompt, roles and rules are those of the released code.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_jax.evaluate import reviews
from llava_jax.evaluate.answers import Figures, field, match, read_rows
from llava_jax.evaluate.judge import Judge, ask
from llava_jax.io import read_json, read_lines, write_rows
from llava_jax.synthesize.journal import key_of
from llava_jax.synthesize.parse import RejectedReply
from llava_jax.synthesize.scheduler import Task
from llava_jax.synthesize.teacher import Reply
from llava_jax.types import InputError

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
LAYOUT = (
    "[Context]\n{context}\n\n[Question]\n{question}\n\n[{role} 1]\n{first}\n\n[End of {role} 1]\n\n"
    "[{role} 2]\n{second}\n\n[End of {role} 2]\n\n[System]\n{rule}\n\n"
)
IN_THE_WILD = "llava_bench_"  # before a category's name in the rules
HIGHEST = 10.0


def review(
    questions_path: str,
    context_path: str,
    rules_path: str,
    answers_paths: Sequence[str],
    output: str,
    who: Judge,
    *,
    swap: bool = False,
    repeats: int = 1,
) -> Figures:
    """Have every question judged and return the figures of `summarise`, with the judge and its failures.

    Args:
      questions_path: JSONL with question_id, image, text, category.
      context_path: JSONL with image and captions and instances (COCO), or caption.
      rules_path: JSON of {category: {role, prompt}}.
      answers_paths: of the reference, and of the candidate.
      output: written, the reviews as LLaVA has them; its journal next to it is what a later run resumes from.
      who: the judge.
      swap: judge each pair in the other order as well.
      repeats: judgings of everything.

    Raises InputError.
    """
    questions = read_rows(questions_path, ("image", "text", "category"))
    contexts = _contexts(context_path)
    rules = read_json(rules_path, "rules by category")
    both = [match(path, questions, questions_path) for path in answers_paths]
    ids = [read_rows(path, ("text",)) for path in answers_paths]
    asked = list(_judgings(questions, contexts, rules, both, who.teacher.settings, swap, repeats, context_path))
    used = {category: rules[category] for category in sorted({row["category"] for row, _ in asked})}
    judged = ask([task for _, task in asked], who, output, [SYSTEM, LAYOUT, used])
    rows = []
    for number, ((row, _), verdict) in enumerate(zip(asked, judged.verdicts, strict=True), 1):
        answers = {f"answer{n}_id": _answer_id(found, row["question_id"]) for n, found in enumerate(ids, 1)}
        content = verdict.replies[-1].text if verdict.replies else ""
        rows.append({"id": number, **row, **answers, "content": content, "tuple": verdict.result, **_who(judged.about)})
    write_rows(output, rows)
    found = [
        reviews.Review(row["question_id"], row["category"], verdict.result, row["repeat"])
        for (row, _), verdict in zip(asked, judged.verdicts, strict=True)
    ]
    figures = reviews.summarise(found)
    return {**figures, "judge": {**judged.about, **judged.counts}, "stopped": judged.stopped}


def content_of(context: str, question: str, answers: Sequence[str], rule: Mapping[str, str]) -> str:
    """Return what the judge is asked about two answers."""
    return LAYOUT.format(
        context=context,
        question=question,
        role=rule["role"],
        first=answers[0],
        second=answers[1],
        rule=rule["prompt"],
    )


def scores_of(reply: Reply, swapped: bool = False) -> tuple[float, float]:
    """Return (reference, candidate) of a review, whose first line holds two numbers. Raises RejectedReply."""
    first = reply.text.split("\n")[0].replace(",", " ").split()
    try:
        one, other = map(float, first)
    except ValueError:
        raise RejectedReply("its first line is not two numbers") from None
    if not all(math.isfinite(score) and 0 <= score <= HIGHEST for score in (one, other)):
        raise RejectedReply("its scores are not on the scale of 1 to 10")
    return (other, one) if swapped else (one, other)


def _judgings(
    questions: Mapping[str, Mapping[str, Any]],
    contexts: Mapping[str, tuple[str, bool]],
    rules: Any,
    both: Sequence[Mapping[str, str]],
    settings: Mapping[str, Any],
    swap: bool,
    repeats: int,
    context_path: str,
) -> Iterator[tuple[dict[str, Any], Task[tuple[float, float]]]]:
    """Yield (what the review is of, its task) of every question, repeat and order."""
    for key, question in questions.items():
        if question["image"] not in contexts:
            raise InputError(
                f"{context_path}: no context of image {question['image']!r}, which question {key} is about"
            )
        context, wild = contexts[question["image"]]
        category = IN_THE_WILD + question["category"] if wild else question["category"]
        rule = field(rules, category, dict, f"the rules, for question {key}")
        for name in ("role", "prompt"):
            field(rule, name, str, f"rule {category!r}")
        for repeat in range(repeats):
            for swapped in (False, True) if swap else (False,):
                pair = [texts[key] for texts in (reversed(both) if swapped else both)]
                content = content_of(context, question["text"], pair, rule)
                messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
                kind = f"review {repeat}{' swapped' if swapped else ''}"
                row = {"question_id": key, "category": category, "repeat": repeat, "swapped": swapped}
                read = functools.partial(scores_of, swapped=swapped)
                yield row, Task(key, kind, messages, key_of(key, kind, settings, messages), read)


def _contexts(path: str) -> dict[str, tuple[str, bool]]:
    """Return (what the judge reads of an image, whether it is one of In-the-Wild) by the image's name."""
    found = {}
    for where, row in read_lines(path, "an object with image, and captions and instances or caption"):
        image = field(row, "image", str, where)
        wild = "caption" in row
        captions = row["caption"] if wild else field(row, "captions", list, where)
        text = captions if isinstance(captions, str) else "\n".join(map(str, captions))
        if not wild:
            boxes = field(row, "instances", list, where)
            lines = [f"{field(box, 'category', str, where)}: {field(box, 'bbox', list, where)}" for box in boxes]
            text = "\n\n".join([text, "\n".join(lines)])
        found[image] = text, wild
    return found


def _answer_id(rows: Mapping[str, Mapping[str, Any]], question: str) -> Any:
    return rows[question].get("answer_id", rows[question]["question_id"])


def _who(about: Mapping[str, Any]) -> dict[str, Any]:
    return {"judge": about["name"], "prompt_hash": about["prompt_hash"]}
