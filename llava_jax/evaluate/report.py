"""One self-contained HTML page about runs of `evaluate suite`: table, radar, bars, and answers to browse."""

import html
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_jax.data.images import thumbnail
from llava_jax.data.rows import check_path
from llava_jax.evaluate.answers import SCORES, field, read_rows, with_text
from llava_jax.evaluate.mmbench import ROUND
from llava_jax.evaluate.page import page, section
from llava_jax.evaluate.published import BENCHMARKS, HIGHEST, ROWS
from llava_jax.evaluate.textvqa import question_of
from llava_jax.io import read_json, read_lines
from llava_jax.types import InputError

SIZE, CENTRE, RADIUS = 640, 320, 220  # of the radar, in its own units
THUMBNAIL = 384  # pixels of an image's longer side
GROUPS = ("columns", "types", "abilities", "categories")  # where figures hold those of groups of questions
SHOWN = ("score", "relative", "accuracy")  # of a group that has several figures
Run = dict[str, Any]


def report(folders: Sequence[str], examples: int) -> str:
    """Return the page about the output folders of `evaluate suite`, with so many questions of each benchmark.

    Raises InputError.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run["name"] for run in runs}) < len(runs):  # the folders' names alone do not tell them apart
        for run in runs:
            run["name"] = f"{run['model']} ({os.path.abspath(run['folder'])})"
    rows = {run["name"]: run["results"] for run in runs}
    rows |= {title: dict(zip(BENCHMARKS, values, strict=True)) for title, values in ROWS.items()}
    names = [name for name in BENCHMARKS if any(name in run["results"] for run in runs)]
    found = [example for name in names for example in _examples(name, runs, examples)]
    data = {"runs": [run["name"] for run in runs], "headings": {name: BENCHMARKS[name][0] for name in names}}
    text = json.dumps({**data, "examples": found}, ensure_ascii=False).replace("<", "\\u003c")
    body = [
        f"<header>\n<h1>Benchmarks</h1>\n<p>{html.escape(', '.join(data['runs']))}, next to the published figures of "
        "LLaVA-1.5.</p>\n</header>",
        section("All figures", _table(rows, names, len(runs)), TABLE_NOTE),
        section("Next to the published rows", _radar(rows, names, len(runs)), RADAR_NOTE),
        section("By category", "".join(_bars(name, runs) for name in names), BARS_NOTE),
        section("Answers", BROWSER, f"At most {examples} questions of each benchmark, evenly spaced over its file."),
        f'<script type="application/json" id="data">{text}</script>',
    ]
    return page("llava_jax benchmarks", "\n".join(body), style="report.css", script="report.js")


TABLE_NOTE = (
    "Percent, except MME's perception (at most 2000). A dash: the figure is a server's or a judge's and is not there."
)
RADAR_NOTE = "Each axis begins at 0 in the centre and ends at the largest figure of that benchmark here."
BARS_NOTE = "Percent; of MME accuracy plus accuracy+, at most 200."
BROWSER = """<form id="controls">
<label>Benchmark <select id="bench"></select></label>
<label>Run <select id="run"></select></label>
<label>Show <select id="filter"><option value="all">all</option><option value="right">right</option>
<option value="wrong">wrong</option><option value="differ">runs that differ</option></select></label>
<label>Search <input id="search" type="search"></label>
<span class="moves"><button type="button" id="previous">Previous</button> <output id="position"></output>
<button type="button" id="next">Next</button></span>
</form>
<article id="example" aria-live="polite"></article>"""


def read_run(folder: str) -> Run:
    """Return what `evaluate suite` wrote: name, results, image folders, and figures by benchmark. Raises InputError."""
    path = os.path.join(folder, "suite.json")
    run = read_json(path, "what `evaluate suite --output=DIR` writes at its end")
    for name, kind in (("model", str), ("results", dict), ("images", dict)):
        field(run, name, kind, path)
    unknown = sorted(set(run["results"]) - set(BENCHMARKS))
    if unknown:
        raise InputError(f"{path}: results has {unknown[0]!r}; expected benchmarks of this version")
    paths = {name: os.path.join(folder, name, "figures.json") for name in run["results"]}
    figures = {name: read_json(one, "figures") for name, one in paths.items() if os.path.isfile(one)}
    name = f"{run['model']} ({os.path.basename(os.path.abspath(folder))})"
    return {**run, "name": name, "folder": folder, "figures": figures}


def groups_of(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return one figure for each group of questions that a benchmark has: a category, a split, an ability."""
    if "mean_f1" in figures:
        return {name: 100 * one["f1"] for name, one in figures.items() if isinstance(one, Mapping) and "f1" in one}
    found = next((figures[name] for name in GROUPS if figures.get(name)), {})
    values = {name: _one(value) for name, value in found.items()}
    return {name: value for name, value in values.items() if value is not None}


