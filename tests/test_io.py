"""JSON Lines and what is wrong in them; files that are whole or not there, whoever else writes."""

import errno
import os

import pytest

from llava_jax import io
from llava_jax.types import InputError


def test_lines_are_read_and_what_is_wrong_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n["\xc3\xa9"]')
    assert list(io.read_lines(str(path), "a value")) == [(f"{path} line 1", {"a": 1}), (f"{path} line 4", ["é"])]
    for content, says in (
        (b"1\n{\n", r"line 2: not JSON \(.*\), expected a value per line"),
        (b"1\n\xff\n", r"line 2: not JSON"),
        (b"1\n" + b"[" * 100_000, "line 2: not JSON"),
        (b'\n\xef\xbb\xbf [{"a": 1}]', "a.jsonl: a JSON list, expected one object a line"),
        (b'{"a": 1}\r{"a": 2}', "a.jsonl: its lines end in a carriage return alone"),
        (b"\n \n", "a.jsonl: holds no rows, expected a value per line"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=says):
            list(io.read_lines(str(path), "a value"))
    with pytest.raises(InputError, match="none.jsonl: no such file, expected JSONL with a value per line"):
        list(io.read_lines(str(tmp_path / "none.jsonl"), "a value"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(InputError, match="no more"), io.replacing(str(path)) as file:
        file.write("half")
        raise InputError("no more")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.json"]
    with io.replacing(str(path)) as file:
        file.write("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["a.json"]


def test_a_link_stays_one_and_what_is_no_file_stays_too(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "disk" / "a.json")
    with io.replacing(str(tmp_path / "a.json")) as file:
        file.write("whole")
    assert (tmp_path / "a.json").is_symlink() and (tmp_path / "disk" / "a.json").read_text() == "whole"
    with pytest.raises(InputError, match="disk: is not a regular file"):
        with io.replacing(str(tmp_path / "disk")):
            pass


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="a.json: cannot be written .*name a file that can"):
        with io.replacing(str(tmp_path / "none" / "a.json")):
            pass

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(InputError, match="a.json: cannot be written .No space left on device.; make room"):
        with io.replacing(str(tmp_path / "a.json")) as file:
            file.write("much")
    assert os.listdir(tmp_path) == []
    # An error of a file that is read meanwhile stays its own.
    with pytest.raises(FileNotFoundError, match="source"), io.replacing(str(tmp_path / "a.json")):
        open(tmp_path / "source")
