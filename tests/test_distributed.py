"""Two processes train as one: same numbers, same checkpoints, stopped and failing together."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from llava_jax.parallel import distributed, sharding
from llava_jax.parallel.sharding import make_mesh
from llava_jax.settings import write_settings
from llava_jax.types import InputError, MeshSettings
from tests import fast_compile
from tests.tiny_run import make_inputs, make_settings, read_metrics

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 8


def launch(count: int, *runs: list[str], devices: int = 8) -> list[subprocess.Popen]:
    """`count` processes with `devices` in all; `runs` are the arguments of each, or of all when there is one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = fast_compile.environment(devices // count)
    many = dict(JAX_COORDINATOR_ADDRESS=address, JAX_COORDINATOR_BIND_ADDRESS=address, JAX_NUM_PROCESSES=str(count))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.host_run", *map(str, runs[min(index, len(runs) - 1)])],
            cwd=ROOT,
            env=common | (many | dict(JAX_PROCESS_ID=str(index)) if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    small = dict(train__batch_size=8, data__max_length=48, mesh__tensor=2)
    held_out = dict(data__eval=f"{folder}/captions.json", train__eval_every=3, train__keep_best=True)
    long = make_settings(folder, "finetune", train__steps=STEPS, train__checkpoint_every=2, **held_out, **small)
    asked = dict(data__eval=f"{folder}/captions.json", train__eval_generate=3)
    ranks = make_settings(folder, "pretrain", train__steps=2, train__loss_norm="rank_mean", **asked, **small)
    write_settings(str(folder / "global_token.json"), long)
    write_settings(str(folder / "rank_mean.json"), ranks)
    return folder


@pytest.fixture(scope="module")
def ran(inputs) -> dict:
    """What two processes said, the first time until one gets SIGTERM, and one process that does the same on its own."""
    two = inputs / "two"
    long = [inputs / "global_token.json", two]
    stopped = launch(2, long)
    wait_for_lines(two / "metrics.jsonl", 1, stopped)
    stopped[1].send_signal(signal.SIGTERM)
    said = {"stopped": finish(stopped)}
    said["steps"] = sorted(int(path.name) for path in (two / "checkpoints").iterdir())
    said["logged"] = len(read_metrics(two))
    shutil.copytree(two, inputs / "back")
    ranks = inputs / "rank_mean.json"
    said["two"] = finish(launch(2, [*long, ranks, inputs / "two_ranks"]))
    alone = [inputs / "global_token.json", inputs / "one", ranks, inputs / "one_ranks"]
    said["one"] = finish(launch(1, [*alone, inputs / "global_token.json", inputs / "back"]))
    return said


def wait_for_lines(path: pathlib.Path, count: int, processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + 200
    while all(process.poll() is None for process in processes) and time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError([process.communicate() for process in processes if process.poll() is not None])


def close(a: list[dict], b: list[dict], within: float) -> None:
    """Each step's numbers agree, the counts exactly."""
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for ours, theirs in zip(a, b, strict=True):
        assert (ours["targets"], ours["tokens"], ours["lr"]) == (theirs["targets"], theirs["tokens"], theirs["lr"])
        # A pass over held-out rows may have been cut short by SIGTERM.
        for name in ("loss", "grad_norm", *({"eval_loss", "eval_exact_match"} & ours.keys() & theirs.keys())):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=within), (name, ours["step"])


def test_two_processes_give_the_numbers_of_one(ran, inputs):
    assert [code for code, *_ in ran["two"] + ran["one"]] == [0, 0, 0], ran
    whole = read_metrics(inputs / "one")
    assert len(whole) == STEPS
    assert [row["step"] for row in whole if "eval_loss" in row] == [2, 5, 7]
    close(read_metrics(inputs / "two"), whole, 1e-6)
    asked = read_metrics(inputs / "one_ranks")
    assert asked[-1]["eval_answers"] == 3
    close(read_metrics(inputs / "two_ranks"), asked, 1e-6)


def test_sigterm_on_one_host_stops_all_after_the_same_step(ran):
    assert [code for code, *_ in ran["stopped"]] == [42, 42], ran["stopped"]
    assert ran["steps"][-1] == ran["logged"] and 1 <= ran["logged"] < STEPS
    assert f"resuming at step {ran['logged']}\n" in ran["two"][0][1]


def test_one_process_goes_on_from_the_checkpoint_of_two(ran, inputs):
    assert f"resuming at step {ran['logged']}\n" in ran["one"][0][1]
    close(read_metrics(inputs / "back"), read_metrics(inputs / "one"), 1e-6)


def test_only_the_first_process_speaks(ran):
    first, second = ran["two"]
    assert "2 processes" in first[1] and f"{STEPS}/{STEPS} steps done" in first[1]
    ours = [line for line in second[1].splitlines() if line and "peer ranks" not in line]  # what gloo says
    assert len(ours) == 1 and ours[0].startswith("{")


def test_each_host_reads_the_rows_of_its_devices(ran):
    read = [json.loads(out.splitlines()[-1]) for _, out, _ in [*ran["two"], *ran["one"]]]
    halves, whole = ([0, 1, 2, 3], [4, 5, 6, 7]), list(range(8))
    assert read[0] == {"fsdp": halves[0], "mixed": halves[0], "tensor": whole}
    assert read[1] == {"fsdp": halves[1], "mixed": halves[1], "tensor": whole}
    assert read[2] == {"fsdp": whole, "mixed": whole, "tensor": whole}


def test_a_workdir_that_is_not_shared_is_refused(inputs, tmp_path):
    apart = [[inputs / "rank_mean.json", tmp_path / name] for name in ("a", "b")]
    first, second = finish(launch(2, *apart, devices=2))
    assert second[0] == 2 and "process 1 does not see what process 0 writes in it" in second[2]
    assert first[0] != 0


def test_hosts_with_other_settings_are_refused(inputs, tmp_path):
    apart = [[inputs / name, tmp_path] for name in ("rank_mean.json", "global_token.json")]
    both = finish(launch(2, *apart, devices=4))
    # Whoever says so first ends the other one.
    assert any(code == 2 and "the config of process 1 and of process 0 differ" in err for code, _, err in both), both
    assert all(code != 0 for code, *_ in both)


def test_a_host_reads_the_rows_of_its_devices_wherever_they_lie(monkeypatch):
    """A host of a TPU slice has a square of chips: two runs of neighbouring rows."""

    class Square:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(4, 6),), 1: (slice(0, 2),), 2: (slice(0, 2),)}

    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: Square())
    assert sharding.local_rows(make_mesh(MeshSettings(1, -1, 1)), 8) == (0, 1, 4, 5)


