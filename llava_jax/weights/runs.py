"""Checkpoints of a run as other commands read them: trained parts as numpy, and which steps there are."""

import glob
import hashlib
import json
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llava_jax.types import InputError

# What reading a truncated, emptied or foreign checkpoint raises (orbax and tensorstore mostly ValueError).
UNREADABLE = (ValueError, OSError, KeyError)


def load_params(workdir: str, step: int | None = None, part: str | None = None) -> tuple[int, dict, dict]:
    """Return (step, trainable parameters as numpy, meta) of a run's newest checkpoint, or of the one of `step`.

    They have the dtype they learn in. `part` reads that one alone. `meta["frozen"]` says which parts are not here and
    where they came from. Raises InputError where that checkpoint is absent or cannot be read.
    """
    steps = sorted(steps_on_disk(workdir), reverse=True)
    if not steps:
        raise InputError(f"{workdir}: no checkpoint, expected checkpoints/STEP as `train` writes them")
    if step is not None and step not in steps:
        raise InputError(f"{workdir}: no checkpoint of step {step}, it holds {sorted(steps)}")
    wanted = steps[0] if step is None else step
    try:
        return wanted, *_read_params(_folder(workdir, wanted), part)
    except UNREADABLE as error:
        older = _whole(workdir, [other for other in steps if other < wanted], part)
        problem = f"{_folder(workdir, wanted)}: the checkpoint cannot be read ({first_line(error)})"
        if older is None:
            raise InputError(f"{problem}, nor one before it; restore it from a copy") from error
        raise InputError(
            f"{problem}; {_folder(workdir, older)} is whole: take that one with --step={older} (Python: step={older}; "
            f"for init.model or init.projector: llava-jax convert --from={workdir} --step={older} --to=orbax:DIR or "
            "projector:FILE.safetensors), or restore the damaged one from a copy"
        ) from error


def _folder(workdir: str, step: int) -> str:
    return os.path.abspath(os.path.join(workdir, "checkpoints", str(step)))


def _whole(workdir: str, steps: list[int], part: str | None) -> int | None:
    """The first of the steps whose checkpoint can be read."""
    for step in steps:
        try:
            _read_params(_folder(workdir, step), part)
        except UNREADABLE:
            continue
        return step
    return None


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
    folder = os.path.join(workdir, "checkpoints", str(max(steps_on_disk(workdir), default="none")))
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)):
        if os.path.isfile(path):
            digest.update(f"{os.path.relpath(path, os.path.dirname(folder))} {os.path.getsize(path)}\n".encode())
    meta = os.path.join(folder, "meta", "metadata")
    if os.path.isfile(meta):
        with open(meta, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def steps_on_disk(workdir: str) -> list[int]:
    folder = os.path.join(workdir, "checkpoints")
    return [int(name) for name in os.listdir(folder) if name.isdigit()] if os.path.isdir(folder) else []
