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
    """(step, trainable parameters as numpy, meta) for inference; the newest readable step by default.

    They have the dtype they learn in. `part` reads that one alone. `meta["frozen"]` says which parts are not here and
    where they came from.
    """
    steps = [step] if step is not None else sorted(steps_on_disk(workdir), reverse=True)
    if step is not None and step not in steps_on_disk(workdir):
        raise InputError(f"{workdir}: no checkpoint of step {step}, it holds {sorted(steps_on_disk(workdir))}")
    for candidate in steps:
        folder = os.path.abspath(os.path.join(workdir, "checkpoints", str(candidate)))
        try:
            return candidate, *_read_params(folder, part)
        except UNREADABLE as error:
            print(f"checkpoint {folder} cannot be read ({first_line(error)}), trying the one before")
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
