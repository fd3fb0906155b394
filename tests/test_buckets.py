"""Runs, models and data at gs://, on a stand-in of Google Cloud Storage: as on a disk, also when it loses requests."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llava_jax import buckets
from llava_jax.cli.main import main
from llava_jax.data.images import load_image
from llava_jax.settings import read_settings, write_settings
from llava_jax.train.loop import train
from llava_jax.types import InputError, Settings
from llava_jax.weights.load import model_spec, read_projector
from llava_jax.weights.source import load_params, local_folder
from tests import fast_compile
from tests.gcs_server import Bucket, environment, serving
from tests.test_distributed import finish, launch
from tests.tiny_run import change, make_inputs, make_settings, read_metrics

RUN = "gs://bucket/runs/finetune"


@pytest.fixture(scope="module")
def bucket():
    with serving(Bucket()) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(found).items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(scope="module")
def inputs(bucket, tmp_path_factory) -> pathlib.Path:
    """The inputs of tiny runs, in a folder and in the bucket."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    bucket.put_folder("inputs", folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_else(tmp_path, monkeypatch):
    """Every test has a cache of its own, and leaves no folder `gs:` where it ran."""
    monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("gs:*"))


def settings_of(folder: pathlib.Path, **changes: object) -> Settings:
    return make_settings(folder, "finetune", train__steps=6, train__checkpoint_every=3, **changes)


@pytest.fixture(scope="module")
def runs(bucket, inputs, tmp_path_factory) -> pathlib.Path:
    """A run in a folder of this machine, which is returned, and the same one with all that it reads in the bucket."""
    folder = tmp_path_factory.mktemp("runs")
    local = settings_of(inputs)
    there = change(local, "init", model="hf:gs://bucket/inputs/llava")
    there = change(there, "data", annotations="gs://bucket/inputs/rows.json", images="gs://bucket/inputs/images/")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_JAX_CACHE", str(folder / "cache"))
        train(local, str(folder / "local"))
        train(there, RUN)
        train(there, RUN)
    return folder / "local"


def metrics_of(bucket: Bucket, run: str, into: pathlib.Path) -> list[dict]:
    into.mkdir(exist_ok=True)
    (into / "metrics.jsonl").write_bytes(bucket.blobs[f"{run}/metrics.jsonl"].content)
    return read_metrics(into)


def refused(line: str, capsys) -> str:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    return said


