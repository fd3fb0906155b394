"""Large JSON files read an element at a time, and what is wrong in them, with its line and byte."""

import codecs
import re
from collections.abc import Iterator
from typing import Any

import ijson

from llava_jax.types import InputError

PIECE, SCANNED = 1 << 16, 1 << 24  # bytes that are parsed, and looked through, at a time
BOM = codecs.BOM_UTF8
# A surrogate's escape without its other half, of which ijson's parser in C makes a question mark.
LONE = re.compile(
    rb"\\u(?:[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u)[dD][c-fC-F])"
)
# A file that is no JSON but begins with brackets: ijson's memory grows with the square of the depth.
DEEP = re.compile(rb"(?:[\[{]\s*){200}")
NOISE = re.compile(r"^(?:b')?(?:lexical|parse) error: |\.?(?:\n|\\n).*", re.DOTALL)


class _Object(dict):
    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            raise ValueError(f"key {key!r} twice in one object")
        super().__setitem__(key, value)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of json.loads' `object_pairs_hook`; ValueError where it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        named = _Object()
        for key, value in pairs:
            named[key] = value
    return found


def elements(path: str, prefix: str, expected: str) -> Iterator[Any]:
    """The elements at an ijson prefix: `item` of a file that is a list, `images.item` of an object's list.

    InputError where the file is not JSON, or is something else; `expected` ends the message. Memory holds one element.
    """
    parse = _parser(path, expected)
    opening = _opening(path)
    if opening != ("[" if prefix == "item" else "{"):
        raise _other_kind(path, opening, expected)
    found = ijson.sendable_list()
    parser = parse(found, prefix, use_float=True, map_type=_Object)
    for start, piece in _pieces(path, PIECE):
        try:
            parser.send(piece)
        except (ijson.JSONError, ValueError) as error:
            raise _broken(path, _place(path, parse, prefix, start), error, expected) from None
        yield from found
        found.clear()
    try:
        parser.close()
    except (ijson.JSONError, ValueError):
        raise _broken(path, None, "the file ends too early", expected) from None
    yield from found


def line_of(path: str, at: int) -> int:
    """The line of a file, counted from 1, in which byte `at` stands."""
    line, left = 1, at
    with open(path, "rb") as file:
        while piece := file.read(min(left, SCANNED)):
            line, left = line + piece.count(b"\n"), left - len(piece)
    return line


def utf8_pieces(path: str, expected: str) -> Iterator[bytes]:
    """The file piece by piece, a byte order mark left out; InputError names the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start, piece in _pieces(path, SCANNED):
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(piece)
        except UnicodeDecodeError as error:
            at = start - held + error.start
            raise InputError(f"{path}: not UTF-8 text (byte {at}); expected {expected}") from None
        yield piece
    if held := len(decoder.getstate()[0]):
        raise InputError(f"{path}: ends within a character ({held} bytes of it); expected {expected}")


def _pieces(path: str, size: int) -> Iterator[tuple[int, bytes]]:
    """(place in the file, bytes), without a byte order mark."""
    with open(path, "rb") as file:
        file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        while piece := file.read(size):
            yield file.tell() - len(piece), piece


def _parser(path: str, expected: str) -> Any:
    """ijson's parser: the one in C, or where that would change a text the slow one in Python."""
    rest, lone = b"", False
    for number, piece in enumerate(utf8_pieces(path, expected)):
        if number == 0 and DEEP.match(piece):
            raise InputError(f"{path}: not JSON that can be read: nested more than 200 deep; expected {expected}")
        # No escape reaches past a quote.
        head, _, rest = (rest + piece).rpartition(b'"')
        lone = lone or LONE.search(head) is not None
    return (ijson.get_backend("python") if lone else ijson).items_coro


def _place(path: str, parse: Any, prefix: str, last: int) -> int:
    """The byte at which the parser gives up, which it does not say: the piece at `last` is given to it byte by byte."""
    found = ijson.sendable_list()
    parser = parse(found, prefix, use_float=True, map_type=_Object)
    for start, piece in _pieces(path, PIECE):
        parts = [piece] if start < last else [piece[at : at + 1] for at in range(len(piece))]
        for at, part in enumerate(parts):
            try:
                parser.send(part)
            except (ijson.JSONError, ValueError):
                return start + at
        found.clear()
    return last


def _broken(path: str, at: int | None, reason: object, expected: str) -> InputError:
    where = "" if at is None else f", line {line_of(path, at)} (byte {at})"
    text = NOISE.sub("", str(reason))
    text = text.replace("trailing garbage", "more text after its end (one object a line belongs into a .jsonl file)")
    return InputError(f"{path}: not JSON: {text}{where}; expected {expected}")


def _opening(path: str) -> str:
    """The first character that is no blank; "" where there is none."""
    for _, piece in _pieces(path, PIECE):
        if piece.strip():
            return piece.lstrip()[:1].decode("utf-8", "replace")
    return ""


def _other_kind(path: str, opening: str, expected: str) -> InputError:
    kind = {"{": "an object", "[": "a list", '"': "text", "": "nothing"}.get(opening, "a number or a word")
    hint = _hint(path) if opening == "{" else ""
    return InputError(f"{path}: expected {expected}, found {kind}{hint}")


def _hint(path: str) -> str:
    """What to do with an object in place of a list of rows."""
    lists, error = [], None
    with open(path, "rb") as file:
        file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        try:
            lists = [name for name, event, _ in ijson.parse(file) if event == "start_array" and "." not in name]
        except ijson.JSONError as found:
            error = found
    if "conversations" in lists or "trailing garbage" in str(error):
        return "; one object a line belongs into a .jsonl file"
    return f"; if its list {lists[0]!r} holds the rows, write that alone" if lists else ""
