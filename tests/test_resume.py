"""Kill the trainer and start it again: from then on every number is the uninterrupted run's, to the last bit."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from llava_jax.settings import write_settings
from tests.tiny_run import make_inputs, make_settings, read_metrics

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 24


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts the trainer in a workdir; the first one compiles for all of them."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    settings = make_settings(
        folder,
        "pretrain",
        train__steps=STEPS,
        train__checkpoint_every=2,
        optim__warmup_ratio=0.1,
        data__max_length=32,
        data__eval=str(folder / "captions.json"),
        train__eval_every=5,
    )
    config = folder / "settings.json"
    write_settings(str(config), settings)
    cache = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir: pathlib.Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.tiny_run", str(config), str(workdir)],
            cwd=ROOT,
            env=os.environ | cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def stop_at(process: subprocess.Popen, workdir: pathlib.Path, line: int, how: signal.Signals) -> int:
    """Sends the signal once metrics.jsonl has that many lines; returns the exit code."""
    path = workdir / "metrics.jsonl"
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= line:
            process.send_signal(how)
            break
        time.sleep(0.001)
    process.communicate(timeout=300)
    return process.returncode


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> list[dict]:
    """The metrics of a run that nobody stops."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir))
    return read_metrics(workdir)


def test_killed_three_times_it_ends_as_if_never_killed(start, whole, tmp_path):
    assert [row["step"] for row in whole] == list(range(STEPS))
    assert len({row["loss"] for row in whole}) == STEPS
    assert [row["step"] for row in whole if "eval_loss" in row] == [4, 9, 14, 19, 23]
    seed = random.randrange(10**6)
    kills = sorted(random.Random(seed).sample(range(1, STEPS - 6), 3))
    for line in kills:
        assert stop_at(start(tmp_path), tmp_path, line, signal.SIGKILL) == -signal.SIGKILL, (seed, kills)
    # A checkpoint is written while the run continues: killed early enough, it has none yet and starts again.
    saved = any(name.isdecimal() for name in os.listdir(tmp_path / "checkpoints"))
    out = finish(start(tmp_path))
    assert ("resuming at step" in out) == saved, (seed, kills, out)
    assert read_metrics(tmp_path) == whole, (seed, kills)


def test_sigterm_saves_and_leaves_with_its_own_code(start, whole, tmp_path):
    assert stop_at(start(tmp_path), tmp_path, 5, signal.SIGTERM) == 42
    done = len(read_metrics(tmp_path))
    assert 5 <= done < STEPS
    assert str(done) in os.listdir(tmp_path / "checkpoints")
    assert f"resuming at step {done}\n" in finish(start(tmp_path))

    def trained(rows: list[dict]) -> list[dict]:
        # A pass over held-out rows that SIGTERM meets is cut short.
        return [{name: row[name] for name in row if not name.startswith("eval")} for row in rows]

    assert trained(read_metrics(tmp_path)) == trained(whole)
