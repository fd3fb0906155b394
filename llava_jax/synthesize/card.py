"""The data card: figures of a file of instruction data and of the replies that were rejected, as text and as a page."""

import dataclasses
import html
import importlib.resources
from collections import Counter

from llava_jax.synthesize.parse import LEAK_REASONS
from llava_jax.synthesize.scheduler import Verdict
from llava_jax.types import IMAGE_PLACEHOLDER

OPENING_WORDS = 3
TOP = 12
WIDTH, HEIGHT, BASE, BINS = 360, 150, 22, 24  # of a histogram


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

    def add(self, verdict: Verdict, problem: str) -> None:
        """Count one task: a row, or set aside because of `problem`, or unanswered where there is neither."""
        self.images += 1
        self.replies += len(verdict.replies)
        self.bad_replies.update(verdict.reasons)
        if problem:
            self.set_aside[problem] += 1
        elif verdict.result is None:
            self.unanswered += 1
        else:
            self.rows += 1
            self.turns += len(verdict.result)
            self.image_first += verdict.result[0].text.startswith(IMAGE_PLACEHOLDER)
            for turn in verdict.result:
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

    @property
    def set_aside(self) -> Counter:
        return sum((tally.set_aside for tally in self.tallies.values()), Counter())


def quantile(counts: Counter, share: float) -> int:
    """Return the smallest value that at least `share` of the counts do not exceed; 0 when there are none."""
    needed, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    return 0


def mean(counts: Counter) -> float:
    return sum(value * count for value, count in counts.items()) / max(counts.total(), 1)


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
    ("set aside", lambda tally: str(tally.set_aside.total())),
    ("unanswered", lambda tally: str(tally.unanswered)),
    ("questions", lambda tally: str(tally.question_words.total())),
    ("words a question", lambda tally: _spread(tally.question_words)),
    ("words an answer", lambda tally: _spread(tally.answer_words)),
    ("image first", lambda tally: f"{tally.image_first / tally.rows:.1%}" if tally.rows else "-"),
    ("answers of the teacher", lambda tally: str(tally.replies)),
    ("rejected of them", lambda tally: f"{tally.bad_replies.total() / max(tally.replies, 1):.1%}"),
    ("leaks among them", lambda tally: str(tally.leaks)),
)


def _figures(card: Card) -> list[tuple[str, list[str]]]:
    """Return (name, the figure of each kind) for every line of the card's table."""
    return [(name, [figure(tally) for tally in card.tallies.values()]) for name, figure in FIGURES]


def _table(card: Card) -> list[str]:
    rows = [("", list(card.tallies)), *_figures(card)]
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(card.tallies))]
    return [
        f"{name:<24}" + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for name, cells in rows
    ]


def _spread(counts: Counter) -> str:
    """Return mean (10 % .. 90 %) as text."""
    return f"{mean(counts):.1f} ({quantile(counts, 0.1)}..{quantile(counts, 0.9)})" if counts else "-"


# ---- page -------------------------------------------------------------------------------------------------------


def card_page(card: Card) -> str:
    """Return the page: the figures of each kind, its lengths, openings and rejected answers, as charts."""
    style = importlib.resources.files("llava_jax.synthesize").joinpath("card.css").read_text(encoding="utf-8")
    cost = "" if card.money is None else f", {card.money:,.2f} USD"
    body = [
        f"<h1>{html.escape(card.title)}</h1>",
        f"<p>{card.rows:,} rows of instruction data, written by {html.escape(card.teacher)} from captions and boxes. "
        f"All answers together: {card.tokens_in:,} prompt tokens, {card.tokens_out:,} completion tokens{cost}.</p>",
        _bars("Rows by kind", Counter({kind: tally.rows for kind, tally in card.tallies.items()})),
        "<h2>Figures</h2>",
        "<p>Lengths in words: the mean, and the 10th to the 90th percentile. A request whose answer could not be used "
        "was sent again; an image without a usable answer is set aside.</p>",
        _html_table(card),
        *(_kind(kind, tally) for kind, tally in card.tallies.items()),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(card.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _html_table(card: Card) -> str:
    heads = "".join(f'<th scope="col">{html.escape(kind)}</th>' for kind in card.tallies)
    rows = [
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in _figures(card)
    ]
    return (
        f'<div class="wide"><table class="figures"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _kind(kind: str, tally: Tally) -> str:
    charts = [
        _histogram("Words a question", tally.question_words),
        _histogram("Words an answer", tally.answer_words),
        _bars("Questions begin with", tally.question_openings),
        _bars("Answers begin with", tally.answer_openings),
        _bars("Answers of the teacher that cannot be used", tally.bad_replies, "lost"),
        _bars("Images set aside", tally.set_aside, "lost"),
    ]
    return f'<h2>{html.escape(kind)}</h2>\n<div class="charts">{"".join(charts)}</div>'


def _bars(title: str, counts: Counter, style: str = "") -> str:
    """Draw the most frequent names with a bar each, or write "none"."""
    top = max(counts.values(), default=0)
    rows = [
        f'<tr><th scope="row">{html.escape(name)}</th><td><i style="width:{100 * count / max(top, 1):.1f}%"></i></td>'
        f"<td>{count:,}</td></tr>"
        for name, count in counts.most_common(TOP)
    ]
    content = f'<table class="bars {style}"><tbody>{"".join(rows)}</tbody></table>' if rows else "<p>none</p>"
    return f"<figure><h3>{html.escape(title)}</h3>{content}</figure>"


def _histogram(title: str, counts: Counter) -> str:
    """Draw how many texts have how many words; the longest hundredth is in the last bar."""
    last = max(quantile(counts, 0.99), 1)
    width = -(-(last + 1) // BINS)
    bins = [0] * (last // width + 1)
    for value, count in counts.items():
        bins[min(value, last) // width] += count
    top, step = max(max(bins), 1), WIDTH / len(bins)
    bars = []
    for number, count in enumerate(bins):
        tall = (HEIGHT - BASE - 16) * count / top
        low, high = number * width, number * width + width - 1
        span = (f"{low}" if low == high else f"{low} to {high}") if number + 1 < len(bins) else f"{low} or more"
        bars.append(
            f'<rect x="{number * step + 1:.1f}" y="{HEIGHT - BASE - tall:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{tall:.1f}"><title>{span} words: {count:,}</title></rect>'
        )
    return (
        f"<figure><h3>{html.escape(title)}</h3>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}: mean {mean(counts):.1f}">'
        f'{"".join(bars)}<line x1="0" x2="{WIDTH}" y1="{HEIGHT - BASE}" y2="{HEIGHT - BASE}"/>'
        f'<text x="0" y="{HEIGHT - 6}">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">{last}+ words</text>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">mean {mean(counts):.1f}</text>'
        f'<text x="0" y="12">{top:,}</text></svg></figure>'
    )
