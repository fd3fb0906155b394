"""`synthesize`: instruction data in LLaVA's JSON, written by a language-only teacher from captions and boxes."""

import collections
import dataclasses
import glob
import json
import os
import pathlib
import random

from llava_jax.synthesize.context import Context, context_text, load_contexts
from llava_jax.synthesize.parse import RejectedReply, parse_description, parse_dialogue, parse_exchange
from llava_jax.synthesize.teacher import Message, Teacher
from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Turn

PROMPTS = str(pathlib.Path(__file__).parent / "prompts")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of instruction data: the folder of its prompts, and whether the teacher is shown the boxes too."""

    folder: str
    boxes: bool


KINDS = {
    "conversation": Kind("conversation", boxes=False),
    "detail": Kind("detail_description", boxes=True),
    "reasoning": Kind("complex_reasoning", boxes=True),
}

# The questions of the paper's appendix for a detailed description; one is drawn for each picture.
DETAIL_QUESTIONS = (
    "Describe the following image in detail",
    "Provide a detailed description of the given image",
    "Give an elaborate explanation of the image you see",
    "Share a comprehensive rundown of the presented image",
    "Offer a thorough analysis of the image",
    "Explain the various aspects of the image before you",
    "Clarify the contents of the displayed image with great detail",
    "Characterize the image using a well-detailed description",
    "Break down the elements of the image in a detailed manner",
    "Walk through the important details of the image",
    "Portray the image with a rich, descriptive narrative",
    "Narrate the contents of the image with precision",
    "Analyze the image in a comprehensive and detailed manner",
    "Illustrate the image through a descriptive explanation",
    "Examine the image closely and share its details",
    "Write an exhaustive depiction of the given image",
)


@dataclasses.dataclass(frozen=True)
class Written:
    """What a run of `synthesize` did: rows written, turns in them, and how many replies were rejected, by reason."""

    rows: int
    turns: int
    rejected: dict[str, int]

    def __str__(self) -> str:
        lost = sum(self.rejected.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.rejected.items())
        return f"{self.rows} rows, {self.turns} turns, {lost} rejected" + (f" ({reasons})" if lost else "")


def synthesize(
    contexts_path: str,
    kind: str,
    output: str,
    teacher: Teacher,
    *,
    prompts_dir: str | None = None,
    seed: int = 0,
    limit: int = 0,
) -> Written:
    """Asks the teacher about every picture (the first `limit` ones, when not 0) and writes the rows to `output`.

    `contexts_path` is a JSONL file of contexts or a folder of COCO annotations; `prompts_dir` holds a folder of
    prompts for each kind (ours when None). Raises InputError; a reply that cannot be used is counted, not written.
    """
    prompts = load_prompts(kind, prompts_dir)
    contexts = load_contexts(contexts_path)
    rows, rejected = [], collections.Counter()
    for context in contexts[: limit or None]:
        try:
            turns = ask(context, kind, prompts, teacher, seed)
        except RejectedReply as reason:
            rejected[str(reason)] += 1
            continue
        rows.append(_row(context, turns))
    if not rows:
        reason, count = rejected.most_common(1)[0]
        raise InputError(f"{teacher.name}: none of its {count} replies could be used ({reason}); nothing written")
    _write(output, rows)
    return Written(len(rows), sum(len(row["conversations"]) for row in rows), dict(rejected))


def load_prompts(kind: str, prompts_dir: str | None = None) -> list[Message]:
    """The system message and the worked examples of a kind, from system_message.txt, 000_caps.txt, 000_conv.txt …"""
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    folder = os.path.join(prompts_dir or PROMPTS, KINDS[kind].folder)
    system = os.path.join(folder, "system_message.txt")
    if not os.path.isfile(system):
        raise InputError(f"{system}: no such file; expected system_message.txt, 000_caps.txt, 000_conv.txt … in it")
    messages = [{"role": "system", "content": _read(system)}]
    for captions in sorted(glob.glob(os.path.join(glob.escape(folder), "*_caps.txt"))):
        reply = captions.removesuffix("_caps.txt") + "_conv.txt"
        if not os.path.isfile(reply):
            raise InputError(f"{captions}: has no {os.path.basename(reply)} beside it; each example needs both files")
        messages.append({"role": "user", "content": _read(captions)})
        messages.append({"role": "assistant", "content": _read(reply)})
    return messages


def messages_for(context: Context, kind: str, prompts: list[Message]) -> list[Message]:
    """The whole conversation that a teacher is sent about one picture."""
    return [*prompts, {"role": "user", "content": context_text(context, KINDS[kind].boxes)}]


def ask(context: Context, kind: str, prompts: list[Message], teacher: Teacher, seed: int) -> tuple[Turn, ...]:
    """The turns about one picture, the placeholder in the first one. Raises RejectedReply.

    What is drawn (the question of a description; whether the picture comes before or after the first question, as in
    the paper) depends on seed, kind and picture only, not on the order of the file.
    """
    if not context.captions:
        raise RejectedReply("no captions")
    rng = random.Random(f"{seed}/{kind}/{context.id}")
    reply = teacher.answer(messages_for(context, kind, prompts))
    if kind == "conversation":
        turns = parse_dialogue(reply)
    elif kind == "reasoning":
        turns = parse_exchange(reply)
    else:
        turns = (Turn("human", rng.choice(DETAIL_QUESTIONS)), Turn("gpt", parse_description(reply)))
    first = turns[0].text
    placed = f"{IMAGE_PLACEHOLDER}\n{first}" if rng.random() < 0.5 else f"{first}\n{IMAGE_PLACEHOLDER}"
    return (Turn("human", placed), *turns[1:])


def _row(context: Context, turns: tuple[Turn, ...]) -> dict:
    said = [{"from": turn.speaker, "value": turn.text} for turn in turns]
    return {"id": context.id, "image": context.image, "conversations": said}


def _write(path: str, rows: list[dict]) -> None:
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=1)
        file.write("\n")
    os.replace(temporary, path)


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()
