"""The demo's report: one self-contained HTML page."""

import base64
import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.evaluate.page import page as whole_page
from llava_jax.evaluate.page import section

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 12, 28
SMOOTHING = 0.9


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question about an image, the model's answer and the right one."""

    kind: str
    question: str
    text: str
    expected: str
    correct: bool


@dataclasses.dataclass(frozen=True)
class Card:
    """One held-out image (a PNG file's bytes) and the answers to questions about it."""

    title: str
    image: bytes
    answers: tuple[Answer, ...]


Curves = Mapping[str, Sequence[float]]  # name of a run -> its loss at each step


def page(report: dict[str, Any], charts: Mapping[str, Curves], cards: Sequence[Card], mistakes: Sequence[Card]) -> str:
    """Return the page. `report` is the content of report.json; `charts` are loss curves by title."""
    drawn = "".join(_chart(title, curves) for title, curves in charts.items())
    body = [
        _head(report),
        section("Does it see?", _table(report), TABLE_NOTE),
        section("Images it has never seen", _gallery(cards), f"The first {len(cards)} held-out scenes, not selected."),
        section("Mistakes", _gallery(mistakes), "Held-out scenes with at least one wrong answer.")
        if mistakes
        else section("Mistakes", "", "None: every answer about the held-out scenes is right."),
        section("Learning curves", f'<div class="charts">{drawn}</div>', CHART_NOTE),
        section("How it was made", _parts(report), _made_of(report)),
        section("Talk to it", f"<pre><code>{html.escape(report['chat'])}</code></pre>", CHAT_NOTE),
    ]
    return whole_page("llava_jax demo", "\n".join(body))


TABLE_NOTE = (
    "Percentage of questions about held-out scenes answered with exactly the right words. "
    "<b>Shuffled</b> is the same model, but each question comes with the image of a scene where the answer is "
    "different: a model that looks at the image must fail. <b>Read as text</b> is the language model alone, before "
    "it ever saw an image, with a sentence about the scene in place of the image: an upper bound."
)
CHART_NOTE = "Loss per supervised token: the faint line is each step, the strong one a running mean."
CHAT_NOTE = "Chat in the terminal with the model just trained, about an image that was not in the training data."


def _head(report: dict[str, Any]) -> str:
    tiles, seconds = [], report["total_seconds"]
    took = f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"
    for goal in report["goals"]:
        state, mark = ("met", "&#10003;") if goal["met"] else ("missed", "&#10007;")
        tiles.append(
            f'<div class="tile {state}"><span class="figure">{goal["value"]:.1f}<small> {goal["unit"]}</small></span>'
            f"<span>{html.escape(goal['name'])}</span>"
            f'<span class="need"><b>{mark}</b> {html.escape(goal["needed"])}</span></div>'
        )
    return (
        "<header>\n<h1>A language model learns to see</h1>\n"
        "<p>This is LLaVA end to end at a small size: a vision tower, a projector and a language model; instruction "
        "data written from captions and boxes by a teacher that never saw an image; two training stages. "
        f"It took {took} on this machine.</p>\n"
        f'<div class="tiles">{"".join(tiles)}</div>\n</header>'
    )


