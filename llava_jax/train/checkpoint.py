"""Checkpoints of a run: trainable parameters, optimizer, step and data position in one atomic, asynchronous save.

Layout: WORKDIR/checkpoints/STEP/{state,data,meta}, STEP being the number of updates done. Frozen weights are not
saved; meta says where they came from. A checkpoint that cannot be read is moved to WORKDIR/damaged/ and the one before
it is taken.

Of several processes each writes the arrays on its own devices, the first one all the rest. Nothing says how many there
were: any number on any mesh goes on from there.
"""

import dataclasses
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llava_jax.parallel.distributed import check_agreed, check_shared, is_first
from llava_jax.settings import absolute_paths, flatten, read_settings
from llava_jax.types import InputError, Settings

State = TypeVar("State", bound=tuple)  # step.TrainState: a NamedTuple with the fields step, params, opt_state

# What may change between the start of a run and its resumption: none of it enters the numbers.
FREE_KEYS = ("train.log_every", "train.checkpoint_every", "train.keep", "train.profile", "data.workers")
# Nor does how a batch is cut over devices, where neither the loss nor the order of rows asks.
MESH_KEYS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.fsdp_inner", "train.accumulate")

# What reading a truncated, emptied or foreign checkpoint raises (orbax and tensorstore mostly ValueError).
UNREADABLE = (ValueError, OSError, KeyError)


@contextmanager
def hold_workdir(workdir: str, settings: Settings) -> Iterator[None]:
    """Makes the workdir and keeps other trainers out of it; InputError when it holds anything but this run.

    The first process does it for all; the others see to it that they look at the same folder.
    """
    path = os.path.join(workdir, ".lock")
    if not is_first():
        check_shared(workdir, path)
        yield
        return
    check_workdir(workdir, settings)
    try:
        os.makedirs(workdir, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--workdir={workdir}: cannot be written ({error.strerror}), choose another one") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--workdir={workdir}: another train is running in it, wait for its end or choose another workdir"
            ) from error
        except OSError as error:
            raise InputError(
                f"--workdir={workdir}: its file system cannot lock files ({error.strerror}), choose another folder"
            ) from error
        check_shared(workdir, path)
        yield


def check_workdir(workdir: str, settings: Settings) -> None:
    """InputError when a config.json there is not a run's, or checkpoints there are of another config (differences)."""
    path = os.path.join(workdir, "config.json")
    if os.path.isfile(workdir):
        raise InputError(f"--workdir={workdir}: is a file, expected a folder or a new path")
    if not _steps_on_disk(workdir) and not os.path.exists(path):
        return
    try:
        there = absolute_paths(read_settings(path))
    except InputError as error:
        raise InputError(
            f"--workdir={workdir}: its config.json is not that of a run ({error}): choose another workdir"
        ) from error
    if _steps_on_disk(workdir):
        old = dict(flatten(dataclasses.asdict(there)))
        new = dict(flatten(dataclasses.asdict(absolute_paths(settings))))
        alike = settings.train.loss_norm == "global_token" and settings.data.group_by == "none"
        free = FREE_KEYS + MESH_KEYS if alike else FREE_KEYS
        differ = [key for key in new if new[key] != old[key] and key not in free]
        if differ:
            shown = "; ".join(f"{key}: {old[key]!r} there, {new[key]!r} asked for" for key in differ[:5])
            raise InputError(
                f"--workdir={workdir} holds a run of another config ({shown}): expected the same config, "
                "choose another workdir or give the values of its config.json"
            )


@contextmanager
def open_manager(workdir: str, keep: int) -> Iterator[ocp.CheckpointManager]:
    """The run's CheckpointManager; on every way out the save in flight is finished before it is closed."""
    manager = ocp.CheckpointManager(
        os.path.abspath(os.path.join(workdir, "checkpoints")),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    )
    try:
        yield manager
    finally:
        # Without the wait the last asynchronous save is lost even on a normal exit.
        manager.wait_until_finished()
        manager.close()


def save(manager: ocp.CheckpointManager, state: State, data: grain.DatasetIterator, meta: dict) -> None:
    """Starts the save of `state` after `state.step` updates; nothing is done when that step is already there."""
    step = int(state.step)
    if step in manager.all_steps():
        return
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        data=ocp.args.JsonSave(data.get_state()),
        meta=ocp.args.JsonSave(meta),
    )
    if not manager.save(step, args=args):
        raise RuntimeError(f"orbax refused to save step {step} beside steps {manager.all_steps()}")