def _one(value: Any) -> float | None:
    if not isinstance(value, Mapping):
        return value
    return next((value[name] for name in SHOWN if name in value), None)


# ---- figures --------------------------------------------------------------------------------------------------------


def _table(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], ours: int) -> str:
    heads = "".join(f'<th scope="col">{BENCHMARKS[name][0]}</th>' for name in names)
    lines = []
    for index, (title, values) in enumerate(rows.items()):
        cells = "".join(f"<td>{_shown(values.get(name))}</td>" for name in names)
        kind = f'<i class="dot run-{index}"></i>' if index < ours else '<i class="dot published"></i>'
        lines.append(f'<tr><th scope="row">{kind}{html.escape(title)}</th>{cells}</tr>')
    head = f'<thead><tr><th scope="col"></th>{heads}</tr></thead>'
    return f'<div class="wide"><table class="results figures">{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _radar(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], ours: int) -> str:
    """Return the radar of all rows; an axis that a row has no figure on is left out of its line."""
    if len(names) < 3:
        return "<p>A radar needs three benchmarks.</p>"
    tops = {name: max([row[name] for row in rows.values() if row.get(name)] or [1.0]) for name in names}
    angles = {name: 2 * math.pi * at / len(names) - math.pi / 2 for at, name in enumerate(names)}
    circle = f'<circle class="grid" cx="{CENTRE}" cy="{CENTRE}" r="'
    rings = "".join(f'{circle}{RADIUS * part / 4}"/>' for part in (1, 2, 3, 4))
    axes = []
    for name in names:
        x, y = _point(angles[name], 1.0)
        tx, ty = _point(angles[name], 1.12)
        anchor = "middle" if abs(tx - CENTRE) < RADIUS / 4 else "start" if tx > CENTRE else "end"
        label = f"{BENCHMARKS[name][0]} {tops[name]:.1f}"
        axes.append(f'<line class="grid" x1="{CENTRE}" y1="{CENTRE}" x2="{x:.1f}" y2="{y:.1f}"/>')
        axes.append(f'<text x="{tx:.1f}" y="{ty + 4:.1f}" text-anchor="{anchor}">{label}</text>')
    lines, legend = [], []
    for index, (title, values) in enumerate(rows.items()):
        style = f"run-{index}" if index < ours else f"published published-{index - ours}"
        known = [name for name in names if values.get(name) is not None]
        points = " ".join("{:.1f},{:.1f}".format(*_point(angles[name], values[name] / tops[name])) for name in known)
        lines.append(f'<polygon class="{style}" points="{points}"><title>{html.escape(title)}</title></polygon>')
        legend.append(f'<span class="key"><i class="dot {style}"></i>{html.escape(title)}</span>')
    svg = f'<svg viewBox="0 60 {SIZE} {SIZE - 120}" role="img" aria-label="radar of the benchmarks">'
    drawn = f"{svg}{rings}{''.join(axes)}{''.join(reversed(lines))}</svg>"
    return f'<figure class="chart radar"><div class="legend">{"".join(legend)}</div>{drawn}</figure>'


