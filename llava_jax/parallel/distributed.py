"""Several processes that train as one: how they start, what each reads, where they agree, and how they end together.

Every process runs the same program on the devices of its host. The first one alone prints, locks the workdir and
writes its files; checkpoints are written by all, so the workdir must be a folder that all of them see.
"""

import glob
import hashlib
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_jax.types import InputError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# A process that died is noticed by the others after so many seconds at the latest (jax waits 100).
HEARTBEAT_SECONDS = 30
# Processes that are done wait so long for the others (jax waits 300): the last save is over by then.
SHUTDOWN_SECONDS = 60
# A network file system shows a new file a moment later.
VISIBLE_SECONDS = 20.0


# ---- start and end ----------------------------------------------------------------------------------------------


@contextmanager
def connected() -> Iterator[None]:
    """Joins the other processes of the run, where there are any; must come before the first use of a device.

    InputError for an environment that contradicts itself. When a run of several processes fails in one of them, that
    one prints why and ends at once, with exit code 2 for bad input: the others notice and end too.
    """
    how = distributed_arguments(os.environ)
    if how is not None:
        join(how)
    try:
        with ExitStack() as stack:
            if jax.distributed.is_initialized() and jax.process_count() > 1:
                stack.push(end_at_once)
            yield
    finally:
        jax.distributed.shutdown()


def join(how: dict[str, Any]) -> None:
    """jax.distributed.initialize with our limits; a TPU that belongs to no cluster stays on its own."""
    limits = dict(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    try:
        jax.distributed.initialize(**how, **limits)
    except ValueError as error:
        if how or "coordinator_address should be defined" not in str(error):
            raise
        if not has_tpu_device():
            raise InputError(
                f"several processes were started and jax does not find the others: set {', '.join(EXPLICIT)} "
                "(JAX_NUM_PROCESSES=1 alone for a process on its own)"
            ) from error


def distributed_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize: {} where jax finds them itself, None for a process on its own.

    JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID go before everything else. Jax is asked
    under Slurm and Open MPI when they started several processes, in pods of an indexed Kubernetes job, in TPU pods,
    and where there may be a TPU (it asks Google's metadata server then); nowhere else: a laptop asks nobody.
    """
    given = {name: environment[name] for name in EXPLICIT if environment.get(name)}
    if given.get("JAX_NUM_PROCESSES") == "1":
        return None
    if given.keys() & {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}:
        return explicit_arguments(given)
    # In an allocation without srun the number of tasks is set, but one process was started.
    tasks = environment.get("SLURM_NTASKS") if "SLURM_STEP_NODELIST" in environment else None
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    # Where libtpu finds no pod it puts a warning, with a comma, in place of the names.
    known = [name for name in workers.split(",") if name and " " not in name.strip()]
    several = (
        max(map(int, (tasks or 1, environment.get("OMPI_COMM_WORLD_SIZE") or 1))) > 1
        or len(known) > 1
        or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
        or (not known and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys())
        or (not known and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and has_tpu_device())
    )
    return {} if several else None


def explicit_arguments(given: dict[str, str]) -> dict[str, Any]:
    """What the three variables say. InputError when one is absent or no number."""
    absent = [name for name in EXPLICIT if name not in given]
    if absent:
        raise InputError(
            f"{absent[0]} is not set next to {', '.join(given)}: set all of {', '.join(EXPLICIT)}, or none"
        )
    address, count, index = (given[name] for name in EXPLICIT)
    if ":" not in address or not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        shown = " ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(f"{shown}: expected HOST:PORT, the number of processes, and this one's index, from 0")
    # Deactivated, or jax would ask a cluster it finds which devices are ours, and leave this process only one of them.
    how = dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
    return how | dict(cluster_detection_method="deactivate")


def has_tpu_device() -> bool:
    """Whether the kernel shows a device that may be a TPU."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def end_at_once(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    """Ends a process that fails while others run: an orderly exit would wait for them, and they for us."""
    if error is None or isinstance(error, SystemExit):
        return
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, InputError) else 1)


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """A function of the updates done that is true, on all hosts after the same update, once one of them got SIGTERM.

    It must be asked after every update. Among several processes jax passes the signal on: the update that all stop
    after is the next one that none has finished. Outside the main thread a process on its own takes no signals.
    """
    if jax.process_count() > 1:
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


# ---- who says and checks what -----------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line, in the first process only."""
    if is_first():
        print(line, flush=True)


def check_agreed(values: dict[str, str]) -> None:
    """InputError that names the processes where a value is not that of the first; every process must call it."""
    if jax.process_count() == 1:
        return
    mine_VD = np.stack([np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8) for value in values.values()])
    all_PVD = np.asarray(multihost_utils.process_allgather(mine_VD))
    for name, hashes_PD in zip(values, all_PVD.swapaxes(0, 1), strict=True):
        others = np.flatnonzero((hashes_PD != hashes_PD[0]).any(axis=1))
        if others.size:
            which = ", ".join(map(str, others))
            raise InputError(f"{name} of process {which} and of process 0 differ: give all the same settings and files")


def check_shared(workdir: str, path: str) -> None:
    """InputError when a process does not see the file at `path` as the first one writes it; every one must call it."""
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
    while not _reads(path, wanted):
        if time.monotonic() > end:
            raise InputError(
                f"--workdir={workdir}: process {jax.process_index()} does not see what process 0 writes in it: "
                "expected a folder that all hosts share, choose one on a network file system"
            )
        time.sleep(0.2)


def _reads(path: str, content: str) -> bool:
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        return file.read() == content
