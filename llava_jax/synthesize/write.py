"""Instruction data in LLaVA's JSON, written by a language-only teacher from captions and boxes (`synthesize`)."""

import collections
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from llava_jax.io import replacing, write_rows
from llava_jax.synthesize.budget import Budget, Prices, longest_answer
from llava_jax.synthesize.card import Card, Tally, card_page, card_text
from llava_jax.synthesize.context import Context, open_contexts
from llava_jax.synthesize.journal import Journal
from llava_jax.synthesize.kinds import KINDS, load_prompts
from llava_jax.synthesize.scheduler import Task, ask_all, judge, tasks_of
from llava_jax.synthesize.teacher import Message, Teacher, estimate_messages
from llava_jax.types import InputError

ALL_KINDS = "all"
REASONS = 5  # named in one line; the data card has more, and OUTPUT.rejected.jsonl all of them
# What stands next to the rows, in place of their suffix.
REJECTED, CARD_TEXT, CARD_PAGE = ENDS = (".rejected.jsonl", ".card.txt", ".card.html")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked about which images: the prompts of each kind, and how replies become rows.

    `seed` draws (where the image stands, the question of a description), `limit` takes the first images only (0: all),
    and `attempts` is how many answers to one request there may be until one can be used.
    """

    contexts: Iterable[Context]
    prompts: Mapping[str, list[Message]]
    seed: int = 0
    limit: int = 0
    attempts: int = 3

    def tasks(self, settings: Mapping[str, Any]) -> Iterator[Task]:
        return tasks_of(self.contexts, self.prompts, settings, self.limit, self.seed)


@dataclasses.dataclass(frozen=True)
class Written:
    """What a run of `synthesize` did: rows, turns in them, images set aside and not answered yet, by reason.

    `stopped` is why it ended before everything was asked, "" where it did not.
    """

    rows: int
    turns: int
    rejected: dict[str, int]
    unanswered: int = 0
    why: dict[str, int] = dataclasses.field(default_factory=dict)
    stopped: str = ""

    def __str__(self) -> str:
        lost = sum(self.rejected.values())
        text = f"{self.rows} rows, {self.turns} turns, {lost} rejected{_reasons(self.rejected)}"
        if not self.unanswered:
            return text
        return f"{text}, {self.unanswered} not answered{_reasons(self.why, self.stopped)}"


def _reasons(counts: Mapping[str, int], more: str = "") -> str:
    """Return the most frequent reasons in brackets: some name an image, and there can be as many as images."""
    named = collections.Counter(counts).most_common(REASONS)
    others = sum(counts.values()) - sum(count for _, count in named)
    reasons = [f"{count} {reason}" for reason, count in named]
    reasons += [f"{others} for other reasons"] if others else []
    reasons += [more] if more else []
    return f" ({', '.join(reasons)})" if reasons else ""


def open_job(
    contexts_path: str, kind: str, prompts_dir: str | None = None, *, seed: int = 0, limit: int = 0, attempts: int = 3
) -> Job:
    """Return the job of a contexts file and a kind, or `all`; see `open_contexts` and `load_prompts`."""
    kinds = tuple(KINDS) if kind == ALL_KINDS else (kind,)
    prompts = {name: load_prompts(name, prompts_dir) for name in kinds}
    return Job(open_contexts(contexts_path), prompts, seed, limit, attempts)


def synthesize(
    job: Job,
    output: str,
    teacher: Teacher,
    journal: Journal,
    *,
    concurrency: int = 1,
    tokens: int = 0,
    money: float = 0.0,
    prices: Prices | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = print,
) -> Written:
    """Ask the teacher about every image that the journal does not settle, and write the rows to `output`.

    What was set aside, with its reason (.rejected.jsonl), and the data card (.card.txt, .card.html) are written next to
    it. `tokens` and `money` limit what all answers of the journal cost; 0 is no limit. A reply that cannot be used is
    counted and set aside. Raises InputError.
    """
    budget = Budget(tokens, money, prices, journal.tokens_in, journal.tokens_out)
    asked = ask_all(
        job.tasks(teacher.settings),
        teacher,
        journal,
        budget,
        attempts=job.attempts,
        concurrency=concurrency,
        stop=stop or threading.Event(),
        say=say,
    )
    return write_data(
        job, output, teacher.name, teacher.settings, journal, prices=prices, why=asked.failed, stopped=asked.stopped
    )


def write_data(
    job: Job,
    output: str,
    name: str,
    settings: Mapping[str, Any],
    journal: Journal,
    *,
    prices: Prices | None = None,
    why: Mapping[str, int] | None = None,
    stopped: str = "",
) -> Written:
    """Write rows, what was set aside and the data card from the answers in the journal; nothing is asked.

    `name` and `settings` are those of the teacher; `why` says why tasks are still open, `stopped` why the asking ended.
    Raises InputError and writes nothing when there is no row.
    """
    stem = os.path.splitext(output)[0]
    card = Card(os.path.basename(output), name, {kind: Tally() for kind in job.prompts})
    with replacing(f"{stem}{REJECTED}") as rejected:
        write_rows(output, _rows(job, settings, journal, card, rejected, _reasons(why or {}, stopped)))
    card.tokens_in, card.tokens_out = journal.tokens_in, journal.tokens_out
    card.money = prices.cost(card.tokens_in, card.tokens_out) if prices else None
    for end, text in ((CARD_TEXT, card_text(card)), (CARD_PAGE, card_page(card))):
        with replacing(f"{stem}{end}") as file:
            file.write(text)
    turns = sum(tally.turns for tally in card.tallies.values())
    return Written(card.rows, turns, dict(card.set_aside), card.unanswered, dict(why or {}), stopped)


def _rows(
    job: Job, settings: Mapping[str, Any], journal: Journal, card: Card, rejected: TextIO, still_open: str
) -> Iterator[dict[str, Any]]:
    """Yield the row of each task that has one; `card` counts every task, `rejected` gets those set aside."""
    for task in job.tasks(settings):
        verdict = judge(task, journal.replies(task.key) if not task.problem else ())
        problem = task.problem
        if not problem and verdict.result is None and verdict.settled(job.attempts):
            problem = verdict.reasons[-1]
        card.tallies[task.kind].add(verdict, problem)
        if problem:
            pairs = zip(verdict.reasons, verdict.replies, strict=False)
            replies = [{"reason": reason, "text": reply.text} for reason, reply in pairs]
            line = {"id": task.id, "kind": task.kind, "reason": problem, "replies": replies}
            rejected.write(json.dumps(line) + "\n")
        elif verdict.result is not None:
            turns = [{"from": turn.speaker, "value": turn.text} for turn in verdict.result]
            yield {"id": task.id, "image": task.image, "conversations": turns}
    if card.rows:
        return
    replies = sum(tally.replies for tally in card.tallies.values())
    if not card.set_aside:
        raise InputError(f"{card.teacher}: no answer that can be used yet{still_open}; nothing written")
    saved = f"; they are in {journal.path}" if replies and journal.path else ""
    problem = f"none of its {replies} replies could be used" if replies else "there is no image to ask about"
    raise InputError(f"{card.teacher}: {problem}{_reasons(card.set_aside)}; nothing written{saved}")


# ---- before anything is asked -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a job will ask: the requests still open, and about how many tokens they need.

    `tokens_out` takes answers to be as long as the worked examples, `most_out` as long as their limit, with one answer
    to each request.
    """

    requests: int
    settled: int
    tokens_in: int
    tokens_out: int
    most_out: int

    def lines(self, prices: Prices | None) -> list[str]:
        lines = [
            f"{self.requests} requests to send, {self.settled} images need none",
            f"about {self.tokens_in} prompt and {self.tokens_out} completion tokens, of these at most {self.most_out}",
        ]
        if prices:
            cost, most = (prices.cost(self.tokens_in, out) for out in (self.tokens_out, self.most_out))
            lines.append(f"about {cost:.2f} USD, at most {most:.2f}, with one answer per request")
        return lines


def estimate(job: Job, settings: Mapping[str, Any], journal: Journal) -> Estimate:
    """Estimate what the journal does not settle yet; see `estimate_messages`."""
    prompts, typical, limit = {}, {}, longest_answer(settings)
    for kind, messages in job.prompts.items():
        prompts[kind], examples = estimate_messages(messages), messages[2::2]
        typical[kind] = min(limit, estimate_messages(examples) // len(examples)) if examples else limit
    requests = settled = tokens_in = tokens_out = 0
    for task in job.tasks(settings):
        if task.problem or judge(task, journal.replies(task.key)).settled(job.attempts):
            settled += 1
            continue
        requests += 1
        tokens_in += prompts[task.kind] + estimate_messages(task.messages[-1:])
        tokens_out += typical[task.kind]
    return Estimate(requests, settled, tokens_in, tokens_out, requests * limit)
