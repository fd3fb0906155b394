"""The processes of a tiny run that the commands of this folder stop, kill and hang, and what becomes of them.

`python -m tests.faults.trainers ROLE CONFIG WORKDIR` is one of them: `llava-jax train`, with phases made slow. A role
is phase@seconds, several joined by commas, as in compile@60,step@0.2: the phase takes so much longer, and writes
"at PHASE N" first, N being 1 the first time. `numbers` writes what each update gives and the hash of the parameters
that it starts with; loss@4 and gradient@4 make these not finite in update 4 (gradient: in the rows of the last
process alone), and pixels@4 an image of colour 4; raises, full and none have no number.
"""

import ctypes
import hashlib
import itertools
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llava_jax.cli.main import main
from llava_jax.parallel import distributed
from llava_jax.train import checkpoint, loop, setup, validation
from llava_jax.train import step as step_module
from llava_jax.weights import manifest

ROOT = pathlib.Path(__file__).parent.parent.parent
RESTARTED = (42, 43, 44, *range(128, 256))  # what the scripts of launch/ start again
WATCHDOG = 20
PHASES = {
    "connect": (jax.distributed, "initialize"),
    "backend": (jax, "default_backend"),
    "rows": (loop, "read_records"),
    "restore": (loop, "restore_or_start"),
    "compile": (loop, "compile_step"),
    "step": (loop, "log_update"),
    "save": (checkpoint, "save"),
    "commit": (manifest, "hashes"),  # of a save, in its thread
    "evaluation": (loop, "evaluate"),
    "batch": (validation, "global_batch"),  # of an evaluation
}


# ---- one process ------------------------------------------------------------------------------------------------


