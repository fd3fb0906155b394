"""A row of any form that is read, made into LLaVA's: ShareGPT's conversations, OpenAI's messages, images with the row.

A conversation stands under `conversations` or `messages`, its turns with `from` and `value` or with `role` and
`content`; content is text, or a list of parts. A part that is an image becomes `<image>` at its place, unless the texts
of its message say with `<image>` where the images stand. One without a source is the next of the row's images.
"""

import base64
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from llava_jax.data.rows import SPEAKERS, TRAINING, Rejected, parse_images, parse_or_reject, row_id, unread_keys
from llava_jax.types import IMAGE_PLACEHOLDER, ImageBytes, InputError, Record

KEYS = ("conversations", "messages")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
SOURCES = ("image", "path", "url", "image_url")
PARTS = {"text": ("type", "text"), "image": ("type", "index", *SOURCES), "image_url": ("type", *SOURCES)}
PART_KEYS = tuple(dict.fromkeys(key for keys in PARTS.values() for key in keys))
EXPECTED_PART = 'expected {"type": "text", "text": …} or {"type": "image", …}'


def parse_any(row: Any, index: int) -> Record | Rejected:
    """Return the record of a decoded row of any form, or why it cannot be used, as `parse_or_reject` does."""
    try:
        is_llava = row["conversations"][-1]["from"] in SPEAKERS and "messages" not in row
    except (KeyError, IndexError, TypeError):
        is_llava = not isinstance(row, dict)  # an error in place of a row, which says why
    if is_llava:
        return parse_or_reject(row, index)
    try:
        key, converted = _as_llava(row)
    except InputError as error:
        return Rejected(index, row_id(row), str(error))
    found = parse_or_reject(converted, index)
    # What is said of a turn names it as the row does.
    if isinstance(found, Rejected):
        return dataclasses.replace(found, reason=re.sub(rf"^{KEYS[0]}\b", key, found.reason))
    return dataclasses.replace(found, unread=tuple(re.sub(rf"^{KEYS[0]}\b", key, name) for name in found.unread))


def conversation_key(row: dict[str, Any]) -> str:
    """Return the key under which the conversation of a row stands. Raises InputError where both are given."""
    given = [key for key in KEYS if row.get(key) is not None]
    if len(given) == 2:
        raise InputError("both conversations and messages are given; keep one of them")
    return given[0] if given else KEYS[0]


def turns_of(row: dict[str, Any], key: str) -> Any:
    """Return the conversation; one that is kept as a list for each key, as Hugging Face may do, as a list of turns.

    Raises InputError where these lists differ in length.
    """
    turns = row.get(key)
    if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
        if len({len(values) for values in turns.values()}) > 1:
            raise InputError(
                f"{key}: its lists {', '.join(map(str, turns))} differ in length; expected one value a turn"
            )
        return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    return turns


# ---- a row ----------------------------------------------------------------------------------------------------------


class _Images:
    """The images of a row: what it names, how many of these were taken by turns, and all that turns show."""

    def __init__(self, named: Iterable[Any]):
        self.named, self.taken, self.shown = list(named), 0, []

    def take(self, count: int) -> list[Any]:
        """Return the next images that the row names; fewer where there are no more."""
        found = self.named[self.taken : self.taken + count]
        self.taken += len(found)
        return found

    def all(self) -> list[Any]:
        return [*self.shown, *self.named[self.taken :]]


