"""The three kinds of instruction data: their prompts, their requests, and the turns of a reply."""

import dataclasses
import glob
import os
import pathlib
import random

from llava_jax.synthesize.context import Context, context_text
from llava_jax.synthesize.parse import RejectedReply, parse_description, parse_dialogue, parse_exchange
from llava_jax.synthesize.teacher import Message, Reply
from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Turn

EXAMPLE = ("_caps.txt", "_conv.txt")  # request and answer of a worked example
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

# The questions of the paper's appendix for a detailed description; one is drawn for each image.
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

THOUGHT = "</think>"  # ends a model's reasoning, which some servers leave in the text
# Why a reply is incomplete, by OpenAI's finish_reason; other reasons (stop, and those that servers invent) are an end.
INCOMPLETE = {
    "length": "cut off at the limit of tokens",
    "content_filter": "held back by a filter",
    "refusal": "refused",
}


def load_prompts(kind: str, prompts_dir: str | None = None) -> list[Message]:
    """Return the system message and the worked examples of a kind: system_message.txt, 000_caps.txt, 000_conv.txt …

    Each text is a file's, byte for byte, except for one line break at its end.
    """
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    folder = os.path.join(prompts_dir or PROMPTS, KINDS[kind].folder)
    system = os.path.join(folder, "system_message.txt")
    if not os.path.isfile(system):
        raise InputError(f"{system}: no such file; expected system_message.txt, 000_caps.txt, 000_conv.txt … in it")
    messages = [{"role": "system", "content": _read(system)}]
    inside = os.path.join(glob.escape(folder), "*")
    for name in sorted({path.removesuffix(end) for end in EXAMPLE for path in glob.glob(inside + end)}):
        for role, end in zip(("user", "assistant"), EXAMPLE, strict=True):
            if not os.path.isfile(name + end):
                raise InputError(f"{name}{end}: no such file; each example needs {' and '.join(EXAMPLE)}")
            messages.append({"role": role, "content": _read(name + end)})
    return messages


def messages_for(context: Context, kind: str, prompts: list[Message]) -> list[Message]:
    """Return the conversation that a teacher is sent about one image."""
    return [*prompts, {"role": "user", "content": context_text(context, KINDS[kind].boxes)}]


def turns_of(reply: Reply, context: Context, kind: str, seed: int) -> tuple[Turn, ...]:
    """Return the turns about one image, with the placeholder in the first one. Raises RejectedReply.

    What is drawn (the question of a description; whether the image comes before or after the first question, as in the
    paper) depends on seed, kind and image only, not on the order of the file.
    """
    if reply.finish in INCOMPLETE:
        raise RejectedReply(INCOMPLETE[reply.finish])
    rng = random.Random(f"{seed}/{kind}/{context.id}")
    text = reply.text.rpartition(THOUGHT)[2]
    if kind == "conversation":
        turns = parse_dialogue(text)
    elif kind == "reasoning":
        turns = parse_exchange(text)
    else:
        turns = (Turn("human", rng.choice(DETAIL_QUESTIONS)), Turn("gpt", parse_description(text)))
    first = turns[0].text
    placed = f"{IMAGE_PLACEHOLDER}\n{first}" if rng.random() < 0.5 else f"{first}\n{IMAGE_PLACEHOLDER}"
    return (Turn("human", placed), *turns[1:])


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
