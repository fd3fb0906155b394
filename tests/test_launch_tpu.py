"""Training on TPU VMs: what happens on a worker, and that a run continues after a preemption."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tarfile
import time

import pytest

from tests.launch_stage import LAUNCH, NASTY, ROOT, V5E, Stage


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


# ---- on a worker --------------------------------------------------------------------------

PYTHON = """#!/bin/bash
trap 'exit 42' TERM
printf '%s\\n' "$JAX_PLATFORMS" "$@" >> "$HOME/argv"
echo trains
code=$(cat "$HOME/code" 2>/dev/null) && exit "$code"
while true; do sleep 0.02; done
"""


@pytest.fixture
def worker(stage):
    """The home folder of a TPU worker with the package installed; its Python runs until SIGTERM, or ends as told."""
    home = stage.folder
    shutil.copytree(LAUNCH, home / "llava_jax/launch")
    (home / "llava_jax/.venv/bin").mkdir(parents=True)
    (home / "llava_jax/.venv/bin/python").write_text(PYTHON)
    (home / "llava_jax/.venv/bin/python").chmod(0o755)
    yield stage
    if (home / "llava_jax_run/pid").exists():
        remote(stage, "stop", "llava")


def remote(stage: Stage, *words: str) -> str:
    """Runs in the worker's home what a script sends there, as ssh does; returns how the worker says it stands."""
    stage.answer({"describe": [["READY", 0]]})
    assert stage.run("launch/tpu_vm.sh", *words, **V5E).returncode == 0
    [sent] = stage.sent()
    environment = stage.environment()
    done = subprocess.run(
        ["bash", "-c", sent], cwd=stage.folder, env=environment, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition(": ")[2].strip()


def wait_for(path: pathlib.Path) -> None:
    """Until something stands in the file."""
    for _ in range(200):
        if path.exists() and path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} stays empty")


def reaches(stage: Stage, state: str) -> bool:
    """Whether the worker comes to that state in a few seconds."""
    for _ in range(100):
        if remote(stage, "status", "llava") == state:
            return True
        time.sleep(0.05)
    return False


def test_worker_runs_detached_until_it_is_stopped(worker):
    assert remote(worker, "status", "llava") == "none"
    assert remote(worker, "train", "llava", "c.py:a=b", "/data/a b", *NASTY) == "running"
    assert remote(worker, "train", "llava", "c.py:a=b", "/data/a b", *NASTY) == "running"
    run = worker.folder / "llava_jax_run"
    wait_for(run / "child")
    # A session of its own: the end of the ssh that started it does not reach it.
    assert os.getsid(int((run / "child").read_text())) == int((run / "pid").read_text())
    assert remote(worker, "stop", "llava") in ("stopping", "stopped")
    assert reaches(worker, "stopped")
    assert (run / "exit").read_text() == "42\n"
    assert (run / "train.log").read_text() == "trains\n"
    train = ["-m", "llava_jax", "train", "--config=c.py:a=b", "--workdir=/data/a b", *NASTY]
    assert (worker.folder / "argv").read_text().splitlines() == ["tpu,cpu", *train]


@pytest.mark.parametrize("code", ["0", "2", "42"])
def test_worker_keeps_the_exit_code(worker, code):
    (worker.folder / "code").write_text(code)
    remote(worker, "train", "llava", "c.py", "/data")
    assert reaches(worker, f"exit {code}")
    remote(worker, "train", "llava", "c.py", "/data")
    assert reaches(worker, f"exit {code}")
    assert (worker.folder / "llava_jax_run/train.log").read_text() == "trains\n" * 2


def test_worker_that_lost_its_run_says_so(worker):
    run = worker.folder / "llava_jax_run"
    run.mkdir()
    # A process id of before the reboot that is somebody else's now.
    (run / "pid").write_text(f"{os.getpid()}\n")
    assert remote(worker, "status", "llava") == "gone"


