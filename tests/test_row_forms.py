"""Rows as others keep them: OpenAI's messages, ShareGPT, Parquet, data sets of `datasets`, names on the Hub."""

import base64
import copy
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from llava_jax.cli.main import main
from llava_jax.data.records import load_records, recognised
from llava_jax.data.rows import Rejected, parse_any
from llava_jax.data.sources import absolute, choose_split, with_commits
from llava_jax.settings import read_settings
from llava_jax.train.loop import train
from llava_jax.types import ImageBytes, InputError, Turn
from tests import full_size
from tests.tiny_run import make_inputs, make_settings

ROWS, ROLES = 200, {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))


def llava_rows(folder: pathlib.Path) -> list[dict]:
    """Rows of `full_size`, some with several images, a system text, answers that are not trained, an unread key."""
    rows = json.loads(pathlib.Path(full_size.make_rows(folder, ROWS)).read_text())
    for number, row in enumerate(rows):
        if number % 9 == 1 and "image" in row:
            row["images"] = [row.pop("image"), "8.jpg", "9.jpg"]
            row["conversations"][0]["value"] += "\n<image>\nIs it this?"
            row["conversations"] += [{"from": "human", "value": "Or\n<image>"}, {"from": "gpt", "value": "No."}]
        if number % 7 == 2:
            row["system"] = "Answer in French."
        if number % 5 == 3 and len(row["conversations"]) > 2:
            row["conversations"][1]["weight"] = 0
        if number % 4 == 1:
            row["source"] = "web"
    return rows


def share_gpt(row: dict) -> dict:
    """The row with the speakers of ShareGPT's descendants, its system text as a turn, its images as a list."""
    row = copy.deepcopy(row)
    turns = [turn | {"from": ROLES[turn["from"]]} for turn in row["conversations"]]
    if "system" in row:
        turns.insert(0, {"from": "system", "value": row.pop("system")})
    images = row.pop("images", [row.pop("image")] if "image" in row else [])
    return row | {"conversations": turns, "images": images}


def parts(text: str) -> list[dict]:
    """A text with placeholders on lines of their own as parts."""
    found = [part.strip("\n") for part in re.split("(<image>)", text)]
    return [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in found if part]


def messages(row: dict) -> dict:
    """The row in OpenAI's form, its images next to the messages."""
    row = share_gpt(row)
    turns = row.pop("conversations")
    said = []
    for turn in turns:
        who, text = turn.pop("from"), turn.pop("value")
        said.append(turn | {"role": who, "content": parts(text) if "<image>" in text else text})
    return row | {"messages": said}


def with_sources(row: dict, folder: pathlib.Path) -> dict:
    """A row of `messages` with each image in its part: a path, or the bytes as a data: URL."""
    row = copy.deepcopy(row)
    names = iter(row.pop("images"))
    shown = [part for turn in row["messages"] for part in turn["content"] if isinstance(part, dict)]
    for number, part in enumerate(part for part in shown if part["type"] == "image"):
        name = next(names)
        content = base64.b64encode((folder / name).read_bytes()).decode()
        url = f"data:image/jpeg;base64,{content}"
        kinds = ({"image": name}, {"path": name}, {"type": "image_url", "image_url": {"url": url, "detail": "high"}})
        part |= kinds[number % 3]
    return row


def with_bytes(row: dict, folder: pathlib.Path) -> dict:
    """A row with its images as `datasets` keeps them."""
    named = row.get("images", [row["image"]] if "image" in row else [])
    images = [{"bytes": (folder / name).read_bytes(), "path": name} for name in named]
    return {key: value for key, value in row.items() if key not in ("image", "images")} | {"images": images}


def as_texts(row: dict) -> dict:
    """A row of `messages` with `<image>` in texts in place of parts, which one column of strings can hold."""
    row = copy.deepcopy(row)
    for turn in row["messages"]:
        if isinstance(turn["content"], list):
            turn["content"] = "\n".join(part.get("text", "<image>") for part in turn["content"])
    return row


def as_parts(row: dict) -> dict:
    """A row of `messages` with every content as a list of parts, as `datasets` has to write it."""
    row = copy.deepcopy(row)
    for turn in row["messages"]:
        if isinstance(turn["content"], str):
            turn["content"] = [{"type": "text", "text": turn["content"]}]
    return row


