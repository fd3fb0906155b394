"""Rows on disk: sources and weights, places of rows in a file, what is kept between starts, TFDS data sets."""

import json
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from etils import epath
from PIL import Image

from llava_jax import io
from llava_jax.cli.main import main
from llava_jax.data import records, sources, validate
from llava_jax.data.images import check_image
from llava_jax.data.mixture import Mixture
from llava_jax.data.packing import plan_batches
from llava_jax.data.records import load_records
from llava_jax.data.rows import Rejected
from llava_jax.data.sources import Source, absolute, split_sources
from llava_jax.data.tokenize import TextTokenizer
from llava_jax.prepare import arrayrecord
from llava_jax.types import InputError
from tests import full_size


def row(name, text="Hi", image=None):
    turns = [{"from": "human", "value": f"{text}<image>" if image else text}, {"from": "gpt", "value": "Yes."}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing of a test is kept in the user's folder."""
    monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- sources --------------------------------------------------------------------------------------------------------


def test_sources_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_sources("a.json") == (Source("a.json"),)
    assert split_sources("a.json:0.7, gs://b/c.jsonl:3") == (Source("a.json", 0.7), Source("gs://b/c.jsonl", 3.0))
    exact = "a.json:0.123456789,b.json:1000000,c.json:1e+30"
    assert ",".join(map(str, split_sources(exact))) == exact
    assert split_sources("a.json:.") == (Source("a.json:."),) and split_sources("a:1.0.0") == (Source("a:1.0.0"),)
    assert split_sources("tfds:a/1.0.0,gs://b/c") == (Source("tfds:a/1.0.0"), Source("gs://b/c"))
    assert absolute("a.json:0.7,tfds:b:1") == f"{tmp_path}/a.json:0.7,tfds:b:1"
    assert absolute("") == "" and absolute("gs://b/c.json") == "gs://b/c.json"
    write(tmp_path / "a,b.json", [])
    assert split_sources("a,b.json") == (Source("a,b.json"),)
    for text, reason in (("a.json:0.5,b.json", "b.json has no weight"), ("a:0,b:1", "above 0"), ("a,a", "named twice")):
        with pytest.raises(InputError, match=reason):
            split_sources(text)


def test_rows_of_several_sources_stand_one_after_another(tmp_path):
    first = write(tmp_path / "a.json", [row("a0"), row("a1")])
    second = write(tmp_path / "b.json", [row("b0"), {"id": "b1"}])
    rows = load_records(f"{first},{second}")
    assert len(rows) == 4 and rows.mixture is None and [rows[n].id for n in range(3)] == ["a0", "a1", "b0"]
    bad = rows.entry(3)
    assert isinstance(bad, Rejected) and bad.row == 3 and "(row 1 of" in bad.reason and "b.json" in bad.reason
    assert rows.fingerprint != load_records(f"{second},{first}").fingerprint
    assert load_records(f"{first}:1,{second}:2").mixture == Mixture((2, 2), (1.0, 2.0))


def test_a_file_elsewhere_is_copied_once(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")  # whose credentials nobody looks for
    content, opened = json.dumps([row("far")]).encode(), []

    def open_(_, path, mode):
        opened.append(str(path))
        return BytesIO(content)

    found = types.SimpleNamespace(length=len(content), mtime=1)
    with epath.testing.mock_epath(stat=lambda _, path: found, open=open_):
        assert [load_records("gs://bucket/rows.json")[0].id for _ in range(2)] == ["far", "far"]
    assert opened == ["gs://bucket/rows.json"] and len(list((cache / "rows").glob("*.kept.json"))) == 1


# ---- where rows stand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [5, 64, 1 << 20])
def test_rows_are_found_whatever_the_pieces(tmp_path, monkeypatch, piece):
    for name in ("PIECE", "SCANNED"):
        monkeypatch.setattr(io, name, piece)
    rows = [row(f"{n}", text) for n, text in enumerate(('"},{"', "[\\", "größe 😀 \u2028", "x" * 300, "\n\t}]"))]
    rows[0] |= {"n": [1.5, -2, 1e400, 2**62], "none": None}
    forms = {
        "a.json": json.dumps(rows).replace("Infinity", "1e99"),
        "b.json": "\ufeff" + json.dumps(rows, ensure_ascii=False, indent=2).replace("Infinity", "1") + " \n",
        "c.jsonl": "\r\n\n".join(json.dumps(one, ensure_ascii=False) for one in rows),
    }
    for name, text in forms.items():
        (tmp_path / name).write_bytes(text.encode())
        found = load_records(str(tmp_path / name))
        assert [one.turns[0].text for one in found] == [one["conversations"][0]["value"] for one in rows]
    for text, reason in (
        ('[{"a": 1} {"b": 2}]', r"after array element, .*, line 1 \(byte 10\); expected a JSON list of rows$"),
        ('[{"a": 1}\n,\n{"a": 2}', "not JSON: the file ends too early; expected"),
        ('[{"a": 1}]\nx', r"not JSON: .*, line 2 \(byte 11\)"),
        ('[{"a": "b', "not JSON: the file ends too early"),
        ('[{"a": tru}]', r"not JSON: invalid string in json text, line 1 \(byte 10\)"),
        ('[{"a": NaN}]', r"not JSON: invalid char in json text, line 1 \(byte 7\)"),
        ('[\n{"a": 1, "b": 2, "a": 3}]', r"not JSON: key 'a' twice in one object, line 2 \(byte 2[0-9]\)"),
        ('\ufeff[{"a": 1},\n]', r"not JSON: .*, line 2 \(byte 14\)"),
        ('{"data": [{"id": 1}]}', "found an object; if its list 'data' holds the rows, write that alone"),
        ('{"id": 1, "conversations": []}\n{"id": 2}', "one object a line belongs into a .jsonl file"),
        ("12", "found a number or a word"),
        ("", "expected a JSON list of rows, found nothing"),
        ('[{"id": "\\ud83d", "a": tru}]', "not JSON: .*line 1"),
    ):
        (tmp_path / "bad.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=reason) as caught:
            load_records(str(tmp_path / "bad.json"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("piece", [5, 64, 1 << 20])
def test_half_a_surrogate_is_a_bad_row_of_a_good_list(tmp_path, monkeypatch, piece):
    """The parser in C would make a question mark of it; an escaped backslash before it is a text, pairs are one."""
    for name in ("PIECE", "SCANNED"):
        monkeypatch.setattr(io, name, piece)
    texts = {"high": "\ud83d", "low": "a\ude00", "turned": "\ude00\ud83d", "text": "\\ud83d", "pair": "😀"}
    rows = load_records(write(tmp_path / "a.json", [row(name, text) for name, text in texts.items()]))
    for number, name in enumerate(texts):
        entry = rows.entry(number)
        assert isinstance(entry, Rejected) == (name in ("high", "low", "turned")), name
        assert "lone surrogate" in entry.reason if isinstance(entry, Rejected) else entry.turns[0].text == texts[name]


def test_lines_in_another_form_are_told_in_one_line(tmp_path):
    content = [row("a"), row("b")]
    forms = {
        json.dumps(content): "a JSON list of rows: name it .json",
        "\ufeff" + json.dumps(content, indent=1): "a JSON list of rows: name it .json",
        "\r".join(map(json.dumps, content)): "its lines end in a carriage return alone",
    }
    for text, reason in forms.items():
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=reason):
            load_records(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"id": 1, "id": 2}')
    assert "line 1 is not JSON: key 'id' twice" in load_records(str(tmp_path / "a.jsonl")).entry(0).reason


def test_a_list_becomes_lines_once(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.json", [row("a"), row("b")])
    assert [record.id for record in load_records(path)] == ["a", "b"]
    (lines,) = (cache / "rows").iterdir()
    assert [json.loads(line)["id"] for line in lines.read_text().splitlines()] == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setattr(records, "elements", None)
        assert [record.id for record in load_records(path)] == ["a", "b"]
    monkeypatch.setenv("LLAVA_JAX_CACHE", path)
    with pytest.raises(InputError, match="cannot be written .*LLAVA_JAX_CACHE"):
        load_records(write(tmp_path / "b.json", [row("c")]))


def test_rows_read_in_any_order_are_the_same(tmp_path, monkeypatch):
    """In order (from pieces that hold some of them, or less than one), backwards, jumping, each twice."""
    content = [row(f"row {n}", "é" * (1 + n * 7 % 50)) for n in range(40)]
    rows = load_records(write(tmp_path / "a.json", content))
    orders = [*range(40)], [*range(39, -1, -1)], [n * 17 % 40 for n in range(40)], [n // 2 for n in range(80)]
    for piece in (50, 1000, 1 << 18):
        monkeypatch.setattr(records, "SEVERAL_ROWS", piece)
        for order in orders:
            assert [rows[n].id for n in order] == [f"row {n}" for n in order]


def test_threads_may_read_side_by_side(tmp_path, monkeypatch):
    """The thread that reads ahead, and the one that names the rows of a bad batch."""
    rows = load_records(write(tmp_path / "a.json", [row(f"row {n}", "x" * (1 + n * 7 % 50)) for n in range(400)]))
    monkeypatch.setattr(records, "SEVERAL_ROWS", 500)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            orders = [range(400), range(399, -1, -1), range(400), range(0, 400, 3)] * 20
            assert all(pool.map(lambda order: all(rows[n].id == f"row {n}" for n in order), orders))
    finally:
        sys.setswitchinterval(before)


# ---- mixtures -------------------------------------------------------------------------------------------------------


def test_a_mixture_shows_the_shares_and_every_row_in_turn():
    mixture = Mixture((10, 6, 4), (0.5, 0.4, 0.1))
    assert mixture.shares().tolist() == [10, 8, 2]
    epochs = [mixture.epoch(epoch, seed=3, shuffle=True) for epoch in range(6)]
    for source, (begin, end, share) in enumerate(((0, 10, 10), (10, 16, 8), (16, 20, 2))):
        counts = np.bincount(np.concatenate(epochs), minlength=20)[begin:end]
        assert counts.sum() == 6 * share and np.ptp(counts) <= 1, source
        assert all(((begin <= rows) & (rows < end)).sum() == share for rows in epochs)
    assert mixture.epoch(2, seed=3, shuffle=True).tolist() == epochs[2].tolist() != epochs[1].tolist()
    assert mixture.epoch(2, seed=4, shuffle=True).tolist() != epochs[2].tolist()
    plain = mixture.epoch(0, seed=3, shuffle=False)
    assert plain[plain < 10].tolist() == list(range(10))
    assert plain[(plain >= 10) & (plain < 16)].tolist() == [10, 11, 12, 13, 14, 15, 10, 11]
    assert set(plain[:4]) > {0, 10}


@pytest.mark.parametrize("pack", [False, True])
def test_batches_of_a_mixture_have_its_rows(tmp_path, pack):
    settings = full_size.settings_of(tmp_path, workers=0, pack=pack)
    mixture, lengths = Mixture((30, 10), (1.0, 3.0)), np.full(40, 100, np.int32)
    images = np.ones(40, np.int32)
    sizes = dict(batch_size=8, row_multiple=1, steps=10, seed=1, slots_A=images, words_A=lengths, mixture=mixture)
    plan = plan_batches([None] * 40, lengths, settings, **sizes)
    for epoch in range(2):
        found = plan.order_UC[5 * epoch : 5 * epoch + 5].ravel()
        assert sorted(found) == sorted(mixture.epoch(epoch, seed=1, shuffle=True))


# ---- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_full_size_in_small(tmp_path, monkeypatch, cache, pack):
    """tests/full_size.py with few rows: the second start tokenises nothing, and continues at the exact next row."""
    for module in (records, validate):
        monkeypatch.setattr(module, "KEPT_ROWS", 100)
    full_size.make_rows(tmp_path, 300)
    settings = full_size.settings_of(tmp_path, workers=0, pack=pack)
    data, plan, _ = full_size.open_batches(settings, 16)
    batches = [next(data) for _ in range(4)]
    kinds = sorted(path.suffix for path in (cache / "rows").iterdir())
    assert kinds == [".jsonl", ".npz", ".npz", ".npz"]

    def never(*_, **__):
        raise AssertionError("done again")

    with monkeypatch.context() as patch:
        patch.setattr(TextTokenizer, "encode_chunks", never)
        patch.setattr(validate, "plan_batches", never)
        again, other, _ = full_size.open_batches(settings, 16)
    assert (other.shape, other.max_per_row) == (plan.shape, plan.max_per_row)
    assert other.order_UC.tolist() == plan.order_UC.tolist() and other.rows_UC.tolist() == plan.rows_UC.tolist()
    again.set_state({"batches": 3})
    resumed = next(again)
    np.testing.assert_array_equal(resumed.tokens_BT, batches[3].tokens_BT)
    np.testing.assert_array_equal(resumed.rows_BM, batches[3].rows_BM)
    assert sorted(resumed.rows_BM[resumed.rows_BM >= 0]) == sorted(plan.order_UC[3])


def test_what_nobody_asks_for_is_let_go_of_and_nothing_else(cache):
    names = {name: sources.key_of(name) for name in ("used", "unused", "new")}
    for name in ("used", "unused"):
        sources.keep(names[name], {"rows": np.arange(3)})
    others = [cache / "of others.npz", cache / "rows" / "of others.npz", cache / "rows" / ("0" * 32 + ".npz")]
    for path in others:
        path.write_text("not ours")
    for path in [*others, *(cache / "rows").iterdir()]:
        os.utime(path, (0, 0))
    assert sources.recall(names["used"])["rows"].tolist() == [0, 1, 2]
    sources.keep(names["new"], {"rows": np.arange(3)})
    assert [path.exists() for path in others] == [True] * 3
    assert sources.recall(names["unused"]) is None and sources.recall(names["new"]) is not None


def test_what_is_kept_belongs_to_content_and_images(tmp_path, monkeypatch):
    for module in (records, validate):
        monkeypatch.setattr(module, "KEPT_ROWS", 10)
    path = full_size.make_rows(tmp_path, 40)
    settings = full_size.settings_of(tmp_path, workers=0, pack=False)
    full_size.open_batches(settings, 8)
    os.rename(tmp_path / "images" / "3.jpg", tmp_path / "images" / "gone.jpg")
    with pytest.raises(InputError, match=r"6 of 40 rows cannot be trained.*3\.jpg: no such file"):
        full_size.open_batches(settings, 8)
    os.rename(tmp_path / "images" / "gone.jpg", tmp_path / "images" / "3.jpg")
    rows = json.loads(open(path, encoding="utf-8").read())
    rows[1]["conversations"][-1]["value"] = ""
    write(tmp_path / "rows.json", rows)
    with pytest.raises(InputError, match="1 of 40 rows.*row 1 .*empty answer"):
        full_size.open_batches(settings, 8)


def test_what_is_kept_and_damaged_is_not_there(cache):
    assert sources.recall("a") is None
    sources.keep("a", {"x": np.arange(5)})
    assert sources.recall("a")["x"].tolist() == list(range(5))
    (path,) = (cache / "rows").iterdir()
    whole = path.read_bytes()
    # One byte of the values, and one of the archive's own table: how they are compressed.
    values, table = whole.index(np.arange(5).tobytes()), whole.index(b"PK\1\2") + 10
    changed = (whole[:place] + b"?" + whole[place + 1 :] for place in (values, table))
    for content in (b"", b"no archive", whole[:-40], *changed):
        path.write_bytes(content)
        assert sources.recall("a") is None


def test_writers_do_not_meet(cache):
    """Two of them at a time, and one that fails: what is there is whole, and nothing else is."""
    with sources.whole(f"{cache}/a") as slow:
        slow.write(b"slow")
        with sources.whole(f"{cache}/a") as quick:
            quick.write(b"quick")
        assert (cache / "a").read_bytes() == b"quick"
    with pytest.raises(ValueError), sources.whole(f"{cache}/a") as broken:
        broken.write(b"br")
        raise ValueError
    assert (cache / "a").read_bytes() == b"slow" and os.listdir(cache) == ["a"]


# ---- TFDS -----------------------------------------------------------------------------------------------------------


def test_arrayrecord_is_read_by_tfds_and_by_train(tmp_path, capsys):
    path = full_size.make_rows(tmp_path, 60)
    words = ["prepare", "arrayrecord", f"--annotations={path}", f"--images={tmp_path}/images", f"--output={tmp_path}/o"]
    assert main([*words, "--shards=2"]) == 0
    assert main(words) == 2 and "is there already" in capsys.readouterr().err

    import tensorflow_datasets as tfds

    source = tfds.data_source("llava_rows", split="train", data_dir=f"{tmp_path}/o")
    rows = load_records(path)
    given = [rows.entry(row) for row in range(len(rows))]
    assert len(source) == 60 and [one["id"].decode() for one in source] == [record.id for record in given]
    image = (tmp_path / "images" / given[3].images[0]).read_bytes()
    assert source[3]["images"] == [image] and source[0]["images"] == []
    assert source[3]["conversations"]["value"][0].decode() == given[3].turns[0].text
    assert "tensorflow" not in sys.modules
    folder = f"{tmp_path}/o/llava_rows/1.0.0"
    rows = load_records(folder)
    assert [record.turns for record in rows] == [record.turns for record in given]
    assert rows[3].images == (image,) and rows[11].id == given[11].id
    capsys.readouterr()
    words = ["prepare", "verify", f"--annotations={folder}", "--template=v1", f"--tokenizer={full_size.TOKENIZER}"]
    assert main(words) == 0 and "60 of 60 rows can be trained" in capsys.readouterr().out
    packed = full_size.settings_of(tmp_path, workers=0, pack=False)
    files, _, _ = full_size.open_batches(packed, 8)
    bytes_, _, _ = full_size.open_batches(full_size.reading(packed, folder), 8)
    for ours, theirs in zip(next(files), next(bytes_), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_message_about_a_packed_image_names_its_file(tmp_path):
    """Packed again, too, and from a data set that was packed before it kept names."""
    os.mkdir(tmp_path / "images")
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    path = write(tmp_path / "a.json", [row("one", image="a.png")])
    arrayrecord.write(path, f"{tmp_path}/images", f"{tmp_path}/first")
    arrayrecord.write(f"{tmp_path}/first/llava_rows/1.0.0", "", f"{tmp_path}/again")
    (image,) = load_records(f"{tmp_path}/again/llava_rows/1.0.0")[0].images
    assert image == (tmp_path / "images" / "a.png").read_bytes()
    assert image.name == "a.png"
    with pytest.raises(InputError, match="image a.png: truncated or damaged"):
        check_image(type(image)(image[:-30], image.name))

    features = tmp_path / "first" / "llava_rows" / "1.0.0" / "features.json"
    described = json.loads(features.read_text())
    del described["featuresDict"]["features"]["image_names"]
    features.write_text(json.dumps(described))
    (unnamed,) = load_records(str(features.parent))[0].images
    assert unnamed == image
    with pytest.raises(InputError, match="image that came with its row: truncated or damaged"):
        check_image(type(image)(image[:-30], unnamed.name))


def test_arrayrecord_names_what_cannot_be_packed(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    path = write(
        tmp_path / "a.json",
        [row("good", image="whole.png"), row("lost", image="none.png"), {"id": "bad"}, row("cut", image="cut.png")],
    )
    words = ["prepare", "arrayrecord", f"--annotations={path}", f"--images={tmp_path}", f"--output={tmp_path}/o"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "3 of 4 rows cannot be packed: row 1 (id 'lost')" in error and "row 2 (id 'bad')" in error
    assert f"row 3 (id 'cut'): image {tmp_path}/cut.png: truncated or damaged" in error
    assert not (tmp_path / "o").exists()
    with pytest.raises(InputError, match="tfds:none_such: TFDS cannot read"):
        load_records("tfds:none_such")
