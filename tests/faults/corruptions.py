"""Damaged checkpoints: what a run that resumes, and whoever reads a model, make of each of 200 kinds of damage.

`python -m tests.faults.corruptions [COUNT]` prints a line a kind and exits with 1 unless none of them is restored
wrong, none ends in a traceback, and each resumes from the newest step that is whole. Each damages a copy of a workdir
with the checkpoints 2, 4 and 6: mostly the newest one, sometimes the two newest.
"""

import collections
import contextlib
import errno
import hashlib
import io
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from llava_jax.data.pipeline import BatchIterator
from llava_jax.train import checkpoint
from llava_jax.types import InputError
from llava_jax.weights.source import load_params

TX = optax.adam(1e-3)
STEPS, WIDTH = (2, 4, 6), 400


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_state(step: int) -> State:
    rng = np.random.default_rng(step)
    params = {"projector": {"linear_1": {"kernel": jnp.asarray(rng.normal(size=(3, WIDTH)), jnp.float32)}}}
    state = State(jnp.int32(step), params, TX.init(params))
    return jax.tree.map(lambda x: x + x.dtype.type(step), state)._replace(step=jnp.int32(step))


def like(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def numbers(position: int = 0) -> BatchIterator:
    data = BatchIterator(grain.MapDataset.range(100).shuffle(seed=3), 1)
    data.set_state({"batches": position})
    return data


def same(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)))


def write(workdir: pathlib.Path, steps: tuple[int, ...] | list[int], keep: int = 5) -> None:
    """Write checkpoints of `steps`, each after that many elements of the data."""
    with checkpoint.open_manager(str(workdir), keep) as manager:
        for n in steps:
            checkpoint.save(manager, make_state(n), numbers(n), {"stage": "pretrain", "frozen": {"llm": n}})


# ---- one kind of damage each: change a workdir, return the newest step that is still whole -------------------------


def files(step: pathlib.Path, of: Callable[[str], bool]) -> list[pathlib.Path]:
    return sorted(path for path in step.rglob("*") if path.is_file() and of(str(path.relative_to(step))))


def is_array(name: str) -> bool:
    return name.startswith("state/") and "METADATA" not in name and "_sharding" not in name


def is_ours(name: str) -> bool:
    """Return whether a step is not the same without that file; the rest only says that Orbax was there."""
    return "/" in name and name != "manifest/commit_success.txt"


def is_json(name: str) -> bool:
    return not is_array(name) and is_ours(name)


