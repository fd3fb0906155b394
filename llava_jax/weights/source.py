"""What a SRC names (hf:DIR, llava:DIR, orbax:DIR, or a DIR recognised by its files), and the checkpoints of a run."""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llava_jax import buckets, hub
from llava_jax.io import absolute_path, cache_folder, exists, is_bucket, opened, reached
from llava_jax.types import InputError
from llava_jax.weights import manifest
from llava_jax.weights.hf_config import read_json

FORMS = (
    "hf:DIR (Hugging Face LlavaForConditionalGeneration), llava:DIR (original LLaVA), orbax:DIR (a workdir of train, "
    "or what convert wrote so), peft:DIR (adapters, with --base), or such a DIR alone; DIR may be a name on the Hub, "
    "owner/name[@REVISION], or gs://BUCKET/DIR"
)
_HOLDS = {
    "run": "a workdir of train",
    "orbax": "a whole model as orbax",
    "llava": "a config.json of the original LLaVA",
    "peft": "adapters of peft",
    "hf": "a config.json without checkpoints/ or weights/",
    "": "none of them",
}


# The folder with our parameters in a model that we wrote as orbax, and the file that says what adapters are.
WEIGHTS = "weights"
ADAPTER_CONFIG = "adapter_config.json"


def is_workdir(folder: str) -> bool:
    """Return whether a folder is the workdir of a training run, by what lies in it."""
    config, checkpoints = os.path.join(folder, "config.json"), os.path.join(folder, "checkpoints")
    if is_bucket(folder):
        return exists(config) and exists(checkpoints)
    return os.path.isfile(config) and os.path.isdir(checkpoints)


def is_converted(folder: str) -> bool:
    """Return whether a folder is a whole model that we wrote as orbax, by what lies in it."""
    return os.path.isfile(os.path.join(folder, WEIGHTS, "_METADATA"))


def is_adapter(folder: str) -> bool:
    """Return whether a folder holds adapters of peft and no model, by what lies in it."""
    has = [os.path.isfile(os.path.join(folder, name)) for name in (ADAPTER_CONFIG, "config.json")]
    return has == [True, False]


def is_original(config: Mapping[str, Any]) -> bool:
    """Return whether config.json is that of the original LLaVA code, whose keys for images no other has."""
    return "mm_vision_tower" in config or "mm_projector_type" in config


def split(source: str) -> tuple[str, str]:
    """Return (form or "", folder) as written, nothing looked up but a folder whose own name has a colon."""
    form, colon, folder = source.partition(":")
    if not colon or os.path.isdir(source) or os.sep in form or is_bucket(source):
        return "", source
    return form, folder


def parse(source: str, name: str = "model", need: str = "config") -> tuple[str, str]:
    """Return (kind, folder) of a SRC that is there; `name` is its flag or key, for errors.

    A name on the Hub is fetched, and a folder in a bucket copied, as `local_folder` does with `need`. The kind is `run`
    (a workdir of train, which may lie in a bucket), `orbax` (a whole model that we wrote so), `peft`, `hf` or `llava`.
    """
    form, folder = split(source)
    if form not in ("", "hf", "llava", "orbax", "peft"):
        raise InputError(f"{name}={source}: form {form!r} is not read; expected {FORMS}")
    folder = local_folder(folder, name, need)
    is_run = is_workdir(folder)
    if not is_run and not os.path.isdir(folder):
        raise InputError(f"{name}={source}: no folder {folder!r}; expected {FORMS}")
    config = os.path.join(folder, "config.json")
    if is_run:
        found = "run"
    elif is_converted(folder) and os.path.isfile(config):
        found = "orbax"
    elif os.path.isfile(config):
        found = "llava" if is_original(read_json(config)) else "hf"
    else:
        found = "peft" if is_adapter(folder) else ""
    if not found or form not in ("", "orbax" if found == "run" else found):
        raise InputError(f"{name}={source}: the folder holds {_HOLDS[found]}; expected {FORMS}")
    return found, folder


def absolute(source: str, name: str = "model") -> str:
    """Return the SRC with its folder as `absolute_folder` has it: a path, or a name on the Hub with its commit."""
    form, folder = split(source)
    found = absolute_folder(folder, name)
    return f"{form}:{found}" if form else found


def pinned(source: str, name: str) -> str:
    """Return the SRC with the commit where it is a name on the Hub, as it is where it is a folder."""
    return absolute(source, name) if is_name(split(source)[1]) else source