def test_package_that_is_sent(stage, tmp_path):
    stage.answer({"describe": [["READY", 0]]})
    assert stage.run("launch/tpu_vm.sh", "install", "llava", **V5E).returncode == 0
    [command] = [call for call in stage.calls() if call[0] == "tar"]
    archive = tmp_path / "sent.tar.gz"
    subprocess.run([archive if word.endswith(".gz") else word for word in command], cwd=ROOT, check=True)
    with tarfile.open(archive) as file:
        names = set(file.getnames())
    assert {
        "launch/worker.sh",
        "launch/env/v5e.sh",
        "llava_jax/cli/main.py",
        "configs/tiny.py",
        "requirements.txt",
    } <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".", "tests"))]
    [sent] = stage.sent()
    assert "tar -xzf ../llava_jax.tar.gz" in sent and "worker.sh install" in sent


# ---- babysit -------------------------------------------------------------------------------------------

NOT_FOUND = ["ERROR: (gcloud) NOT_FOUND: Resource was not found", 1]
SILENT = ["ssh: connect: timed out", 255]


def workers(*states: str) -> list:
    """An answer of `worker.sh state` on all workers."""
    return ["\n".join(f"llava_jax worker w-{n}: {state}" for n, state in enumerate(states)), 0]


def babysit(stage: Stage, nodes: list, states: list, script="tpu_queued.sh", **more: str):
    """(exit code, what it did in order, what it said) of babysit with scripted states of node and workers."""
    answers = {"describe": [state if isinstance(state, list) else [state, 0] for state in nodes]}
    stage.answer(answers | {"worker.sh state": states})
    done = stage.run(f"launch/{script}", "babysit", "llava", "c.py:a=b", "/data", *NASTY, **V5E | more)
    did = []
    for call in stage.calls():
        text = " ".join(call)
        for verb, sign in {"create": " create ", "delete": " delete ", "install": "worker.sh install"}.items():
            did += [verb] if sign in text else []
        did += [re.sub(".*worker.sh ", "", text)] if "worker.sh start" in text else []
    return done.returncode, did, done.stderr


FRESH = ["create", "install", "start"]


def kinds(did: list[str]) -> list[str]:
    return [word.partition(" ")[0] for word in did]


