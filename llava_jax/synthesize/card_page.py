"""The data card as one self-contained HTML page."""

import html
import importlib.resources
from collections import Counter

from llava_jax.synthesize.card import TOP, Card, Tally, figures, mean, quantile

WIDTH, HEIGHT, BASE = 360, 150, 22
BINS = 24


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
        _table(card),
        *(_kind(kind, tally) for kind, tally in card.tallies.items()),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(card.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _table(card: Card) -> str:
    heads = "".join(f'<th scope="col">{html.escape(kind)}</th>' for kind in card.tallies)
    rows = [
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in figures(card)
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