def stuck(seconds: float) -> None:
    """Sleep in C, where Python's own signal handlers wait."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        ctypes.CDLL(None).usleep(int(1e6 * left) + 1)


def slowed(function: Callable[..., Any], phase: str, seconds: float) -> Callable[..., Any]:
    count = itertools.count(1)

    def slow(*args: Any, **given: Any) -> Any:
        print(f"at {phase} {next(count)}", flush=True)
        stuck(seconds)
        return function(*args, **given)

    return slow


def full(save: Callable[..., None]) -> Callable[..., None]:
    def fails(*args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))  # the log still fits
        save(*args)

    return fails


def trace(update: Callable[..., None]) -> Callable[..., None]:
    """Say which rows an update read here, and what it gave."""

    def said(n: int, values: dict, rows: Any, *args: Any, **given: Any) -> None:
        read = rows[rows >= 0].tolist()
        print(f"update {n} {float(values['loss']).hex()} {json.dumps(read)}", flush=True)
        update(n, values, rows, *args, **given)

    return said


def hashed(begin: Callable[..., Any]) -> Callable[..., Any]:
    """Say the hash of the parameters, in whatever way they are spread over devices."""

    def said(*args: Any) -> Any:
        state, frozen = begin(*args)
        whole = multihost_utils.process_allgather(state.params, tiled=True)
        content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(whole))
        print(f"parameters {hashlib.md5(content).hexdigest()}", flush=True)
        return state, frozen

    return said


def spoil(kind: str, which: int) -> None:
    """Let the loss or a gradient of update `which`, or images of this colour, not be finite."""
    step, loss_and_grads, normalise = setup.train_step, step_module.loss_and_grads, step_module.normalise_batch
    now: list[Any] = []

    def numbered(state: Any, *args: Any, **given: Any) -> Any:
        now[:] = [state.step == which]
        return step(state, *args, **given)

    def spoiled(*args: Any, **given: Any) -> Any:
        loss, grads, targets = loss_and_grads(*args, **given)
        if kind == "loss":
            return jnp.where(now[0], jnp.nan, loss), grads, targets
        kernel = grads["llm"]["layers"]["attn"]["q"]["kernel"]
        last = (jnp.arange(kernel.size) == kernel.size - 1).reshape(kernel.shape) & now[0]
        grads["llm"]["layers"]["attn"]["q"]["kernel"] = jnp.where(last, jnp.nan, kernel)
        return loss, grads, targets

    def seen(pixels: Any, *args: Any) -> Any:
        is_bad = (pixels == which).all(axis=(2, 3, 4), keepdims=True)
        return jnp.where(is_bad, jnp.nan, normalise(pixels, *args))

    if kind == "pixels":
        step_module.normalise_batch = seen
    else:
        setup.train_step, step_module.loss_and_grads = numbered, spoiled


def play(role: str, config: str, workdir: str) -> int:
    """Train as one of the processes; return its exit code."""
    distributed.HEARTBEAT_SECONDS = 10
    for part in role.split(","):
        phase, _, seconds = part.partition("@")
        if phase in PHASES:
            module, name = PHASES[phase]
            setattr(module, name, slowed(getattr(module, name), phase, float(seconds)))
        elif phase == "numbers":
            loop.log_update, loop.restore_or_start = trace(loop.log_update), hashed(loop.restore_or_start)
        elif phase in ("loss", "gradient", "pixels"):
            spoil(phase, int(seconds))
        elif phase == "raises":
            loop.log_update = lambda *args, **given: 1 / 0
        elif phase == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            checkpoint.save = full(checkpoint.save)
    print("at start 1", flush=True)
    return main(["train", f"--config={config}", f"--workdir={workdir}"])


# ---- their parent -----------------------------------------------------------------------------------------------


class Trainer:
    """One process, what it says in `log`, a file, and when it ended."""

    def __init__(self, process: subprocess.Popen, log: pathlib.Path):
        self._process, self.log = process, log

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def has_said(self, mark: str) -> bool:
        return any(line.startswith(mark) for line in self.lines())

    def resumed(self) -> int:
        """Return the update that this start began with."""
        said = [line for line in self.lines() if line.startswith("resuming at step ")]
        return int(said[0].rpartition(" ")[2]) if said else 0

    def wait_for(self, mark: str, seconds: float = 120.0) -> bool:
        """Return whether a line that starts with `mark` came before the process ended, or so much time has passed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.code() is None:
            if self.has_said(mark):
                return True
            time.sleep(0.02)
        return self.has_said(mark)

    def send(self, sent: signal.Signals) -> None:
        self._process.send_signal(sent)

    def code(self) -> int | None:
        """Return the exit code as a shell has it, 128 and more for a signal; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code


def start(
    roles: Sequence[str], config: pathlib.Path, workdir: pathlib.Path, logs: pathlib.Path, devices: int = 2
) -> list[Trainer]:
    """Start a process a role, `devices` in all; the logs are LOGS.0, LOGS.1, …"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}
    common["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices // len(roles)}"
    if len(roles) > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
        common["JAX_NUM_PROCESSES"] = str(len(roles))
    trainers = []
    for index, role in enumerate(roles):
        log = logs.with_name(f"{logs.name}.{index}")
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.trainers", role, str(config), str(workdir)],
                cwd=ROOT,
                env=os.environ | common | ({"JAX_PROCESS_ID": str(index)} if len(roles) > 1 else {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        trainers.append(Trainer(process, log))
    return trainers


def wait(trainers: Sequence[Trainer], seconds: float) -> bool:
    """Return whether all end within so many seconds; those that do not are killed."""
    end = time.monotonic() + seconds
    while any(trainer.code() is None for trainer in trainers):
        if time.monotonic() > end:
            kill(trainers)
            return False
        time.sleep(0.02)
    return True


def run(
    roles: Sequence[str], config: pathlib.Path, workdir: pathlib.Path, logs: pathlib.Path, devices: int = 2
) -> list[Trainer]:
    """Start processes as `start` does and wait until they end; those that do not are killed."""
    trainers = start(roles, config, workdir, logs, devices)
    wait(trainers, 300)
    return trainers


def kill(trainers: Sequence[Trainer]) -> None:
    for trainer in trainers:
        if trainer.code() is None:
            trainer.send(signal.SIGKILL)
            while trainer.code() is None:
                time.sleep(0.02)


class Case(NamedTuple):
    """What is done to a run, and how it has to end."""

    name: str
    roles: tuple[str, ...]
    mark: str  # a line of each of `told` that is waited for; "": none
    told: tuple[int, ...]  # processes that get `sent`
    sent: signal.Signals | None
    seconds: float  # until all but those that are frozen are gone
    codes: tuple[int, ...]  # allowed of those that get no SIGKILL


def attempt(case: Case, config: pathlib.Path, workdir: pathlib.Path, logs: pathlib.Path) -> bool:
    """Print what becomes of a case and return whether that is as it should be."""
    trainers = start(case.roles, config, workdir, logs)
    frozen = case.told if case.sent == signal.SIGSTOP else ()
    ending = [trainer for index, trainer in enumerate(trainers) if index not in frozen]
    is_there = not case.mark or all(trainers[index].wait_for(case.mark) for index in case.told)
    began = time.monotonic()
    for index in case.told if case.sent is not None else ():
        trainers[index].send(case.sent)
    is_gone = wait(ending, case.seconds + (0 if case.mark else 30))
    took, codes = time.monotonic() - began, [trainer.code() for trainer in ending]
    kill(trainers)
    killed = case.told if case.sent == signal.SIGKILL else ()
    right = all(code in case.codes for index, code in enumerate(codes) if index not in killed)
    is_right = is_there and is_gone and right
    said = ", ".join(map(str, codes)) if is_gone else "still there"
    print(f"{case.name:<52}{took:>6.1f} s  exit {said}{'' if is_right else '  WRONG'}", flush=True)
    if not is_right:
        for trainer in trainers:
            print("".join(f"    {line}\n" for line in trainer.lines()[-15:]))
    return is_right


def alive(workdir: pathlib.Path) -> int:
    """Return how many processes have this workdir in their command line."""
    found = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += os.fsencode(workdir) in path.read_bytes().split(b"\0")
        except OSError:  # it ended
            continue
    return found


if __name__ == "__main__":
    sys.exit(play(*sys.argv[1:]))
