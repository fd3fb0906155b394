import copy
import json
import os

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.tokenize import load_tokenizer
from llava_jax.data.verify import report_lines, verify
from llava_jax.types import InputError
from tests.make_tokenizers import golden_llama

GOOD = {
    "id": "good",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}],
}


def _row(name, question="<image>\nWhat is this?", answer="A cat.", **changes):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    row = GOOD | {"id": name, "conversations": turns} | changes
    return {key: value for key, value in row.items() if value is not None}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(golden_llama(tmp_path_factory.mktemp("golden"), legacy=False))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-700])
    return str(folder)


def _verify(tmp_path, images, tokenizer, rows, template="v1", **options):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return verify(str(path), images, tokenizer, template, **{"patches": 4, "max_length": 100} | options)


def test_every_bad_row_is_named_with_its_reason(tmp_path, images, tokenizer):
    rows = [
        GOOD,
        _row("missing", image="none.png"),
        _row("truncated", image="cut.jpg"),
        _row("empty", answer=""),
        _row("unequal", question="What is this?"),
        _row("role", conversations=[{"from": "system", "value": "x"}]),
        _row("twice", conversations=[*GOOD["conversations"], {"from": "gpt", "value": "More."}]),
        _row("long", question="<image>\n" + "a " * 100),
        _row("outside", image="../a.png"),
        "no row",
        _row("text", question="Hello", image=None),
    ]
    report = _verify(tmp_path, images, tokenizer, rows)
    assert (report.rows, report.kept) == (11, 2)
    reasons = {rejected.id: (rejected.row, rejected.reason) for rejected in report.rejected}
    assert [row for row, _ in reasons.values()] == list(range(1, 10))
    for name, expected in {
        "missing": "none.png",
        "truncated": "cut.jpg",
        "empty": "empty answer",
        "unequal": "0 <image>",
        "role": "unknown role 'system'",
        "twice": "two gpt turns in a row",
        "outside": "leaves the images folder",
        "long": "row longer than max_length keeps no target",
        "": "found text",
    }.items():
        assert expected in reasons[name][1], name
    lines = report_lines(report)
    assert lines[0].startswith("rejected: row 1 (id 'missing'): ") and len(lines) == 12
    assert lines[9].startswith("2 of 11 rows can be trained, 9 cannot")


def test_figures(tmp_path, images, tokenizer):
    leading = _row("leading", conversations=[{"from": "gpt", "value": "Hi."}, *GOOD["conversations"]])
    trailing = _row("trailing", conversations=[*GOOD["conversations"], {"from": "human", "value": "And?"}])
    cut = _row("cut", answer="A cat. " * 40)
    report = _verify(tmp_path, images, tokenizer, [GOOD, leading, trailing, cut])
    # 31 of the system message, 16 of the turn (3 more for an image of 4 patches), 4 supervised; the last fills 100.
    assert report.tokens == 3 * (31 + 16 + 3 + 4) + 100
    assert report.targets == 3 * 4 + (100 - 50)
    assert report.supervised_share == report.targets / report.tokens
    assert report.longest[0] == 3 and report.longest[1] > 100
    assert (report.cut, report.leading_answers, report.open_questions) == (1, 1, 1)
    kept_by_v0 = _verify(tmp_path, images, tokenizer, [leading], "v0")
    assert (kept_by_v0.kept, kept_by_v0.leading_answers) == (1, 0)


def test_dump_shows_what_is_trained(tmp_path, images, tokenizer):
    dump = tmp_path / "dump.jsonl"
    rows = [GOOD, _row("bad", answer=""), _row("cut", answer="A cat. " * 40)]
    _verify(tmp_path, images, tokenizer, rows, dump_path=str(dump))
    good, cut = [json.loads(line) for line in dump.read_text(encoding="utf-8").splitlines()]
    assert list(good) == ["id", "tokens", "targets", "text"]
    assert (good["id"], good["text"], cut["id"]) == ("good", "A cat.</s>", "cut")
    assert good["tokens"][31:] == [
        3148,
        1001,
        29901,
        29871,
        -200,
        29871,
        13,
        5618,
        338,
        445,
        29973,
        319,
        1799,
        9047,
        13566,
        29901,
        319,
        6635,
        29889,
        2,
    ]
    assert good["targets"] == [0] * 47 + [1] * 4
    assert len(cut["tokens"]) == 97 and cut["tokens"].count(-200) == 1 and len(cut["targets"]) == 97
    assert sorted(os.listdir(tmp_path)) == ["dump.jsonl", "images", "rows.json"]


def test_dump_appears_only_when_complete(tmp_path, images, tokenizer):
    dump = tmp_path / "dump.jsonl"
    dump.write_text("before")

    def break_down(path):
        raise RuntimeError(path)

    with pytest.raises(RuntimeError):
        _verify(tmp_path, images, tokenizer, [GOOD], dump_path=str(dump), check_image=break_down)
    assert dump.read_text() == "before" and not (tmp_path / "dump.jsonl.partial").exists()
    with pytest.raises(InputError, match="folder .* does not exist"):
        _verify(tmp_path, images, tokenizer, [GOOD], dump_path=str(tmp_path / "none" / "dump.jsonl"))


def test_each_image_is_looked_at_once(tmp_path, images, tokenizer):
    seen = []
    report = _verify(
        tmp_path, images, tokenizer, [GOOD, GOOD, _row("text", "Hello", image=None)], check_image=seen.append
    )
    assert report.kept == 3 and seen == [os.path.join(images, "a.png")]


def test_what_spoils_all_rows_is_an_error(tmp_path, images, tokenizer):
    with pytest.raises(InputError, match="unknown template 'v9'"):
        _verify(tmp_path, images, tokenizer, [GOOD], "v9")
    endless = copy.copy(tokenizer)
    endless._special = {}
    with pytest.raises(InputError, match="end-of-text token"):
        _verify(tmp_path, images, endless, [GOOD])
    with pytest.raises(InputError, match="unknown image_position 'back'"):
        _verify(tmp_path, images, tokenizer, [GOOD], image_position="back")
    with pytest.raises(InputError, match="no such folder; expected the folder that image paths start from"):
        _verify(tmp_path, str(tmp_path / "nowhere"), tokenizer, [GOOD])
    with pytest.raises(InputError, match="no such annotations file"):
        verify(str(tmp_path / "none.json"), images, tokenizer, "v1")
