"""The report page: complete, well-formed and self-contained."""

import base64
import html.parser
import re

import pytest

from llava_jax.demo import report, story
from llava_jax.demo.report import Answer, Card

VOID = ("meta", "img", "line")
PICTURE = b"\x89PNG picture"


def result(name, *rights):
    kinds = {
        kind: {"asked": 4, "right": n, "missing": 0, "accuracy": 25.0 * n} for kind, n in zip("ab", rights, strict=True)
    }
    right = sum(rights)
    return {"name": name, "asked": 8, "right": right, "missing": 0, "accuracy": 12.5 * right, "categories": kinds}


RESULTS = {
    "both_stages": result("both stages", 4, 3),
    "shuffled": result("shuffled", 1, 1),
    "stage_1_only": result("stage 1 only", 4, 3),
    "without_stage_1": result("without stage 1", 2, 1),
    "read_as_text": result("read as text", 4, 4),
}
CONTENT = {
    "goals": story.goals(RESULTS),
    "results": RESULTS,
    "parts": [{"name": "draw", "seconds": 3.0}, {"name": "train <fast>", "seconds": 12.0}],
    "total_seconds": 120.0,
    "peak_memory_bytes": 3 * 2**29,
    "data": {"train_scenes": 6000, "held_out_scenes": 300, "caption_rows": 30000, "instruction_rows": 7200},
    "chat": "llava-jax chat --model=a&b",
}
RIGHT = Answer("colour", "What colour is it?", "red", "red", True)
WRONG = Answer("count", "How many <b>?", "<two>", "three", False)
CHARTS = {"Stage 1": {"pretrain": [4.0, 2.0, 1.0]}, "Stage 2": {"with": [2.0], "without": [3.9]}}


class Reader(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps the text and the attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *item) for item in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *item) for item in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page():
    cards = [Card("1.png", PICTURE, (RIGHT, WRONG))]
    return report.page(CONTENT, CHARTS, cards, cards)


@pytest.fixture(scope="module")
def reader(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_it_is_self_contained(page, reader):
    links = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links == ["data:image/png;base64," + base64.b64encode(PICTURE).decode()] * 2
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)


def test_it_shows_every_figure_the_answers_and_the_chat_command(reader):
    text = " ".join(reader.texts)
    for res in RESULTS.values():
        assert res["name"] in text and f"{res['accuracy']:.1f}" in text
    assert "How many <b>?" in text and "<two>" in text and "right: three" in text
    assert "llava-jax chat --model=a&b" in text and "train <fast>" in text
    assert "2.0 minutes" in text and "1.5 GiB" in text


def test_goals_met_and_missed_are_marked(page):
    assert [goal["met"] for goal in CONTENT["goals"]] == [True, True, False, True, True]
    assert [round(goal["value"], 1) for goal in CONTENT["goals"]] == [87.5, 62.5, 0.0, 50.0, 100.0]
    assert re.findall(r'class="tile (\w+)"', page) == ["met", "met", "missed", "met", "met"]


def test_curves_lie_inside_the_chart(page):
    paths = re.findall(r'<path class="[^"]*" d="M([^"]*)"', page)
    assert len(paths) == 6
    for path in paths:
        for point in path.split(" L"):
            x, y = (float(value) for value in point.split(","))
            assert report.LEFT <= x <= report.WIDTH - report.RIGHT
            assert report.TOP <= y <= report.HEIGHT - report.BOTTOM


def test_the_running_mean_starts_at_the_first_value_and_follows():
    assert report.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert report.smooth([4.0] + [1.0] * 100)[-1] == pytest.approx(1.0, abs=1e-3)


def test_a_demo_without_a_mistake_says_so():
    text = report.page(CONTENT, CHARTS, [Card("1.png", PICTURE, (RIGHT,))], [])
    assert "every answer about the held-out scenes is right" in text
