"""Ask a judge, a language model, through the client, the journal and the budget of `synthesize`."""

import dataclasses
import hashlib
import json
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Any

from llava_jax.synthesize.budget import Budget, Prices
from llava_jax.synthesize.journal import Journal
from llava_jax.synthesize.scheduler import Result, Task, Verdict, ask_all, judge
from llava_jax.synthesize.teacher import Teacher


def journal_of(output: str) -> str:
    """Return where the judge's answers are saved: next to the reviews, with another suffix."""
    return os.path.splitext(output)[0] + ".journal.jsonl"


@dataclasses.dataclass(frozen=True)
class Judge:
    """Who judges and what it may cost: as in `ask_all` and `Budget`. `attempts` are answers until one can be read.

    `sharing` are the reviews of other benchmarks, whose answers the budget pays as well.
    """

    teacher: Teacher
    stop: threading.Event
    attempts: int = 5
    concurrency: int = 8
    tokens: int = 0
    money: float = 0.0
    prices: Prices | None = None
    say: Callable[[str], None] = print
    sharing: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Judged:
    """The verdict on each task, and what happened on the way: answers that could not be read, judgings without any."""

    verdicts: list[Verdict[Any]]
    about: dict[str, Any]
    stopped: str

    @property
    def counts(self) -> dict[str, int]:
        """What to tell of the judge's failures: judgings without a score, answers asked for again, none at all."""
        return {
            "failed": sum(one.result is None for one in self.verdicts),
            "unreadable_answers": sum(len(one.reasons) for one in self.verdicts),
            "unanswered": sum(one.result is None and not one.replies for one in self.verdicts),
        }


def ask(tasks: Sequence[Task[Result]], who: Judge, output: str, prompt: Any) -> Judged:
    """Judge what the journal of `output` does not settle, and return the verdicts in the order of the tasks.

    `prompt` is what all tasks share; its hash, the judge's name and the day of its newest answer say who judged how.
    """
    others = [_spent(journal_of(one)) for one in who.sharing]
    with Journal(journal_of(output)) as journal:
        tokens_in, tokens_out = map(sum, zip((journal.tokens_in, journal.tokens_out), *others, strict=True))
        budget = Budget(who.tokens, who.money, who.prices, tokens_in, tokens_out)
        asked = ask_all(
            tasks,
            who.teacher,
            journal,
            budget,
            attempts=who.attempts,
            concurrency=who.concurrency,
            stop=who.stop,
            say=who.say,
        )
        verdicts = [judge(task, journal.replies(task.key)) for task in tasks]
        digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]
        about = {"name": who.teacher.name, "date": journal.latest[:10], "prompt_hash": digest}
    return Judged(verdicts, about, "; ".join([*asked.failed, *filter(None, [asked.stopped])]))


def _spent(path: str) -> tuple[int, int]:
    """Return the tokens asked and answered that a journal holds; none where there is no file."""
    if not os.path.exists(path):
        return 0, 0
    with Journal(path) as journal:
        return journal.tokens_in, journal.tokens_out


def mean_and_sd(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return the mean of a figure's repeats that have it, and their standard deviation where there are several."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None
