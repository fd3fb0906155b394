"""Checkpoints of a run: trainable parameters, optimizer, step and data position in one atomic, asynchronous save.

Layout: WORKDIR/checkpoints/STEP/{state,data,meta,manifest}, STEP being the number of updates done. Frozen weights are
not saved; meta says where they came from. A checkpoint whose files are not those of its manifest is moved to
WORKDIR/damaged/ and the one before it is taken.

Among several processes each writes the arrays on its own devices, the first one all the rest. The number of processes
is not recorded: a run resumes with any number of them on any mesh.
"""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from llava_jax import buckets
from llava_jax.data import sources
from llava_jax.io import absolute_path, exists, is_bucket, reached
from llava_jax.parallel.distributed import check_agreed, check_shared, is_first, of_first, say, text_of_first
from llava_jax.settings import RANDOM, differences, read_settings, write_settings
from llava_jax.train.optim import leaf_path
from llava_jax.train.step import TrainState
from llava_jax.types import InputError, Settings
from llava_jax.weights import manifest
from llava_jax.weights.source import (
    UNREADABLE,
    absolute,
    absolute_folder,
    earlier_configs,
    eval_losses,
    first_line,
    is_name,
    repository,
    steps_on_disk,
)
from llava_jax.weights.tensors import enough_room


class _Manifest(ocp.CheckpointHandler):
    """An item of a step that holds the hashes of those before it, written once these are whole."""

    def save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> None:
        """Write nothing yet."""

    def restore(self, directory: epath.Path, *args: Any, **kwargs: Any) -> None:
        """Read nothing: `manifest.damage` does, before Orbax is asked."""

    def finalize(self, directory: epath.Path) -> None:
        """Write the manifest; Orbax calls this in the first process, in the items' order."""
        content = manifest.hashes(os.fspath(directory.parent), ["state", "data", "meta"])
        (directory / manifest.FILE).write_text(json.dumps(content, indent=0))


