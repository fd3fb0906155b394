"""benchmark: the sides' protocol, medians and ratio, the same work on both sides, and what is refused."""

import json
import sys

import numpy as np
import pytest

from llava_jax.benchmark import compare, fixtures, worker
from llava_jax.cli import benchmark, main
from llava_jax.cli.benchmark import further
from llava_jax.types import InputError

# A side that stands in for PyTorch's: it speaks the protocol, and its turns take what it is told.
SIDE = """
import json, sys
sys.path.insert(0, {folder!r})
import worker
seconds = iter({seconds})
worker.serve(lambda work: (json.loads(work["found"]), lambda: {{"step": next(seconds)}}))
"""
FOLDER = compare.FOLDER


@pytest.fixture
def side(tmp_path):
    """side(name, found, seconds): a started Side whose k-th turn took seconds[k]."""
    opened = []

    def start(name: str, found: dict, seconds: list[float]) -> compare.Side:
        work = tmp_path / f"{name}.json"
        work.write_text(json.dumps({"found": json.dumps(found)}))
        code = SIDE.format(folder=FOLDER, seconds=seconds)
        one = compare.Side(name, [sys.executable, "-c", code, str(work)], str(tmp_path / f"{name}.log"))
        opened.append(one.__enter__())
        return one

    yield start
    for one in opened:
        one.__exit__(None, None, None)


def played(one: compare.Side, rounds: int) -> compare.Side:
    one.ready()
    for _ in range(rounds):
        one.turn()
    one.finish()
    return one


TRAIN = {"job": "train", "weights": True}


def test_medians_and_ratio(side):
    ours = played(side("ours", {"loss": 2.0}, [0.2, 0.1, 9.0]), 3)
    peer = played(side("peer", {"loss": 2.00005}, [0.3, 0.4, 0.3]), 3)
    result = compare.summary(TRAIN, {"ours": ours, "peer": peer})
    assert result["ours"]["step"] == 0.2 and result["peer"]["step"] == 0.3
    assert result["ratio"] == pytest.approx(1.5)
    assert result["ratios"] == pytest.approx([1.5, 4.0, 0.3 / 9.0])
    assert result["ours"]["peak_bytes"] > 2**20


def test_one_side_alone_has_no_ratio(side):
    result = compare.summary(TRAIN, {"ours": played(side("ours", {"loss": 2.0}, [0.5]), 1)})
    assert result["ours"]["step"] == 0.5 and "ratio" not in result


@pytest.mark.parametrize(
    "work, ours, theirs, says",
    [
        (TRAIN, {"loss": 2.0}, {"loss": 2.001}, "2.0 and 2.001"),
        ({"job": "data"}, {"pixels": ["a", "b"]}, {"pixels": ["a", "c"]}, "images differ"),
    ],
)
def test_different_work_is_refused(work, ours, theirs, says):
    with pytest.raises(InputError, match=says):
        compare.check_same(work, ours, theirs)


def test_a_fingerprint_sees_where_a_value_stands():
    pixels_XYC = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    others = (pixels_XYC[::-1], pixels_XYC[:, ::-1], pixels_XYC[..., ::-1], np.nextafter(pixels_XYC, 9))
    found = worker.fingerprint(pixels_XYC)
    assert found == worker.fingerprint(pixels_XYC.copy())
    assert all(worker.fingerprint(other) != found for other in others)


def test_same_ids_are_counted():
    work = {"job": "generate", "weights": True}
    assert compare.check_same(work, {"ids": [[1, 2], [3, 4]]}, {"ids": [[1, 2], [3, 5]]}).startswith("3 of 4 ids")


def test_a_side_that_ends_says_why(tmp_path):
    log = str(tmp_path / "log")
    with compare.Side("peer", [sys.executable, "-c", "raise ImportError('no torch here')"], log) as one:
        with pytest.raises(InputError, match="peer .* exit code 1: ImportError: no torch here"):
            one.ready()


def test_peak_memory_sees_what_was_held():
    worker.forget_peak()
    before = worker.peak_bytes()
    held = bytearray(64 * 2**20)
    assert worker.peak_bytes() - before > 32 * 2**20 and held[0] == 0


def test_the_commands_know_what_a_image_takes():
    assert {size: config.vision.patches for size, config in fixtures.MODELS.items()} == benchmark.PATCHES


def refused(words: list[str], capsys) -> str:
    assert main.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    "words, says",
    [
        (["benchmark", "train", "--rounds=0"], "--rounds=0: expected 1 or more"),
        (["benchmark", "train", "--core=9999"], "--core=9999"),
        (["benchmark", "train", "--length=10"], "--length=10"),
        (["benchmark", "data", "--json=no/such/data.json"], "no folder 'no/such'"),
        (["benchmark", "data", "--images=12"], "--images=12: expected whole batches, a multiple of 8"),
        (["benchmark", "data", "--peer_python=python3"], "add --peer"),
        (["benchmark", "data", "--peer", "--peer_python=no-such-python"], "no-such-python"),
        (["benchmark", "train", "--stage=lora"], "--stage"),
        (["benchmark"], "needs the name of a tool"),
    ],
)
def test_refused(words, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "run_once", lambda *_: None)  # what is refused is refused without a model
    assert says in refused(words, capsys)


def test_train_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    path = tmp_path / "train.json"
    words = ["benchmark", "train", "--size=tiny", "--stage=finetune", "--rounds=3", "--steps=1", f"--json={path}"]
    assert main.main(words) == 0
    written = json.loads(path.read_text())
    assert written["ratio"] is None and list(written["stages"]) == ["finetune"]
    figures = written["stages"]["finetune"]["ours"]
    # Random weights: about the logarithm of the vocabulary's 2,048.
    assert figures["step"] > 0 and figures["loss"] == pytest.approx(7.6, abs=0.5)
    assert figures["tokens_per_second"] == pytest.approx(96 / figures["step"])
    assert "seconds an update" in capsys.readouterr().out


def test_generate_and_data_measure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    answers, images = tmp_path / "generate.json", tmp_path / "data.json"
    assert main.main(["benchmark", "generate", "--size=tiny", "--new_tokens=4", "--rounds=1", f"--json={answers}"]) == 0
    assert (
        main.main(["benchmark", "data", "--images=8", "--side=32", "--rows=128", "--rounds=1", f"--json={images}"]) == 0
    )
    ours = json.loads(answers.read_text())["ours"]
    assert ours["first_token"] > 0
    assert f"ms to each further one{1000 * ours['further_token']:24.1f}" in capsys.readouterr().out
    assert further({"token": 0.5, "first_token": 0.8}, 4) == pytest.approx(0.4)
    assert json.loads(images.read_text())["ours"]["image"] > 0
