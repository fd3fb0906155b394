"""Signals, hangs and lost processes: how long a run takes to end, and with which exit code.

`python -m tests.faults.processes` starts thirteen tiny runs of one and of two processes, a few minutes in all. It
prints a line each, and exits with 1 unless every process was gone in time with a code that the scripts in launch/ start
again (2 for a full disk), and the last run of each kind resumes and ends.

`… role CONFIG WORKDIR` is one process of them; `role` is what is slow or fails in it.
"""

import ctypes
import json
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from llava_jax.parallel import distributed
from llava_jax.settings import read_settings, write_settings
from llava_jax.train import checkpoint, loop
from llava_jax.types import InputError
from tests import fast_compile
from tests.tiny_run import make_inputs, make_settings

RESTARTED = (42, 43, 44, *range(128, 256))
WATCHDOG = 20


def stuck(seconds: float = 3600.0) -> None:
    """Sleep in C, where Python's own signal handlers wait."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        ctypes.CDLL(None).usleep(int(1e6 * left) + 1)


def slowed(function: Callable[..., Any], seconds: float, mark: str) -> Callable[..., Any]:
    def slow(*args: Any, **given: Any) -> Any:
        print(f"at {mark}", flush=True)
        stuck(seconds)
        return function(*args, **given)

    return slow


def play(role: str, config: str, workdir: str) -> None:
    """Train as one of the processes."""
    distributed.HEARTBEAT_SECONDS = 10
    if role == "start":
        loop.read_records = slowed(loop.read_records, 60, role)
    elif role == "compile":
        loop.compile_step = slowed(loop.compile_step, 60, role)
    elif role == "save":
        checkpoint.save = slowed(checkpoint.save, 3, role)
    elif role == "hung":
        loop.log_update = slowed(loop.log_update, 3600, role)
    else:
        loop.log_update = slowed(loop.log_update, 0.2, "step")
    if role == "raises":
        loop.log_update = lambda *args, **given: 1 / 0
    if role == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoint.save = full(checkpoint.save)
    try:
        with distributed.connected():
            loop.train(read_settings(config), workdir)
    except InputError as error:  # as the command line does
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def full(save: Callable[..., None]) -> Callable[..., None]:
    def fails(*args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
        save(*args)

    return fails


def start(roles: list[str], config: pathlib.Path, workdir: pathlib.Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = fast_compile.environment(2 // len(roles))
    many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.processes", role, str(config), str(workdir)],
            env=common | (many | {"JAX_PROCESS_ID": str(index)} if len(roles) > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index, role in enumerate(roles)
    ]


def wait_for(process: subprocess.Popen, mark: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(mark):
            return


# (name, roles of the processes, line of the last one that is waited for, signal to it, seconds allowed, codes allowed)
CASES = [
    *((f"SIGTERM at {phase}", [phase], f"at {phase}", signal.SIGTERM, 30, (42,)) for phase in ("start", "compile")),
    *((f"SIGTERM at {phase}", [phase], f"at {phase}", signal.SIGTERM, 30, (42,)) for phase in ("step", "save")),
    ("SIGTERM at compile, of one of two", ["compile"] * 2, "at compile", signal.SIGTERM, 60, RESTARTED),
    ("SIGTERM at step, of one of two", ["step"] * 2, "at step", signal.SIGTERM, 30, (42,)),
    ("SIGKILL of one of two", ["step"] * 2, "at step", signal.SIGKILL, 60, RESTARTED),
    ("SIGSTOP of one of two", ["step"] * 2, "at step", signal.SIGSTOP, 60, RESTARTED),
    ("one of two hangs", ["step", "hung"], "at hung", None, 60, RESTARTED),
    ("one of two raises", ["step", "raises"], "", None, 60, (1, *RESTARTED)),
    ("one of two dies while the other compiles", ["compile", "compile"], "at compile", signal.SIGKILL, 60, RESTARTED),
    ("it hangs", ["hung"], "at hung", None, 60, (43,)),
    ("disk full at a save", ["full"], "", None, 60, (2,)),
]


def attempt(case: tuple, config: pathlib.Path, workdir: pathlib.Path) -> bool:
    """Print what becomes of a case and return whether that is as it should be."""
    name, roles, mark, sent, allowed, codes = case
    processes = start(roles, config, workdir)
    try:
        if mark:
            wait_for(processes[-1], mark)
        before = time.monotonic()
        if sent is not None:
            processes[-1].send_signal(sent)
        ended = [process for process in processes if sent != signal.SIGSTOP or process is not processes[-1]]
        for process in ended:
            process.communicate(timeout=max(0.1, allowed + (0 if mark else 30) - (time.monotonic() - before)))
        took = time.monotonic() - before
        found = [process.returncode % 256 if process.returncode >= 0 else 128 - process.returncode for process in ended]
        right = all(code in codes for code in found)
    except subprocess.TimeoutExpired:
        took, found, right = time.monotonic() - before, ["still there"], False
    finally:
        for process in processes:
            process.kill()
    print(f"{name:<44}{took:>6.1f} s  exit {', '.join(map(str, found))}{'' if right else '  WRONG'}", flush=True)
    return right


def main(chosen: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        inputs = pathlib.Path(folder)
        make_inputs(inputs)
        how = dict(train__watchdog=WATCHDOG, train__checkpoint_every=2, train__batch_size=8, data__max_length=48)
        write_settings(str(inputs / "config.json"), make_settings(inputs, "finetune", train__steps=30, **how))
        wrong = 0
        for index, case in enumerate(CASES):
            if not chosen or any(word in case[0] for word in chosen):
                wrong += not attempt(case, inputs / "config.json", inputs / f"run{index}")
        print(json.dumps({"wrong": wrong}))
    return int(wrong > 0)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[2].endswith(".json"):
        play(*sys.argv[1:])
    else:
        sys.exit(main(sys.argv[1:]))