@ocp.args.register_with_handler(_Manifest, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ManifestSave(ocp.args.CheckpointArgs):
    pass


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a log record is no traceback of Orbax's threads, whose errors the next save or the end raises."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


@dataclasses.dataclass
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps, and of those in `losses` the one with the smallest."""

    newest: int
    losses: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return which of the checkpoints, oldest first, stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min((step for step in steps if step in self.losses), key=lambda step: self.losses[step], default=None)
        return [step == best or step in steps[-self.newest :] for step in steps]


@contextmanager
def open_manager(
    workdir: str, keep: int, losses: Mapping[int, float] = MappingProxyType({})
) -> Iterator[ocp.CheckpointManager]:
    """Yield the run's CheckpointManager; on every way out the save in flight is finished before it is closed.

    It keeps `keep` checkpoints, and the one with the smallest of `losses`, which may change meanwhile. Raises
    InputError where a save, in flight or at the end, finds the disk full; none stays half-written.
    """
    folder = absolute_path(os.path.join(workdir, "checkpoints"))
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)  # its threads may still be at it when the manager is closed
    with reached(folder):
        manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=_Kept(keep, losses), cleanup_tmp_directories=True),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
                manifest.ITEM: _Manifest(),  # the last one
            },
        )
    try:
        yield manager
    finally:
        # Without the wait the last asynchronous save is lost even on a normal exit.
        with enough_room(folder), reached(folder), closing(manager):
            manager.wait_until_finished()


def save(manager: ocp.CheckpointManager, state: TrainState, data: grain.DatasetIterator, meta: dict) -> None:
    """Start saving `state` after `state.step` updates; does nothing when that step is already there.

    Raises InputError where the state is not finite or the disk has no room for it; nothing is written then.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    folder, position = os.fspath(manager.directory), data.get_state()
    if position != {"batches": step}:
        raise RuntimeError(f"the state after step {step} does not belong to the position {position} in the data")
    if not _is_finite(state):
        raise InputError(
            f"{folder}: the state after step {step} is not finite and was not saved: lower optim.lr or set "
            "optim.clip_norm; the same command resumes from the checkpoint before"
        )
    if is_first() and not is_bucket(folder):
        needed, free = 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"{folder}: {free / 1e9:.2f} GB are free, a checkpoint takes {needed / 1e9:.2f}; make room, run again"
            )
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        data=ocp.args.JsonSave(position),
        meta=ocp.args.JsonSave(meta),
        **{manifest.ITEM: _ManifestSave()},
    )
    with enough_room(folder), reached(folder):  # also for what the save before this one met
        if not manager.save(step, args=args):
            raise RuntimeError(f"orbax refused to save step {step} next to steps {manager.all_steps()}")


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def restore(
    workdir: str, manager: ocp.CheckpointManager, state: TrainState, data: grain.DatasetIterator
) -> tuple[TrainState, dict] | None:
    """Return (state, meta) of the newest whole checkpoint and move `data` to its position; None without checkpoint.

    `state` is a tree of ShapeDtypeStructs with shardings. A checkpoint that is proven to be damaged, by its manifest or
    by what it holds, is reported, moved away and skipped by all processes alike. Raises an InputError where that is not
    proven (a disk or a network that fails), where it lies in a bucket, and, naming the first differences, when it has
    another tree, shape or dtype.
    """
    damaged: dict[int, str] = {}
    with reached(workdir):
        steps = sorted(manager.all_steps(), reverse=True)
    check_agreed({f"the list of checkpoints in {workdir}": repr(steps)})
    for step in steps:
        folder = os.path.join(workdir, "checkpoints", str(step))
        wrong = text_of_first(partial(manifest.damage, folder))
        if wrong == manifest.NONE:
            say(f"checkpoint {folder} was written by an earlier version, without hashes: its files are not compared")
        if wrong in ("", manifest.NONE):
            restored, wrong = _read(folder, manager, state, is_proven=wrong == "")
            if restored is not None:
                for bad in damaged if is_first() else ():
                    _set_aside(workdir, bad)
                of_first(True)  # what is moved is moved for all
                manager.reload()
                data.set_state(restored["data"])
                return type(state)(**restored["state"]), restored["meta"]
        damaged[step] = wrong
        if is_bucket(workdir):
            raise InputError(f"{folder} is damaged ({wrong}): move it away to resume from the one before")
        say(f"checkpoint {folder} is damaged ({wrong}), trying the one before")
    if damaged:
        raise InputError(
            f"{workdir}: all of the checkpoints {sorted(damaged)} are damaged ({damaged[max(damaged)]}): restore one "
            "from a copy, or choose another workdir to start again"
        )
    return None


def best_loss(workdir: str, rows: str) -> dict[int, float]:
    """Return {step: loss} of the best checkpoint by `eval_losses`, {} without one; every process must call it.

    The first one reads: what decides over a save must be the same in all.
    """

    def read() -> str:
        losses = eval_losses(workdir, rows)
        return json.dumps(sorted(losses.items(), key=lambda item: item[1])[:1])

    return dict(json.loads(text_of_first(read)))


def _read(folder: str, manager: ocp.CheckpointManager, state: TrainState, is_proven: bool) -> tuple[Any, str]:
    """Return (what the checkpoint holds, ""), or (None, why it is damaged).

    Only of files without hashes an error proves that: with `is_proven` what cannot be read twice is an InputError, and
    so it is where other processes, or a later start, may be able to read it.
    """
    step = int(os.path.basename(folder))
    for is_last in (False, True):
        try:
            like = _like_saved(folder, manager.item_metadata(step)["state"], state)
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(like._asdict()), data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
            )
            restored = manager.restore(step, args=args)
            break
        except UNREADABLE as error:
            if not is_last:
                continue
            if manifest.is_transient(error):
                raise manifest.unread(folder, error) from error
            if is_proven or jax.process_count() > 1 or is_bucket(folder):
                raise InputError(
                    f"{folder} cannot be read by process {jax.process_index()} ({first_line(error)}): restore it from "
                    "a copy, or move it away to resume from the one before"
                ) from error
            return None, first_line(error)
    found = int(restored["state"]["step"]), restored["data"]
    if found != (step, {"batches": step}):
        return None, f"holds step {found[0]} and the position {found[1]} in the data"
    if like is not state:
        restored["state"]["opt_state"] = _reclipped(restored["state"]["opt_state"])
    return restored, ""


