"""A large JSON object read piece by piece: COCO's annotation files have hundreds of megabytes, most of it outlines."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

from llava_jax.types import InputError

CHUNK = 1 << 20
SPACE = " \t\r\n"
AFTER = (*SPACE, ",", ":", "]", "}")


def items(path: str) -> Iterator[tuple[str, Any]]:
    """(key, element) of every element of the lists of the file's object, and (key, value) of what is no list.

    No more than a chunk of the file and one element are held. Raises InputError where it is no such object.
    """
    with open(path, encoding="utf-8-sig") as file:
        reader = _Reader(file)
        try:
            yield from _object(reader)
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}), expected COCO's annotations") from error


class _Reader:
    """The text of a file from some place on: as much of it as the next value needs."""

    def __init__(self, file: TextIO):
        self._file = file
        self._text = ""
        self._at = 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, *expected: str) -> str:
        """The next character that is no space, passed over; ValueError when it is not one of `expected`."""
        found = self.peek()
        if found not in expected or not found:
            raise ValueError(f"{f'{found!r}' if found else 'the end'} where {' or '.join(expected)} should be")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value, passed over."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except ValueError:
                if not self._more():
                    raise
                continue
            # A number that ends where the text ends, or at its point, may continue in the next chunk.
            if self._text[end : end + 1] in AFTER or not self._more():
                self._at = end
                return value

    def _more(self) -> bool:
        chunk = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


def _object(reader: _Reader) -> Iterator[tuple[str, Any]]:
    reader.take("{")
    following = "}" if reader.peek() == "}" else ","
    while following == ",":
        key = reader.value()
        if not isinstance(key, str):
            raise ValueError(f"{key!r:.40} where a name should be")
        reader.take(":")
        if reader.peek() == "[":
            yield from ((key, element) for element in _list(reader))
        else:
            yield key, reader.value()
        following = reader.take(",", "}")
    if reader.peek():
        raise ValueError("more text after the end of the object; one object a line belongs into a .jsonl file")


def _list(reader: _Reader) -> Iterator[Any]:
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
        return
    following = ","
    while following == ",":
        yield reader.value()
        following = reader.take(",", "]")