def test_what_one_host_cannot_read_ends_all(inputs, tmp_path):
    """An image that is broken, in a row that the second process reads."""
    rows = json.loads((inputs / "captions.json").read_text())
    shutil.copytree(inputs / "images", tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    rows[3]["image"] = "broken.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    paths = dict(data__annotations=f"{tmp_path}/rows.json", data__images=f"{tmp_path}/images")
    settings = make_settings(inputs, "pretrain", data__shuffle=False, data__max_length=48, **paths)
    write_settings(str(tmp_path / "settings.json"), settings)
    begin = time.monotonic()
    first, second = finish(launch(2, [tmp_path / "settings.json", tmp_path / "run"], devices=2))
    assert second[0] == 2 and "row 3 (id 'caption-3')" in second[2] and "broken.png" in second[2]
    assert first[0] not in (0, 2)
    assert time.monotonic() - begin < 150


# ---- who is asked ---------------------------------------------------------------------------------------------------

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0"}
# What libtpu leaves in the environment of a machine that is no TPU.
NO_POD = {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames or IP addresses, please set it"}


@pytest.mark.parametrize(
    "environment, device, wanted",
    [
        ({}, False, None),
        (NO_POD, False, None),
        ({}, True, {}),
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"JAX_PLATFORMS": "tpu,cpu"}, True, {}),
        (SLURM, False, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, {}),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, True, {}),
        ({"KUBERNETES_SERVICE_HOST": "k", "JOB_COMPLETION_INDEX": "0"}, False, {}),
        ({"KUBERNETES_SERVICE_HOST": "k"}, False, None),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, False, None),
        (
            SLURM | EXPLICIT,
            False,
            dict(coordinator_address="a:1", num_processes=4, process_id=3, cluster_detection_method="deactivate"),
        ),
    ],
)
def test_jax_looks_for_others_only_where_there_are_some(monkeypatch, environment, device, wanted):
    monkeypatch.setattr(distributed, "has_tpu_device", lambda: device)
    assert distributed.distributed_arguments(environment) == wanted


@pytest.mark.parametrize(
    "change, says",
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"JAX_PROCESS_ID": "4"}, "this one's index, from 0"),
        ({"JAX_NUM_PROCESSES": "four"}, "the number of processes"),
        ({"JAX_COORDINATOR_ADDRESS": "a"}, "expected HOST:PORT"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(change, says):
    with pytest.raises(InputError, match=says):
        distributed.distributed_arguments(EXPLICIT | change)


def test_pods_that_do_not_find_each_other_do_not_train_alone(monkeypatch):
    for name in (*distributed.EXPLICIT, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", refuse)
    monkeypatch.setattr(distributed, "has_tpu_device", lambda: False)
    with pytest.raises(InputError, match="jax does not find the others"):
        distributed.join({}, 1)
    monkeypatch.setattr(distributed, "has_tpu_device", lambda: True)
    distributed.join({}, 1)


def refuse(**_: object) -> None:
    """What jax does where it finds no cluster."""
    raise ValueError("coordinator_address should be defined.")
