"""One row of LLaVA annotations, checked; and what rows, questions and messages share: images, keys, text.

What a row must hold: `conversations` with strictly known speakers and non-empty texts, and as many `<image>` in the
human turns as it names or brings images. Ids need not be unique. Of the keys that we do not know, those that could
change what is trained or asked are refused by name, and the others are counted (`unread_keys`).
"""

import dataclasses
import difflib
import functools
import ntpath
import re
from collections.abc import Mapping
from typing import Any

from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Record, Turn

SPEAKERS = ("human", "gpt")
ROW_KEYS = ("id", "image", "images", "conversations", "system")
TURN_KEYS = ("from", "value", "weight")
# What another program would show or train otherwise for such a key.
MEDIA = ("video", "videos", "audio", "audios")
TRAINING = ("weight", "train", "tools", "chosen", "rejected", "tool_calls", "function_call", "reasoning_content")
IMAGE_LIKE = re.compile(r"(?:image|img|picture|pic|photo)s?(?:_?(?:file|path|name|url|list)s?)?")
SYSTEM_LIKE = re.compile(r"system_?(?:prompt|message|text|instruction)")
# Where the text shows a video: alone at an end of a line, as LLaVA-NeXT writes it. Elsewhere it may be about HTML.
OTHER_MEDIA = re.compile(r"^[ \t]*(<(?:video|audio)>)|(<(?:video|audio)>)[ \t]*$", re.MULTILINE)
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
    """Return the record of one decoded JSON row; `where` begins the message of the InputError a bad row raises."""
    try:
        return _parse(row)
    except InputError as error:
        name = row_id(row)
        raise InputError(f"{where}{f' (id {name!r})' if name else ''}: {error}") from None


def parse_or_reject(row: Any, index: int) -> Record | Rejected:
    """Return the record of a decoded JSON row, or why it cannot be used; an InputError in its place is the reason."""
    try:
        return _parse(row)
    except InputError as error:
        return Rejected(index, row_id(row), str(error))


def _parse(row: Any) -> Record:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"expected an object with id and conversations, found {_kind(row)}")
    if not isinstance(row.get("id", ""), str | int) and not row_id(row):
        raise InputError(f"id is {_kind(row['id'])}, expected text")
    name = row_id(row)
    check_unicode(name, "id")
    unread = unread_keys(row, ROW_KEYS, TRAINING)
    turns = _parse_turns(row)
    for index, turn in enumerate(row["conversations"]):
        if len(turn) > 2:
            unread += _unread_of_turn(turn, index)
    images = parse_images(row)
    for image in images:
        _check_path(image, "image" if row.get("image") is not None else "images")
    _check_placeholders(turns, images)
    return Record(name, images, turns, tuple(dict.fromkeys(unread)))


