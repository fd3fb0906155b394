"""Ask the teacher about every image that is still open, several at a time, each answer saved before it counts."""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from llava_jax.data.rows import Rejected, parse_or_reject
from llava_jax.synthesize.budget import Budget, BudgetSpent, metered
from llava_jax.synthesize.context import Context
from llava_jax.synthesize.journal import Journal, key_of
from llava_jax.synthesize.kinds import messages_for, turns_of
from llava_jax.synthesize.parse import RejectedReply
from llava_jax.synthesize.teacher import Message, Reply, RequestFailed, Teacher, estimate_messages
from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Turn

# So many requests without an answer one after the other, and it is not the requests.
FAILURES_IN_A_ROW = 20
SECONDS_BETWEEN_REPORTS = 10.0


@dataclasses.dataclass(frozen=True)
class Task:
    """One image and one kind: what is sent, the key of its answers; or the `problem` for which nothing is asked."""

    context: Context
    kind: str
    messages: list[Message]
    key: str
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the answers to a task have come to: its turns, or None; and the reason each answer is not used for."""

    turns: tuple[Turn, ...] | None
    replies: tuple[Reply, ...]
    reasons: tuple[str, ...]

    def settled(self, attempts: int) -> bool:
        return self.turns is not None or len(self.replies) >= attempts


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a run of `ask_all` did: answers saved, why requests failed, and why it stopped before the end."""

    answers: int
    failed: dict[str, int]
    stopped: str


def tasks_of(
    contexts: Iterable[Context], prompts: Mapping[str, list[Message]], settings: Mapping[str, Any], limit: int
) -> Iterator[Task]:
    """A task for each kind of `prompts` and each of the first `limit` contexts (all of them at 0), kind by kind."""
    for kind, examples in prompts.items():
        seen: set[str] = set()
        for number, context in enumerate(contexts):
            if limit and number >= limit:
                break
            messages = messages_for(context, kind, examples)
            problem = _problem(context, messages[-1]["content"], seen)
            seen.add(context.id)
            yield Task(context, kind, messages, key_of(context.id, kind, settings, messages), problem)


def _problem(context: Context, text: str, seen: Container[str]) -> str:
    """Why nothing is asked about an image, by training's own reader of rows as well; "" where something is."""
    if context.id in seen:
        return "id seen before in the contexts"
    if not context.captions:
        return "no captions"
    said = [{"from": "human", "value": IMAGE_PLACEHOLDER}, {"from": "gpt", "value": text}]
    row = parse_or_reject({"id": context.id, "image": context.image, "conversations": said}, 0)
    return f"its row: {row.reason}" if isinstance(row, Rejected) else ""


def judge(task: Task, replies: Iterable[Reply], seed: int) -> Verdict:
    """The first answer that can be used, and why those before it cannot."""
    read, reasons = [], []
    for reply in replies:
        read.append(reply)
        try:
            return Verdict(turns_of(reply, task.context, task.kind, seed), tuple(read), tuple(reasons))
        except RejectedReply as reason:
            reasons.append(str(reason))
    return Verdict(None, tuple(read), tuple(reasons))


class _Asker:
    """What the threads of `ask_all` share."""

    def __init__(
        self, teacher: Teacher, journal: Journal, budget: Budget, attempts: int, seed: int, stop: threading.Event
    ):
        self.teacher, self.journal, self.budget = teacher, journal, budget
        self.attempts, self.seed, self.stop = attempts, seed, stop
        self.answers = 0
        self._lock = threading.Lock()

    def settle(self, task: Task) -> None:
        """Asks until an answer can be used or there were enough of them."""
        while not judge(task, self.journal.replies(task.key), self.seed).settled(self.attempts):
            reserved = self.budget.reserve(task.messages, self.teacher.settings)
            reply = Reply("")
            try:
                if self.stop.is_set():
                    raise RequestFailed("stopped")
                reply = metered(self.teacher.answer(task.messages), estimate_messages(task.messages))
            finally:
                self.budget.settle(reserved, reply.tokens_in, reply.tokens_out)
            self.journal.append(task.key, task.context.id, task.kind, self.teacher.name, reply)
            with self._lock:
                self.answers += 1


@dataclasses.dataclass
class _Ended:
    """How the requests of `ask_all` ended: what failed, how often in a row, and whether the budget is spent."""

    name: str
    failed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    in_a_row: int = 0
    stopped: str = ""

    def take(self, future: concurrent.futures.Future[None]) -> None:
        try:
            future.result()
            self.in_a_row = 0
        except BudgetSpent as reason:
            self.stopped = str(reason)
        except RequestFailed as reason:
            self.failed[str(reason)] += 1
            self.in_a_row += 1
            if self.in_a_row == FAILURES_IN_A_ROW:
                raise InputError(f"{self.name}: {self.in_a_row} requests in a row failed: {reason}") from reason


def ask_all(
    tasks: Iterable[Task],
    teacher: Teacher,
    journal: Journal,
    budget: Budget,
    *,
    attempts: int,
    concurrency: int,
    seed: int,
    stop: threading.Event,
    say: Callable[[str], None],
) -> Asked:
    """Asks about every task that the journal does not settle; at most `concurrency` requests are under way.

    A request that fails is counted and left open for the next run. Raises InputError when no request can succeed;
    on the way out, as when the user interrupts, `stop` is set, which ends the waiting of threads.
    """
    asker = _Asker(teacher, journal, budget, attempts, seed, stop)
    ended, reported = _Ended(teacher.name), time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(concurrency)
    under_way: set[concurrent.futures.Future[None]] = set()
    coming = iter(tasks)
    try:
        while True:
            while not ended.stopped and len(under_way) < 2 * concurrency:
                task = next(coming, None)
                if task is None:
                    break
                if task.problem or judge(task, journal.replies(task.key), seed).settled(attempts):
                    continue
                under_way.add(pool.submit(asker.settle, task))
            if not under_way:
                return Asked(asker.answers, dict(ended.failed), ended.stopped)
            done, under_way = concurrent.futures.wait(
                under_way, timeout=SECONDS_BETWEEN_REPORTS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                ended.take(future)
            if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                spent = f"{budget.tokens_in + budget.tokens_out} tokens"
                say(f"{asker.answers} answers saved, {sum(ended.failed.values())} requests failed, {spent}")
    finally:
        # On the way out by an error nothing new is asked, and what is under way is saved when it comes.
        if under_way:
            stop.set()
            say("stopping; answers to the requests under way are still saved")
        pool.shutdown(wait=True, cancel_futures=True)
