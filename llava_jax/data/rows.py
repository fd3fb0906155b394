"""One row of annotations, checked, and made into LLaVA's form where it has another.

What a row must hold: `conversations` with strictly known speakers and non-empty texts, and as many `<image>` in the
human turns as it names or brings images. Ids need not be unique. Of the keys that we do not know, those that could
change what is trained or asked are refused by name, and the others are counted (`io.unread_keys`).
"""

import base64
import dataclasses
import ntpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llava_jax.io import check_text, check_unicode, unread_keys
from llava_jax.types import IMAGE_PLACEHOLDER, ImageBytes, InputError, Record, Turn

SPEAKERS = ("human", "gpt")
ROW_KEYS = ("id", "image", "images", "conversations", "system")
TURN_KEYS = ("from", "value", "weight")
# What another program would train otherwise for such a key.
TRAINING = ("weight", "train", "tools", "chosen", "rejected", "tool_calls", "function_call", "reasoning_content")
MAX_PATH = 4096  # as Linux has it
# Most paths; what else a path may be is looked at more closely.
PLAIN_PATH = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*(?:/[a-zA-Z0-9_-][a-zA-Z0-9_.-]*)*")


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: its index in the file, its id ("" where it has none) and the reason."""

    row: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}{f' (id {self.id!r:.80})' if self.id else ''}: {self.reason}"


def parse_row(row: Any, where: str) -> Record:
    """Return the record of one decoded JSON row; `where` begins the message of the InputError a bad row raises."""
    try:
        return _parse(row)
    except InputError as error:
        name = row_id(row)
        raise InputError(f"{where}{f' (id {name!r:.80})' if name else ''}: {error}") from None


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
        check_path(image, "image" if row.get("image") is not None else "images")
    _check_placeholders(turns, images)
    return Record(name, images, turns, tuple(dict.fromkeys(unread)))


def unread_line(counts: Mapping[str, int], of: str) -> str:
    """Return a line for a person: the keys that were not read, and in how many `of` (rows, questions) each stands."""
    return "keys not read: " + ", ".join(f"{key} ({count:,} {of})" for key, count in counts.items())


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
        raise InputError(f"conversations[{index}]: unknown role {speaker!r:.80} in from, expected human or gpt{where}")
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
        raise InputError(f"conversations[{index}]: weight is {weight!r:.80}, expected 0 (not trained) or 1")
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


def check_path(image: Any, where: str) -> None:
    """Raise InputError for an image that is neither the bytes of a file nor a path that stays below its folder."""
    if isinstance(image, bytes) and image:
        return
    if not isinstance(image, str) or not image.strip():
        raise InputError(f"{where}: {image!r:.80} is no path; expected one below the images folder")
    if len(image) <= MAX_PATH and PLAIN_PATH.fullmatch(image):
        return
    check_unicode(image, where, fix="rename the file in UTF-8")
    if len(image) > MAX_PATH:
        raise InputError(f"{where}: a path of {len(image):,} characters; expected at most {MAX_PATH}")
    parts = image.replace("\\", "/").split("/")
    if "://" in image or image.startswith("data:"):
        here = "a path below the images folder, or in a message a data: URL"
        raise InputError(f"{where}: {image!r:.80} is an address; expected {here}")
    absolute = image.startswith(("/", "\\")) or ntpath.splitdrive(image)[0] != ""
    if absolute or ".." in parts or "\0" in image:
        raise InputError(f"{where}: {image!r:.200} leaves the images folder; expected a relative path without ..")


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


# ---- other forms ----------------------------------------------------------------------------------------------------

# A conversation stands under `conversations` or `messages`, its turns with `from` and `value` or with `role` and
# `content`; content is text, or a list of parts. A part that is an image becomes `<image>` at its place, unless the
# texts of its message say with `<image>` where the images stand. One without a source is the next of the row's images.
CONVERSATION_KEYS = ("conversations", "messages")
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
        return dataclasses.replace(found, reason=re.sub(rf"^{CONVERSATION_KEYS[0]}\b", key, found.reason))
    return dataclasses.replace(
        found, unread=tuple(re.sub(rf"^{CONVERSATION_KEYS[0]}\b", key, name) for name in found.unread)
    )


def conversation_key(row: dict[str, Any]) -> str:
    """Return the key under which the conversation of a row stands. Raises InputError where both are given."""
    given = [key for key in CONVERSATION_KEYS if row.get(key) is not None]
    if len(given) == 2:
        raise InputError("both conversations and messages are given; keep one of them")
    return given[0] if given else CONVERSATION_KEYS[0]


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
    converted = {name: value for name, value in row.items() if name not in CONVERSATION_KEYS} | {"conversations": turns}
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
        raise InputError(f"unknown role {role!r:.80} in {name}, expected {expected}, or system in the first turn")
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
        raise InputError(f"type {what!r:.80} is not read, only text and images are; {EXPECTED_PART}")
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
        raise InputError(
            f"index is {part['index']!r:.80}, expected {images.taken}: the images of a row are shown in order"
        )
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


# ---- what a file holds -----------------------------------------------------------------------------------------------


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