# ---- names on the Hub ----


NAME = re.compile(rf"{hub.REPOSITORY}(?:@[^\s@]+)?")
# Files of the arguments that take a file as well as a folder: no repository is called so.
_FILES = (".safetensors", ".bin", ".json")


def is_name(path: str) -> bool:
    """Return whether a folder's place is taken by the name of a repository: a file or folder of that name wins."""
    plain = _plain(path)
    return bool(NAME.fullmatch(plain)) and not plain.endswith(_FILES) and not os.path.exists(plain)


def _plain(path: str) -> str:
    """Return a path or name without the `hf:` before it, unless a file or folder is called so."""
    return path if os.path.exists(path) else path.removeprefix("hf:")


def repository(path: str) -> tuple[str, str]:
    """Return (owner/name, revision or "") of a name."""
    repo, _, revision = _plain(path).partition("@")
    return repo, revision


def local_folder(path: str, name: str, need: str = "config") -> str:
    """Return the path without `hf:`, or the folder of a name on the Hub, fetched as `hub.fetch` does with `need`.

    `path` is a path, or owner/name or owner/name@REVISION, `hf:` may stand before it; `name` is its flag or key, for
    errors. Of what lies in a bucket it is a copy of the same files, but for a workdir of train, of which only the
    checkpoint asked for is read, there. Whether there is anything at a path is not looked up.
    """
    if is_name(path):
        return hub.fetch(*repository(path), f"{name}={path}", need)
    path = _plain(path)
    if not is_bucket(path) or is_workdir(path):
        return path
    return buckets.fetch(path, cache_folder("buckets"), lambda names: hub.needed(need, names))


def absolute_folder(path: str, name: str) -> str:
    """Return the path so that it means the same from any folder, at any time; an empty one stays empty.

    That is an absolute path, or owner/name@COMMIT, for which the Hub is asked. `name` is its flag or key, for errors.
    """
    if not is_name(path):
        return absolute_path(_plain(path)) if path else ""
    repo, revision = repository(path)
    if hub.COMMIT.fullmatch(revision):
        return f"{repo}@{revision}"
    return f"{repo}@{os.path.basename(hub.fetch(repo, revision, f'{name}={path}', 'config'))}"


# ---- checkpoints of a run ----


# What reading a truncated, emptied or foreign checkpoint raises (orbax and tensorstore mostly ValueError).
UNREADABLE = (ValueError, OSError, KeyError)
EARLIER_CONFIG = re.compile(r"config\.until-(\d+)\.json")
EVAL_LOSS = "eval_loss"  # in the metrics and a checkpoint's meta
EVAL_ROWS = "eval_rows"  # in a checkpoint's meta: the fingerprint of the rows that have this loss


def load_params(workdir: str, step: int | None = None, part: str | None = None) -> tuple[int, dict, dict]:
    """Return (step, trainable parameters as numpy, meta) of a run's newest checkpoint, or of the one of `step`.

    They have the dtype they learn in. `part` reads that one alone, and nothing where it was not trained.
    `meta["frozen"]` says of which parts something is not here and where that came from. Raises InputError where that
    checkpoint is absent or cannot be read.
    """
    steps = sorted(steps_on_disk(workdir), reverse=True)
    if not steps:
        raise InputError(f"{workdir}: no checkpoint, expected checkpoints/STEP as `train` writes them")
    if step is not None and step not in steps:
        raise InputError(f"{workdir}: no checkpoint of step {step}, it holds {sorted(steps)}")
    wanted = steps[0] if step is None else step
    folder = _folder(workdir, wanted)
    if not exists(os.path.join(folder, manifest.ITEM)):
        text = "was written by an earlier version, without hashes: its files are not compared"
        print(f"checkpoint {folder} {text}", file=sys.stderr)
    with reached(workdir):
        try:
            return wanted, *_read_params(workdir, wanted, part)
        except UNREADABLE as error:
            if manifest.is_transient(error):
                raise manifest.unread(folder, error) from error
            older = _whole(workdir, [other for other in steps if other < wanted], part)
            problem = f"{folder}: the checkpoint is damaged ({first_line(error)})"
            if older is None:
                raise InputError(f"{problem}, nor one before it; restore it from a copy") from error
            raise InputError(
                f"{problem}; {_folder(workdir, older)} is whole: take that one with --step={older} (Python: "
                f"step={older}; for init.model or init.projector: llava-jax convert --from={workdir} --step={older} "
                "--to=orbax:DIR or projector:FILE.safetensors), or restore the damaged one from a copy"
            ) from error