def test_babysit_runs_again_after_a_preemption(stage):
    nodes = [NOT_FOUND, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED"]
    nodes += [NOT_FOUND, "ACTIVE", "ACTIVE"]
    states = [workers(state) for state in ("none", "running", "running", "none", "running", "exit 0")]
    code, did, said = babysit(stage, nodes, states, SPOT="1")
    assert code == 0, said
    assert kinds(did) == [*FRESH, "delete", *FRESH]
    starts = [word for word in did if word.startswith("start")]
    assert len(starts) == 2 and starts[0] == starts[1]
    assert shlex.split(starts[0]) == ["start", "v5e", "c.py:a=b", "/data", *NASTY]
    creates = [call for call in stage.calls() if "create" in call]
    assert creates[0] == creates[1] and "--spot" in creates[0]
    assert sum(call[0] == "tar" for call in stage.calls()) == 1
    assert "node is lost" in said and "restarts so far: 0 of 10" in said


def test_babysit_of_a_plain_tpu_vm(stage):
    nodes = [NOT_FOUND, "CREATING", "READY", "READY", "PREEMPTED", NOT_FOUND, "READY"]
    states = [workers("none"), workers("running"), workers("none"), workers("exit 0")]
    code, did, said = babysit(stage, nodes, states, script="tpu_vm.sh")
    assert (code, kinds(did)) == (0, [*FRESH, "delete", *FRESH]), said


@pytest.mark.parametrize(
    "ends",
    [["exit 42"], ["exit 43"], ["exit 44"], ["exit 134"], ["gone"], ["exit 42", "exit 134", "gone", "exit 137"]],
    ids=lambda ends: " ".join(ends),
)
def test_babysit_starts_an_interrupted_run_again_on_its_node(stage, ends):
    more = {"TOPOLOGY": "v5e:4x4"} if len(ends) == 4 else {}
    none, running, zero = (workers(*[state] * len(ends)) for state in ("none", "running", "exit 0"))
    states = [none, running, workers(*ends), workers(*ends), zero]
    code, did, said = babysit(stage, [NOT_FOUND, "ACTIVE"], states, **more)
    assert code == 0, said
    assert kinds(did) == [*FRESH, "install", "start"]


@pytest.mark.parametrize("ends, expected", [(["exit 2"], 2), (["exit 1", "exit 134", "exit 134", "exit 42"], 1)])
def test_babysit_ends_with_an_error_of_train(stage, ends, expected):
    more = {"TOPOLOGY": "v5e:4x4"} if len(ends) == 4 else {}
    states = [workers(*["none"] * len(ends)), workers(*ends)]
    code, did, said = babysit(stage, [NOT_FOUND, "ACTIVE"], states, **more)
    assert (code, kinds(did)) == (expected, FRESH)
    assert f"exit code {expected}" in said and "logs llava all" in said


def test_babysit_takes_the_error_of_a_dying_node_for_a_preemption(stage):
    nodes = [NOT_FOUND, "ACTIVE", "ACTIVE", "SUSPENDING", NOT_FOUND, "ACTIVE"]
    states = [workers("none"), workers("exit 1"), workers("none"), workers("exit 0")]
    code, did, said = babysit(stage, nodes, states)
    assert (code, kinds(did)) == (0, [*FRESH, "delete", *FRESH]), said


def test_babysit_gives_up_after_its_restarts(stage):
    nodes = [NOT_FOUND, "ACTIVE", "SUSPENDED"] * 3
    code, did, said = babysit(stage, nodes, [workers("none")], RESTARTS="2")
    assert (code, kinds(did)) == (1, [*FRESH, "delete"] * 3)
    assert "giving up after 2 restarts" in said


def test_babysit_counts_workers_that_do_not_answer(stage):
    nodes = [NOT_FOUND, *["ACTIVE"] * 10]
    # One of four, then none.
    states = [workers("none", "none", "none", "none"), workers("running"), SILENT]
    code, did, said = babysit(stage, nodes, states, RESTARTS="0", TOPOLOGY="v5e:4x4")
    assert (code, kinds(did)) == (1, [*FRESH, "delete"])
    assert "5 of 5 times" in said


def test_babysit_waits_where_google_does_not_answer(stage):
    away = ["ERROR: (gcloud) network is unreachable", 1]
    nodes = [away, away, "ACTIVE", *[away] * 7, "ACTIVE"]
    code, did, said = babysit(stage, nodes, [workers("running"), workers("running"), workers("exit 0")])
    assert (code, did) == (0, []), said
    assert "unreachable" in said and "a run is in progress" in said


def test_babysit_ends_when_somebody_stops_the_run(stage):
    # Two slices of one worker: each is asked by itself.
    states = [workers(state) for state in ("running", "running", "stopping", "running", "stopped", "exit 42")]
    code, did, said = babysit(stage, ["ACTIVE"], states, SLICES="2")
    assert (code, did) == (42, []), said


def test_babysit_removes_what_a_preemption_left(stage):
    nodes = ["SUSPENDED", "ACTIVE"]
    code, did, _ = babysit(stage, nodes, [workers("none"), workers("exit 0")])
    assert (code, kinds(did)) == (0, ["delete", *FRESH])


def test_babysit_tries_a_refused_creation_again(stage):
    creation = {" create ": [["ERROR: no more capacity", 1], ["", 0]]}
    nodes = {"describe": [NOT_FOUND, NOT_FOUND, ["READY", 0]]}
    stage.answer(creation | nodes | {"worker.sh state": [workers("none"), workers("exit 0")]})
    done = stage.run("launch/tpu_vm.sh", "babysit", "llava", "c.py", "/data", **V5E)
    assert done.returncode == 0, done.stderr
    assert sum("create" in call for call in stage.calls()) == 2
