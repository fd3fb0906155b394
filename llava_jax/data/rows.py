"""One row of LLaVA annotations, checked.

What a row must hold: `conversations` with strictly known speakers and non-empty texts, and as many `<image>` in the
human turns as it names or brings images. Ids need not be unique.
"""

import dataclasses
import ntpath
import re
from typing import Any

from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Record, Turn

SPEAKERS = ("human", "gpt")
# Most paths; what else a path may be is looked at more closely.
PLAIN_PATH = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*(?:/[a-zA-Z0-9_-][a-zA-Z0-9_.-]*)*")


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: its index in the file, its id ("" where it has none) and the reason."""

    row: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}{f' (id {self.id!r})' if self.id else ''}: {self.reason}"


def parse_row(row: Any, where: str) -> Record:
    """The record of one decoded JSON row; `where` begins the message of the InputError a bad row raises."""
    try:
        return _parse(row)
    except InputError as error:
        name = _row_id(row)
        raise InputError(f"{where}{f' (id {name!r})' if name else ''}: {error}") from None


def parse_or_reject(row: Any, index: int) -> Record | Rejected:
    """The record of one decoded JSON row, or why it cannot be used; an InputError in its place is the reason."""
    try:
        return _parse(row)
    except InputError as error:
        return Rejected(index, _row_id(row), str(error))


def _parse(row: Any) -> Record:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"expected an object with id and conversations, found {_kind(row)}")
    name = row.get("id", "")
    if not isinstance(name, (str, int)):
        raise InputError(f"id is {_kind(name)}, expected text")
    name = str(name)
    _check_unicode(name, "id")
    turns = _parse_turns(row)
    images = _parse_images(row)
    _check_placeholders(turns, images)
    return Record(name, images, turns)


def _row_id(row: Any) -> str:
    name = row.get("id", "") if isinstance(row, dict) else ""
    return str(name) if isinstance(name, str | int) else ""


def _parse_turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    conversation = row.get("conversations")
    if not isinstance(conversation, list):
        raise InputError(f"conversations is {_kind(conversation)}, expected a list of turns")
    if not conversation:
        raise InputError("empty conversation; expected at least one human and one gpt turn")
    return tuple([_parse_turn(turn, index) for index, turn in enumerate(conversation)])


def _parse_turn(turn: Any, index: int) -> Turn:
    if not isinstance(turn, dict):
        raise InputError(f"conversations[{index}] is {_kind(turn)}, expected an object with from and value")
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in SPEAKERS:
        raise InputError(f"conversations[{index}]: unknown role {speaker!r} in from, expected human or gpt")
    if not isinstance(text, str):
        problem = "missing value" if "value" not in turn else f"value is {_kind(text)}"
        raise InputError(f"conversations[{index}]: {problem}, expected text")
    _check_unicode(text, "conversations", index)
    # The original writes an empty turn without its separator and then masks the whole row; here it is named instead.
    if not text or (speaker == "gpt" and text.isspace()):
        what = "answer" if speaker == "gpt" else "question"
        raise InputError(f"conversations[{index}]: empty {what}; remove the turn or fill it")
    return Turn(speaker, text)


def _parse_images(row: dict[str, Any]) -> tuple[str | bytes, ...]:
    keys = [key for key in ("image", "images") if row.get(key) is not None]
    if len(keys) == 2:
        raise InputError("both image and images are given; keep one of them")
    if not keys:
        return ()
    images = row[keys[0]]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        raise InputError(f"{keys[0]} is {_kind(images)}, expected a path or a list of paths")
    for image in images:
        _check_path(image, keys[0])
    return tuple(images)


def _check_path(image: Any, where: str) -> None:
    if isinstance(image, bytes) and image:
        return
    if not isinstance(image, str) or not image.strip():
        raise InputError(f"{where}: {image!r} is no path; expected one below the images folder")
    if PLAIN_PATH.fullmatch(image):
        return
    _check_unicode(image, where)
    parts = image.replace("\\", "/").split("/")
    absolute = image.startswith(("/", "\\")) or ntpath.splitdrive(image)[0] != ""
    if absolute or ".." in parts or "\0" in image:
        raise InputError(f"{where}: {image!r} leaves the images folder; expected a relative path without ..")


def _check_placeholders(turns: tuple[Turn, ...], images: tuple[str | bytes, ...]) -> None:
    for index, turn in enumerate(turns):
        if turn.speaker == "gpt" and IMAGE_PLACEHOLDER in turn.text:
            raise InputError(
                f"conversations[{index}]: {IMAGE_PLACEHOLDER} inside an answer; only a human turn may hold it"
            )
    found = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if found != len(images):
        raise InputError(
            f"{found} {IMAGE_PLACEHOLDER} in the human turns but {len(images)} "
            f"image{'' if len(images) == 1 else 's'} named; expected one placeholder an image"
        )


def _check_unicode(text: str, where: str, index: int | None = None) -> None:
    if text.isascii():
        return
    where = where if index is None else f"{where}[{index}]"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{where}: lone surrogate U+{code:04X} at character {error.start}; the text was cut inside a character"
        ) from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "nothing"}
    return names.get(type(value), "a number")
