"""JSON Lines read with an answer to what is wrong in them, and files that stand under their name only when whole."""

import codecs
import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from llava_jax.types import InputError

# A full disk, a quota, a file system that holds no file of that size: so say the libraries that write, too.
NO_ROOM = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def each_line(path: str) -> Iterator[tuple[str, Any]]:
    """("line N", decoded) of every line that is not blank, one at a time; in place of one that is no JSON, why.

    InputError where the file is a JSON list, or has other line ends.
    """
    first = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                if first:
                    check_first_line(path, line, "a JSON list, expected one object a line")
                first = False
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    value = ValueError(f"not JSON ({error})")
                yield f"line {number}", value


def check_first_line(path: str, line: bytes, a_list: str) -> None:
    """Raise InputError where a file that begins with this line is no JSON Lines; `a_list` says so of a JSON list."""
    line = line.removeprefix(codecs.BOM_UTF8).strip()
    if line.startswith(b"["):
        raise InputError(f"{path}: {a_list}")
    if b"\r" in line:
        raise InputError(f"{path}: its lines end in a carriage return alone; write a line feed there")


def read_lines(path: str, expected: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, decoded) of every line of a JSONL file; `expected` says what a line holds.

    Raises InputError where there is no such file, at a line that is no JSON, and where there is no line.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, expected JSONL with {expected} per line")
    found = False
    for line, value in each_line(path):
        found = True
        if isinstance(value, ValueError):
            raise InputError(f"{path} {line}: {value}, expected {expected} per line")
        yield f"{path} {line}", value
    if not found:
        raise InputError(f"{path}: holds no rows, expected {expected} per line")


def write_rows(path: str, rows: Iterable[dict[str, Any]]) -> int:
    """Writes the rows of a data set as a JSON list, or as JSONL where the name says so; returns how many there are.

    The file appears under its name only when it is whole: an error of `rows` leaves what was there.
    """
    lines = path.lower().endswith((".jsonl", ".ndjson"))
    before, between, after = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    count = 0
    with replacing(path) as file:
        file.write(before)
        for count, row in enumerate(rows, 1):
            file.write(("" if count == 1 else between) + json.dumps(row, ensure_ascii=False))
        file.write(after)
    return count


def write_json(path: str, content: Any) -> None:
    """Write a JSON file for a person to read; it appears under its name only when it is whole."""
    with replacing(path) as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")


def no_room(error: BaseException) -> str:
    """Why nothing more can be written, where an error says so, whichever library raised it; "" for any other."""
    return next((reason for reason in NO_ROOM if reason in str(error)), "")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[TextIO]:
    """A text file that takes the name `path` when it is whole and on the disk; until then what was there stays.

    Processes that write to one name do not mix; the last one stays. Raises InputError when it cannot be written.
    """
    path = os.path.realpath(path)  # of a link the file behind it is replaced, not the link
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is no file, expected the name of one")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a file that can") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None:  # of a file that was read meanwhile, or of the name itself
            raise
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room, run again") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


LFS_POINTER = "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`, or download it"


def is_lfs_pointer(path: str) -> bool:
    """Return whether a file is what git keeps in place of one that git-lfs has not fetched."""
    with open(path, "rb") as file:
        return file.read(24) == b"version https://git-lfs."
