"""MM-Vet: open answers that a judge scores from 0 to 1, over all questions and by the abilities they need.

The judge's prompt, with its worked examples, is that of the official evaluator; it comes as a file.
"""

from collections.abc import Mapping
from typing import Any

from llava_jax.evaluate.answers import REFUSE, SCORES, Figures, by_id, field, match, percent
from llava_jax.evaluate.judge import Judge, ask, mean_and_sd
from llava_jax.io import read_json, utf8_pieces, write_rows
from llava_jax.synthesize.journal import key_of
from llava_jax.synthesize.parse import RejectedReply
from llava_jax.synthesize.scheduler import Task
from llava_jax.synthesize.teacher import Reply
from llava_jax.types import InputError

PREFIX = "v1_"


def submission(annotations_path: str, answers_path: str, missing: str = REFUSE) -> dict[str, str]:
    """Return the texts by question as the official evaluator takes them. Raises InputError."""
    entries = read_annotations(annotations_path)
    texts = match(answers_path, entries, annotations_path, missing=missing, key=_key)
    return {f"{PREFIX}{key}": text for key, text in texts.items()}


def score(
    annotations_path: str, answers_path: str, prompt_path: str, output: str, who: Judge, *, repeats: int = 1
) -> Figures:
    """Have every answer judged; return `score` (percent), its `sd` over the repeats, and the score of each ability.

    Args:
      annotations_path: mm-vet.json.
      answers_path: JSONL with question_id (the number, or v1_NUMBER) and text.
      prompt_path: the official evaluator's prompt, as text.
      output: written, a line a judging; its journal next to it is what a later run resumes from.
      who: the judge.
      repeats: judgings of everything.

    Raises InputError.
    """
    entries = read_annotations(annotations_path)
    texts = match(answers_path, entries, annotations_path, key=_key)
    prompt = read_prompt(prompt_path)
    asked = [
        _task(key, entry, texts[key], prompt, repeat, who.teacher.settings)
        for key, entry in entries.items()
        for repeat in range(repeats)
    ]
    judged = ask(asked, who, output, prompt)
    found: dict[int, dict[str, float]] = {repeat: {} for repeat in range(repeats)}
    rows = []
    for number, (task, verdict) in enumerate(zip(asked, judged.verdicts, strict=True)):
        content = verdict.replies[-1].text if verdict.replies else ""
        repeat = number % repeats
        rows.append({"question_id": PREFIX + task.id, "repeat": repeat, "content": content, "score": verdict.result})
        if verdict.result is not None:
            found[repeat][task.id] = verdict.result
    write_rows(output, rows)
    abilities = sorted({ability for entry in entries.values() for ability in entry["capability"]})
    needs = {key: entry["capability"] for key, entry in entries.items()}
    every = {task.id: [one[task.id] for one in found.values() if task.id in one] for task in asked}
    total, sd = _percent(found, list(needs))
    return {
        "score": total,
        "sd": sd,
        "count": len(entries),
        "abilities": {name: _percent(found, [key for key in needs if name in needs[key]])[0] for name in abilities},
        "judge": {**judged.about, **judged.counts},
        "stopped": judged.stopped,
        SCORES: {key: sum(scores) / len(scores) for key, scores in every.items() if scores},
    }


def correctness(reply: Reply) -> float:
    """Return the number that a judge's answer begins with. Raises RejectedReply where it is none from 0 to 1."""
    try:
        value = float(reply.text.split(" ")[0].strip())
    except ValueError:
        raise RejectedReply("it begins with no number") from None
    if not 0 <= value <= 1:
        raise RejectedReply("its number is not from 0 to 1")
    return value


def read_prompt(path: str) -> str:
    """Return the official evaluator's prompt. Raises InputError for a file that is no text."""
    return b"".join(utf8_pieces(path, "the official prompt")).decode().strip()


def read_annotations(path: str) -> dict[str, dict[str, Any]]:
    """Return the entries of mm-vet.json by the number of the question. Raises InputError."""
    entries = read_json(path, "MM-Vet's questions by id")
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: expected MM-Vet's questions by id, v1_0, v1_1, …")
    for key, entry in entries.items():
        for name in ("question", "answer", "imagename"):
            field(entry, name, str, f"{path}: {key}")
        field(entry, "capability", list, f"{path}: {key}")
    return {key.removeprefix(PREFIX): entry for key, entry in entries.items()}


def _key(row: Any, where: str) -> str:
    """Return the key of an answer, whose id is the question's number with or without `v1_`."""
    return by_id(row, where).removeprefix(PREFIX)


def _task(key: str, entry: Mapping[str, Any], text: str, prompt: str, repeat: int, settings: Any) -> Task[float]:
    truth = entry["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    content = f"{prompt}\n" + " | ".join([entry["question"], truth, text, ""])
    messages = [{"role": "user", "content": content}]
    kind = f"review {repeat}"
    return Task(key, kind, messages, key_of(key, kind, settings, messages), correctness)


def _percent(found: Mapping[int, Mapping[str, float]], keys: list[str]) -> tuple[float | None, float | None]:
    """Return the mean score of some questions in percent, and its standard deviation over the repeats."""
    some = [[scores[key] for key in keys if key in scores] for scores in found.values()]
    return mean_and_sd([percent(scores) if scores else None for scores in some])
