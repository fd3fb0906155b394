"""Captions of pictures as rows of stage 1: a brief question, drawn by the seed, and the caption as its answer."""

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

from llava_jax.prepare.output import read_json, single_turn
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
EXPECTED = "a list or JSONL of objects with image and caption (or captions), or COCO's captions file"


@dataclasses.dataclass(frozen=True)
class Caption:
    """One caption; `id` names its row, and `image` is relative to the folder of pictures."""

    id: str
    image: str
    text: str


@dataclasses.dataclass(frozen=True)
class Refused:
    """A caption that cannot be used: where it stands, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def load_captions(path: str) -> tuple[list[Caption], list[Refused]]:
    """The captions of a JSON or JSONL file, and those that cannot be used.

    A row has `image` (or `file_name`) and `caption`, or `captions`, of which each becomes a row; the id is its `id`, or
    the name of its picture, followed by -K where a row has several.
    """
    captions: list[Caption] = []
    refused: list[Refused] = []
    for where, row in read_rows(path):
        for entry in parse_row(where, row):
            (captions if isinstance(entry, Caption) else refused).append(entry)
    if not captions:
        first = f"; the first of {len(refused)} refused: {refused[0]}" if refused else ""
        raise InputError(f"{path}: no caption in it; expected {EXPECTED}{first}")
    return captions, refused


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, decoded row) of every row; a line that is no JSON comes as its error."""
    if path.lower().endswith((".jsonl", ".ndjson")):
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", json_line(line)
        return
    content = read_json(path, EXPECTED)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = coco_rows(path, content)
    if not isinstance(content, list):
        raise InputError(f"{path}: a {type(content).__name__}, expected {EXPECTED}")
    yield from ((f"row {index}", row) for index, row in enumerate(content))


def json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return error


def coco_rows(path: str, content: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO's captions as rows, in the order of the file."""
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [
            {"id": str(note.get("id", note["image_id"])), "image": names[note["image_id"]], "caption": note["caption"]}
            for note in content["annotations"]
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not COCO's captions ({error!r}); expected images and annotations") from error


def parse_row(where: str, row: Any) -> list[Caption | Refused]:
    """The captions of one row."""
    if not isinstance(row, dict):
        return [Refused(where, f"not JSON: {row}" if isinstance(row, ValueError) else "expected an object")]
    image = row.get("image", row.get("file_name"))
    if not isinstance(image, str) or not image.strip():
        return [Refused(where, f"image is {image!r}, expected the name of a picture")]
    if IMAGE_PLACEHOLDER in image:
        return [Refused(where, f"image {image!r} holds {IMAGE_PLACEHOLDER}")]
    texts = row.get("captions", [row.get("caption")])
    name = str(row.get("id", image))
    if not isinstance(texts, list) or not texts:
        return [Refused(where, f"captions is {texts!r}, expected a list of texts")]
    ids = [name] if len(texts) == 1 else [f"{name}-{index}" for index in range(len(texts))]
    return [check_text(where, Caption(own, image, text)) for own, text in zip(ids, texts, strict=True)]


def check_text(where: str, caption: Caption) -> Caption | Refused:
    if not isinstance(caption.text, str) or not caption.text.strip():
        return Refused(where, f"caption {caption.id!r} is {caption.text!r}, expected text")
    if IMAGE_PLACEHOLDER in caption.text:
        return Refused(where, f"caption {caption.id!r} holds {IMAGE_PLACEHOLDER}")
    return dataclasses.replace(caption, text=caption.text.strip())


def caption_rows(captions: Iterable[Caption], seed: int) -> Iterator[dict[str, Any]]:
    """The rows of stage 1; question, and whether the picture comes before it, depend on seed and id alone."""
    for caption in captions:
        rng = random.Random(f"{seed}/caption/{caption.id}")
        question, first = rng.choice(BRIEF_QUESTIONS), rng.random() < 0.5
        asked = f"{IMAGE_PLACEHOLDER}\n{question}" if first else f"{question}\n{IMAGE_PLACEHOLDER}"
        yield single_turn(caption.id, caption.image, asked, caption.text)
