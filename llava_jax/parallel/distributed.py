"""Training in several processes: how they start, what they must agree on, and how they end together.

Every process runs the same program on the devices of its host. Only the first one prints, locks the workdir and writes
its files; checkpoints are written by all, so the workdir must be on a file system that they share.
"""

import glob
import hashlib
import os
import pathlib
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_jax.io import WRITE_ERRORS, no_room
from llava_jax.types import LOST_EXIT_CODE, InputError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# What the errors of collectives and of jax's coordination service say when another process is gone.
LOST = re.compile(
    r"heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|connection (reset|refused|closed)|gloo.*(closed|timed out)",
    re.IGNORECASE,
)

START_SECONDS = 300  # that the processes wait for one another
HEARTBEAT_SECONDS = 30  # until the others notice that a process died (jax: 100)
SHUTDOWN_SECONDS = 60  # that a finished process waits for the others (jax: 300); the last save is over by then
LAST_SECONDS = 2.0  # that the first process waits for the others, which abort without it, to leave by themselves
VISIBLE_SECONDS = 20.0  # until a network file system must show a new file on every host


# ---- start and end ----------------------------------------------------------------------------------------------


@contextmanager
def connected(limit: int = 0) -> Iterator[None]:
    """Join the other processes of the run, if there are any; must come before the first use of a device.

    It waits for them START_SECONDS, or `limit` seconds if that is less and not 0. When one of several processes fails,
    it prints why and exits at once, with code 2 for bad input and a full disk; the others notice and exit, with
    LOST_EXIT_CODE or by a signal. Raises InputError for an environment that contradicts itself.
    """
    arguments = distributed_arguments(os.environ)
    if arguments is not None:
        join(arguments, min(limit or START_SECONDS, START_SECONDS))
    try:
        with ExitStack() as stack:
            if jax.distributed.is_initialized():
                stack.push(end_with_others)
            yield
    finally:
        jax.distributed.shutdown()


def join(arguments: dict[str, Any], seconds: int) -> None:
    """Call jax.distributed.initialize with our time limits; a TPU that belongs to no cluster stays on its own."""
    try:
        with ThreadPoolExecutor(1) as pool:  # so that the main thread handles SIGTERM meanwhile
            pool.submit(
                jax.distributed.initialize,
                **arguments,
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            ).result()
    except jax.errors.JaxRuntimeError as error:
        end_at_once(type(error), error, error.__traceback__)
    except ValueError as error:
        if arguments or "coordinator_address should be defined" not in str(error):
            raise
        if not has_tpu_device():
            raise InputError(
                f"several processes were started and jax does not find the others: set {', '.join(EXPLICIT)} "
                "(JAX_NUM_PROCESSES=1 alone for a process on its own)"
            ) from error


