"""Captions of images as rows of stage 1: a brief question, drawn by the seed, and the caption as its answer."""

import codecs
import dataclasses
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

from llava_jax.data.rows import Rejected, parse_or_reject, single_turn
from llava_jax.io import each_line, elements
from llava_jax.synthesize.context import one_line
from llava_jax.types import IMAGE_PLACEHOLDER, InputError

# The questions of the paper's appendix for a short caption. The plain template leaves them out, as the original does.
BRIEF_QUESTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
EXPECTED = "a JSON list or a .jsonl file of objects with image and caption (or captions), or COCO's captions file"


@dataclasses.dataclass(frozen=True, slots=True)
class Caption:
    """One caption; `id` names its row, and `image` is relative to the folder of images."""

    id: str
    image: str
    text: str


def read_captions(path: str, refused: list[str]) -> Iterator[Caption]:
    """Yield the captions of a JSON or JSONL file, one at a time; why others cannot be used goes to `refused`.

    A row has `image` (or `file_name`) and `caption`, or `captions`, of which each becomes a row; the id is its `id`, or
    the name of its image, followed by -K where a row has several. Raises InputError at the end when there was none.
    """
    found = False
    for where, row in read_rows(path):
        for entry in parse_row(row):
            if isinstance(entry, str):
                refused.append(f"{where}: {entry}")
            else:
                found = True
                yield entry
    if not found:
        first = f"; the first of {len(refused)} refused: {refused[0]}" if refused else ""
        raise InputError(f"{path}: no caption in it; expected {EXPECTED}{first}")


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, decoded row) of every row; a line that is no JSON comes as its error."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; expected {EXPECTED}")
    if path.lower().endswith((".jsonl", ".ndjson")):
        yield from each_line(path)
        return
    with open(path, "rb") as file:
        begins = file.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if begins == b"{":
        yield from coco_rows(path)
    else:
        yield from ((f"row {index}", row) for index, row in enumerate(elements(path, "item", EXPECTED)))


def coco_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield COCO's captions as rows, in the order of the file, which is read twice: only names of images are held."""
    try:
        names = {item["id"]: item["file_name"] for item in elements(path, "images.item", EXPECTED)}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not COCO's captions ({error!r} in images); expected {EXPECTED}") from error
    for number, note in enumerate(elements(path, "annotations.item", EXPECTED)):
        if isinstance(note, dict) and isinstance(note.get("image_id"), str | int):
            image = note["image_id"]
            note = {"id": note.get("id", image), "image": names.get(image), "caption": note.get("caption")}
        yield f"annotation {number}", note


def parse_row(row: Any) -> list[Caption | str]:
    """Return the captions of one row, for one that cannot be used the reason."""
    if not isinstance(row, dict):
        return [str(row) if isinstance(row, ValueError) else "expected an object"]
    image = row.get("image", row.get("file_name"))
    if not isinstance(image, str) or not image.strip():
        return [f"image is {image!r:.80}, expected the name of an image"]
    texts = row.get("captions", [row.get("caption")])
    name = image if row.get("id") is None else str(row["id"])
    if not isinstance(texts, list) or not texts:
        return [f"captions is {texts!r:.80}, expected a list of texts"]
    ids = [name] if len(texts) == 1 else [f"{name}-{index}" for index in range(len(texts))]
    return [check_text(Caption(own, image, text)) for own, text in zip(ids, texts, strict=True)]


def check_text(caption: Caption) -> Caption | str:
    """Return the caption as training's own reader of rows takes it, or why it does not."""
    if not isinstance(caption.text, str) or not caption.text.strip():
        return f"caption {caption.id!r} is {caption.text!r:.80}, expected text"
    text = one_line(caption.text)
    row = parse_or_reject(single_turn(caption.id, caption.image, IMAGE_PLACEHOLDER, text), 0)
    if isinstance(row, Rejected):
        return f"caption {caption.id!r}: {row.reason}"
    return Caption(caption.id, caption.image, text)


def caption_rows(captions: Iterable[Caption], seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of stage 1; question, and whether the image comes before it, depend on seed and id alone."""
    for caption in captions:
        rng = random.Random(f"{seed}/caption/{caption.id}")
        question, first = rng.choice(BRIEF_QUESTIONS), rng.random() < 0.5
        asked = f"{IMAGE_PLACEHOLDER}\n{question}" if first else f"{question}\n{IMAGE_PLACEHOLDER}"
        yield single_turn(caption.id, caption.image, asked, caption.text)