def _leaves(tree: Any) -> dict[str, tuple]:
    """Return path -> (shape, dtype)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_path(path): (tuple(leaf.shape), str(np.dtype(leaf.dtype))) for path, leaf in leaves}


def _reclipped(parts: tuple) -> tuple:
    """Return the parts of an optimizer's state without the first one, clipping, which holds nothing, or with it."""
    is_clipped = bool(parts) and isinstance(parts[0], optax.EmptyState)
    return parts[1:] if is_clipped else (optax.EmptyState(), *parts)


def _like_saved(folder: str, metadata: Any, state: TrainState) -> TrainState:
    """Return `state` as the checkpoint holds it: `optim.clip_norm` may have been turned on or off since."""
    if metadata is None:
        raise ValueError("its state has no readable metadata")
    saved, wanted = _leaves(metadata.tree if hasattr(metadata, "tree") else metadata), _leaves(state._asdict())
    other = state._replace(opt_state=_reclipped(state.opt_state))
    if saved == _leaves(other._asdict()):
        return other
    paths = sorted(path for path in {*saved, *wanted} if saved.get(path) != wanted.get(path))
    if paths:
        first = "; ".join(f"{p}: {saved.get(p, 'absent')} there, {wanted.get(p, 'absent')} expected" for p in paths[:5])
        raise InputError(f"{folder} does not fit this model ({first}): expected the model it was saved from")
    return state


def _set_aside(workdir: str, step: int) -> None:
    """Move a damaged checkpoint away: orbax saves no step at or below the newest it sees."""
    source = os.path.join(workdir, "checkpoints", str(step))
    folder, n = os.path.join(workdir, "damaged"), 1
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, str(step))
    while os.path.exists(target):
        target, n = os.path.join(folder, f"{step}-{n}"), n + 1
    os.rename(source, target)
    print(f"moved the damaged checkpoint {source} to {target}")


# ---- the folder of a run ----


LOCK = ".lock"
# What may change when a run is resumed: none of it enters the numbers.
FREE_KEYS = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.profile",
    "train.watchdog",
    "train.max_nonfinite",
    "data.workers",
    "data.max_rejects",
    "data.eval",
    "data.eval_images",
    "train.eval_every",
    "train.eval_generate",
    "train.keep_best",
    "train.wandb",
)
# What may change and does enter them, from the update on at which the run resumes: `write_config` says and records it.
CHANGED_KEYS = ("optim.lr", "optim.clip_norm", "data.exclude")
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
        free = (*FREE_KEYS, *CHANGED_KEYS, *(MESH_KEYS if _split_is_free(settings) else ()))
        found = differences(there, absolute_paths(settings)).items()
        differ = [f"{key}: {old!r} there, {new!r} asked for" for key, (old, new) in found if key not in free]
        if differ:
            first = "; ".join(differ[:5])
            raise InputError(
                f"--workdir={workdir} holds a run of another config ({first}): expected the same config, "
                "choose another workdir or give the values of its config.json"
            )


def write_config(workdir: str, settings: Settings, step: int) -> None:
    """Write config.json; where a run resumes at `step` with changed keys, keep the one until there and say them.

    Configs until later updates are removed: those updates are done again.
    """
    folder = epath.Path(workdir)
    earlier = earlier_configs(workdir)
    last = min((until for until in earlier if until >= step), default=None)
    path = folder / ("config.json" if last is None else f"config.until-{last}.json")
    if step and path.exists():
        there = absolute_paths(read_settings(str(path)))
        changed = {key: values for key, values in differences(there, settings).items() if key in CHANGED_KEYS}
        for key, (old, new) in changed.items():
            say(f"{key}: {old!r} until update {step}, {new!r} from there on")
        if changed:
            write_settings(str(folder / f"config.until-{step}.json"), there)
    for until in earlier:
        if until > step:
            (folder / f"config.until-{until}.json").unlink()
    write_settings(str(folder / "config.json"), settings)


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
            exclude=absolute_path(data.exclude) if data.exclude else "",
        ),
    )


def _absolute_tower(spec: str, name: str) -> str:
    if not spec.startswith(RANDOM):
        return absolute_folder(spec, name)
    return RANDOM + os.path.abspath(spec.removeprefix(RANDOM)) if spec.endswith(".json") else spec