# ---- a run in a bucket ----------------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, runs, tmp_path):
    assert metrics_of(bucket, "runs/finetune", tmp_path / "m") == read_metrics(runs)
    (step, ours, meta), (same_step, theirs, same_meta) = load_params(RUN), load_params(str(runs))
    assert step == same_step == 6
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert meta["inputs"]["the tokenizer"]["fingerprint"] == same_meta["inputs"]["the tokenizer"]["fingerprint"]
    assert meta["frozen"]["vision"]["fingerprint"] == same_meta["frozen"]["vision"]["fingerprint"]
    names = [name.removeprefix("runs/finetune/") for name in bucket.blobs if name.startswith("runs/finetune/")]
    parts = {name.partition("/")[0] for name in names}
    assert parts == {"config.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    again = read_settings(f"{RUN}/config.json")
    assert again.init.model == "hf:gs://bucket/inputs/llava" and again.data.images == "gs://bucket/inputs/images"


def test_a_run_resumes_from_its_own_config_in_the_bucket(runs, capsys):
    assert main(["train", f"--config={RUN}/config.json", f"--workdir={RUN}"]) == 0
    assert f"resuming at step 6\n6/6 steps done, saved in {RUN}" in capsys.readouterr().out
    assert "gs://bucket/cfg.py: of a bucket only the config.json" in refused(
        "train --config=gs://bucket/cfg.py --workdir=w", capsys
    )


def test_generate_and_convert_read_a_run_in_a_bucket(runs, inputs, tmp_path, capsys):
    for source, target in ((RUN, "there"), (str(runs), "here")):
        assert main(["convert", f"--from={source}", f"--to=hf:{tmp_path / target}"]) == 0
    there, here = (tmp_path / name for name in ("there", "here"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (there / name).read_bytes() == (here / name).read_bytes(), name
    card = (there / "README.md").read_text()
    assert "### Stage `finetune`, 6 updates" in card and "Logged last, at update 6" in card
    capsys.readouterr()
    answers = []
    for source in (f"orbax:{RUN}", str(runs)):
        ask = [f"--model={source}", f"--image={inputs}/images/0.png", "--prompt=What is this?", "--max_new_tokens=8"]
        assert main(["generate", *ask]) == 0
        answers.append(capsys.readouterr().out.splitlines()[-1])
    assert answers[0] == answers[1]


def test_a_stage_starts_from_one_in_a_bucket(runs):
    config = model_spec(read_settings(f"{RUN}/config.json")).config
    ours, theirs = read_projector(RUN, config), read_projector(str(runs), config)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_damaged_checkpoint_in_a_bucket_is_not_skipped(bucket, runs):
    """It is found by the listing's hashes; nothing is moved there, no step is trained again."""
    kept = {
        name: blob for name, blob in bucket.blobs.items() if name.startswith("runs/finetune/checkpoints/6/state/d/")
    }
    for name in kept:
        bucket.put(name, b"damaged")
    before = set(bucket.blobs)
    with pytest.raises(InputError, match=r"checkpoints/6 is damaged \(state/d/\w+ is not what was written\): move it"):
        train(read_settings(f"{RUN}/config.json"), RUN)
    with pytest.raises(InputError, match=r"checkpoints/6: the checkpoint is damaged"):
        load_params(RUN)
    assert set(bucket.blobs) == before
    bucket.blobs |= kept


# ---- killed, and while requests are lost ----------------------------------------------------------------------------


def start(config: pathlib.Path, workdir: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bucket_run", str(config), workdir],
        cwd=pathlib.Path(__file__).parent.parent,
        env=fast_compile.environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_with(process: subprocess.Popen, bucket: Bucket, name: str) -> None:
    """Kill the process once that object is in the bucket."""
    end = time.monotonic() + 100
    while name not in bucket.blobs and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_and_failing_it_ends_as_if_nothing_had_happened(bucket, inputs, tmp_path):
    whole = make_settings(inputs, "pretrain", train__steps=8, train__checkpoint_every=4, data__max_length=32)
    config = tmp_path / "settings.json"
    write_settings(str(config), whole)
    undisturbed = start(config, str(tmp_path / "local"))
    bucket.failing, before = 0.01, bucket.failed
    kill_with(start(config, "gs://bucket/killed"), bucket, "killed/checkpoints/4/commit_success.txt")
    assert "killed/.lock" in bucket.blobs
    code, out, err = finish([start(config, "gs://bucket/killed")])[0]
    bucket.failing = 0.0
    assert code == 0, err
    assert "killed/.lock is there: waiting 2 s" in out and "killed/.lock" not in bucket.blobs
    assert "resuming at step 4" in out
    assert bucket.failed > before
    assert finish([undisturbed])[0][0] == 0
    assert metrics_of(bucket, "killed", tmp_path / "m") == read_metrics(tmp_path / "local")
    jax.tree.map(
        np.testing.assert_array_equal, load_params("gs://bucket/killed")[1], load_params(str(tmp_path / "local"))[1]
    )


def test_two_processes_train_in_one_bucket(bucket, inputs, tmp_path):
    small = dict(train__steps=3, train__batch_size=8, data__max_length=48, mesh__fsdp=-1)
    config = tmp_path / "settings.json"
    write_settings(str(config), make_settings(inputs, "pretrain", **small))
    said = finish(launch(2, [config, "gs://bucket/two"], devices=4))
    assert [code for code, *_ in said] == [0, 0], said
    assert load_params("gs://bucket/two")[0] == 3


# ---- one train at a time --------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(buckets, "RENEWED", 0.2)
    monkeypatch.setattr(buckets, "EXPIRED", 1.5)


def take(lock: buckets.Lock) -> None:
    assert list(lock.take())[-1]


def test_a_second_train_is_refused(bucket, quick):
    first = buckets.Lock("gs://bucket/locks/a")
    take(first)
    with pytest.raises(InputError, match=f"held by .*process {os.getpid()}"):
        take(buckets.Lock("gs://bucket/locks/a"))
    first.release()
    assert "locks/a" not in bucket.blobs
    second = buckets.Lock("gs://bucket/locks/a")
    take(second)
    second.release()


def test_the_lock_of_a_process_that_is_gone_is_taken_over(bucket, quick):
    bucket.put("locks/b", b"another host, process 1")
    lock = buckets.Lock("gs://bucket/locks/b")
    begin = time.monotonic()
    take(lock)
    assert time.monotonic() - begin >= 1.5
    lock.release()
    assert "locks/b" not in bucket.blobs


def test_who_loses_the_lock_ends(bucket, quick, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or lock._ended.set())
    lock = buckets.Lock("gs://bucket/locks/c")
    take(lock)
    bucket.put("locks/c", b"another")
    lock._thread.join(5)
    assert ended == [2]
    assert bucket.blobs["locks/c"].content == b"another"


def test_a_lock_lives_through_requests_that_are_lost(bucket, quick, monkeypatch):
    """Also where a write is carried out and answered by an error: repeated, it is refused for its own first try."""
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("lost"))
    lock = buckets.Lock("gs://bucket/locks/d")
    take(lock)
    bucket.failing, before, seen = 0.3, bucket.failed, {bucket.blobs["locks/d"].generation}
    end = time.monotonic() + 180
    while (len(seen) < 3 or bucket.failed == before) and time.monotonic() < end:
        time.sleep(0.05)
        seen.add(bucket.blobs["locks/d"].generation)
    bucket.failing = 0.0
    assert len(seen) >= 3 and lock._thread.is_alive() and bucket.failed > before
    lock.release()
    assert "locks/d" not in bucket.blobs


# ---- models and images ----------------------------------------------------------------------------------------------


def test_a_model_is_copied_once_and_only_what_is_needed(bucket, inputs, capsys):
    source = "gs://bucket/inputs/llava"
    folder = pathlib.Path(local_folder(source, "--model"))
    assert (folder / "config.json").read_bytes() == (inputs / "llava" / "config.json").read_bytes()
    assert not (folder / "model.safetensors").exists()
    assert local_folder(f"hf:{source}/", "--model", "weights") == str(folder)
    assert (folder / "model.safetensors").read_bytes() == (inputs / "llava" / "model.safetensors").read_bytes()
    assert capsys.readouterr().out.count("copying") == 2
    assert local_folder(source, "--model", "weights") == str(folder) and capsys.readouterr().out == ""
    bucket.put("inputs/llava/generation_config.json", b"{}")
    assert local_folder(source, "--model") != str(folder)


def test_an_image_in_a_bucket(bucket, inputs):
    path = "gs://bucket/inputs/images/1.png"
    np.testing.assert_array_equal(load_image(path, 16, "pad"), load_image(str(inputs / "images/1.png"), 16, "pad"))
    with pytest.raises(InputError, match=r"image gs://bucket/inputs/images/9.png: no such file"):
        load_image("gs://bucket/inputs/images/9.png", 16, "pad")


def test_rows_whose_image_is_not_in_the_bucket_are_named(bucket, inputs, tmp_path, capsys):
    rows = json.loads((inputs / "rows.json").read_text())
    rows[2]["image"] = "9.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = tmp_path / "config.json"
    write_settings(
        str(config), settings_of(inputs, data__annotations="rows.json", data__images="gs://bucket/inputs/images")
    )
    said = refused(f"train --config={config} --workdir=gs://bucket/named", capsys)
    assert "row 2 (id 'row-2'): image gs://bucket/inputs/images/9.png: no such object" in said
    assert not [name for name in bucket.blobs if name.startswith("named")]
    assert main(["prepare", "verify", f"--config={config}"]) == 2
    assert "image gs://bucket/inputs/images/9.png: no such file" in capsys.readouterr().out


# ---- what cannot be reached -----------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(bucket, inputs, tmp_path, capsys):
    config = tmp_path / "config.json"
    write_settings(str(config), settings_of(inputs))
    said = refused(f"train --config={config} --workdir=gs://nowhere/run", capsys)
    assert "gs://nowhere/run" in said and "check its name, your rights to the bucket" in said
    said = refused("convert --from=gs://bucket/nothing --to=hf:m", capsys)
    assert "--from=gs://bucket/nothing: no folder" in said and "gs://BUCKET/DIR" in said


def test_a_full_disk_of_this_machine_is_not_said_of_the_bucket(bucket):
    with pytest.raises(OSError, match="No space left"), buckets.reached("gs://bucket/a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_small_files_of_a_run_lie_where_its_checkpoints_do(bucket, monkeypatch):
    """Also where the workdir is given with a slash; and what ended the run is said, not that the upload failed, too."""

    def lost(path, content):
        raise InputError(f"{path}: lost")

    with pytest.raises(ZeroDivisionError), buckets.mirrored("gs://bucket/small/", "a") as (here, upload):
        pathlib.Path(here, "a").write_text("1")
        upload()
        pathlib.Path(here, "b").write_text("2")
        monkeypatch.setattr(buckets, "write", lost)
        raise ZeroDivisionError
    assert [name for name in bucket.blobs if name.startswith("small")] == ["small/a"]


def test_what_is_missing_is_said_in_a_line(monkeypatch):
    buckets._storage.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"needs the package gcsfs: pip install 'llava-jax\[gcs\]'"):
        buckets.exists("gs://bucket/a")
    buckets._storage.cache_clear()