def _as_llava(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the key of the conversation, and the row in LLaVA's form. Raises InputError."""
    key = conversation_key(row)
    turns = turns_of(row, key)
    converted = {name: value for name, value in row.items() if name not in KEYS} | {"conversations": turns}
    if not isinstance(turns, list):
        return key, converted
    images, said = _Images(map(image_of, parse_images(row))), []
    for index, turn in enumerate(turns):
        try:
            said.append(_turn(turn, images) if isinstance(turn, dict) else turn)
        except InputError as error:
            raise InputError(f"{key}[{index}]: {error}") from None
    return key, converted | {"image": None, "images": images.all(), "conversations": said}


def _turn(turn: dict[str, Any], images: _Images) -> dict[str, Any]:
    """Return a turn with `from`, `value` and all other keys; `images` learns which it shows."""
    turn = {name: value for name, value in turn.items() if value is not None}
    name = "role" if "role" in turn else "from"
    for ours, theirs in ("from", "role"), ("value", "content"):
        if ours in turn and theirs in turn:
            raise InputError(f"both {ours} and {theirs} are given; keep one of them")
        if theirs in turn:
            turn[ours] = turn.pop(theirs)
    role = turn.get("from")
    if not isinstance(role, str) or role not in ROLES:
        expected = "user or assistant" if name == "role" else "human or gpt (or user or assistant)"
        raise InputError(f"unknown role {role!r} in {name}, expected {expected}, or system in the first turn")
    turn["from"] = ROLES[role]
    if isinstance(turn.get("value"), list):
        turn |= _content(turn["value"], images)
    elif isinstance(turn.get("value"), str):
        images.shown += images.take(turn["value"].count(IMAGE_PLACEHOLDER))
    return turn


def _content(parts: list[Any], images: _Images) -> dict[str, Any]:
    """Return the text of the parts as `value`, and those of their keys that are not read."""
    texts, shown, unread = [], [], {}
    for index, part in enumerate(parts):
        try:
            text, image, others = _part(part, images)
        except InputError as error:
            raise InputError(f"content[{index}]: {error}") from None
        texts.append(text)
        shown += [] if text is not None else [image]
        unread |= others
    placed = sum(text.count(IMAGE_PLACEHOLDER) for text in texts if text is not None)
    if placed and shown and placed != len(shown):
        raise InputError(f"{placed} {IMAGE_PLACEHOLDER} in the text for {len(shown)} images; expected as many")
    images.shown += shown or images.take(placed)
    places = [] if placed else [IMAGE_PLACEHOLDER]
    lines = [line for text in texts for line in (places if text is None else [text])]
    return {"value": "\n".join(lines)} | {f"content.{name}": value for name, value in unread.items()}


def _part(part: Any, images: _Images) -> tuple[str | None, Any, dict[str, Any]]:
    """Return (text, None) of a part, or (None, image), and what of it is not read."""
    if not isinstance(part, dict):
        raise InputError(f"is {part!r:.80}; {EXPECTED_PART}")
    part = {name: value for name, value in part.items() if not is_null(value)}
    what = part.get("type")
    if not isinstance(what, str) or what not in PARTS:
        raise InputError(f"type {what!r} is not read, only text and images are; {EXPECTED_PART}")
    unread = {name: part[name] for name in unread_keys(part, PART_KEYS, TRAINING)}
    for name in PART_KEYS:
        if name in part and name not in PARTS[what] and part[name] != "":
            raise InputError(f"{name} in a part of type {what} is not read; give it as a part of its own")
    if what == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"text is {part.get('text')!r:.80}, expected text")
        return part["text"], None, unread
    given = [name for name in SOURCES if name in part]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are given; keep one of them")
    if given:
        source = part[given[0]]
        if isinstance(source, dict) and "url" in source:
            unread |= {f"{given[0]}.{name}": source[name] for name in unread_keys(source, ("url",))}
            source = source["url"]
        return None, image_of(source), unread
    if part.get("index", images.taken) != images.taken:
        raise InputError(f"index is {part['index']}, expected {images.taken}: the images of a row are shown in order")
    taken = images.take(1)
    if not taken:
        raise InputError("an image without a source, and the row names no more images; give its path, or images")
    return None, taken[0], unread


def is_null(value: Any) -> bool:
    """Return whether a value stands for none: tables have every key of a struct in every row."""
    return value is None or (isinstance(value, dict) and all(map(is_null, value.values())))


def image_of(value: Any) -> Any:
    """Return an image as a row of LLaVA's has it: a path, or bytes.

    `value` may also be a data: URL, or {"bytes", "path"} as Hugging Face keeps images. Raises InputError for a data:
    URL that cannot be read; what is no image at all stays.
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        content, path = value.get("bytes"), value.get("path")
        return ImageBytes(content, path or "") if isinstance(content, bytes) else path
    if not isinstance(value, str) or value[:5].lower() != "data:":
        return value
    head, _, content = value.partition(",")
    if not head.endswith(";base64"):
        raise InputError(f"{value[:40]!r}: expected data:image/TYPE;base64,… with the bytes of a file")
    try:
        return ImageBytes(base64.b64decode(content, validate=True), f"of {head}")
    except ValueError as error:
        raise InputError(f"{head},…: not base64 ({error})") from None


# ---- what it was ----------------------------------------------------------------------------------------------------


def describe(rows: Iterable[Any]) -> str:
    """Return a phrase that names the forms of decoded rows, and how their images come, for a person."""
    forms, images = {}, {}
    for row in rows:
        found = parse_any(row, 0)
        if isinstance(found, Record):
            forms[_form(row)] = None
            images |= {"bytes" if isinstance(image, bytes) else "paths": None for image in found.images}
    if not forms:
        return "none of its first rows can be used"
    return " and ".join(forms) + (f" with images as {' and '.join(images)}" if images else "")


def _form(row: dict[str, Any]) -> str:
    key = conversation_key(row)
    last = turns_of(row, key)[-1]
    if key == "messages" or last.get("role") is not None:
        return "OpenAI messages"
    return "LLaVA conversations" if last.get("from") in SPEAKERS else "ShareGPT conversations"
