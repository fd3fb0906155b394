"""Where each row of an annotations file stands in it, found in one pass that never holds the whole file.

A JSON list is written into the cache as JSON Lines first, once for each content.
"""

import json
import os
from array import array
from collections.abc import Iterator

import numpy as np

from llava_jax.data.json_stream import BOM, elements, utf8_pieces
from llava_jax.data.sources import KEPT_ROWS, code, keep, kept_path, key_of, recall, whole
from llava_jax.io import check_first_line
from llava_jax.types import InputError


def lines_of_list(path: str, content: str) -> str:
    """The file with the rows of a JSON list a line, which is made where the cache has none of this `content` (sha256).

    InputError when the list is none, and when the cache cannot be written.
    """
    lines = kept_path(key_of("lines", code(), content), ".jsonl")
    try:
        if not os.path.isfile(lines):
            with whole(lines) as file:
                for row in elements(path, "item", "a JSON list of rows"):
                    file.write(json.dumps(row).encode() + b"\n")
        os.utime(lines)
    except OSError as error:
        raise InputError(
            f"{lines}: cannot be written ({error.strerror}), and the rows of {path} are kept there: make room, name "
            "another folder in LLAVA_JAX_CACHE, or give the rows as a .jsonl file"
        ) from error
    return lines


def index_lines(path: str, content: str) -> np.ndarray:
    """(start, length) of each line of a local JSON Lines file that is not blank, as int64[A, 2].

    `content` is the sha256 of the file, under which the index of a large one is kept. InputError when the file is not
    UTF-8, a JSON list, or holds no row; lines are not decoded.
    """
    name = key_of("index", code(), content)
    kept = recall(name)
    if kept is not None:
        return kept["rows"]
    places = array("q")
    for start, line in _lines(path):
        if line.strip():
            if not places:
                check_first_line(path, line, "a JSON list of rows: name it .json")
            places.extend((start, len(line)))
    rows = np.array(places, np.int64).reshape(-1, 2)
    if not len(rows):
        raise InputError(f"{path}: no rows; expected LLaVA conversations")
    if len(rows) >= KEPT_ROWS:
        keep(name, {"rows": rows})
    return rows


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        start, rest = len(BOM) if file.read(len(BOM)) == BOM else 0, b""
    for piece in utf8_pieces(path, "LLaVA JSON or JSONL"):
        *complete, rest = (rest + piece).split(b"\n")
        for line in complete:
            yield start, line
            start += len(line) + 1
    yield start, rest
