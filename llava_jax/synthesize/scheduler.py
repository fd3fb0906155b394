"""Ask a model everything that is still open, several requests at a time; every answer is saved before it counts."""

import collections
import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from llava_jax.data.rows import Rejected, parse_or_reject
from llava_jax.synthesize.budget import Budget, BudgetSpent, metered
from llava_jax.synthesize.context import Context
from llava_jax.synthesize.journal import Journal, key_of
from llava_jax.synthesize.kinds import messages_for, turns_of
from llava_jax.synthesize.parse import RejectedReply
from llava_jax.synthesize.teacher import Message, Reply, RequestFailed, Teacher, estimate_messages
from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Turn

FAILURES_IN_A_ROW = 20  # after so many the fault is not in the requests
SECONDS_BETWEEN_REPORTS = 10.0
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Task(Generic[Result]):
    """One request: what is sent, the key of its answers, or the `problem` for which nothing is asked.

    `read` makes the result of an answer, or raises RejectedReply; `image` is that of instruction data.
    """

    id: str
    kind: str
    messages: list[Message]
    key: str
    read: Callable[[Reply], Result]
    problem: str = ""
    image: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict(Generic[Result]):
    """The result of a task's answers, or None, and for each rejected answer the reason."""

    result: Result | None
    replies: tuple[Reply, ...]
    reasons: tuple[str, ...]

    def settled(self, attempts: int) -> bool:
        return self.result is not None or len(self.replies) >= attempts


@dataclasses.dataclass
class Asked:
    """What a run of `ask_all` did: why requests failed, how many in a row, and why it stopped before the end."""

    failed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    in_a_row: int = 0
    stopped: str = ""

    def count(self, future: concurrent.futures.Future[None], name: str) -> None:
        """Count how one request ended. Raises InputError after FAILURES_IN_A_ROW."""
        try:
            future.result()
            self.in_a_row = 0
        except BudgetSpent as reason:
            self.stopped = str(reason)
        except RequestFailed as reason:
            self.failed[str(reason)] += 1
            self.in_a_row += 1
            if self.in_a_row == FAILURES_IN_A_ROW:
                raise InputError(f"{name}: {self.in_a_row} requests in a row failed: {reason}") from reason


def tasks_of(
    contexts: Iterable[Context],
    prompts: Mapping[str, list[Message]],
    settings: Mapping[str, Any],
    limit: int,
    seed: int,
) -> Iterator[Task[tuple[Turn, ...]]]:
    """Yield a task for each kind of `prompts` and each of the first `limit` contexts (0: all), kind by kind.

    `seed` is that of `turns_of`.
    """
    for kind, examples in prompts.items():
        seen: set[str] = set()
        for number, context in enumerate(contexts):
            if limit and number >= limit:
                break
            messages = messages_for(context, kind, examples)
            problem = _problem(context, messages[-1]["content"], seen)
            seen.add(context.id)
            key = key_of(context.id, kind, settings, messages)
            read = functools.partial(turns_of, context=context, kind=kind, seed=seed)
            yield Task(context.id, kind, messages, key, read, problem, context.image)


def _problem(context: Context, text: str, seen: Container[str]) -> str:
    """Return why nothing is asked about an image, "" otherwise; training's reader of rows decides as well."""
    if context.id in seen:
        return "id seen before in the contexts"
    if not context.captions:
        return "no captions"
    turns = [{"from": "human", "value": IMAGE_PLACEHOLDER}, {"from": "gpt", "value": text}]
    row = parse_or_reject({"id": context.id, "image": context.image, "conversations": turns}, 0)
    return f"its row: {row.reason}" if isinstance(row, Rejected) else ""


def judge(task: Task[Result], replies: Iterable[Reply]) -> Verdict[Result]:
    """Return the result of the first answer that can be used, and why those before it cannot."""
    read, reasons = [], []
    for reply in replies:
        read.append(reply)
        try:
            return Verdict(task.read(reply), tuple(read), tuple(reasons))
        except RejectedReply as reason:
            reasons.append(str(reason))
    return Verdict(None, tuple(read), tuple(reasons))


def ask(task: Task, teacher: Teacher, journal: Journal, budget: Budget, attempts: int, stop: threading.Event) -> None:
    """Ask until an answer can be used or `attempts` of them are there; each is saved and charged to the budget.

    Raises what the teacher and the budget do, and RequestFailed once `stop` is set.
    """
    while not judge(task, journal.replies(task.key)).settled(attempts):
        reserved = budget.reserve(task.messages, teacher.settings)
        reply = Reply("")
        try:
            if stop.is_set():
                raise RequestFailed("stopped")
            reply = metered(teacher.answer(task.messages), estimate_messages(task.messages))
        finally:
            budget.settle(reserved, reply.tokens_in, reply.tokens_out)
        journal.append(task.key, task.id, task.kind, teacher.name, reply)


def ask_all(
    tasks: Iterable[Task],
    teacher: Teacher,
    journal: Journal,
    budget: Budget,
    *,
    attempts: int,
    concurrency: int,
    stop: threading.Event,
    say: Callable[[str], None],
) -> Asked:
    """Ask about every task that the journal does not settle; at most `concurrency` requests are in flight.

    A request that fails is counted and left open for the next run. Raises InputError when no request can succeed.
    `stop` is set on the way out of an error, as when the user interrupts: it ends the threads' waiting.

    Args:
      tasks: of a job.
      teacher, journal, budget: what is asked, where its answers are saved, and what they may cost.
      attempts: answers to one request until one can be used.
      concurrency: requests in flight.
      stop: ends the waiting between tries.
      say: prints the progress.
    """
    asked, saved, reported = Asked(), len(journal), time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(concurrency)
    in_flight: set[concurrent.futures.Future[None]] = set()
    coming = iter(tasks)
    try:
        while True:
            while not asked.stopped and len(in_flight) < 2 * concurrency:
                task = next(coming, None)
                if task is None:
                    break
                if task.problem or judge(task, journal.replies(task.key)).settled(attempts):
                    continue
                in_flight.add(pool.submit(ask, task, teacher, journal, budget, attempts, stop))
            if not in_flight:
                return asked
            done, in_flight = concurrent.futures.wait(
                in_flight, timeout=SECONDS_BETWEEN_REPORTS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                asked.count(future, teacher.name)
            if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                spent = f"{budget.tokens_in + budget.tokens_out} tokens"
                say(f"{len(journal) - saved} answers saved, {asked.failed.total()} requests failed, {spent}")
    finally:
        # After an error nothing new is asked, and what is in flight is saved when it comes.
        if in_flight:
            stop.set()
            say("stopping; answers to the requests in flight are still saved")
        pool.shutdown(wait=True, cancel_futures=True)
