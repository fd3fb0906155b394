"""Where rows come from, as `data.annotations` says it, and the folder in which what was read of them is kept.

A source is a JSON or JSONL file, a folder that TFDS reads, or tfds:NAME, a data set among those of TFDS; files and
folders may lie where etils.epath reaches (gs://…). Several are joined by commas, all with a weight (a.json:0.7) or all
without.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import time
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from llava_jax.types import InputError

TFDS = "tfds:"
INFO = "dataset_info.json"
LINES = (".jsonl", ".ndjson")
FORMS = "a JSON or JSONL file, a folder of a TFDS data set or tfds:NAME"
# Fewer rows than these are read again sooner than what is kept of them.
KEPT_ROWS = 20_000
KEPT_DAYS = 90
# In the name of every file of the cache; others that lie in its folder are left alone.
KEPT = ".kept"
# A file's content is read in pieces of so many bytes.
PIECE = 1 << 24
OURS = re.compile(rf"[0-9a-f]{{32}}{re.escape(KEPT)}\.[a-z]+(\.[0-9a-f]{{16}}\.tmp)?")
WEIGHT = re.compile(r"(.+):((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?)", re.IGNORECASE)


class Source(NamedTuple):
    """One source: where its rows lie, and its weight; None where sources are joined without weights."""

    path: str
    weight: float | None = None

    def __str__(self) -> str:
        return self.path if self.weight is None else f"{self.path}:{self.weight:g}"


def split_sources(text: str) -> tuple[Source, ...]:
    """Return the sources of `data.annotations`; a name that exists as it is written is one, whatever is in it."""
    if os.path.exists(text) or "," not in text:
        weighted = None if os.path.exists(text) else _weighted(text)
        return (Source(weighted.path) if weighted else Source(text),)
    sources = tuple(_weighted(part) or Source(part) for part in (part.strip() for part in text.split(",")) if part)
    without = [source.path for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise InputError(f"data.annotations={text}: {without[0]} has no weight; give PATH:WEIGHT for each, or for none")
    names = [source.path for source in sources]
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise InputError(f"data.annotations={text}: {doubled[0]} is named twice; name it once, with the sum as weight")
    return sources


def _weighted(part: str) -> Source | None:
    """Return PATH:WEIGHT as a source, None where there is no weight: tfds:name/1.0.0 and gs://a have none."""
    found = WEIGHT.fullmatch(part)
    if found is None or os.path.exists(part) or found[1] == TFDS[:-1]:
        return None
    weight = float(found[2])
    if not 0 < weight < math.inf:
        raise InputError(f"data.annotations: weight {found[2]} of {found[1]}: expected a number above 0")
    return Source(found[1], weight)


def absolute(text: str) -> str:
    """Return `data.annotations` with local paths absolute; empty text stays empty."""
    if not text:
        return ""
    return ",".join(
        str(
            source
            if "://" in source.path or source.path.startswith(TFDS)
            else source._replace(path=os.path.abspath(source.path))
        )
        for source in split_sources(text)
    )


def is_remote(path: str) -> bool:
    """Return whether a path is of the style gs://…"""
    return "://" in path


def is_dataset(path: str) -> bool:
    """Return whether a source is a TFDS data set rather than a file."""
    if path.startswith(TFDS) or not is_remote(path):
        return path.startswith(TFDS) or os.path.isfile(os.path.join(path, INFO))
    return not path.lower().endswith((".json", *LINES))


def digest(path: str) -> str:
    """Return the sha256 of a local file's content, "" where there is none."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- what is kept between runs --------------------------------------------------------------------------------------


def kept_path(name: str, suffix: str) -> str:
    """Return the file for a `key_of` name, in folder rows of LLAVA_JAX_CACHE, or of llava_jax in the user's cache."""
    user = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llava_jax")
    return os.path.join(os.environ.get("LLAVA_JAX_CACHE") or user, "rows", f"{name}{KEPT}{suffix}")


def code() -> str:
    """Return a hash of the code of data/ and io.py: what other code made is made again."""
    folder = os.path.dirname(os.path.abspath(__file__))
    names = [*sorted(os.listdir(folder)), os.path.join(os.pardir, "io.py")]
    return key_of([digest(os.path.join(folder, name)) for name in names if name.endswith(".py")])


def key_of(*facts: object) -> str:
    """Return a name for what is kept under these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def recall(name: str) -> dict[str, np.ndarray] | None:
    """Return the arrays kept under a name; None where there are none, or none that can be read."""
    path = kept_path(name, ".npz")
    try:
        with np.load(path, allow_pickle=False) as kept:
            arrays = {key: kept[key] for key in kept.files}
        os.utime(path)
        return arrays
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):  # what damaged files raise
        return None


def keep(name: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays under a name, whole or not at all; where the folder cannot be written, they are made again."""
    with contextlib.suppress(OSError), whole(kept_path(name, ".npz")) as file:
        np.savez(file, allow_pickle=False, **arrays)


@contextlib.contextmanager
def whole(path: str) -> Iterator[BinaryIO]:
    """Yield a file of the cache that is there once it is whole; until then each of several writers has its own.

    (Hosts may share the folder, and in pods every one of them is process 1.) What nobody has asked for in KEPT_DAYS is
    let go of.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
        with contextlib.suppress(OSError):
            for entry in os.scandir(os.path.dirname(path)):
                if OURS.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > KEPT_DAYS * 86_400:
                    os.unlink(entry)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def local_copy(path: str) -> str:
    """Return a file of this machine with the content of `path`: itself, or a copy of one that lies elsewhere.

    The copy is kept under path, length and time of change. Raises InputError where there is no such file.
    """
    if not is_remote(path):
        return path
    from etils import epath  # a tenth of a second that no local file asks for

    there = epath.Path(path)
    try:
        found = there.stat()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be reached ({type(error).__name__}: {error}); expected {FORMS}") from error
    copy = kept_path(key_of(path, found.length, found.mtime), os.path.splitext(path)[1].lower())
    if not os.path.isfile(copy):
        with there.open("rb") as source, whole(copy) as target:
            while piece := source.read(PIECE):
                target.write(piece)
    os.utime(copy)
    return copy
