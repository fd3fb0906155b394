"""How the tools of `prepare` read JSON, and the rows they make."""

import json
import os
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