def _folder(workdir: str, step: int) -> str:
    return absolute_path(os.path.join(workdir, "checkpoints", str(step)))


def _whole(workdir: str, steps: list[int], part: str | None) -> int | None:
    """Return the first of the steps whose checkpoint can be read."""
    for step in steps:
        try:
            _read_params(workdir, step, part)
        except UNREADABLE:
            continue
        return step
    return None


def checkpoint_meta(workdir: str, step: int) -> dict:
    """Return what the checkpoint of a step says about itself; raises one of UNREADABLE where it cannot be read."""
    with opened(os.path.join(_folder(workdir, step), "meta", "metadata")) as file:
        return json.load(file)


def eval_losses(workdir: str, rows: str | None = None) -> dict[int, float]:
    """Return the loss of held-out rows at each checkpoint that was saved after a pass over them, where it is finite.

    `rows` is their fingerprint, None that of the last pass: losses of other rows are no measure.
    """
    found = {}
    for step in sorted(steps_on_disk(workdir), reverse=True):
        with contextlib.suppress(*UNREADABLE):  # whoever wants that checkpoint says so
            meta = checkpoint_meta(workdir, step)
            if math.isfinite(meta.get(EVAL_LOSS, math.nan)):
                rows = meta.get(EVAL_ROWS, "") if rows is None else rows
                found |= {step: meta[EVAL_LOSS]} if meta.get(EVAL_ROWS, "") == rows else {}
    return dict(sorted(found.items()))


def best_step(workdir: str) -> int:
    """Return the checkpoint at which held-out rows had the smallest loss. Raises InputError where none was measured."""
    losses = eval_losses(workdir)
    if not losses:
        raise InputError(f"{workdir}: no checkpoint says the loss of held-out rows, as runs with data.eval save them")
    return min(losses, key=losses.__getitem__)


def _read_params(workdir: str, step: int, part: str | None) -> tuple[dict, dict]:
    folder = _folder(workdir, step)
    if (wrong := manifest.damage(folder)) not in ("", manifest.NONE):
        raise ValueError(wrong)
    meta = checkpoint_meta(workdir, step)
    reader = ocp.PyTreeCheckpointHandler()
    source = epath.Path(folder) / "state"
    saved = {name: tree for name, tree in reader.metadata(source).tree.items() if name in ("step", "params")}
    if part is not None:
        saved["params"] = {name: tree for name, tree in saved["params"].items() if name == part}
        if not saved["params"]:
            return {}, meta
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    found = reader.restore(source, args=args)
    if found["step"] != step:
        raise ValueError(f"holds step {found['step']}")
    return found["params"], meta


def run_fingerprint(workdir: str) -> str:
    """Return hash of the newest checkpoint: its step, its meta, the names and sizes of its files."""
    digest = hashlib.blake2b(digest_size=16)
    step = str(max(steps_on_disk(workdir), default="none"))
    folder = os.path.join(workdir, "checkpoints", step)
    sizes = _sizes(folder)
    for name in sorted(sizes):
        digest.update(f"{os.path.join(step, name)} {sizes[name]}\n".encode())
    meta = os.path.join("meta", "metadata")
    if meta in sizes:
        with opened(os.path.join(folder, meta)) as file:
            digest.update(file.read())
    return digest.hexdigest()


def _sizes(folder: str) -> dict[str, int]:
    """Return the bytes of each file below a folder, by its name in there."""
    if is_bucket(folder):
        return {name: about["size"] for name, about in buckets.listed(folder).items()}
    paths = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
    return {os.path.relpath(path, folder): os.path.getsize(path) for path in paths if os.path.isfile(path)}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def steps_on_disk(workdir: str) -> list[int]:
    folder = os.path.join(workdir, "checkpoints")
    if is_bucket(workdir):
        with reached(workdir):
            return ocp.utils.checkpoint_steps(folder)  # whose saves are complete: nothing is renamed there
    return [int(name) for name in os.listdir(folder) if name.isdigit()] if os.path.isdir(folder) else []


def earlier_configs(workdir: str) -> list[int]:
    """Return the updates until which a run had other settings than those of its config.json."""
    files = buckets.names(workdir) if is_bucket(workdir) else os.listdir(workdir)
    return sorted(int(match[1]) for match in map(EARLIER_CONFIG.fullmatch, files) if match)
