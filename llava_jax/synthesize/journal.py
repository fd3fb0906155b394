"""Keep every raw answer on disk before it counts, so that none is paid for twice.

An append-only JSONL file, one line per answer, good or bad, synced before `append` returns. A line that a kill left
incomplete is cut off the next time; no line is ever changed.
"""

import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.synthesize.teacher import Message, Reply
from llava_jax.types import InputError

BEGINS = b'{"key": "'  # of every line; a last line that begins otherwise is not half a line of ours, and stays


def key_of(context_id: str, kind: str, settings: Mapping[str, Any], messages: Sequence[Message]) -> str:
    """Return the key of a request's answers: another image, kind, prompt or setting gives another key."""
    text = json.dumps([context_id, kind, dict(settings), list(messages)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """The answers in the file `path`, or without a path in one that is gone with the process; thread-safe.

    Raises InputError when another process writes to it, when a line is not an answer, and when the disk is full.
    """

    def __init__(self, path: str | None):
        self.path = path
        self.tokens_in = self.tokens_out = self._answers = 0
        self.latest = ""  # when the newest answer came
        self._lock = threading.Lock()
        self._places: dict[str, list[tuple[int, int]]] = {}
        self._file = tempfile.TemporaryFile() if path is None else _open(path)  # noqa: SIM115, held with the journal
        self._end = self._read()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Return how many answers it holds."""
        return self._answers

    def replies(self, key: str) -> list[Reply]:
        """Return the answers to one request, in the order they came."""
        rows = [json.loads(os.pread(self._file.fileno(), size, at)) for at, size in self._places.get(key, ())]
        return [Reply(row["text"], row["finish"], row["tokens_in"], row["tokens_out"]) for row in rows]

    def append(self, key: str, context_id: str, kind: str, model: str, reply: Reply) -> None:
        """Save an answer; when this returns it is on the disk."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"key": key, "id": context_id, "kind": kind, "model": model, "at": now, **dataclasses.asdict(reply)}
        line = (json.dumps(row) + "\n").encode()
        with self._lock:
            self._write(line)
            self._count(key, row, self._end, len(line))
            self._end += len(line)

    def _write(self, line: bytes) -> None:
        number = self._file.fileno()
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(number, line[written:], self._end + written)
            if self.path is not None:
                os.fsync(number)
        except OSError as error:
            os.ftruncate(number, self._end)
            raise InputError(
                f"{self.path}: an answer cannot be saved ({error.strerror}); free some space and run again"
            ) from error

    def _read(self) -> int:
        """Count the lines and return the file's end; half a line there is cut off."""
        end, number = 0, 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n") and line.startswith(BEGINS[: len(line)]):
                os.ftruncate(self._file.fileno(), end)
                break
            try:
                row = json.loads(line)
                Reply(row["text"], row["finish"], row["tokens_in"], row["tokens_out"])
                self._count(row["key"], row, end, len(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path} line {number}: no saved answer ({type(error).__name__}); the file is damaged, "
                    "remove this line"
                ) from error
            end += len(line)
        return end

    def _count(self, key: str, row: dict, at: int, size: int) -> None:
        self._places.setdefault(key, []).append((at, size))
        self._answers += 1
        self.latest = max(self.latest, row.get("at", ""))
        self.tokens_in += row["tokens_in"]
        self.tokens_out += row["tokens_out"]


def _open(path: str) -> Any:
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")  # noqa: SIM115, held with the journal
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: another process is writing to it; wait for it, or name another output") from None
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)  # the name of a new file has to be on the disk as well
    finally:
        os.close(folder)
    return file
