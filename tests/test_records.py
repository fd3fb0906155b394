import json

import pytest

from llava_jax.data.records import load_records
from llava_jax.data.rows import Rejected, parse_row
from llava_jax.types import InputError, Record, Turn


def _row(**changes):
    row = {
        "id": "r1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    }
    return {key: value for key, value in (row | changes).items() if value is not None}


def _says(text, speaker="human"):
    return [{"from": speaker, "value": text}, {"from": "gpt", "value": "Yes."}]


def _write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_record_of_one_image_many_or_none():
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat."))
    assert parse_row(_row(), "here") == Record("r1", ("a.png",), turns)
    assert parse_row(_row(image=["x/a.png"]), "here").images == ("x/a.png",)
    both = _row(image=None, images=["a.png", "b.png"], conversations=_says("<image> or <image>?"))
    assert parse_row(both, "here").images == ("a.png", "b.png")
    assert parse_row(_row(image=None, conversations=_says("Hello")), "here").images == ()
    assert parse_row(_row(id=7), "here").id == "7"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["no", "object"], "expected an object with id and conversations, found a list"),
        (_row(conversations=None), "conversations is nothing"),
        (_row(conversations=[]), "empty conversation"),
        (_row(conversations=["hello"]), "conversations[0] is text"),
        (
            _row(conversations=_says("<image>", "user")),
            "conversations[0]: unknown role 'user' in from, expected human or",
        ),
        (_row(conversations=[{"from": "human"}]), "conversations[0]: missing value"),
        (_row(conversations=_says(3)), "conversations[0]: value is a number"),
        (_row(conversations=_says("")), "conversations[0]: empty question"),
        (_row(conversations=[*_says("<image>"), {"from": "gpt", "value": ""}]), "conversations[2]: empty answer"),
        (_row(conversations=[*_says("<image>"), {"from": "gpt", "value": " \n"}]), "conversations[2]: empty answer"),
        (_row(conversations=_says("What?")), "0 <image> in the human turns but 1 image named"),
        (_row(image=None), "1 <image> in the human turns but 0 images named"),
        (_row(conversations=_says("<image><image>")), "2 <image> in the human turns but 1 image named"),
        (
            _row(conversations=[{"from": "human", "value": "Show"}, {"from": "gpt", "value": "<image>"}]),
            "conversations[1]: <image> inside an answer",
        ),
        (_row(image="/etc/passwd"), "'/etc/passwd' leaves the images folder"),
        (_row(image="a/../../b.png"), "leaves the images folder"),
        (_row(image="..\\b.png"), "leaves the images folder"),
        (_row(image="C:b.png"), "leaves the images folder"),
        (_row(image=""), "is no path"),
        (_row(image=[3]), "3 is no path"),
        (_row(image=3), "image is a number"),
        (_row(images=["a.png"]), "both image and images"),
        (_row(conversations=_says("<image> \ud83d")), "lone surrogate U+D83D at character 8"),
        (_row(id=[1]), "id is a list"),
    ],
)
def test_bad_row_is_named(row, reason):
    with pytest.raises(InputError) as error:
        parse_row(row, "f.json: row 3")
    assert str(error.value).startswith("f.json: row 3")
    assert reason in str(error.value)
    if isinstance(row, dict) and row["id"] == "r1":
        assert "(id 'r1')" in str(error.value)


def test_json_and_json_lines_give_the_same(tmp_path):
    rows = [_row(), _row(id="r1"), _row(id="r3", image=None, conversations=_says("Grüße 😀\u2028"))]
    as_list = list(load_records(_write(tmp_path / "a.json", rows)))
    lines = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert list(load_records(_write(tmp_path / "a.jsonl", lines))) == as_list
    assert list(load_records(_write(tmp_path / "b.JSONL", lines))) == as_list
    assert [record.id for record in as_list] == ["r1", "r1", "r3"]
    assert as_list[2].turns[0].text == "Grüße 😀\u2028"


def test_every_bad_row_is_collected(tmp_path):
    lines = "\n".join([json.dumps(_row()), "{broken", "", json.dumps(_row(id="r9", image=None))])
    path = _write(tmp_path / "a.jsonl", lines)
    good, broken, unequal = map(load_records(path).entry, range(3))
    assert good.id == "r1"
    assert (broken.row, broken.id) == (1, "") and broken.reason.startswith("line 2 is not JSON: Expecting")
    assert broken.reason.endswith(", column 2")
    assert isinstance(unequal, Rejected) and (unequal.row, unequal.id) == (2, "r9")
    with pytest.raises(InputError, match=r"^row 1: line 2 is not JSON"):
        load_records(path)[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "expected a JSON list of rows, found a number or a word"),
        ("{}", "expected a JSON list of rows, found an object"),
        ("[]", "no rows"),
        ('{"id": 1}\n{"id": 2}', "belongs into a .jsonl file"),
        ("[" * 100000, "nested more than 200 deep"),
    ],
)
def test_file_that_is_no_annotations(tmp_path, content, reason):
    with pytest.raises(InputError, match=reason):
        load_records(_write(tmp_path / "a.json", content))


def test_missing_and_undecodable_file(tmp_path):
    with pytest.raises(InputError, match="a folder with neither dataset_info.json, .* nor a Parquet file; expected"):
        load_records(str(tmp_path))
    with pytest.raises(InputError, match="no such annotations file"):
        load_records(str(tmp_path / "none.json"))
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(InputError, match="not UTF-8 text \\(byte 2\\)"):
        load_records(str(tmp_path / "latin.json"))
