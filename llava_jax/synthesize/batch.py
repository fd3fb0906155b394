"""Batch mode: the open requests as the file a batch service takes, and its output joined by id.

Source of both formats: OpenAI's Batch API; `vllm run-batch` takes and writes the same lines.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llava_jax.synthesize.asking import Task, judge
from llava_jax.synthesize.budget import metered
from llava_jax.synthesize.journal import Journal
from llava_jax.synthesize.teacher import estimate_messages, read_completion
from llava_jax.types import InputError

# What OpenAI takes in one file; more requests go into further files.
MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000


@dataclasses.dataclass(frozen=True)
class Joined:
    """What `join_output` did: answers saved, those saved before, lines of other requests, failed requests by reason."""

    answers: int
    known: int
    foreign: int
    failed: dict[str, int]

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {reason}" for reason, count in self.failed.items())
        lines = (
            f"{self.answers} answers joined, {self.known} of them known before, {self.foreign} lines of other requests"
        )
        return f"{lines}, {sum(self.failed.values())} failed" + (f" ({failed})" if failed else "")


def write_input(
    path: str, tasks: Iterable[Task], journal: Journal, settings: Mapping[str, Any], attempts: int, seed: int
) -> tuple[int, list[str]]:
    """Writes a request for every task that the journal does not settle: (how many, the files).

    The first file is `path`; FILE-2.jsonl, FILE-3.jsonl … follow where one cannot hold them all.
    """
    files: list[str] = []
    count = in_file = size = 0
    file = None
    try:
        for task in tasks:
            if task.problem or judge(task, journal.replies(task.key), seed).settled(attempts):
                continue
            line = (json.dumps(_request(task, settings), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
            if file is None or in_file == MOST_REQUESTS or size + len(line) > MOST_BYTES:
                if file is not None:
                    file.close()
                stem, end = os.path.splitext(path)
                files.append(path if not files else f"{stem}-{len(files) + 1}{end}")
                file, in_file, size = open(files[-1], "wb"), 0, 0
            file.write(line)
            count, in_file, size = count + 1, in_file + 1, size + len(line)
    finally:
        if file is not None:
            file.close()
    return count, files


def _request(task: Task, settings: Mapping[str, Any]) -> dict[str, Any]:
    body = {**settings, "messages": task.messages}
    return {"custom_id": task.key, "method": "POST", "url": "/v1/chat/completions", "body": body}


def join_output(paths: Sequence[str], tasks: Iterable[Task], journal: Journal, model: str) -> Joined:
    """Saves the answers of a batch's output files in the journal, in whatever order they stand.

    The same file joined twice adds nothing. Raises InputError for a line that is none of a batch's output.
    """
    asked = {task.key: (task.context.id, task.kind, estimate_messages(task.messages)) for task in tasks}
    answers = known = foreign = 0
    failed: collections.Counter[str] = collections.Counter()
    for path in paths:
        for where, key, response in _lines(path):
            if key not in asked:
                foreign += 1
                continue
            if response.get("status_code") != 200:
                failed[str(response.get("problem", f"status {response.get('status_code')}"))] += 1
                continue
            try:
                context_id, kind, tokens = asked[key]
                reply = metered(read_completion(response.get("body")), tokens)
            except ValueError as error:
                raise InputError(f"{where}: {error}; expected the answer of a chat completion") from error
            answers += 1
            if any(saved.text == reply.text for saved in journal.replies(key)):
                known += 1
            else:
                journal.append(key, context_id, kind, model, reply)
    return Joined(answers, known, foreign, dict(failed))


def _lines(path: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, custom_id, response) of each line; that of a request that never ran has its `problem`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
                key, response, error = str(row["custom_id"]), row.get("response"), row.get("error")
            except (ValueError, TypeError, KeyError, AttributeError) as problem:
                raise InputError(f"{where}: no line of a batch's output ({problem!r:.80})") from problem
            if isinstance(response, dict):
                yield where, key, response
            else:
                code = error.get("code", "unknown") if isinstance(error, dict) else "unknown"
                yield where, key, {"problem": code}
