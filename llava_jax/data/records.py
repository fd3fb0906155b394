"""Rows of LLaVA annotation files (JSON list or JSON Lines), checked one by one.

What a row must hold: `conversations` with strictly known speakers and non-empty texts, and as many `<image>` in the
human turns as it names pictures. Rows are counted from 0, as in `Batch.rows_BM`. Ids need not be unique.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Record, Turn

SPEAKERS = ("human", "gpt")


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: its index in the file, its id ("" where it has none) and the reason."""

    row: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}{f' (id {self.id!r})' if self.id else ''}: {self.reason}"


def load_records(path: str) -> list[Record]:
    """All rows of a file; raises InputError at the first row that cannot be used (`prepare verify` lists them all)."""
    records = []
    for entry in parse_records(path):
        if isinstance(entry, Rejected):
            raise InputError(f"{path}: {entry}")
        records.append(entry)
    return records


def parse_records(path: str) -> list[Record | Rejected]:
    """One entry a row; raises InputError when the file as a whole is no annotation file."""
    text = _read_text(path)
    if pathlib.PurePath(path).suffix.lower() in (".jsonl", ".ndjson"):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [_json_line(line, number) for number, line in lines]
    else:
        rows = _json_list(text, path)
    if not rows:
        raise InputError(f"{path}: no rows; expected LLaVA conversations")
    return [_parse_or_reject(row, index) for index, row in enumerate(rows)]


def parse_row(row: Any, where: str) -> Record:
    """The record of one decoded JSON row; `where` begins the message of the InputError a bad row raises."""
    try:
        return _parse(row)
    except InputError as error:
        name = _row_id(row)
        raise InputError(f"{where}{f' (id {name!r})' if name else ''}: {error}") from None


def _parse_or_reject(row: Any, index: int) -> Record | Rejected:
    try:
        return _parse(row)
    except InputError as error:
        return Rejected(index, _row_id(row), str(error))


def _parse(row: Any) -> Record:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"expected an object with id and conversations, found {_kind(row)}")
    if not isinstance(row.get("id", ""), str | int):
        raise InputError(f"id is {_kind(row['id'])}, expected text")
    _check_unicode(_row_id(row), "id")
    turns = _parse_turns(row)
    images = _parse_images(row)
    _check_placeholders(turns, images)
    return Record(_row_id(row), images, turns)


def _row_id(row: Any) -> str:
    name = row.get("id", "") if isinstance(row, dict) else ""
    return str(name) if isinstance(name, str | int) else ""


def _read_text(path: str) -> str:
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such annotations file; expected LLaVA JSON or JSONL")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); expected LLaVA JSON or JSONL") from None


def _json_list(text: str, path: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; one object a line belongs into a .jsonl file" if text.lstrip().startswith("{") else ""
        raise InputError(f"{path}: not JSON: {error}{hint}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of rows, found {_kind(rows)}")
    return rows


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"line {number} is not JSON: {error}")


def _parse_turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    conversation = row.get("conversations")
    if not isinstance(conversation, list):
        raise InputError(f"conversations is {_kind(conversation)}, expected a list of turns")
    if not conversation:
        raise InputError("empty conversation; expected at least one human and one gpt turn")
    return tuple(_parse_turn(turn, f"conversations[{index}]") for index, turn in enumerate(conversation))


def _parse_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise InputError(f"{where} is {_kind(turn)}, expected an object with from and value")
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in SPEAKERS:
        raise InputError(f"{where}: unknown role {speaker!r} in from, expected human or gpt")
    if not isinstance(text, str):
        problem = "missing value" if "value" not in turn else f"value is {_kind(text)}"
        raise InputError(f"{where}: {problem}, expected text")
    _check_unicode(text, where)
    # The original writes an empty turn without its separator and then masks the whole row; here it is named instead.
    if not (text.strip() if speaker == "gpt" else text):
        raise InputError(f"{where}: empty {'answer' if speaker == 'gpt' else 'question'}; remove the turn or fill it")
    return Turn(speaker, text)


def _parse_images(row: dict[str, Any]) -> tuple[str, ...]:
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
    if not isinstance(image, str) or not image.strip():
        raise InputError(f"{where}: {image!r} is no path; expected one below the images folder")
    _check_unicode(image, where)
    parts = image.replace("\\", "/").split("/")
    absolute = image.startswith(("/", "\\")) or pathlib.PureWindowsPath(image).drive != ""
    if absolute or ".." in parts or "\0" in image:
        raise InputError(f"{where}: {image!r} leaves the images folder; expected a relative path without ..")


def _check_placeholders(turns: tuple[Turn, ...], images: tuple[str, ...]) -> None:
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


def _check_unicode(text: str, where: str) -> None:
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