def _table(report: dict[str, Any]) -> str:
    results = report["results"]
    first = next(iter(results.values()))
    heads = "".join(f'<th scope="col">{html.escape(result["name"])}</th>' for result in results.values())
    rows = []
    for kind in (*first["categories"], None):
        figures = [result if kind is None else result["categories"][kind] for result in results.values()]
        shares = [f"{one['accuracy']:.1f}" for one in figures]
        cells = [f'<td style="--share:{share}%"><span>{share}</span></td>' for share in shares]
        asked = figures[-1]["asked"]
        head = f'<th scope="row">{html.escape(kind or "all")}<small>{asked} questions</small></th>'
        rows.append(f"<tr{'' if kind else ' class=total'}>{head}{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="results"><thead><tr><th scope="col">question</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _gallery(cards: Sequence[Card]) -> str:
    return f'<div class="cards">{"".join(_card(card) for card in cards)}</div>'


def _card(card: Card) -> str:
    lines = []
    for answer in card.answers:
        text = html.escape(answer.text) or "<i>no answer</i>"
        if answer.correct:
            verdict = f'<span class="right"><b>&#10003;</b> {text}</span>'
        else:
            verdict = (
                f'<span class="wrong"><b>&#10007;</b> {text}</span> '
                f'<span class="expected">right: {html.escape(answer.expected)}</span>'
            )
        lines.append(f"<dt>{html.escape(answer.question)}</dt><dd>{verdict}</dd>")
    source = base64.b64encode(card.image).decode()
    image = f'<img alt="scene {html.escape(card.title)}" src="data:image/png;base64,{source}" width="96" height="96">'
    return f"<figure>{image}<figcaption><dl>{''.join(lines)}</dl></figcaption></figure>"


def _parts(report: dict[str, Any]) -> str:
    longest = max(part["seconds"] for part in report["parts"])
    rows = [
        f'<tr><th scope="row">{html.escape(part["name"])}</th>'
        f'<td class="bar"><i style="width:{100 * part["seconds"] / max(longest, 1e-9):.1f}%"></i></td>'
        f"<td>{part['seconds']:.1f} s</td></tr>"
        for part in report["parts"]
    ]
    return f'<table class="parts"><tbody>{"".join(rows)}</tbody></table>'


def _made_of(report: dict[str, Any]) -> str:
    data = report["data"]
    return (
        f"{data['train_scenes']:,} training scenes and {data['held_out_scenes']} held-out ones, which are not among "
        f"the training scenes; {data['caption_rows']:,} captions for stage 1 and {data['instruction_rows']:,} rows of "
        "instructions for stage 2 (conversation, detail, reasoning). Peak memory of a process: "
        f"{report['peak_memory_bytes'] / 2**30:.1f} GiB."
    )


def _chart(title: str, curves: Curves) -> str:
    steps = max(map(len, curves.values()))
    top = _nice(max(map(max, curves.values())))
    marks = [_axis_y(top * part / 4, top) for part in range(5)]
    marks += [_axis_x(step, steps) for step in sorted({0, steps // 2, steps})]
    lines, legend = [], ""
    for index, (name, values) in enumerate(curves.items(), 1):
        means = smooth(values)
        lines.append(f'<path class="faint line-{index}" d="{_path(values, steps, top)}"/>')
        lines.append(f'<path class="line-{index}" d="{_path(means, steps, top)}"/>')
        legend += f'<span class="key"><i class="fill-{index}"></i>{html.escape(name)}: {means[-1]:.3f}</span>'
    return (
        f'<figure class="chart"><h3>{html.escape(title)}</h3><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}: loss over steps">'
        f"{''.join(marks)}{''.join(lines)}</svg></figure>"
    )


def smooth(values: Sequence[float]) -> list[float]:
    """Return an exponential running mean, corrected for its start at zero."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(total / weight)
    return means


def _path(values: Sequence[float], steps: int, top: float) -> str:
    points = [f"{_x(step, steps):.1f},{_y(value, top):.1f}" for step, value in enumerate(values, 1)]
    return "M" + " L".join(points)


def _x(step: float, steps: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / steps


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(value, top) / top)


def _axis_y(value: float, top: float) -> str:
    y = _y(value, top)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    )


def _axis_x(step: int, steps: int) -> str:
    name = f"{step} steps" if step == steps else str(step)
    anchor = "end" if step == steps else "middle"
    return f'<text x="{_x(step, steps):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{name}</text>'


def _nice(value: float) -> float:
    """Return the smallest of 1, 2, 4, 6, 8 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(power * factor for factor in (1, 2, 4, 6, 8, 10) if power * factor >= value)