def columns(rows: Iterable[dict]) -> list[dict]:
    """The rows with all keys that any of them has: pyarrow and `datasets` take the columns of the first one."""
    rows = list(rows)
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def write_lines(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- the same rows in every form --------------------------------------------------------------------------------


def test_the_same_rows_in_every_form_give_byte_equal_batches(tmp_path):
    rows, images = llava_rows(tmp_path), tmp_path / "images"
    said = [messages(row) for row in rows]
    sources = [with_sources(row, images) for row in said]
    plain = str(tmp_path / "rows.json")
    pathlib.Path(plain).write_text(json.dumps(rows))
    forms = {write_lines(tmp_path / "llava.jsonl", rows): "JSON Lines, LLaVA conversations with images as paths"}
    name = write_lines(tmp_path / "sharegpt.jsonl", [share_gpt(row) for row in rows])
    forms[name] = "JSON Lines, ShareGPT conversations with images as paths"
    name = write_lines(tmp_path / "messages.jsonl", said)
    forms[name] = "JSON Lines, OpenAI messages with images as paths"
    name = write_lines(tmp_path / "sources.jsonl", sources)
    forms[name] = "JSON Lines, OpenAI messages with images as paths and bytes"
    name = str(tmp_path / "llava.parquet")
    parquet.write_table(pa.Table.from_pylist(columns(with_bytes(row, images) for row in rows)), name, row_group_size=30)
    forms[name] = "Parquet, LLaVA conversations with images as bytes"
    name = str(tmp_path / "raw.parquet")
    raw = [row | {"images": [(images / path).read_bytes() for path in row["images"]]} for row in map(as_texts, said)]
    parquet.write_table(pa.Table.from_pylist(columns(raw)), name, row_group_size=1000)
    forms[name] = "Parquet, OpenAI messages with images as bytes"
    shown = datasets.Dataset.from_list(columns(with_bytes(as_parts(row), images) for row in said))
    shown = shown.cast_column("images", datasets.Sequence(datasets.Image()))
    shown.save_to_disk(tmp_path / "saved", num_shards=3)
    forms[str(tmp_path / "saved")] = "Hugging Face data set, OpenAI messages with images as bytes"
    datasets.Dataset.from_list(columns(map(as_parts, sources))).save_to_disk(tmp_path / "parts")
    forms[str(tmp_path / "parts")] = "Hugging Face data set, OpenAI messages with images as paths and bytes"
    shown.to_parquet(tmp_path / "hub-00000-of-00001.parquet")
    forms[str(tmp_path / "hub-00000-of-00001.parquet")] = "Parquet, OpenAI messages with images as bytes"

    settings = dataclasses.replace(full_size.settings_of(tmp_path, workers=2, pack=True), max_length=1024)
    assert recognised(plain, load_records(plain)) == [f"{plain}: JSON, LLaVA conversations with images as paths"]
    expected, plan, _ = full_size.open_batches(settings, 16)
    expected = [next(expected) for _ in range(plan.steps)]
    for name, form in forms.items():
        records = load_records(name)
        assert recognised(name, records) == [f"{name}: {form}"]
        assert [record.id for record in records] == [row["id"] for row in rows]
        found, _, _ = full_size.open_batches(full_size.reading(settings, name), 16)
        for batch in expected:
            for ours, theirs in zip(next(found), batch, strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_rows_of_tables_are_read_in_any_order_by_several_threads(tmp_path):
    rows = [{"id": f"{n}", "messages": [{"role": "user", "content": f"{n}"}]} for n in range(100)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=4)
    for name in ("a.parquet", "saved"):
        records = load_records(str(tmp_path / name))
        for order in (range(100), range(99, -1, -1), [n * 37 % 100 for n in range(100)]):
            assert [records[n].id for n in order] == [f"{n}" for n in order]


def test_the_content_of_tables_is_their_fingerprint(tmp_path):
    def written(name: str, answer: str) -> str:
        row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / name)
        return load_records(str(tmp_path / name)).fingerprint

    assert written("a.parquet", "Yes.") == written("b.parquet", "Yes.") != written("a.parquet", "No..")


# ---- what a message means ---------------------------------------------------------------------------------------


def turn(*content, role="user", **others):
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)} | others


def asked(*said, answer="Yes.", **others):
    return {"id": "m1", "messages": [*said, turn(answer, role="assistant")]} | others


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    "row, turns, images",
    [
        (
            asked(turn(text("Compare"), IMAGE, text("with"), IMAGE), images=["a", "b"]),
            ["Compare\n<image>\nwith\n<image>"],
            "ab",
        ),
        (asked(turn(IMAGE, IMAGE, text("<image> or <image>?")), images=["a", "b"]), ["<image> or <image>?"], "ab"),
        (asked(turn("<image> or <image>?"), images=["a", "b"]), ["<image> or <image>?"], "ab"),
        (asked(turn({"type": "image", "image": "b"}, IMAGE), images=["a"]), ["<image>\n<image>"], "ba"),
        (asked(turn(text("Hi\n"), IMAGE | {"index": 0, "text": None}), image="a"), ["Hi\n\n<image>"], "a"),
        (asked(turn({"type": "image_url", "image_url": "a"})), ["<image>"], "a"),
        (asked(turn({"type": "image", "url": "a"}, text("Hi"))), ["<image>\nHi"], "a"),
    ],
)
def test_images_stand_where_their_parts_or_placeholders_stand(row, turns, images):
    found = parse_any(row, 0)
    assert [turn.text for turn in found.turns[:-1]] == turns and found.images == tuple(images)


