"""Runs at gs:// that are killed, on a stand-in of Google Cloud Storage that answers one request in ten by 429 or 503.

`python -m tests.show_buckets [SEED]` takes about eight minutes, most of them spent between tries. Half of the requests
that are answered by an error are carried out all the same. One run is killed five times (SIGKILL), wherever it is; one
of two processes with four devices each is killed once. Both end as the same runs on a disk that nobody kills, to the
last bit; `generate` and `convert` read them in the bucket.
"""

import contextlib
import io
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from llava_jax.cli.main import main
from llava_jax.settings import write_settings
from llava_jax.weights.source import load_params
from tests.gcs_server import Bucket, environment, serving
from tests.test_buckets import metrics_of, start
from tests.test_distributed import finish, launch
from tests.tiny_run import make_inputs, make_settings, read_metrics

KILLS, STEPS = 5, 24


def same(bucket: Bucket, run: str, local: pathlib.Path, folder: pathlib.Path) -> str:
    """Compare a run in the bucket with one on a disk; say what was compared."""
    rows = metrics_of(bucket, run, folder / "metrics")
    assert rows == read_metrics(local), (run, rows)
    (step, ours, _), (_, theirs, _) = load_params(f"gs://bucket/{run}"), load_params(str(local))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    return f"{len(rows)} lines of metrics.jsonl and the parameters of step {step} are those of the run on a disk"


def killed_at_random(bucket: Bucket, config: pathlib.Path, draw: random.Random) -> str:
    """Kill a run KILLS times once it has begun to train, and let it end; say where each start resumed."""
    resumed = []
    for kill in range(KILLS + 1):
        process = start(config, "gs://bucket/killed")
        said = next((line for line in process.stdout if line.startswith(("resuming at", "compiled"))), "")
        resumed.append(int(said.split()[-1]) if said.startswith("resuming") else 0)
        if kill == KILLS:
            assert process.wait(timeout=600) == 0, process.stderr.read()
            break
        time.sleep(draw.uniform(1.0, 30.0))  # a checkpoint takes about fifteen, most of them spent between tries
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return f"{KILLS} kills, resumed at updates {resumed}"


def killed_together(bucket: Bucket, config: pathlib.Path) -> None:
    """Kill both processes of a run after its first checkpoint, and let it end."""
    processes = launch(2, [config, "gs://bucket/two"])
    while "two/checkpoints/4/commit_success.txt" not in bucket.blobs and processes[0].poll() is None:
        time.sleep(0.01)
    for process in processes:
        process.kill()
    finish(processes)
    said = finish(launch(2, [config, "gs://bucket/two"]))
    assert [code for code, *_ in said] == [0, 0] and "resuming at step" in said[0][1], said


def read_there(source: str, local: pathlib.Path, inputs: pathlib.Path, folder: pathlib.Path) -> None:
    """Convert and ask the model of a run, from the bucket and from the disk."""
    said = []
    for name, model in (("there", source), ("here", str(local))):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["convert", f"--from={model}", f"--to=hf:{folder / name}"]) == 0
        ask = [f"--image={inputs}/images/0.png", "--prompt=What is this?", "--max_new_tokens=8"]
        command = [sys.executable, "-m", "llava_jax", "generate", f"--model={model}", *ask]
        said.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    written = [(folder / name / "model.safetensors").read_bytes() for name in ("there", "here")]
    assert written[0] == written[1] and said[0] == said[1], said


def show(folder: pathlib.Path, seed: int) -> None:
    inputs = folder / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    alone = make_settings(inputs, "finetune", train__steps=STEPS, train__checkpoint_every=4, data__max_length=48)
    together = make_settings(
        inputs, "pretrain", train__steps=8, train__checkpoint_every=4, train__batch_size=8, data__max_length=48
    )
    for name, settings in (("alone", alone), ("together", together)):
        write_settings(str(folder / f"{name}.json"), settings)
    assert finish([start(folder / "alone.json", str(folder / "alone"))])[0][0] == 0
    assert [code for code, *_ in finish(launch(2, [folder / "together.json", folder / "two"]))] == [0, 0]
    with serving(Bucket(failing=0.1, seed=seed)) as bucket:
        os.environ |= environment(bucket)
        print(killed_at_random(bucket, folder / "alone.json", random.Random(seed)), flush=True)
        print(same(bucket, "killed", folder / "alone", folder), flush=True)
        killed_together(bucket, folder / "together.json")
        print(f"two processes x 4 devices: {same(bucket, 'two', folder / 'two', folder)}", flush=True)
        differ = finish(
            launch(2, [folder / "together.json", "gs://bucket/a"], [folder / "together.json", "gs://bucket/b"])
        )
        assert "--workdir of process 1" in "".join(err for *_, err in differ), differ
        read_there("gs://bucket/killed", folder / "alone", inputs, folder)
        print("generate and convert give the same from the bucket and from the disk", flush=True)
        share = bucket.failed / bucket.requests
        print(
            f"{bucket.requests:,} requests, {bucket.failed:,} of them ({share:.0%}) answered by 429 or 503", flush=True
        )
    found = [path for place in (folder, pathlib.Path.cwd()) for path in place.rglob("gs:*")]
    assert not found, found
    print("no file lies below a folder gs:")


if __name__ == "__main__":
    begin, seed = time.monotonic(), int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        show(pathlib.Path(place), seed)
    print(f"{time.monotonic() - begin:.0f} s")