def distributed_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the arguments for jax.distributed.initialize: {} where jax finds them itself, None for a single process.

    JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID take precedence. Jax is asked where Slurm or
    Open MPI started several processes, in pods of an indexed Kubernetes job, in TPU pods, and where there may be a TPU
    (it then asks Google's metadata server), and nowhere else: a laptop makes no request.
    """
    variables = {name: environment[name] for name in EXPLICIT if environment.get(name)}
    if variables.get("JAX_NUM_PROCESSES") == "1":
        return None
    if variables.keys() & {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}:
        return explicit_arguments(variables)
    # In an allocation without srun the number of tasks is set although only one process was started.
    tasks = environment.get("SLURM_NTASKS") if "SLURM_STEP_NODELIST" in environment else None
    addresses = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    # Where libtpu finds no pod, a warning with a comma in it stands in place of the names.
    workers = [name for name in addresses.split(",") if name and " " not in name.strip()]
    several = (
        max(map(int, (tasks or 1, environment.get("OMPI_COMM_WORLD_SIZE") or 1))) > 1
        or len(workers) > 1
        or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
        or (not workers and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys())
        or (not workers and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and has_tpu_device())
    )
    return {} if several else None


def explicit_arguments(variables: dict[str, str]) -> dict[str, Any]:
    """Return what the three variables of EXPLICIT say. Raises InputError when one is absent or not a number."""
    absent = [name for name in EXPLICIT if name not in variables]
    if absent:
        raise InputError(
            f"{absent[0]} is not set next to {', '.join(variables)}: set all of {', '.join(EXPLICIT)}, or none"
        )
    address, count, index = (variables[name] for name in EXPLICIT)
    if ":" not in address or not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        settings = " ".join(f"{name}={value}" for name, value in variables.items())
        raise InputError(f"{settings}: expected HOST:PORT, the number of processes, and this one's index, from 0")
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        # Otherwise jax asks the cluster it finds which devices are ours, and leaves this process only one of them.
        "cluster_detection_method": "deactivate",
    }


def has_tpu_device() -> bool:
    """Return whether the kernel shows a device that may be a TPU."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def end_with_others(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    """Call `end_at_once` unless this process is on its own; asked only here, since the answer takes a device."""
    if error is not None and jax.process_count() > 1:
        end_at_once(kind, error, trace, LAST_SECONDS if is_first() else 0.0)


def end_at_once(
    kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, seconds: float = 0.0
) -> None:
    """Exit when this process fails while others run: an orderly exit would wait for them, and they for us.

    It says why, and waits so many seconds: what is wrong here may be wrong in the others.
    """
    if error is None or isinstance(error, SystemExit):
        return
    code = 1
    if isinstance(error, WRITE_ERRORS) and no_room(error):
        error, code = InputError(f"a file cannot be written ({no_room(error)}); make room, run again"), 2
    if is_lost(error):
        # All of it: a network that was never set up says the same.
        traceback.print_exception(kind, error, trace)
        print("error: another process is gone", file=sys.stderr)
        code = LOST_EXIT_CODE
    elif isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
        code = 2
    else:
        traceback.print_exception(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(seconds)
    os._exit(code)


def is_lost(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, says that another process of the run is gone."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yield a function of the number of updates done that turns True once a process has received SIGTERM.

    Call it before the first update and after every one: it turns True on all hosts after the same one. Among several
    processes jax passes the signal on, and all of them stop at one more than the highest number that any has asked
    with: the next update that none has finished. A single process notices no signal
    outside the main thread.
    """
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: event.is_set()
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield lambda _: event.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- output and agreement ---------------------------------------------------------------------------------------


def is_first() -> bool:
    """Return whether this is the process that prints and writes."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Print a line, in the first process only."""
    if is_first():
        print(line, flush=True)


def check_agreed(values: dict[str, str]) -> None:
    """Raise an InputError naming the processes whose value differs from the first one's; every process must call it."""
    if jax.process_count() == 1:
        return
    mine_VD = np.stack([np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8) for value in values.values()])
    all_PVD = np.asarray(multihost_utils.process_allgather(mine_VD))
    for name, hashes_PD in zip(values, all_PVD.swapaxes(0, 1), strict=True):
        others = np.flatnonzero((hashes_PD != hashes_PD[0]).any(axis=1))
        if others.size:
            which = ", ".join(map(str, others))
            raise InputError(f"{name} of process {which} and of process 0 differ: give all the same settings and files")


def of_first(flag: bool) -> bool:
    """Return the first process's flag; every process must call it."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def text_of_first(work: Callable[[], str]) -> str:
    """Return in all processes what `work` returns in the first one, 1,000 bytes at most; every process must call it.

    The others are told each time that it is still at work: collectives that wait for one process give up after half a
    minute.
    """
    if jax.process_count() == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if is_first() else None
        while of_first(future is not None and not wait([future], timeout=5).done):
            pass
    text = b"" if future is None else future.result().encode()
    sent = np.frombuffer(text[:1000].ljust(1000, b"\0"), np.uint8)
    return (
        bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)).rstrip(b"\0").decode(errors="replace")
    )


def check_shared(workdir: str, path: str) -> None:
    """Raise InputError when a process does not see the file at `path` that the first one writes; all must call it."""
    if jax.process_count() == 1:
        return
    nonce = np.frombuffer(secrets.token_bytes(16), np.uint8)
    if is_first():
        with open(path, "w", encoding="utf-8") as file:
            file.write(nonce.tobytes().hex())
            file.flush()
            os.fsync(file.fileno())
    wanted = np.asarray(multihost_utils.broadcast_one_to_all(nonce), np.uint8).tobytes().hex()
    end = time.monotonic() + VISIBLE_SECONDS
    while not (os.path.exists(path) and pathlib.Path(path).read_text(encoding="utf-8") == wanted):
        if time.monotonic() > end:
            raise InputError(
                f"--workdir={workdir}: process {jax.process_index()} does not see what process 0 writes in it: "
                "expected a folder that all hosts share, choose one on a network file system"
            )
        time.sleep(0.2)