def test_system_weight_and_unread_keys_mean_what_they_mean_in_other_forms():
    row = asked(
        turn("Be brief.", role="system"), turn("Q1"), turn("A1", role="assistant", weight=0), turn("Q2", name="Ann")
    )
    found = parse_any(row | {"source": "web"}, 0)
    said = (Turn("system", "Be brief."), Turn("human", "Q1"), Turn("gpt", "A1", False), Turn("human", "Q2"))
    assert found.turns == (*said, Turn("gpt", "Yes.")) and found.unread == ("source", "messages.name")
    detailed = asked(turn({"type": "image_url", "image_url": {"url": "a", "detail": "high"}} | {"cached": 1}))
    assert parse_any(detailed, 0).unread == ("messages.content.cached", "messages.content.image_url.detail")
    lists = {"from": ["human", "gpt"], "value": ["Hi", "Yes."]}
    assert parse_any({"conversations": lists}, 0).turns == (Turn("human", "Hi"), Turn("gpt", "Yes."))


def test_what_a_table_has_of_other_rows_is_nothing(tmp_path):
    nothing = {"bytes": None, "path": None}
    part = text("Hi") | {"image": nothing, "image_url": {"url": None, "detail": None}, "index": None}
    content = {"bytes": b"JFIF", "path": None}
    rows = [asked(turn(part), image=nothing, source=None), asked(turn(IMAGE | {"text": None}), image=content)]
    rows = [as_parts(row) for row in rows]
    parquet.write_table(pa.Table.from_pylist(columns(rows)), tmp_path / "a.parquet")
    found = load_records(str(tmp_path / "a.parquet"))
    assert [record.images for record in found] == [(), (b"JFIF",)] and found[0].unread == ()


def test_an_image_that_came_with_its_row_keeps_its_name():
    part = {"type": "image", "image": {"bytes": b"JFIF", "path": "cats/1.jpg"}}
    (image,) = parse_any(asked(turn(part)), 0).images
    assert isinstance(image, ImageBytes) and (image, image.name) == (b"JFIF", "cats/1.jpg")
    (image,) = parse_any(asked(turn({"type": "image", "image": "DATA:image/png;base64,SkZJRg=="})), 0).images
    assert (image, image.name) == (b"JFIF", "of DATA:image/png;base64")