def unread_keys(given: Mapping[str, Any], known: tuple[str, ...], more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the keys that are not `known` and hold something.

    Raises InputError for a key that could change what is meant. That is a key of other media, one of `more`, and one
    that looks like a known key which is not given.
    """
    if given.keys() <= set(known):
        return ()
    found = [key for key in given if key not in known and given[key] not in (None, "", [], {})]
    for key in found:
        if key in MEDIA:
            raise InputError(f"{key} is not read: only images are shown; remove it with its row, or alone")
        if key in more:
            raise InputError(f"{key} is not read, though it says what is trained; remove the row, or the key")
        meant = _meant(key, known)
        if meant and not any(given.get(name) for name in (meant, f"{meant}s")):
            raise InputError(f"{key} is not read: did you mean {meant}? Rename the key, or remove it")
    return tuple(found)


def unread_line(counts: Mapping[str, int], of: str) -> str:
    """Return a line for a person: the keys that were not read, and in how many `of` (rows, questions) each stands."""
    return "keys not read: " + ", ".join(f"{key} ({count:,} {of})" for key, count in counts.items())


@functools.cache
def _meant(key: str, known: tuple[str, ...]) -> str:
    """Return the known key that another one looks like; "" where it looks like none."""
    name = key.lower().replace("-", "_")
    if "image" in known and IMAGE_LIKE.fullmatch(name):
        return "image"
    if "system" in known and SYSTEM_LIKE.fullmatch(name):
        return "system"
    return next(iter(difflib.get_close_matches(name, [key for key in known if "id" not in key], 1, 0.8)), "")


def _unread_of_turn(turn: Mapping[str, Any], index: int) -> tuple[str, ...]:
    try:
        if turn.get("image") or turn.get("images"):
            raise InputError("an image of a turn is not read; name it in image or images of the row")
        return tuple(f"conversations.{key}" for key in unread_keys(turn, TURN_KEYS, TRAINING))
    except InputError as error:
        raise InputError(f"conversations[{index}]: {error}") from None


def row_id(row: Any) -> str:
    """Return the id of a decoded row as text; "" where it has none."""
    name = row.get("id", "") if isinstance(row, dict) else ""
    if isinstance(name, float) and name.is_integer():  # as pandas writes numbers next to missing ones
        name = int(name)
    return str(name) if isinstance(name, str | int) else ""


def _parse_turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    conversation = row.get("conversations")
    if not isinstance(conversation, list):
        raise InputError(f"conversations is {_kind(conversation)}, expected a list of turns")
    if not conversation:
        raise InputError("empty conversation; expected at least one human and one gpt turn")
    turns = [_parse_turn(turn, index) for index, turn in enumerate(conversation)]
    system = parse_system(row)
    if turns[0].speaker == "system":
        if system:
            raise InputError("system is given as a key and as a turn; keep one of them")
        turns = turns if turns[0].text else turns[1:]
    return (Turn("system", system), *turns) if system else tuple(turns)


def parse_system(row: Mapping[str, Any]) -> str:
    """Return the system text of a row or question; "" where it has none."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise InputError(f"system is {_kind(system)}, expected text")
    check_text(system, "system")
    return system if system.strip() else ""


def _parse_turn(turn: Any, index: int) -> Turn:
    if not isinstance(turn, dict):
        raise InputError(f"conversations[{index}] is {_kind(turn)}, expected an object with from and value")
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in SPEAKERS and (speaker != "system" or index > 0):
        where = ", or system in the first turn" if speaker == "system" else ""
        raise InputError(f"conversations[{index}]: unknown role {speaker!r} in from, expected human or gpt{where}")
    if not isinstance(text, str):
        problem = "missing value" if "value" not in turn else f"value is {_kind(text)}"
        raise InputError(f"conversations[{index}]: {problem}, expected text")
    if speaker == "human":
        check_text(text, "conversations", index)
    else:
        check_unicode(text, "conversations", index)
    if speaker == "system":
        return Turn(speaker, text if text.strip() else "")
    # The original writes an empty turn without its separator and then masks the whole row; here it is named instead.
    if not text or (speaker == "gpt" and text.isspace()):
        what = "answer" if speaker == "gpt" else "question"
        raise InputError(f"conversations[{index}]: empty {what}; remove the turn or fill it")
    return Turn(speaker, text, _is_target(turn, index))


def _is_target(turn: dict[str, Any], index: int) -> bool:
    weight = turn.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InputError(f"conversations[{index}]: weight is {weight!r}, expected 0 (not trained) or 1")
    if weight == 1 and turn["from"] == "human":
        raise InputError(f"conversations[{index}]: weight 1 on a human turn; only answers can be trained")
    return weight == 1 or turn["from"] == "human"


def parse_images(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a row or question names under `image` or `images`, as it is written there."""
    keys = [key for key in ("image", "images") if row.get(key) is not None]
    if len(keys) == 2:
        raise InputError("both image and images are given; keep one of them")
    if not keys:
        return ()
    images = row[keys[0]]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        raise InputError(f"{keys[0]} is {_kind(images)}, expected a path or a list of paths")
    return tuple(images)


def _check_path(image: Any, where: str) -> None:
    if isinstance(image, bytes) and image:
        return
    if not isinstance(image, str) or not image.strip():
        raise InputError(f"{where}: {image!r:.80} is no path; expected one below the images folder")
    if PLAIN_PATH.fullmatch(image):
        return
    check_unicode(image, where, fix="rename the file in UTF-8")
    parts = image.replace("\\", "/").split("/")
    if "://" in image or image.startswith("data:"):
        here = "a path below the images folder, or in a message a data: URL"
        raise InputError(f"{where}: {image!r:.80} is an address; expected {here}")
    absolute = image.startswith(("/", "\\")) or ntpath.splitdrive(image)[0] != ""
    if absolute or ".." in parts or "\0" in image:
        raise InputError(f"{where}: {image!r} leaves the images folder; expected a relative path without ..")


def _check_placeholders(turns: tuple[Turn, ...], images: tuple[str | bytes, ...]) -> None:
    for index, turn in enumerate(turns):
        if turn.speaker != "human" and IMAGE_PLACEHOLDER in turn.text:
            what = "an answer" if turn.speaker == "gpt" else "a system text"
            raise InputError(
                f"conversations[{index}]: {IMAGE_PLACEHOLDER} inside {what}; only a human turn may hold it"
            )
    found = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if found != len(images):
        raise InputError(
            f"{found} {IMAGE_PLACEHOLDER} in the human turns but {len(images)} "
            f"image{'' if len(images) == 1 else 's'} named; expected one placeholder an image"
        )


def check_text(text: str, where: str, index: int | None = None) -> None:
    """Raise InputError for what a human turn cannot hold: characters that are none, and media we do not show."""
    check_unicode(text, where, index)
    if "<" not in text:
        return
    found = OTHER_MEDIA.search(text)
    if found is not None and f"</{found[0].strip()[1:]}" not in text:
        where = where if index is None else f"{where}[{index}]"
        raise InputError(
            f"{where}: {found[0].strip()} is not read: only images are shown; remove it with its row, or alone"
        )


def check_unicode(text: str, where: str, index: int | None = None, fix: str = "give it in UTF-8") -> None:
    """Raise InputError where the text holds half a character, or a byte that is no UTF-8, which `fix` corrects."""
    if text.isascii():
        return
    where = where if index is None else f"{where}[{index}]"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            problem = f"byte 0x{code - 0xDC00:02X} at character {error.start} is not UTF-8; {fix}"
        else:
            problem = f"lone surrogate U+{code:04X} at character {error.start}; the text was cut inside a character"
        raise InputError(f"{where}: {problem}") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "nothing"}
    return names.get(type(value), "a number")


def count_words(record: Record) -> int:
    """Count the words of a row over all its turns as the file has them, placeholders included."""
    return sum(len(turn.text.split()) for turn in record.turns)


def single_turn(row_id: str, image: str | None, question: str, answer: str) -> dict[str, Any]:
    """Return a row of LLaVA's JSON with one question and one answer."""
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, **({} if image is None else {"image": image}), "conversations": said}
