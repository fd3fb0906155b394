"""Checkpoints of a run: trainable parameters, optimizer, step and data position in one atomic, asynchronous save.

Layout: WORKDIR/checkpoints/STEP/{state,data,meta}, STEP being the number of updates done. Frozen weights are not saved;
meta says where they came from. A checkpoint that cannot be read is moved to WORKDIR/damaged/ and the one before it is
taken.

Among several processes each writes the arrays on its own devices, the first one all the rest. The number of processes
is not recorded: a run resumes with any number of them on any mesh.
"""

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from llava_jax import buckets
from llava_jax.data import sources
from llava_jax.io import absolute_path, exists, is_bucket, reached
from llava_jax.parallel.distributed import check_agreed, check_shared, is_first, of_first
from llava_jax.settings import RANDOM, flatten, read_settings
from llava_jax.train.optim import leaf_path
from llava_jax.train.step import TrainState
from llava_jax.types import InputError, Settings
from llava_jax.weights.source import (
    UNREADABLE,
    absolute,
    absolute_folder,
    first_line,
    is_name,
    repository,
    steps_on_disk,
)
from llava_jax.weights.tensors import enough_room


@contextmanager
def open_manager(workdir: str, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Yield the run's CheckpointManager; on every way out the save in flight is finished before it is closed.

    Raises InputError where a save, in flight or at the end, finds the disk full; none stays half-written.
    """
    folder = absolute_path(os.path.join(workdir, "checkpoints"))
    with reached(folder):
        manager = ocp.CheckpointManager(
            folder,
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
        with enough_room(folder), reached(folder), closing(manager):
            manager.wait_until_finished()


def save(manager: ocp.CheckpointManager, state: TrainState, data: grain.DatasetIterator, meta: dict) -> None:
    """Start saving `state` after `state.step` updates; does nothing when that step is already there."""
    step = int(state.step)
    if step in manager.all_steps():
        return
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        data=ocp.args.JsonSave(data.get_state()),
        meta=ocp.args.JsonSave(meta),
    )
    folder = os.fspath(manager.directory)
    with enough_room(folder), reached(folder):  # also for what the save before this one met
        if not manager.save(step, args=args):
            raise RuntimeError(f"orbax refused to save step {step} next to steps {manager.all_steps()}")


def restore(
    workdir: str, manager: ocp.CheckpointManager, state: TrainState, data: grain.DatasetIterator
) -> tuple[TrainState, dict] | None:
    """Return (state, meta) of the newest readable checkpoint and move `data` to its position; None without checkpoint.

    `state` is a tree of ShapeDtypeStructs with shardings. An unreadable checkpoint is reported, moved away and skipped;
    one in a bucket is not, since there the network is a likelier cause than damage. Raises an InputError naming the
    first differences when the checkpoint has another tree, shape or dtype.
    """
    damaged: dict[int, str] = {}
    with reached(workdir):
        steps = sorted(manager.all_steps(), reverse=True)
    check_agreed({f"the list of checkpoints in {workdir}": repr(steps)})
    for step in steps:
        folder = os.path.join(workdir, "checkpoints", str(step))
        try:
            _check_like(folder, manager.item_metadata(step)["state"], state)
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(state._asdict()),
                data=ocp.args.JsonRestore(),
                meta=ocp.args.JsonRestore(),
            )
            restored = manager.restore(step, args=args)
        except UNREADABLE as error:
            damaged[step] = first_line(error)
            if jax.process_count() > 1 or is_bucket(workdir):
                # Others, or a later start, may be able to read it and would then resume from a different step.
                raise InputError(
                    f"{folder} cannot be read by process {jax.process_index()} ({damaged[step]}): restore it from a "
                    "copy, or move it away to resume from the one before"
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


def _leaves(tree: Any) -> dict[str, tuple]:
    """Return path -> (shape, dtype)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_path(path): (tuple(leaf.shape), str(np.dtype(leaf.dtype))) for path, leaf in leaves}


def _check_like(folder: str, metadata: Any, state: TrainState) -> None:
    if metadata is None:
        raise ValueError("its state has no readable metadata")
    saved, wanted = _leaves(metadata.tree if hasattr(metadata, "tree") else metadata), _leaves(state._asdict())
    paths = sorted(path for path in {*saved, *wanted} if saved.get(path) != wanted.get(path))
    if paths:
        first = "; ".join(f"{p}: {saved.get(p, 'absent')} there, {wanted.get(p, 'absent')} expected" for p in paths[:5])
        raise InputError(f"{folder} does not fit this model ({first}): expected the model it was saved from")


def _set_aside(workdir: str, step: int) -> None:
    """Move an unreadable checkpoint away: orbax saves no step at or below the newest it sees."""
    source = os.path.join(workdir, "checkpoints", str(step))
    folder, n = os.path.join(workdir, "damaged"), 1
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, str(step))
    while os.path.exists(target):
        target, n = os.path.join(folder, f"{step}-{n}"), n + 1
    os.rename(source, target)
    print(f"moved the unreadable checkpoint {source} to {target}")


# ---- the folder of a run ----


LOCK = ".lock"
# What may change when a run is resumed: none of it enters the numbers.
FREE_KEYS = ("train.log_every", "train.checkpoint_every", "train.keep", "train.profile", "data.workers")
FREE_KEYS += ("data.eval", "data.eval_images", "train.eval_every")
# Nor does the way a batch is split, where neither the loss nor the order of rows nor dropout depends on it.
MESH_KEYS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.fsdp_inner", "train.accumulate")