@pytest.mark.parametrize(
    "row, reason",
    [
        (asked(turn("Hi", role="tool")), "messages[0]: unknown role 'tool' in role, expected user or assistant"),
        (
            asked(turn("Hi", tool_calls=[{"id": 1}])),
            "messages[0]: tool_calls is not read, though it says what is trained",
        ),
        (asked(turn("Hi"), answer=""), "messages[1]: empty answer"),
        (asked(turn("Hi"), turn("x", role="system")), "messages[1]: unknown role 'system' in from"),
        (asked(turn(IMAGE)), "messages[0]: content[0]: an image without a source, and the row names no more images"),
        (asked(turn("Hi"), images=["a.png"]), "0 <image> in the human turns but 1 image named"),
        (asked(turn(IMAGE, text("<image> <image>")), images=["a", "b"]), "2 <image> in the text for 1 images"),
        (asked(turn(IMAGE | {"index": 1}), images=["a", "b"]), "messages[0]: content[0]: index is 1, expected 0"),
        (asked(turn("Hi"), turn(IMAGE, role="assistant"), image="a"), "messages[1]: <image> inside an answer"),
        (asked(turn({"type": "image", "image": "a", "path": "b"})), "content[0]: image and path are given; keep one"),
        (asked(turn(text("Hi") | {"image": "a.png"})), "content[0]: image in a part of type text is not read"),
        (asked(turn({"type": "text"})), "content[0]: text is None, expected text"),
        (asked(turn({"type": "input_audio", "input_audio": {}})), "content[0]: type 'input_audio' is not read"),
        (asked(turn({"type": "video", "video": "a.mp4"})), "content[0]: type 'video' is not read"),
        (asked(turn(["Hi"])), "messages[0]: content[0]: is ['Hi']; expected {"),
        (
            asked(turn({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}})),
            "'https://a.b/c.png' is an address",
        ),
        (
            asked(turn({"type": "image_url", "image_url": {"url": "data:image/png,abc"}})),
            "expected data:image/TYPE;base64",
        ),
        (asked(turn({"type": "image", "image": "data:image/png;base64,a"})), "data:image/png;base64,…: not base64"),
        (asked(turn({"type": "image", "image": "data:image/png;base64,é"})), "data:image/png;base64,…: not base64"),
        (
            {"id": "m1", "conversations": {"from": ["human", "gpt"], "value": ["Hi"]}},
            "its lists from, value differ in length",
        ),
        (asked(turn({"type": "image", "image": "../a.png"})), "'../a.png' leaves the images folder"),
        (asked(turn("Hi"), images=["data:image/png;base64,SkZJRg=="]) | {"messages": None}, "conversations is nothing"),
        (asked(turn("Hi") | {"from": "human"}), "messages[0]: both from and role are given"),
        (asked(turn("Hi"), conversations=[{"from": "human", "value": "Hi"}]), "both conversations and messages"),
        (asked(turn("Hi")) | {"messages": "Hi"}, "messages is text, expected a list of turns"),
        (
            {"id": "m1", "conversations": [{"from": "robot", "value": "Hi"}]},
            "conversations[0]: unknown role 'robot' in from",
        ),
    ],
)
def test_a_bad_row_of_each_form_is_named(row, reason):
    found = parse_any(row, 7)
    assert isinstance(found, Rejected), found
    assert (found.row, found.id) == (7, "m1") and reason in found.reason, found.reason
    assert "\n" not in str(found) and len(str(found)) < 300


# ---- what is no source ------------------------------------------------------------------------------------------


def test_tables_that_cannot_be_read_are_told_in_one_line(tmp_path):
    def refused(name: str, reason: str) -> None:
        with pytest.raises(InputError, match=reason) as caught:
            load_records(str(tmp_path / name))
        assert "\n" not in str(caught.value)

    (tmp_path / "a.parquet").write_bytes(b"no Parquet at all")
    refused("a.parquet", "a.parquet: no Parquet that can be read .*; expected rows with conversations or messages")
    parquet.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "b.parquet")
    refused("b.parquet", "b.parquet: columns text, label; expected rows with conversations or messages")
    parquet.write_table(pa.table({"messages": pa.array([], pa.list_(pa.string()))}), tmp_path / "c.parquet")
    refused("c.parquet", "c.parquet: no rows; expected")
    saved = datasets.Dataset.from_list([asked(turn("Hi"))])
    saved.save_to_disk(tmp_path / "saved")
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:100])
    refused("saved", "saved: no Hugging Face data set that can be read")
    (tmp_path / "saved" / "state.json").write_text("{}")
    refused("saved", "saved: no data set as `save_to_disk` writes it")
    refused(".", "splits a, b, c; expected one split, or one called train")
    (tmp_path / "empty").mkdir()
    refused("empty", "a folder with neither dataset_info.json, state.json nor a Parquet file; expected")


def test_a_damaged_row_group_rejects_its_rows_and_no_others(tmp_path):
    rows = [asked(turn("x" * 2000)) | {"id": f"{n}"} for n in range(4)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2, compression="zstd")
    place = parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)
    found = [load_records(str(path)).entry(row) for row in range(4)]
    assert [isinstance(entry, Rejected) for entry in found] == [False, False, True, True]
    assert found[3].reason.startswith("row 1 of row group 1 of a.parquet cannot be read (")


def test_the_split_that_is_read_is_named(tmp_path):
    files = ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test.parquet"]
    found = choose_split(files, "", "x")
    assert found.files == tuple(files[1:3]) and str(found) == "Parquet, split data/train (data/test not read)"
    assert choose_split(files, "test", "x").files == ("data/test.parquet",)
    files = ["a/train/0000.parquet", "b/train-00000-of-00001-0123456789abcdef.parquet"]
    assert choose_split(files, "a", "x").files == (files[0],) and choose_split(files, "b/train", "x").name == "b/train"
    for wanted in "", "c", "train":
        with pytest.raises(InputError, match="^x: splits a/train, b/train; expected one split"):
            choose_split(files, wanted, "x")
    rows = datasets.Dataset.from_list([asked(turn("Hi"))])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    records = load_records(str(tmp_path / "both"))
    assert len(records) == 1 and records.format == "Hugging Face data set, split train (test not read)"
    datasets.DatasetDict(a=rows, b=rows).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match="splits a, b; expected one, or one called train"):
        load_records(str(tmp_path / "two"))