def flip(path: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def changed(of: Callable[[str], bool], change: Callable[[pathlib.Path, random.Random], Any]) -> Callable:
    """Return a damage that changes one file of the newest step, one time in five of the step before it as well."""

    def damage(workdir: pathlib.Path, rng: random.Random) -> int:
        bad = STEPS[-2:] if rng.random() < 0.2 else STEPS[-1:]
        for step in bad:
            path = rng.choice([p for p in files(workdir / "checkpoints" / str(step), of) if p.stat().st_size])
            change(path, rng)
        return STEPS[-1 - len(bad)]

    return damage


def cut(path: pathlib.Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def stray(workdir: pathlib.Path, rng: random.Random) -> int:
    folder = workdir / "checkpoints"
    kind = rng.randrange(4)
    if kind == 0:
        (folder / "9").mkdir()
    elif kind == 1:
        (folder / "9" / "state").mkdir(parents=True)
    elif kind == 2:
        (folder / "copy of 6").mkdir()
    else:
        shutil.copytree(folder / "4", folder / "7.orbax-checkpoint-tmp")
    return 6


def mismatched(workdir: pathlib.Path, rng: random.Random) -> int:
    """Put items of another step into the newest one, with its manifest and, as in earlier versions, without one."""
    newest, other = workdir / "checkpoints" / "6", workdir / "checkpoints" / rng.choice(["2", "4"])
    item = rng.choice(["state", "data", "all"])
    for name in ("state", "data", "meta", "manifest") if item == "all" else (item,):
        shutil.rmtree(newest / name)
        shutil.copytree(other / name, newest / name)
    if item != "all" and rng.random() < 0.5:
        shutil.rmtree(newest / "manifest")
    return 4


def full(workdir: pathlib.Path, rng: random.Random) -> int:
    """Save on a disk that holds no more, which is one line; the limit on a file's size stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (rng.choice([0, 100, 400]), before[1]))
    try:
        write(workdir, [8])
    except InputError as error:
        assert "make room" in str(error), error
    else:
        raise AssertionError("nobody noticed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return 6


def orbaxs_own(workdir: pathlib.Path, rng: random.Random) -> int:
    path = rng.choice(files(workdir / "checkpoints" / "6", lambda name: not is_ours(name)))
    rng.choice([flip, cut, lambda path, rng: path.unlink()])(path, rng)
    return 6


def unharmed(workdir: pathlib.Path, rng: random.Random) -> int:
    return 6


DAMAGES: dict[str, tuple[int, Callable[[pathlib.Path, random.Random], int]]] = {
    "a bit of an array": (70, changed(is_array, flip)),
    "a bit of JSON": (34, changed(is_json, flip)),
    "truncated": (24, changed(is_ours, cut)),
    "emptied": (16, changed(is_ours, lambda path, rng: os.truncate(path, 0))),
    "deleted": (16, changed(lambda name: is_ours(name) and "manifest" not in name, lambda path, rng: path.unlink())),
    "Orbax's own files": (8, orbaxs_own),
    "stray folder": (8, stray),
    "state and data of two steps": (12, mismatched),
    "full disk": (6, full),
    "EIO once": (6, unharmed),
}


@contextlib.contextmanager
def failing_once(rng: random.Random) -> Iterator[None]:
    """Let the disk fail the first read, of the manifest's files or of Orbax."""
    whole, name = (hashlib, "file_digest") if rng.random() < 0.5 else (ocp.CheckpointManager, "restore")
    inner = getattr(whole, name)
    error = OSError(errno.EIO, os.strerror(errno.EIO)) if whole is hashlib else ValueError(os.strerror(errno.EIO))
    answers = iter([error])

    def once(*args: Any, **kwargs: Any) -> Any:
        for first in answers:
            raise first
        return inner(*args, **kwargs)

    with mock.patch.object(whole, name, once):
        yield


# ---- what becomes of it --------------------------------------------------------------------------------------------


def judge(workdir: pathlib.Path, whole: int) -> str:
    """Return "" where a run resumes exactly from the step `whole`, and readers take the newest or refuse it."""
    is_comparable = (workdir / "checkpoints" / "6" / "manifest").exists()
    try:
        params = load_params(str(workdir))[1]
        if not same(params, make_state(6).params):
            return "read wrong"
        if whole != 6 and is_comparable:
            return "read though damaged"
    except InputError:
        pass
    data = numbers()
    try:
        with checkpoint.open_manager(str(workdir), 5) as manager:
            state, meta = checkpoint.restore(str(workdir), manager, like(make_state(0)), data)
    except InputError as error:
        return f"refused: {error}"
    step = int(state.step)
    if not (
        same(state, make_state(step)) and meta["frozen"] == {"llm": step} and data.get_state() == {"batches": step}
    ):
        return "restored wrong"
    return "" if step == whole else f"restored step {step} in place of {whole}"


def attempt(original: pathlib.Path, kind: str, seed: int) -> str:
    """Return what goes wrong with the damage of that kind and seed; "" for nothing."""
    rng, said = random.Random(f"{kind} {seed}"), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        workdir = pathlib.Path(folder) / "run"
        shutil.copytree(original, workdir)
        try:
            whole = DAMAGES[kind][1](workdir, rng)
            with failing_once(rng) if kind == "EIO once" else contextlib.nullcontext():
                wrong = judge(workdir, whole)
        except Exception as error:  # noqa: BLE001, a traceback is what is looked for
            return f"traceback: {type(error).__name__}: {str(error).splitlines()[:1]}"
    # Of a save that fails, tensorstore's threads complain to an event loop that is gone, at times of their own.
    is_loud = kind != "full disk" and "Traceback" in said.getvalue()
    return wrong or ("traceback printed" if is_loud else "")


def main(share: float) -> int:
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        original = pathlib.Path(folder) / "run"
        write(original, STEPS)
        for kind, (count, _) in DAMAGES.items():
            outcomes = collections.Counter(attempt(original, kind, seed) for seed in range(round(count * share)))
            good = outcomes.pop("", 0)
            wrong += outcomes.total()
            print(f"{kind:<30} {good:>3} of {good + outcomes.total():>3}", *(f"{n} x {o}" for o, n in outcomes.items()))
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) / 200 if sys.argv[1:] else 1.0))
