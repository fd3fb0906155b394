"""How the tools of `prepare` read JSON, write rows that `train` takes, and replace a file in one move."""

import json
import os
from collections.abc import Iterable
from typing import Any

from llava_jax.types import InputError


def read_json(path: str, expected: str) -> Any:
    """The content of a JSON file; InputError names the file and what was `expected` of it."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; expected {expected}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected {expected}") from error


def single_turn(row_id: str, image: str | None, question: str, answer: str) -> dict[str, Any]:
    """A row of LLaVA's JSON with one question and one answer."""
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, **({} if image is None else {"image": image}), "conversations": said}


def write_rows(path: str, rows: Iterable[dict[str, Any]]) -> int:
    """Writes LLaVA's JSON, or JSONL where the name says so, a row a line; returns how many there are.

    The file appears under its name only when it is whole.
    """
    lines = path.lower().endswith((".jsonl", ".ndjson"))
    before, between, after = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    temporary, count = f"{path}.tmp", 0
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(before)
        for count, row in enumerate(rows, 1):
            file.write(("" if count == 1 else between) + json.dumps(row, ensure_ascii=False))
        file.write(after)
    os.replace(temporary, path)
    return count


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file for a person to read; it appears under its name only when it is whole."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
    os.replace(temporary, path)