# ---- prepare verify ---------------------------------------------------------------------------------------------


def test_verify_names_the_form_and_a_mixed_up_row(tmp_path, capsys):
    rows = [asked(turn("Hi")), asked(turn(IMAGE)) | {"id": "lost"}, {"id": "old", "conversations": "Hi"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    words = ["prepare", "verify", f"--annotations={path}", "--template=v1", f"--tokenizer={full_size.TOKENIZER}"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert f"{path}: JSON Lines, OpenAI messages\n" in said.out
    assert "rejected: row 1 (id 'lost'): messages[0]: content[0]: an image without a source" in said.out
    assert "rejected: row 2 (id 'old'): conversations is text" in said.out
    assert "2 of 3 rows" in said.err


# ---- names on the Hub -------------------------------------------------------------------------------------------


def test_a_data_set_by_name(server, tmp_path, monkeypatch):
    table = pa.Table.from_pylist([asked(turn("Hi"))])
    parquet.write_table(table, tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    listed = json.dumps([asked(turn("Hi")) | {"id": "j"}]).encode()
    files = dict.fromkeys(("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"), content)
    commit = server.push("datasets/a/rows", {"README.md": b"# Rows", "rows.json": listed, **files})
    records = load_records("hf:a/rows")
    assert [record.id for record in records] == ["m1"]
    assert server.fetched("datasets/a/rows") == ["README.md", "data/train-00000-of-00001.parquet"]
    assert load_records("hf:a/rows/rows.json")[0].id == "j"
    assert load_records(f"hf:a/rows@{commit}/test")[0].id == "m1"

    pinned = absolute("hf:a/rows:0.5,hf:a/rows@main/rows.json:1")
    assert pinned == f"hf:a/rows@{commit}:0.5,hf:a/rows@{commit}/rows.json:1"
    server.push("datasets/a/rows", {"README.md": b"# New"})
    kept = with_commits("hf:a/rows:0.5,hf:a/rows@main:1,b.json:2", pinned)
    assert kept == f"hf:a/rows@{commit}:0.5,hf:a/rows@main:1,b.json:2"
    assert with_commits("", pinned) == "" and with_commits("hf:a/rows", "") == "hf:a/rows"
    asked_before = len(server.requests)
    assert load_records(f"hf:a/rows@{commit}/data/train")[0].id == "m1" and absolute(f"hf:a/rows@{commit}")
    assert len(server.requests) == asked_before

    for name, reason in {
        "hf:a/none": r"data.annotations=hf:a/none: the Hub .* has no dataset a/none that it shows",
        "hf:a/rows@v9": "data.annotations=hf:a/rows@v9: a/rows on the Hub has no revision 'v9'",
        f"hf:a/rows@{commit}/valid": "splits data/test, data/train; expected one split",
        "hf:a/rows": "no Parquet file; expected one split",
        "hf:rows": "expected hf:USER/NAME",
    }.items():
        with pytest.raises(InputError, match=reason):
            load_records(name)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert len(load_records(f"hf:a/rows@{commit}")) == 1
        with pytest.raises(InputError, match="may not be asked for a/rows .*HF_HUB_OFFLINE is set"):
            load_records(f"hf:a/rows@{'0' * 40}")
    server.gated.add("datasets/a/rows")
    with pytest.raises(InputError, match=rf"gated: accept its terms at {server.endpoint}/datasets/a/rows"):
        server.push("datasets/a/rows", files)
        load_records("hf:a/rows")


def test_a_run_on_a_data_set_by_name_records_its_commit_and_resumes_from_it(server, tmp_path, capsys):
    make_inputs(tmp_path)
    rows = [with_bytes(row, tmp_path / "images") for row in json.loads((tmp_path / "captions.json").read_text())]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=3)
    files = {"README.md": b"", "train.parquet": (tmp_path / "train.parquet").read_bytes()}
    commit = server.push("datasets/a/rows", files)
    settings = make_settings(tmp_path, "pretrain", data__annotations="hf:a/rows", data__images="", train__steps=1)
    train(settings, str(tmp_path / "run"))
    assert read_settings(str(tmp_path / "run" / "config.json")).data.annotations == f"hf:a/rows@{commit}"
    assert f"hf:a/rows@{commit}: Parquet, LLaVA conversations with images as bytes" in capsys.readouterr().out
    server.push("datasets/a/rows", {"README.md": b"another"})
    asked_before = len(server.requests)
    train(settings, str(tmp_path / "run"))
    assert "resuming at step 1" in capsys.readouterr().out and len(server.requests) == asked_before
