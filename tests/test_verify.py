import copy
import json
import os

import numpy as np
import pytest
from PIL import Image

from llava_jax.cli.main import main
from llava_jax.data.records import load_records
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.data.validate import Checked, excluded_rows, report_lines, verify
from llava_jax.types import UNPACKED, DataSettings, InputError
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


def _verify(tmp_path, images, tokenizer, rows, template="v1", **options) -> Checked:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    settings = DataSettings(str(path), images, template, "front", "pad", 100, shuffle=False, **UNPACKED)
    return verify(settings, tokenizer, patches=4, **options)[1]


def test_rows_are_excluded_by_their_ids(tmp_path):
    rows, ids = tmp_path / "rows.jsonl", tmp_path / "ids.txt"
    rows.write_text("".join(json.dumps(_row(name)) + "\n" for name in ("a", "b", 7, "a")))
    records = load_records(str(rows))
    ids.write_text("a\r\n 7 \n\n")
    assert excluded_rows(records, str(ids)) == [0, 2, 3]
    ids.write_text("#1\nb\n#2")
    assert excluded_rows(records, str(ids)) == [1, 2]
    ids.write_text("b\nnone\nother\n")
    with pytest.raises(InputError, match="data.exclude=.*: no row has the id 'none', nor 1 more of these; expected"):
        excluded_rows(records, str(ids))
    with pytest.raises(InputError, match="data.exclude=.*absent.txt: cannot be read"):
        excluded_rows(records, str(tmp_path / "absent.txt"))


def test_every_bad_row_is_named_with_its_reason(tmp_path, images, tokenizer):
    rows = [
        GOOD,
        _row("missing", image="none.png"),
        _row("truncated", image="cut.jpg"),
        _row("empty", answer=""),
        _row("unequal", question="What is this?"),
        _row("role", conversations=[{"from": "robot", "value": "x"}]),
        _row("twice", conversations=[*GOOD["conversations"], {"from": "gpt", "value": "More."}]),
        _row("long", question="<image>\n" + "a " * 100),
        _row("outside", image="../a.png"),
        "no row",
        _row("text", question="Hello", image=None),
    ]
    checked = _verify(tmp_path, images, tokenizer, rows)
    assert (checked.rows, checked.kept) == (11, 2)
    reasons = {rejected.id: (rejected.row, rejected.reason) for rejected in checked.rejected}
    assert [row for row, _ in reasons.values()] == list(range(1, 10))
    for name, expected in {
        "missing": "none.png",
        "truncated": "cut.jpg",
        "empty": "empty answer",
        "unequal": "0 <image>",
        "role": "unknown role 'robot'",
        "twice": "two gpt turns in a row",
        "outside": "leaves the images folder",
        "long": "row longer than max_length keeps no target",
        "": "found text",
    }.items():
        assert expected in reasons[name][1], name
    lines = report_lines(checked, 100)
    assert lines[0].startswith("rejected: row 1 (id 'missing'): ") and len(lines) == 11
    assert lines[9].startswith("2 of 11 rows can be trained, 9 cannot")


def test_figures(tmp_path, images, tokenizer):
    leading = _row("leading", conversations=[{"from": "gpt", "value": "Hi."}, *GOOD["conversations"]])
    trailing = _row("trailing", conversations=[*GOOD["conversations"], {"from": "human", "value": "And?"}])
    cut = _row("cut", answer="A cat. " * 40)
    checked = _verify(tmp_path, images, tokenizer, [GOOD, leading, trailing, cut])
    # 31 of the system message, 16 of the turn (3 more for an image of 4 patches), 4 supervised; the last fills 100.
    assert checked.total("tokens") == 3 * (31 + 16 + 3 + 4) + 100
    assert checked.total("targets") == 3 * 4 + (100 - 50)
    assert int(checked.lengths_A.max()) == 100 and checked.total("cut") > 50
    assert (checked.count("cut"), checked.count("leading"), checked.count("open")) == (1, 1, 1)
    assert report_lines(checked, 100) == [
        "4 of 4 rows can be trained, 0 cannot (rows are counted from 0)",
        f"4 rows, 262 tokens, 62 of them supervised (23.7%); longest row: 3 with {100 + checked.total('cut')} tokens",
        f"data.max_length=100 cuts {checked.total('cut')} tokens off 1 rows",
        "answers before the first question left out: 1",
        "last questions without an answer left out: 1",
    ]
    told = leading | {"system": "Be brief."}
    assert _verify(tmp_path, images, tokenizer, [told]).count("leading") == 1
    kept_by_v0 = _verify(tmp_path, images, tokenizer, [leading], "v0")
    assert (kept_by_v0.kept, kept_by_v0.count("leading")) == (1, 0)


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
        _verify(tmp_path, images, tokenizer, [GOOD], dump_path=str(dump), look=break_down)
    assert dump.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["dump.jsonl", "images", "rows.json"]
    with pytest.raises(InputError, match="cannot be written"):
        _verify(tmp_path, images, tokenizer, [GOOD], dump_path=str(tmp_path / "none" / "dump.jsonl"))


def test_output_holds_the_rows_that_can_be_trained(tmp_path, images, capsys):
    rows = [GOOD | {"source": "kept as it is"}, _row("missing", image="none.png"), _row("truncated", image="cut.jpg")]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, _row("last")]), encoding="utf-8")
    given = dict(
        annotations=tmp_path / "rows.json",
        images=images,
        tokenizer=golden_llama(tmp_path / "golden", legacy=False),
        template="v1",
    )
    words = ["prepare", "verify", *(f"--{name}={value}" for name, value in given.items()), "--patches=4"]
    assert main(words) == 2
    assert main([*words, f"--output={tmp_path / 'clean.json'}"]) == 0
    assert json.loads((tmp_path / "clean.json").read_text()) == [rows[0], _row("last")]
    assert "rejected: row 1 (id 'missing')" in capsys.readouterr().out


def test_each_image_is_looked_at_once(tmp_path, images, tokenizer):
    seen = []
    checked = _verify(tmp_path, images, tokenizer, [GOOD, GOOD, _row("text", "Hello", image=None)], look=seen.append)
    assert checked.kept == 3 and seen == [os.path.join(images, "a.png")]


def test_what_spoils_all_rows_is_an_error(tmp_path, images, tokenizer):
    with pytest.raises(InputError, match="unknown template 'v9'"):
        _verify(tmp_path, images, tokenizer, [GOOD], "v9")
    endless = copy.copy(tokenizer)
    endless._special = {}
    with pytest.raises(InputError, match="end-of-text token"):
        _verify(tmp_path, images, endless, [GOOD])
    with pytest.raises(InputError, match="no such folder; expected the folder that image paths start from"):
        _verify(tmp_path, str(tmp_path / "nowhere"), tokenizer, [GOOD])
    with pytest.raises(InputError, match="no such annotations file"):
        verify(
            DataSettings("none.json", images, "v1", "front", "pad", 100, shuffle=False, **UNPACKED),
            tokenizer,
            patches=4,
        )
