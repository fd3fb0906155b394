"""Where rows come from, as `data.annotations` says it, and the folder in which what was read of them is kept.

A source is a JSON, JSONL or Parquet file, a folder of Parquet files, one that `datasets` saved or that TFDS reads,
tfds:NAME, a data set among those of TFDS, or hf:USER/NAME, one on the Hugging Face Hub. Files may lie where etils.epath
reaches (gs://…). Several are joined by commas, all with a weight (a.json:0.7) or all without.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import posixpath
import re
import secrets
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from llava_jax import hub
from llava_jax.io import cache_folder, reached
from llava_jax.types import InputError

TFDS, HUB = "tfds:", "hf:"
# A revision of the Hub has no slash but in refs/convert/parquet, where the Hub keeps data sets of other formats.
ON_HUB = re.compile(rf"{HUB}({hub.REPOSITORY})(?:@(refs/[^/@]+/[^/@]+|[^/@]+))?(?:/(.+?))?/?")
INFO = "dataset_info.json"
LINES = (".jsonl", ".ndjson")
TABLE = ".parquet"
PARQUET, SAVED = "Parquet", "Hugging Face data set"
# What `save_to_disk` writes next to the rows of a data set, and next to the folders of several splits.
STATE, SPLITS = "state.json", "dataset_dict.json"
# What a file's name has after that of its split: train-00000-of-00005.parquet, data/train/0000.parquet, train.parquet.
SHARD = re.compile(r"(?:^|-)\d+(?:-of-\d+)?(?:-[0-9a-f]{16})?$")
FORMS = (
    "a JSON, JSONL or Parquet file, a folder of Parquet files, of save_to_disk or of a TFDS data set, tfds:NAME, or "
    "hf:USER/NAME[@REVISION][/FOLDER, SPLIT or FILE]"
)
# Fewer rows than these are read again sooner than what is kept of them.
KEPT_ROWS = 20_000
KEPT_DAYS = 90
# In the name of every file of the cache; others that lie in its folder are left alone.
KEPT = ".kept"
# A file's content is read in pieces of so many bytes.
PIECE = 1 << 24
OURS = re.compile(rf"[0-9a-f]{{32}}{re.escape(KEPT)}\.[a-z]+(\.[0-9a-f]{{16}}\.tmp)?")
WEIGHT = re.compile(r"(.+):((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)", re.IGNORECASE)


class Source(NamedTuple):
    """One source: where its rows lie, and its weight; None where sources are joined without weights."""

    path: str
    weight: float | None = None

    def __str__(self) -> str:
        return self.path if self.weight is None else f"{self.path}:{str(self.weight).removesuffix('.0')}"


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
    """Return `data.annotations` with local paths absolute and names on the Hub with the commit; "" stays.

    Raises InputError where the Hub does not answer.
    """
    return ",".join(str(source._replace(path=_absolute(source.path))) for source in split_sources(text)) if text else ""


def _absolute(path: str) -> str:
    if is_on_hub(path):
        name = on_hub(path)
        if hub.COMMIT.fullmatch(name.revision):
            return str(name)
        return str(name._replace(revision=hub.list_dataset(name.repo, name.revision, _where(path))[0]))
    return path if is_remote(path) or path.startswith(TFDS) else os.path.abspath(path)


def with_commits(text: str, there: str) -> str:
    """Return `data.annotations` with the commits of `there`, where both name a data set on the Hub, `text` without."""
    known = {on_hub(path)._replace(revision=""): path for path, _ in split_sources(there) if is_on_hub(path)}
    given = [(source, on_hub(source.path) if is_on_hub(source.path) else None) for source in split_sources(text)]
    return ",".join(str(source._replace(path=known.get(name, source.path))) for source, name in given) if text else ""


# ---- names on the Hub -----------------------------------------------------------------------------------------------


class OnHub(NamedTuple):
    """A data set on the Hub: owner/name, revision (may be ""), and the folder, split or file in it (may be "")."""

    repo: str
    revision: str
    inside: str

    def __str__(self) -> str:
        return f"{HUB}{self.repo}{self.revision and '@'}{self.revision}{self.inside and '/'}{self.inside}"


def is_on_hub(path: str) -> bool:
    """Return whether a source is a name on the Hub; a file or folder of that name wins."""
    return path.startswith(HUB) and not os.path.exists(path)


def on_hub(path: str) -> OnHub:
    """Return what a name on the Hub says. Raises InputError where it is none."""
    found = ON_HUB.fullmatch(path)
    if found is None:
        raise InputError(f"{_where(path)}: expected hf:USER/NAME[@REVISION][/FOLDER, SPLIT or FILE]")
    return OnHub(*(part or "" for part in found.groups()))


def _where(path: str) -> str:
    return f"data.annotations={path}"


# ---- Parquet and Arrow files ----------------------------------------------------------------------------------------


class Split(NamedTuple):
    """The files of one split: their format (PARQUET or SAVED), their paths in the order of rows, all splits there."""

    format: str
    files: tuple[str, ...]
    name: str = ""
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.format + (f", split {self.name} ({_named(self.others)} not read)" if self.others else "")


def choose_split(files: Sequence[str], wanted: str, where: str) -> Split:
    """Return the Parquet files of one split among paths of a folder or repository.

    `wanted` is a folder or a split; "" takes the only split, or the one called train. Raises InputError, which `where`
    begins, where that leaves none or several.
    """
    splits: dict[str, list[str]] = {}
    for path in sorted(path for path in files if path.endswith(TABLE)):
        folder, name = posixpath.split(path.removesuffix(TABLE))
        splits.setdefault(posixpath.join(folder, SHARD.sub("", name)).strip("/"), []).append(path)
    inside = [name for name in splits if not wanted or f"/{wanted}/" in f"/{name}/"]
    chosen = inside if len(inside) == 1 else [name for name in inside if name.split("/")[-1] == "train"]
    if len(chosen) != 1:
        there = f"splits {_named(inside or splits)}" if splits else "no Parquet file"
        raise InputError(f"{where}: {there}; expected one split, or one called train: name a folder, split or file")
    others = tuple(name for name in splits if name != chosen[0])
    return Split(PARQUET, tuple(splits[chosen[0]]), chosen[0], others)


def _named(splits: Iterable[str]) -> str:
    names = list(splits)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _is_below(name: str) -> bool:
    """Return whether a name is one of a file or folder right below another."""
    return name not in ("", ".", "..") and os.path.basename(name) == name


def split_in(folder: str) -> Split | None:
    """Return what a folder of this machine holds: saved by `datasets`, or in Parquet; None for neither.

    Raises InputError as `choose_split` does.
    """
    state, several = os.path.join(folder, STATE), os.path.join(folder, SPLITS)
    try:
        if os.path.isfile(state):
            with open(state, encoding="utf-8") as file:
                names = [each["filename"] for each in json.load(file)["_data_files"]]
            if not all(map(_is_below, names)):
                raise ValueError("a file that is not in the folder")
            return Split(SAVED, tuple(os.path.join(folder, name) for name in names))
        if os.path.isfile(several):
            with open(several, encoding="utf-8") as file:
                splits = json.load(file)["splits"]
            if not all(map(_is_below, splits)):
                raise ValueError("a split that is not in the folder")
            split = splits[0] if len(splits) == 1 else "train"
            found = split_in(os.path.join(folder, split)) if split in splits else None
            if found is None:
                raise InputError(f"{folder}: splits {_named(splits)}; expected one, or one called train: name a folder")
            return found._replace(name=split, others=tuple(name for name in splits if name != split))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no data set as `save_to_disk` writes it ({error!r}); save it again") from error
    files = glob.glob(os.path.join(glob.escape(folder), "**", f"*{TABLE}"), recursive=True)
    if not files:
        return None
    found = choose_split([os.path.relpath(file, folder).replace(os.sep, "/") for file in files], "", folder)
    return found._replace(files=tuple(os.path.join(folder, file) for file in found.files))


# ---- files ----------------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Return whether a path is of the style gs://…"""
    return "://" in path


def is_dataset(path: str) -> bool:
    """Return whether a source is a TFDS data set rather than a file."""
    if path.startswith(TFDS):
        return True
    if is_remote(path):
        return not path.lower().endswith((".json", *LINES, TABLE))
    # What `save_to_disk` writes has a dataset_info.json, too.
    return os.path.isfile(os.path.join(path, INFO)) and not os.path.isfile(os.path.join(path, STATE))


def digest(path: str) -> str:
    """Return the sha256 of a local file's content, "" where there is none."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- what is kept between runs --------------------------------------------------------------------------------------


def kept_path(name: str, suffix: str) -> str:
    """Return the file for a `key_of` name, in folder rows of LLAVA_JAX_CACHE, or of llava_jax in the user's cache."""
    return os.path.join(cache_folder("rows"), f"{name}{KEPT}{suffix}")


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
    with reached(path):
        try:
            found = there.stat()
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: cannot be reached ({said}); expected {FORMS}") from error
        copy = kept_path(key_of(path, found.length, found.mtime), os.path.splitext(path)[1].lower())
        if not os.path.isfile(copy):
            with there.open("rb") as source, whole(copy) as target:
                while piece := source.read(PIECE):
                    target.write(piece)
    os.utime(copy)
    return copy