@contextmanager
def hold_workdir(workdir: str, settings: Settings) -> Iterator[None]:
    """Create and lock the workdir in the first process; check in the others that they see the same folder.

    A folder made here is removed when the run ends before it has written anything. Raises InputError when it holds
    anything but this run.
    """
    path = os.path.join(workdir, LOCK)
    if is_bucket(workdir):
        with _hold_bucket(workdir, path, settings):
            yield
        return
    if not is_first():
        check_shared(workdir, path)
        yield
        return
    check_workdir(workdir, settings)
    is_ours = not os.path.exists(workdir)
    try:
        os.makedirs(workdir, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--workdir={workdir}: cannot be written ({error.strerror}), choose another one") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reason = f"its file system cannot lock files ({error.strerror}), choose another folder"
            if isinstance(error, BlockingIOError):
                reason = "another train is running in it, wait for its end or choose another workdir"
            raise InputError(f"--workdir={workdir}: {reason}") from error
        check_shared(workdir, path)
        try:
            yield
        finally:
            if is_ours and [name for _, _, names in os.walk(workdir) for name in names] == [LOCK]:
                shutil.rmtree(workdir)


@contextmanager
def _hold_bucket(workdir: str, path: str, settings: Settings) -> Iterator[None]:
    check_agreed({"--workdir": workdir})
    if not is_first():
        while not of_first(False):
            pass
        yield
        return
    check_workdir(workdir, settings)
    with reached(workdir):
        lock = buckets.Lock(path)
        taken = lock.take()
        try:
            # The others are told each time: collectives that wait for one process give up after half a minute.
            while not of_first(next(taken)):
                pass
        except InputError as error:
            raise InputError(f"--workdir={workdir}: {error}: wait for its end or choose another workdir") from None
    try:
        yield
    finally:
        with reached(workdir):
            lock.release()


def check_workdir(workdir: str, settings: Settings) -> None:
    """Raise InputError when a config.json there is not a run's, or its checkpoints are of another config."""
    path = os.path.join(workdir, "config.json")
    if os.path.isfile(workdir):
        raise InputError(f"--workdir={workdir}: is a file, expected a folder or a new path")
    steps = steps_on_disk(workdir)
    if not steps and not exists(path):
        return
    try:
        there = absolute_paths(read_settings(path))
    except InputError as error:
        reason = f"its config.json is not that of a run ({error})"
        raise InputError(f"--workdir={workdir}: {reason}: choose another workdir") from error
    if steps:
        old = dict(flatten(dataclasses.asdict(there)))
        new = dict(flatten(dataclasses.asdict(absolute_paths(settings))))
        free = FREE_KEYS + MESH_KEYS if _split_is_free(settings) else FREE_KEYS
        differ = [key for key in new if new[key] != old[key] and key not in free]
        if differ:
            first = "; ".join(f"{key}: {old[key]!r} there, {new[key]!r} asked for" for key in differ[:5])
            raise InputError(
                f"--workdir={workdir} holds a run of another config ({first}): expected the same config, "
                "choose another workdir or give the values of its config.json"
            )


def _split_is_free(settings: Settings) -> bool:
    """Return whether the numbers stay the same when a batch is split in another way; dropout draws by place in it."""
    dropout = settings.stage == "lora" and settings.lora.dropout > 0
    return settings.train.loss_norm == "global_token" and settings.data.group_by == "none" and not dropout


def with_commits_of(workdir: str, settings: Settings) -> Settings:
    """Return the settings with the commits of the run in `workdir`, where they name its repositories without any."""
    path = os.path.join(workdir, "config.json")
    if not exists(path):
        return settings
    there = read_settings(path)
    model, init = settings.model, settings.init
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(
            model, vision=_kept(model.vision, there.model.vision), llm=_kept(model.llm, there.model.llm)
        ),
        init=dataclasses.replace(
            init, model=_kept(init.model, there.init.model), projector=_kept(init.projector, there.init.projector)
        ),
        data=dataclasses.replace(
            settings.data, annotations=sources.with_commits(settings.data.annotations, there.data.annotations)
        ),
    )


def _kept(given: str, there: str) -> str:
    is_same = is_name(given) and repository(given) == (repository(there)[0], "")
    return there if is_same else given


def absolute_paths(settings: Settings) -> Settings:
    """Return the settings so that a run can resume from any folder: paths absolute, names on the Hub with the commit.

    `random:NAME` stays. Raises InputError where the Hub does not answer.
    """
    model, init, data = settings.model, settings.init, settings.data
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(
            model,
            vision=_absolute_tower(model.vision, "model.vision"),
            llm=_absolute_tower(model.llm, "model.llm"),
        ),
        init=dataclasses.replace(
            init,
            model=absolute(init.model, "init.model"),
            projector=absolute_folder(init.projector, "init.projector"),
        ),
        data=dataclasses.replace(
            data,
            annotations=sources.absolute(data.annotations),
            images=absolute_path(data.images) if data.images else "",
            eval=sources.absolute(data.eval) if data.eval else "",
            eval_images=absolute_path(data.eval_images) if data.eval_images else "",
        ),
    )


def _absolute_tower(spec: str, name: str) -> str:
    if not spec.startswith(RANDOM):
        return absolute_folder(spec, name)
    return RANDOM + os.path.abspath(spec.removeprefix(RANDOM)) if spec.endswith(".json") else spec
