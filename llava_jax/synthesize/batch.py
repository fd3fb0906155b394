"""Batch mode: write the open requests as the file that a batch service takes, and join its output by id.

Source of both formats: OpenAI's Batch API; `vllm run-batch` takes and writes the same lines.
"""

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llava_jax.io import read_lines, replacing
from llava_jax.synthesize.budget import Budget, BudgetSpent, metered
from llava_jax.synthesize.journal import Journal
from llava_jax.synthesize.scheduler import Task, judge
from llava_jax.synthesize.teacher import estimate_messages, read_completion
from llava_jax.types import InputError

# OpenAI's limits for one file; more requests go into further files.
MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000


@dataclasses.dataclass(frozen=True)
class Joined:
    """What `join_output` did: answers saved, those saved before, lines of other requests, failed requests by reason."""

    answers: int
    known: int
    foreign: int
    failed: dict[str, int]

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {reason}" for reason, count in self.failed.items())
        joined = f"{self.answers} answers joined, {self.known} of them known before"
        lost = f"{sum(self.failed.values())} failed" + (f" ({failed})" if failed else "")
        return f"{joined}, {self.foreign} lines of other requests, {lost}"


def write_input(
    path: str,
    tasks: Iterable[Task],
    journal: Journal,
    settings: Mapping[str, Any],
    budget: Budget,
    attempts: int,
) -> tuple[int, list[str], str]:
    """Write a request for every task that the journal does not settle, as far as the budget allows.

    Returns the number of requests, the files, and why it stopped before the last task, "" if it did not.

    The first file is `path`; FILE-2.jsonl, FILE-3.jsonl … follow where one cannot hold them all. They appear once all
    are complete. Raises InputError where one of them exists: it may be the only copy of paid answers.
    """
    files: list[str] = []
    count = in_file = size = 0
    stopped = ""
    with contextlib.ExitStack() as stack:
        for task in tasks:
            replies = journal.replies(task.key)
            if task.problem or judge(task, replies).settled(attempts):
                continue
            try:
                budget.reserve(task.messages, settings, wait=False)
            except BudgetSpent as reason:
                stopped = str(reason)
                break
            # The id says how many answers came before, so that a repeated answer counts again.
            request = {"custom_id": f"{task.key}-{len(replies)}", "method": "POST", "url": "/v1/chat/completions"}
            line = json.dumps({**request, "body": {**settings, "messages": task.messages}}) + "\n"
            if not files or in_file == MAX_REQUESTS or size + len(line) > MAX_BYTES:
                stem, end = os.path.splitext(path)
                files.append(path if not files else f"{stem}-{len(files) + 1}{end}")
                if os.path.exists(files[-1]):
                    raise InputError(f"{files[-1]}: is there already; remove it, or name another file for the requests")
                file, in_file, size = stack.enter_context(replacing(files[-1])), 0, 0
            file.write(line)
            count, in_file, size = count + 1, in_file + 1, size + len(line)
    return count, files, stopped


def join_output(paths: Sequence[str], tasks: Iterable[Task], journal: Journal, model: str) -> Joined:
    """Save the answers of a batch's output files in the journal, in whatever order they come.

    Joining a file twice adds nothing. Raises InputError for a line that is not of a batch's output.
    """
    asked = {task.key: (task.id, task.kind, estimate_messages(task.messages)) for task in tasks}
    answers = known = foreign = 0
    failed: collections.Counter[str] = collections.Counter()
    for path in paths:
        for custom_id, response, problem in _lines(path):
            key, _, before = custom_id.rpartition("-")
            if key not in asked or not before.isdecimal():
                foreign += 1
                continue
            if problem:
                failed[problem] += 1
                continue
            context_id, kind, tokens = asked[key]
            try:
                reply = metered(read_completion(response), tokens)
            except ValueError:
                failed["no chat completion"] += 1
                continue
            answers += 1
            saved = [one.text for one in journal.replies(key)]
            if int(before) < len(saved) and reply.text in saved:
                known += 1
            else:
                journal.append(key, context_id, kind, model, reply)
    return Joined(answers, known, foreign, dict(failed))


def _lines(path: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (custom_id, body of the response, why there is no answer in it or "") of each line."""
    for where, row in read_lines(path, "one answer of a batch"):
        if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
            raise InputError(f"{where}: no custom_id, expected a line of a batch's output")
        response, error = row.get("response"), row.get("error")
        if not isinstance(response, dict):
            code = error.get("code") if isinstance(error, dict) else None
            yield row["custom_id"], None, str(code or "unknown error")
        elif response.get("status_code") != 200:
            yield row["custom_id"], None, f"status {response.get('status_code')}"
        else:
            yield row["custom_id"], response.get("body"), ""
