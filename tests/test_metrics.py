"""What a run writes: the fields of metrics.jsonl, its truncation on resumption, the status line."""

import contextlib
import errno
import importlib.util
import io
import json
import os
import tempfile
import time
from unittest import mock

import pytest

from llava_jax.train import loop as M
from llava_jax.train import watchdog
from llava_jax.train.wandb_run import WandbRun
from llava_jax.train.watchdog import BUCKETS, Goodput
from llava_jax.types import InputError
from tests.faults.goodput import check
from tests.tiny_run import make_settings

CONTRACT = ["step", "loss", "grad_norm", "lr", "targets", "tokens", "seconds", "tokens_per_second", "mfu"]
FIELDS = [*CONTRACT, "data_wait", "compile_seconds", "skipped", "time", "goodput"]


def values(step: int) -> dict:
    return dict(loss=2.0 / (step + 1), grad_norm=1.0, lr=0.1, targets=5, tokens=20)


def write(workdir, steps: range, total: int, log_every: int = 1) -> str:
    screen = io.StringIO()
    with M.open_metrics(str(workdir), range(steps.start, total), log_every, Goodput(time.time()), screen) as writer:
        for step in steps:
            writer.write(step, values(step), slots=40)
    return screen.getvalue()


def read(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rows_have_the_contracts_fields(tmp_path):
    screen = write(tmp_path, range(3), 3)
    rows = read(tmp_path)
    assert [list(row) for row in rows] == [FIELDS] * 3
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["loss"] == 1.0 and rows[1]["targets"] == 5 and rows[1]["mfu"] is None
    assert rows[0]["seconds"] > 0 and rows[0]["tokens_per_second"] > 0
    assert any((tmp_path / "tensorboard").iterdir())
    for said in ("step 3/3 (100%)", "loss 0.6667", "supervised 25%", "filled 50%", "tokens/s", "ETA 0:00"):
        assert said in screen


def test_what_cannot_be_written_does_not_stop_the_run(tmp_path, capsys):
    """Nor is anything waited for: a queue of ten events would be full long before."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(M.EventsWriter, "flush", side_effect=full):
        write(tmp_path, range(30), 30)
    assert [row["step"] for row in read(tmp_path)] == list(range(30))
    said = capsys.readouterr().err.splitlines()
    assert "No space left" in said[0] and said[1:] == ["warning: 30 lines of metrics could not be written"]


def test_wandb_gets_the_lines_in_one_run_over_resumes_and_never_stops_training(tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = make_settings(tmp_path, "finetune", train__wandb="project")

    def logged(steps: range) -> str:
        screen = io.StringIO()
        with contextlib.closing(WandbRun(settings, str(tmp_path), str(tmp_path))) as run:
            account = Goodput(time.time())
            with M.open_metrics(str(tmp_path), range(steps.start, 6), 1, account, screen, run) as writer:
                for step in steps:
                    writer.write(step, values(step), 40, 0.0, {"eval_loss": 1.5, "eval_exact_match": 50.0})
        return screen.getvalue()

    def warnings() -> list[str]:  # wandb itself may advertise there
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    assert logged(range(3)).count("eval loss 1.5000  exact match 50.0%  ") == 3
    logged(range(2, 4))
    name = (tmp_path / "wandb_id").read_text()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))

    def counts() -> list[int]:
        return [path.read_bytes().count(b"tokens_per_second") for path in runs]

    # wandb's own process writes them, a moment later.
    end = time.monotonic() + 20
    while counts() != [6, 4] and time.monotonic() < end:
        time.sleep(0.05)
    # A line is in the run's history and in its summary.
    assert counts() == [6, 4]
    assert warnings() == []
    with mock.patch.object(wandb.Run, "log", side_effect=Exception("Connection lost")):
        logged(range(4, 6))
    assert [row["step"] for row in read(tmp_path)] == list(range(6))
    assert warnings() == ["warning: wandb fails (Connection lost); training continues without"]
    (tmp_path / "wandb_id").write_text("no/id")
    logged(range(5, 6))
    assert "training continues without" in warnings()[0]


def test_wandb_gets_a_new_id_for_an_empty_one_and_writes_no_file_into_a_bucket(tmp_path, monkeypatch, capsys):
    import wandb

    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (here / "wandb_id").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    settings = make_settings(tmp_path, "finetune", train__wandb="project")
    for workdir in ("gs://bucket/run", str(here)):
        with mock.patch.object(wandb, "init", side_effect=Exception("no service")) as init:
            WandbRun(settings, workdir, str(here)).close()
        assert init.call_args.kwargs["id"] == (here / "wandb_id").read_text() != ""
        assert (init.call_args.kwargs["dir"] == str(here)) == (workdir == str(here))
    assert [path.name for path in here.iterdir()] == ["wandb_id"] and len(list(elsewhere.iterdir())) == 1
    assert capsys.readouterr().err.count("wandb fails (no service)") == 2


def test_wandb_that_is_not_there_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "llava-jax\[wandb\]"'):
        M.train(make_settings(tmp_path, "finetune", train__wandb="project"), str(tmp_path / "run"))


def test_time_waited_mfu_and_compiling(tmp_path):
    screen = io.StringIO()
    with M.open_metrics(str(tmp_path), range(4, 10), 2, Goodput(time.time()), screen) as writer:
        writer.start_clock(compile_seconds=7.0, ideal_seconds=1e-6)
        for step in range(4, 10):
            writer.write(step, values(step), slots=40, data_wait=0.5 * step)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [4, 6, 8, 9]
    # The mean of the steps since the line before.
    assert [row["data_wait"] for row in rows] == [2.0, 2.75, 3.75, 4.5]
    assert [row["compile_seconds"] for row in rows] == [7.0, None, None, None]
    assert all(row["mfu"] == pytest.approx(1e-6 / row["seconds"]) for row in rows)
    assert "MFU " in screen.getvalue() and screen.getvalue().count("step 10/10") == 1


def test_log_every_keeps_the_first_and_last_step(tmp_path):
    write(tmp_path, range(8), 8, log_every=3)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [0, 3, 6, 7]
    # Tokens of all steps in between count, not only those of the logged one.
    assert rows[1]["tokens_per_second"] * rows[1]["seconds"] * 3 == pytest.approx(60)


def test_resumption_drops_what_comes_again_and_a_torn_line(tmp_path):
    write(tmp_path, range(6), 9)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    write(tmp_path, range(4, 9), 9)
    assert [row["step"] for row in read(tmp_path)] == list(range(9))


class Clock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time


def test_goodput_adds_up_to_the_wall_time_over_all_starts(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(M, "time", clock)
    monkeypatch.setattr(watchdog, "time", clock)

    def start(steps: range) -> dict:
        account = Goodput(clock.now)
        clock.now += 5
        account.enter("restore")
        clock.now += 2
        account.enter("compile")
        clock.now += 10
        with M.open_metrics(str(tmp_path), steps, 1, account, io.StringIO()) as writer:
            for step in steps:
                account.enter("step")
                clock.now += 4
                account.count_waiting(1)
                writer.write(step, values(step), slots=40)
                if step % 2:
                    account.enter("save")
                    clock.now += 3
        return read(tmp_path)[-1]["goodput"]

    none = dict.fromkeys(BUCKETS, 0)
    first = start(range(6))
    assert first == none | dict(start=7, compile=10, data=6, step=18, checkpoint=6)
    clock.now += 50  # killed after its last save
    # From update 4 on: two updates are run again, with the save before them, which comes after line 3.
    second = start(range(4, 7))
    assert second == none | dict(start=14, compile=20, data=7, step=21, checkpoint=6, lost=11, down=53)
    assert sum(second.values()) == clock.now - 1000
    assert check(tmp_path, clock.now - 1000)[1] == 0 == check(tmp_path)[1]
    assert start(range(7))["lost"] == 11 + 7 + 21 + 6  # from the start, where there was no checkpoint


def test_goodput_of_a_run_that_began_before_there_was_any(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    write(tmp_path, range(1, 3), 3)
    assert sum(read(tmp_path)[-1]["goodput"].values()) < 60


def test_a_complete_last_line_without_its_newline_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    M.truncate_lines(str(path), 5)
    assert path.read_text() == '{"step": 0}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(InputError, match="metrics.jsonl line 2"):
        M.truncate_lines(str(path), 5)


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert M.duration(seconds) == text
