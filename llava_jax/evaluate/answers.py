"""What every benchmark shares: questions and answers matched by id, and figures as a table.

A score is a dict of figures. Its `scores` hold the share of right (0 to 1) of each question, which `evaluate compare`
pairs and `evaluate report` shows; the table leaves them out.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from llava_jax.io import check_unicode, read_lines
from llava_jax.types import InputError

Figures = dict[str, Any]
REFUSE, WRONG = "refuse", "wrong"  # what to do with questions that have no answer
SCORES = "scores"
KINDS = {str: "a text", list: "a list", dict: "an object", int: "a whole number", str | int: "a text or a number"}


def field(row: Any, name: str, kind: Any, where: str) -> Any:
    """Return a field of a decoded JSON object. Raises InputError, which says where, when it is not of that kind."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"{name} is {value!r:.60}" if isinstance(row, dict) and name in row else f"no {name}"
        raise InputError(f"{where}: {found}, expected {KINDS[kind]}")
    if isinstance(value, str):
        check_unicode(value, f"{where}: {name}")
    return value


def by_id(row: Mapping[str, Any], where: str) -> str:
    """Return a row's question_id as text: some files write a number where others quote it."""
    return str(field(row, "question_id", str | int, where))


def by_prompt(row: Mapping[str, Any], where: str) -> str:
    """Return an answer's question_id and `prompt`, the text of the question: several can share an id."""
    return with_text(by_id(row, where), field(row, "prompt", str, where).strip())


def by_text(row: Mapping[str, Any], where: str) -> str:
    """Return the same of a question."""
    return with_text(by_id(row, where), field(row, "text", str, where).strip())


def with_text(question_id: str, text: str) -> str:
    """Return the key of a question that shares its id with others."""
    return f"{question_id} | {text}"


def read_rows(path: str, texts: tuple[str, ...], key: Callable[..., str] = by_id) -> dict[str, dict[str, Any]]:
    """Return the rows of a JSONL file by their key; each holds the fields `texts`, all of them strings.

    Raises InputError where a row is anything else, or has the key of an earlier one.
    """
    rows: dict[str, dict[str, Any]] = {}
    for where, row in read_lines(path, f"an object with question_id, {', '.join(texts)}"):
        found = key(row, where)
        for name in texts:
            field(row, name, str, where)
        if found in rows:
            raise InputError(f"{where}: question {found} is there twice, expected each once")
        rows[found] = row
    return rows


def match(
    answers_path: str,
    asked: Collection[str],
    asked_in: str,
    *,
    missing: str = REFUSE,
    key: Callable[..., str] = by_id,
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the text of each answer in an answers file, which answers the questions `asked` and no others.

    Args:
      answers_path: JSONL with question_id and text, as `generate` writes it.
      asked: the questions' keys.
      asked_in: the file they are from, for messages.
      missing: "refuse" raises where a question has no answer, "wrong" leaves it out of the result.
      key: of an answer.
      elsewhere: what else is known of a key, as the split it belongs to.

    Raises InputError for an answer to another question, or two answers to one.
    """
    answers = read_rows(answers_path, ("text",), key)
    strangers = [found for found in answers if found not in asked]
    if strangers:
        known = (elsewhere or {}).get(strangers[0])
        raise InputError(
            f"{answers_path}: answers question {strangers[0]}, which {asked_in} does not ask"
            f"{f' ({known})' if known else ''} ({len(strangers)} such); give the answers to these questions"
        )
    open_ones = [one for one in asked if one not in answers]
    if open_ones and missing == REFUSE:
        raise InputError(
            f"{answers_path}: {len(open_ones)} of {len(asked)} questions of {asked_in} have no answer, the first "
            f"{open_ones[0]}; answer them (`generate` resumes the file), or give --missing=wrong"
        )
    return {found: row["text"] for found, row in answers.items()}


def percent(scores: Collection[float]) -> float:
    """Return the mean of shares of right in percent; 0 of none."""
    return 100.0 * sum(scores) / len(scores) if scores else 0.0


def groups(scores: Mapping[str, float], group_of: Mapping[str, str]) -> dict[str, float]:
    """Return the percentage of each group of questions."""
    found: dict[str, list[float]] = {}
    for name, score in scores.items():
        found.setdefault(group_of[name], []).append(score)
    return {group: percent(found[group]) for group in sorted(found)}


# ---- the table ------------------------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """Return figures as text: a line a number, and groups of the same numbers as rows below their names."""
    parts = []
    for header, rows in itertools.groupby(_rows(figures), key=lambda row: row[0]):
        parts.append(aligned([*([header] if header else []), *(row for _, row in rows)]))
    return "\n\n".join(parts)


def _rows(figures: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yield (header, row): a number has no header, and each of a group of groups is a row."""
    for name, value in figures.items():
        if name == SCORES or isinstance(value, list):
            continue
        if not isinstance(value, Mapping):
            yield (), (name, shown(value))
            continue
        nested = value and all(isinstance(one, Mapping) for one in value.values())
        for label, one in value.items() if nested else [(name, value)]:
            plain = {key: each for key, each in one.items() if not isinstance(each, Mapping | list)}
            yield ("", *plain), (label, *map(shown, plain.values()))


def shown(value: Any) -> str:
    """Return a figure as tables show it."""
    if isinstance(value, float):
        return f"{value:.4f}" if 0 < abs(value) < 1 else f"{value:.2f}"
    return "" if value is None else str(value)


def aligned(rows: Collection[tuple[str, ...]]) -> str:
    """Return rows of cells as lines of columns, the first one to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
