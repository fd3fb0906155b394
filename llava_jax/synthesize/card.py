"""The data card: figures of a file of instruction data and of the replies that were rejected, as data and as text."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from llava_jax.synthesize.parse import LEAK_REASONS
from llava_jax.synthesize.scheduler import Verdict
from llava_jax.types import IMAGE_PLACEHOLDER, Turn

OPENING_WORDS = 3
TOP = 12


@dataclasses.dataclass
class Tally:
    """The figures of one kind.

    `images` = `rows` + those set aside (by reason) + `unanswered`; `replies` counts every answer saved, `bad_replies`
    those that cannot be used, by reason. Lengths are in words: how many texts have how many.
    """

    images: int = 0
    rows: int = 0
    unanswered: int = 0
    turns: int = 0
    image_first: int = 0
    replies: int = 0
    set_aside: Counter = dataclasses.field(default_factory=Counter)
    bad_replies: Counter = dataclasses.field(default_factory=Counter)
    question_words: Counter = dataclasses.field(default_factory=Counter)
    answer_words: Counter = dataclasses.field(default_factory=Counter)
    question_openings: Counter = dataclasses.field(default_factory=Counter)
    answer_openings: Counter = dataclasses.field(default_factory=Counter)

    @property
    def leaks(self) -> int:
        return sum(self.bad_replies[reason] for reason in LEAK_REASONS)

    @property
    def rejected_share(self) -> float:
        """Return the share of answers that cannot be used."""
        return sum(self.bad_replies.values()) / self.replies if self.replies else 0.0

    def add(self, verdict: Verdict, problem: str) -> None:
        """Count one task: a row, or set aside because of `problem`, or unanswered where there is neither."""
        self.images += 1
        self.replies += len(verdict.replies)
        self.bad_replies.update(verdict.reasons)
        if problem:
            self.set_aside[problem] += 1
        elif verdict.turns is None:
            self.unanswered += 1
        else:
            self._add_turns(verdict.turns)

    def _add_turns(self, turns: Sequence[Turn]) -> None:
        self.rows += 1
        self.turns += len(turns)
        self.image_first += turns[0].text.startswith(IMAGE_PLACEHOLDER)
        for turn in turns:
            words = turn.text.replace(IMAGE_PLACEHOLDER, " ").split()
            human = turn.speaker == "human"
            (self.question_words if human else self.answer_words)[len(words)] += 1
            opening = " ".join(words[:OPENING_WORDS]).lower()
            (self.question_openings if human else self.answer_openings)[opening] += 1


@dataclasses.dataclass
class Card:
    """All kinds of one file, and what its answers have cost; `money` is None where no price was given."""

    title: str
    teacher: str
    tallies: dict[str, Tally]
    tokens_in: int = 0
    tokens_out: int = 0
    money: float | None = None

    @property
    def rows(self) -> int:
        return sum(tally.rows for tally in self.tallies.values())

    @property
    def unanswered(self) -> int:
        return sum(tally.unanswered for tally in self.tallies.values())


def quantile(counts: Counter, share: float) -> int:
    """Return the smallest value that at least `share` of the counts do not exceed; 0 when there are none."""
    needed, seen = share * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    return 0


def mean(counts: Counter) -> float:
    total = sum(counts.values())
    return sum(value * count for value, count in counts.items()) / total if total else 0.0


# ---- text -------------------------------------------------------------------------------------------------------


def card_text(card: Card) -> str:
    """Return the card as text, for the terminal and for a repository."""
    cost = f"{card.tokens_in} prompt tokens, {card.tokens_out} completion tokens"
    cost += "" if card.money is None else f", {card.money:.2f} USD"
    lines = [f"{card.title}: {card.rows} rows written by {card.teacher}", f"cost of all answers: {cost}", ""]
    lines += _table(card)
    for kind, tally in card.tallies.items():
        for title, counts in (
            ("set aside", tally.set_aside),
            ("answers that cannot be used", tally.bad_replies),
            ("questions begin with", tally.question_openings),
            ("answers begin with", tally.answer_openings),
        ):
            if counts:
                lines += ["", f"{kind}: {title}"]
                lines += [f"  {count:>8}  {name}" for name, count in counts.most_common(TOP)]
    return "\n".join(lines) + "\n"


FIGURES = (
    ("images", lambda tally: str(tally.images)),
    ("rows", lambda tally: str(tally.rows)),
    ("set aside", lambda tally: str(sum(tally.set_aside.values()))),
    ("unanswered", lambda tally: str(tally.unanswered)),
    ("questions", lambda tally: str(sum(tally.question_words.values()))),
    ("words a question", lambda tally: _spread(tally.question_words)),
    ("words an answer", lambda tally: _spread(tally.answer_words)),
    ("image first", lambda tally: f"{tally.image_first / tally.rows:.1%}" if tally.rows else "-"),
    ("answers of the teacher", lambda tally: str(tally.replies)),
    ("rejected of them", lambda tally: f"{tally.rejected_share:.1%}"),
    ("leaks among them", lambda tally: str(tally.leaks)),
)


def figures(card: Card) -> list[tuple[str, list[str]]]:
    """Return (name, the figure of each kind) for every line of the card's table."""
    return [(name, [figure(tally) for tally in card.tallies.values()]) for name, figure in FIGURES]


def _table(card: Card) -> list[str]:
    rows = [("", list(card.tallies)), *figures(card)]
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(card.tallies))]
    return [
        f"{name:<24}" + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for name, cells in rows
    ]


def _spread(counts: Counter) -> str:
    """mean (10 % .. 90 %)"""
    return f"{mean(counts):.1f} ({quantile(counts, 0.1)}..{quantile(counts, 0.9)})" if counts else "-"