def restore(
    workdir: str, manager: ocp.CheckpointManager, state: State, data: grain.DatasetIterator
) -> tuple[State, dict] | None:
    """(state, meta) of the newest readable checkpoint, with `data` put at its position; None when there is none.

    `state` is a tree of ShapeDtypeStructs with shardings. Another tree, shape or dtype in the checkpoint is an
    InputError that names the first differences; an unreadable checkpoint is reported, moved away and stepped over.
    """
    damaged: dict[int, str] = {}
    steps = sorted(manager.all_steps(), reverse=True)
    check_agreed({f"the list of checkpoints in {workdir}": repr(steps)})
    for step in steps:
        folder = os.path.join(workdir, "checkpoints", str(step))
        try:
            _check_like(folder, _saved_leaves(manager, step), state)
            json_read = ocp.args.JsonRestore()
            read = ocp.args.Composite(state=ocp.args.StandardRestore(state._asdict()), data=json_read, meta=json_read)
            restored = manager.restore(step, args=read)
        except UNREADABLE as error:
            damaged[step] = _first_line(error)
            if jax.process_count() > 1:
                # The others may be able to read it, and would then go on from another step than this process.
                raise InputError(
                    f"{folder} cannot be read by process {jax.process_index()} ({damaged[step]}): restore it from a "
                    "copy, or move it away to go on from the one before"
                ) from error
            print(f"checkpoint {folder} cannot be read ({damaged[step]}), trying the one before")
            continue
        for bad in damaged:
            _set_aside(workdir, bad)
        manager.reload()
        data.set_state(restored["data"])
        return type(state)(**restored["state"]), restored["meta"]
    if damaged:
        raise InputError(
            f"{workdir}: none of the checkpoints {sorted(damaged)} can be read ({damaged[max(damaged)]}): restore "
            "one from a copy, or choose another workdir to start again"
        )
    return None


def load_params(workdir: str, step: int | None = None, part: str | None = None) -> tuple[int, dict, dict]:
    """(step, trainable parameters as numpy, meta) for inference; the newest readable step by default.

    They have the dtype they learn in. `part` reads that one alone. `meta["frozen"]` says which parts are not here and
    where they came from.
    """
    steps = [step] if step is not None else sorted(_steps_on_disk(workdir), reverse=True)
    if step is not None and step not in _steps_on_disk(workdir):
        raise InputError(f"{workdir}: no checkpoint of step {step}, it holds {sorted(_steps_on_disk(workdir))}")
    for candidate in steps:
        folder = os.path.abspath(os.path.join(workdir, "checkpoints", str(candidate)))
        try:
            return candidate, *_read_params(folder, part)
        except UNREADABLE as error:
            print(f"checkpoint {folder} cannot be read ({_first_line(error)}), trying the one before")
    raise InputError(f"{workdir}: no readable checkpoint, expected checkpoints/STEP as `train` writes them")


def _read_params(folder: str, part: str | None) -> tuple[dict, dict]:
    with open(os.path.join(folder, "meta", "metadata"), encoding="utf-8") as file:
        meta = json.load(file)
    reader = ocp.PyTreeCheckpointHandler()
    source = epath.Path(folder) / "state"
    saved = reader.metadata(source).tree["params"]
    saved = saved if part is None else {part: saved[part]}
    item = {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)}
    how = {"params": jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)}
    args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    return reader.restore(source, args=args)["params"], meta


def fingerprint(workdir: str) -> str:
    """Hash of the newest checkpoint: its step, its meta, the names and sizes of its files."""
    digest = hashlib.blake2b(digest_size=16)
    folder = os.path.join(workdir, "checkpoints", str(max(_steps_on_disk(workdir), default="none")))
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)):
        if os.path.isfile(path):
            digest.update(f"{os.path.relpath(path, os.path.dirname(folder))} {os.path.getsize(path)}\n".encode())
    meta = os.path.join(folder, "meta", "metadata")
    if os.path.isfile(meta):
        with open(meta, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def _saved_leaves(manager: ocp.CheckpointManager, step: int) -> dict[str, tuple]:
    """Path -> (shape, dtype) of what the checkpoint says it holds."""
    saved = manager.item_metadata(step)["state"]
    if saved is None:
        raise ValueError("its state has no readable metadata")
    return _leaves(saved.tree if hasattr(saved, "tree") else saved)


def _leaves(tree: Any) -> dict[str, tuple]:
    names = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
        names[name] = (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
    return names


def _check_like(folder: str, saved: dict[str, tuple], state: State) -> None:
    wanted = _leaves(state._asdict())
    # Optimizer slots are compared as a whole by orbax; the parameters' names, shapes and dtypes are named here.
    paths = sorted(path for path in {*saved, *wanted} if saved.get(path) != wanted.get(path))
    if paths:
        shown = "; ".join(f"{p}: {saved.get(p, 'absent')} there, {wanted.get(p, 'absent')} expected" for p in paths[:5])
        raise InputError(f"{folder} does not fit this model ({shown}): expected the model it was saved from")


def _set_aside(workdir: str, step: int) -> None:
    """Moves an unreadable checkpoint out of the way: orbax saves no step at or below the newest it sees."""
    source = os.path.join(workdir, "checkpoints", str(step))
    folder = os.path.join(workdir, "damaged")
    os.makedirs(folder, exist_ok=True)
    target, n = os.path.join(folder, str(step)), 1
    while os.path.exists(target):
        target, n = os.path.join(folder, f"{step}-{n}"), n + 1
    os.rename(source, target)
    print(f"moved the unreadable checkpoint {source} to {target}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _steps_on_disk(workdir: str) -> list[int]:
    folder = os.path.join(workdir, "checkpoints")
    return [int(name) for name in os.listdir(folder) if name.isdigit()] if os.path.isdir(folder) else []
