"""MMBench, English and Chinese: a question counts when it is right in every order of its options.

The other orders are rows of their own, whose index is that of the question plus a multiple of a million: those of the
published file, or those that `prepare mmbench --all_rounds` makes.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import csv

from llava_jax.evaluate.answers import REFUSE, SCORES, Figures, groups, match, percent
from llava_jax.evaluate.prompts import LETTERS
from llava_jax.types import InputError

if TYPE_CHECKING:
    from openpyxl import Workbook

ROUND = 1_000_000
OPTIONS = LETTERS[:4]
NEEDED = ("index", "question", *OPTIONS)
NAMED = re.compile(r"\(?([A-D])(?:[).:,]+(?:\s.*)?)?", re.DOTALL)
# What the published submission leaves out, and where it puts the prediction.
NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_AT = 6
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # no spreadsheet holds them
LARGEST = 1 << 28  # bytes of a row, whose image stands in it

Row = dict[str, Any]


def score(annotations_path: str, answers_path: str, missing: str = REFUSE, all_rounds: bool = False) -> Figures:
    """Score an answers file on the published table of a split whose answers are published.

    Returns `accuracy` (percent of the questions, by circular evaluation), `single` (percent of the rows, each for
    itself), `count` (questions), `rows`, `unread` (answers that name no option), `categories` and `groups`. Raises
    InputError.
    """
    rows = read_annotations(annotations_path, all_rounds=all_rounds)
    if not has_answers(rows):
        raise InputError(f"{annotations_path}: has no answers; give --submission=FILE.xlsx, and that to the server")
    texts = match(answers_path, rows, annotations_path, missing=missing)
    chosen = {key: option_of(text, options_of(rows[key])) for key, text in texts.items()}
    right = {key: float(chosen.get(key) == row["answer"]) for key, row in rows.items()}
    circular: dict[str, float] = {}
    for key, row in rows.items():
        name = str(int(row["index"]) % ROUND)
        circular[name] = min(circular.get(name, 1.0), right[key])
    kinds = {
        column: {str(int(row["index"]) % ROUND): str(row.get(column)) for row in rows.values()}
        for column in ("category", "l2-category")
    }
    return {
        "accuracy": percent(circular.values()),
        "single": percent(right.values()),
        "count": len(circular),
        "rows": len(rows),
        "unread": sum(one is None for one in chosen.values()),
        "missing": len(rows) - len(texts),
        "categories": groups(circular, kinds["category"]),
        "groups": groups(circular, kinds["l2-category"]),
        SCORES: circular,
    }


def has_answers(rows: Mapping[str, Row]) -> bool:
    """Return whether the right answers are published with a table."""
    return all(row.get("answer") is not None for row in rows.values())


def option_of(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer names, by its letter or by its text; None for another answer."""
    text = text.strip()
    named = NAMED.fullmatch(text)
    if named:
        return named[1] if named[1] in LETTERS[: len(options)] else None
    plain = [option.strip().removesuffix(".").casefold() for option in options]
    found = text.removesuffix(".").casefold()
    return LETTERS[plain.index(found)] if found in plain else None


def options_of(row: Row) -> list[str]:
    """Return a row's options, up to the first that is empty."""
    options = [row[letter] for letter in OPTIONS]
    return options[: options.index(None)] if None in options else options


def read_annotations(path: str, *, images: bool = False, all_rounds: bool = False) -> dict[str, Row]:
    """Return the rows of the published table by their index; an empty cell, nan and none are None.

    `images` reads the column of that name, `all_rounds` adds the other orders of each question's options. Raises
    InputError.
    """
    try:
        reading = csv.ReadOptions(block_size=LARGEST)
        parsing = csv.ParseOptions(delimiter="\t", newlines_in_values=True)
        names = csv.open_csv(path, reading, parsing).schema.names
        lost = [name for name in NEEDED if name not in names]
        if lost:
            raise InputError(f"{path}: no column {' and '.join(lost)}; expected a table of MMBench with tabs between")
        columns = [name for name in names if images or name != "image"]
        converting = csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True
        )
        found = csv.read_csv(path, reading, parsing, converting).to_pylist()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a table of MMBench with tabs between") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a table of MMBench with tabs between") from error
    rows: dict[str, Row] = {}
    for row in ({name: None if is_none(cell) else cell for name, cell in row.items()} for row in found):
        if not str(row["index"]).isdecimal() or row["question"] is None or row["A"] is None:
            raise InputError(f"{path}: index {row['index']!r}: expected a number, a question and its options")
        letters = LETTERS[: len(options_of(row))]
        if row.get("answer") not in (None, *letters):
            raise InputError(f"{path}: index {row['index']}: answer is {row['answer']!r}, expected one of {letters}")
        for one in _rounds(row, path) if all_rounds else [row]:
            if one["index"] in rows:
                raise InputError(f"{path}: index {one['index']} is there twice, expected each once")
            rows[one["index"]] = one
    return rows


def is_none(cell: str | None) -> bool:
    """Return whether a cell counts as empty."""
    return cell is None or cell.lower() in ("", "nan", "none")


def new_book() -> "Workbook":
    """Return an empty spreadsheet. Raises InputError where openpyxl is not installed."""
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise InputError(
            'openpyxl is not installed, which writes spreadsheets: pip install "llava-jax[evaluate]"'
        ) from error
    return Workbook(write_only=True)


def write_submission(path: str, annotations_path: str, answers_path: str, missing: str = REFUSE) -> int:
    """Write the spreadsheet that the server takes and return its rows. Raises InputError."""
    book = new_book()
    from openpyxl.cell import WriteOnlyCell

    rows = read_annotations(annotations_path)
    texts = match(answers_path, rows, annotations_path, missing=missing)
    names = [name for name in next(iter(rows.values())) if name not in NOT_SUBMITTED]
    names.insert(PREDICTION_AT, "prediction")
    sheet = book.create_sheet()
    sheet.append(names)
    for key, row in rows.items():
        cells = []
        for name in names:
            cell = WriteOnlyCell(sheet, CONTROL.sub("", str({**row, "prediction": texts.get(key)}[name] or "")))
            cell.data_type = "s"  # an answer that begins with = is no formula
            cells.append(int(row["index"]) if name == "index" else cell)
        sheet.append(cells)
    book.save(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    return len(rows)


def _rounds(row: Row, path: str) -> list[Row]:
    """Return a row with its options in each of their orders, every one moved up by one from the one before."""
    options, index = options_of(row), int(row["index"])
    if index >= ROUND:
        raise InputError(f"{path}: holds the orders of the options already (index {index}); leave out --all_rounds")
    found = []
    for moved in range(len(options)):
        turned = options[moved:] + options[:moved]
        answer = row.get("answer")
        if answer is not None:
            answer = LETTERS[(LETTERS.index(answer) - moved) % len(options)]
        letters = dict(zip(LETTERS, turned, strict=False))
        found.append({**row, **letters, "answer": answer, "index": str(index + moved * ROUND)})
    return found