def _point(angle: float, share: float) -> tuple[float, float]:
    return CENTRE + RADIUS * share * math.cos(angle), CENTRE + RADIUS * share * math.sin(angle)


def _bars(name: str, runs: Sequence[Run]) -> str:
    groups = [groups_of(run["figures"].get(name) or {}) for run in runs]
    names = dict.fromkeys(group for found in groups for group in found)
    if not names:
        return ""
    top = 200.0 if name in HIGHEST else 100.0
    rows = []
    for group in names:
        bars = "".join(
            f'<span class="bar-row"><i class="fill run-{index}" style="width:{100 * found[group] / top:.1f}%"></i>'
            f"<b>{found[group]:.1f}</b></span>"
            for index, found in enumerate(groups)
            if group in found
        )
        rows.append(f'<tr><th scope="row">{html.escape(group)}</th><td>{bars}</td></tr>')
    return f'<figure class="chart bars"><h3>{BENCHMARKS[name][0]}</h3><table>{"".join(rows)}</table></figure>'


# ---- answers --------------------------------------------------------------------------------------------------------


def _examples(name: str, runs: Sequence[Run], most: int) -> Iterator[dict[str, Any]]:
    """Yield questions of a benchmark, as many as `most`, each with every run's answer, score and review."""
    asked = [run for run in runs if name in run["results"]]
    rows = [row for _, row in read_lines(os.path.join(asked[0]["folder"], name, "questions.jsonl"), "a question")]
    answers = [_answers(run, name) if name in run["results"] else {} for run in runs]
    reviews = [_reviews(run, name) for run in runs]
    for at in range(min(most, len(rows))):
        row = rows[at * len(rows) // min(most, len(rows))]
        key, text = str(row["question_id"]), row["text"].strip()
        said = []
        for run, texts, judged in zip(runs, answers, reviews, strict=True):
            scores = (run["figures"].get(name) or {}).get(SCORES, {})
            found = [key, with_text(key, text), with_text(key, question_of(text).lower())]
            found += [str(int(key) % ROUND)] if name.startswith("mmbench") else []
            score = next((scores[one] for one in found if one in scores), None)
            said.append({"text": texts.get((key, text)), "score": score, "review": judged.get(key)})
        image = _shown_image(asked[0]["images"][name], row.get("image"))
        shown = {"category": row.get("category"), "expected": row.get("answer"), **image}
        yield {"bench": name, "id": key, "question": text, **shown, "answers": said}


def _answers(run: Run, name: str) -> dict[tuple[str, str], str]:
    path = os.path.join(run["folder"], name, "answers.jsonl")
    rows = (row for _, row in read_lines(path, "an answer"))
    return {(str(row["question_id"]), row["prompt"].strip()): row["text"] for row in rows}


def _reviews(run: Run, name: str) -> dict[str, str]:
    path = os.path.join(run["folder"], name, "reviews.jsonl")
    if not os.path.isfile(path):
        return {}
    rows = read_rows(path, ("content",), key=_review_key)
    return {key.removeprefix("v1_"): row["content"] for key, row in rows.items()}


def _review_key(row: Mapping[str, Any], where: str) -> str:
    repeat = field(row, "repeat", int, where)
    first = not repeat and not row.get("swapped")
    return str(row["question_id"]) if first else f"{row['question_id']} {repeat} {row.get('swapped')}"


def _shown_image(folder: str, name: str | None) -> dict[str, str]:
    """Return the address that holds a question's image, or why there is none."""
    if not name:
        return {"problem": "No image."}
    try:
        check_path(name, "image")
        return {"image": f"data:image/jpeg;base64,{thumbnail(os.path.join(folder, name), THUMBNAIL, 'jpeg')}"}
    except InputError as error:
        return {"problem": str(error)}
