"""The folder of a run: its lock, and the check that it holds this run and no other."""

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from llava_jax.data import sources
from llava_jax.parallel.distributed import check_shared, is_first
from llava_jax.settings import RANDOM, flatten, read_settings
from llava_jax.types import InputError, Settings
from llava_jax.weights.runs import steps_on_disk
from llava_jax.weights.source import absolute

# What may change when a run is resumed: none of it enters the numbers.
FREE_KEYS = ("train.log_every", "train.checkpoint_every", "train.keep", "train.profile", "data.workers")
# Nor does the way a batch is split over devices, where neither the loss nor the order of rows depends on it.
MESH_KEYS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.fsdp_inner", "train.accumulate")


@contextmanager
def hold_workdir(workdir: str, settings: Settings) -> Iterator[None]:
    """Create and lock the workdir in the first process; check in the others that they see the same folder.

    Raises InputError when it holds anything but this run.
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
    """Raise InputError when a config.json there is not a run's, or its checkpoints are of another config."""
    path = os.path.join(workdir, "config.json")
    if os.path.isfile(workdir):
        raise InputError(f"--workdir={workdir}: is a file, expected a folder or a new path")
    if not steps_on_disk(workdir) and not os.path.exists(path):
        return
    try:
        there = absolute_paths(read_settings(path))
    except InputError as error:
        raise InputError(
            f"--workdir={workdir}: its config.json is not that of a run ({error}): choose another workdir"
        ) from error
    if steps_on_disk(workdir):
        old = dict(flatten(dataclasses.asdict(there)))
        new = dict(flatten(dataclasses.asdict(absolute_paths(settings))))
        mesh_free = settings.train.loss_norm == "global_token" and settings.data.group_by == "none"
        free = FREE_KEYS + MESH_KEYS if mesh_free else FREE_KEYS
        differ = [key for key in new if new[key] != old[key] and key not in free]
        if differ:
            first = "; ".join(f"{key}: {old[key]!r} there, {new[key]!r} asked for" for key in differ[:5])
            raise InputError(
                f"--workdir={workdir} holds a run of another config ({first}): expected the same config, "
                "choose another workdir or give the values of its config.json"
            )


def absolute_paths(settings: Settings) -> Settings:
    """Return the settings with every path absolute, so that a run can resume from any folder; `random:NAME` stays."""
    model, init, data = settings.model, settings.init, settings.data
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(model, vision=_absolute_tower(model.vision), llm=_absolute_tower(model.llm)),
        init=dataclasses.replace(init, model=absolute(init.model), projector=_absolute(init.projector)),
        data=dataclasses.replace(data, annotations=sources.absolute(data.annotations), images=_absolute(data.images)),
    )


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""


def _absolute_tower(spec: str) -> str:
    if not spec.startswith(RANDOM):
        return _absolute(spec)
    return RANDOM + _absolute(spec.removeprefix(RANDOM)) if spec.endswith(".json") else spec
