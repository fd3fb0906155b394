"""Where each row of an annotations file stands in it, found in one pass that never holds the whole file.

The pass reads the file's bytes as Latin-1: what JSON is built of is ASCII, so places in the text are places in the
file. Every row of a list is decoded on the way, so such a file with an index is JSON throughout.
"""

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from llava_jax.data.sources import KEPT_ROWS, PIECE, code, keep, key_of, recall
from llava_jax.types import InputError

BLANK = re.compile(r"[ \t\n\r]*")
BOM = codecs.BOM_UTF8
# The longest row that is looked for; a file that is no JSON would otherwise be read whole.
LONGEST_ROW = 1 << 28
MORE = 1 << 16


def index_file(path: str, lines: bool, content: str) -> np.ndarray:
    """(start, length) of each row of a local file as int64[A, 2]: of a JSON list, or of JSON Lines without blank ones.

    `content` is the sha256 of the file, under which the index of a large one is kept. InputError when the file is no
    JSON list, not UTF-8, or holds no row; lines are not decoded.
    """
    name = key_of("index", code(), content, lines)
    kept = recall(name)
    if kept is not None:
        return kept["rows"]
    with open(path, "rb") as file:
        places = array("q")
        for start, length in (_lines if lines else _elements)(file, path):
            places.append(start)
            places.append(length)
    rows = np.array(places, np.int64).reshape(-1, 2)
    if not len(rows):
        raise InputError(f"{path}: no rows; expected LLaVA conversations")
    if len(rows) >= KEPT_ROWS:
        keep(name, {"rows": rows})
    return rows


def _pieces(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The file piece by piece, checked to be UTF-8."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        piece = file.read(PIECE)
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            at = before - held + error.start
            raise InputError(f"{path}: not UTF-8 text (byte {at}); expected LLaVA JSON or JSONL") from None
        if not piece:
            return
        before += len(piece)
        yield piece


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[int, int]]:
    start, rest = 0, b""
    for piece in _pieces(file, path):
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield from _line(line, start)
            start += len(line) + 1
    yield from _line(rest, start)


def _line(line: bytes, start: int) -> Iterator[tuple[int, int]]:
    skipped = len(BOM) if start == 0 and line.startswith(BOM) else 0
    if line[skipped:].strip():
        yield start + skipped, len(line) - skipped


class _Text:
    """A window of the file as Latin-1 text; `place` is where we stand in it, `before` what lies in front of it."""

    def __init__(self, file: BinaryIO, path: str):
        self.pieces, self.text, self.place, self.before, self.whole = _pieces(file, path), "", 0, 0, False

    def more(self) -> bool:
        """Reads on, letting go of what lies behind us; False at the end of the file."""
        piece = next(self.pieces, None)
        self.whole = piece is None
        if piece is not None:
            self.before += self.place
            self.text, self.place = self.text[self.place :] + piece.decode("latin-1"), 0
        return piece is not None

    def next_letter(self) -> str:
        """The next one that is no blank, where we then stand; "" at the end."""
        while True:
            self.place = BLANK.match(self.text, self.place).end()
            if self.place < len(self.text) or not self.more():
                return self.text[self.place : self.place + 1]


def _elements(file: BinaryIO, path: str) -> Iterator[tuple[int, int]]:
    text = _Text(file, path)
    if text.next_letter() == BOM.decode("latin-1")[0] and text.text.startswith(BOM.decode("latin-1")):
        text.place = len(BOM)
    decode = json.JSONDecoder().raw_decode
    opening = text.next_letter()
    if opening != "[":
        _value(decode, text, path)
        kind = {"{": "an object", '"': "text"}.get(opening, "a number or a word")
        hint = "; one object a line belongs into a .jsonl file" if opening == "{" else ""
        raise InputError(f"{path}: expected a JSON list of rows, found {kind}{hint}")
    text.place += 1
    if text.next_letter() == "]":
        return
    while True:
        text.next_letter()
        length = _value(decode, text, path)
        yield text.before + text.place, length
        text.place += length
        after = text.next_letter()
        if after not in (",", "]"):
            raise _broken(path, "expected ',' or ']'", text.before + text.place)
        text.place += 1
        if after == "]":
            break
    if text.next_letter():
        raise _broken(path, "more behind the list", text.before + text.place)


def line_of(path: str, at: int) -> int:
    """The line of a file, counted from 1, in which byte `at` stands."""
    line, left = 1, at
    with open(path, "rb") as file:
        while piece := file.read(min(left, PIECE)):
            line, left = line + piece.count(b"\n"), left - len(piece)
    return line


def _broken(path: str, what: str, at: int) -> InputError:
    return InputError(f"{path}: not JSON: {what}, line {line_of(path, at)} (byte {at}); expected a list of rows")


def _value(decode: Callable[[str, int], tuple], text: _Text, path: str) -> int:
    """Length of the JSON value where we stand, which is then in the window as a whole."""
    while True:
        if len(text.text) - text.place < MORE and not text.whole:
            text.more()
        try:
            end = decode(text.text, text.place)[1]
        except RecursionError as error:
            raise InputError(f"{path}: not JSON: {error}") from None
        except ValueError as error:
            if text.whole or len(text.text) - text.place > LONGEST_ROW or not text.more():
                at = text.before + getattr(error, "pos", text.place)
                raise _broken(path, str(getattr(error, "msg", error)).removesuffix(" at"), at) from None
            continue
        # A number at the end of the window may continue behind it; no row is one, so the next letter tells.
        return end - text.place
