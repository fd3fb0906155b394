"""The rows that `data.annotations` names, as a sequence whose rows stay on disk until they are asked for.

In memory are numbers only: where each row of a file stands. Rows are counted from 0, as in `Batch.rows_BM`, through all
sources in their order. A row is parsed and checked (`forms.parse_any`) each time it is read.
"""

import abc
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_jax import hub
from llava_jax.data import sources
from llava_jax.data.mixture import Mixture
from llava_jax.data.rows import Rejected, describe, parse_any
from llava_jax.data.sources import (
    KEPT_ROWS,
    Source,
    Split,
    code,
    keep,
    kept_path,
    key_of,
    recall,
    split_sources,
    whole,
)
from llava_jax.io import BOM, check_first_line, elements, line_of, unique, utf8_pieces
from llava_jax.types import ImageBytes, InputError, Record

# Bytes that are read at a time of rows that are read in order, and the most between two of these.
SEVERAL_ROWS, SEPARATOR = 1 << 18, 16
# Rows at the beginning of a source that are looked at to name their form.
DESCRIBED = 100
ROW = json.JSONDecoder(object_pairs_hook=unique)  # json.loads would make one for every row


class Rows(Sequence[Record]):
    """Rows on disk. `rows[i]` reads one and raises InputError where it cannot be used.

    `fingerprint` is a hash of the content of all sources, `mixture` says how they are mixed (None: one after another),
    `format` is that of the files, for a person.
    """

    fingerprint: str = ""
    format: str = ""
    mixture: Mixture | None = None

    def entry(self, row: int) -> Record | Rejected:
        """Return the row, or why it cannot be used."""
        return parse_any(self.decoded(row), row)

    @abc.abstractmethod
    def decoded(self, row: int) -> Any:
        """Return the row as decoded JSON; an InputError in its place where it is none."""

    def __getitem__(self, row: int) -> Record:  # ty: ignore[incompatible-method-override], no slices
        if not 0 <= row < len(self):
            raise IndexError(row)
        entry = self.entry(row)
        if isinstance(entry, Rejected):
            raise InputError(str(entry))
        return entry


class FileRows(Rows):
    """Rows of a JSON Lines file of this machine; `places` are (start, length) of each in bytes, int64[A, 2]."""

    def __init__(self, path: str, places: np.ndarray, fingerprint: str, format: str):
        self.path, self.places, self.fingerprint, self.format = path, places, fingerprint, format
        self._file: Any = None
        self._piece, self._end = (0, b""), 0  # where a piece of the file starts, and the piece

    def __len__(self) -> int:
        return len(self.places)

    def decoded(self, row: int) -> Any:
        start, length = self.places[row].tolist()
        try:
            return ROW.decode(self._read(start, length).decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            return InputError(f"line {line_of(self.path, start)} is not JSON: {error.msg}, column {error.colno}")
        except (ValueError, RecursionError) as error:
            return InputError(f"line {line_of(self.path, start)} is not JSON: {error}")

    def _read(self, start: int, length: int) -> bytes:
        """Return bytes of the file; rows read one after another come from larger pieces, which saves system calls."""
        # Another thread may read at the same time, so each continues with what it has taken from self once.
        file = self._file
        if file is None:
            self._file = file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        in_order, end = 0 <= start - self._end <= SEPARATOR, start + length
        self._end = end
        first, piece = self._piece
        if not first <= start <= end <= first + len(piece):
            if not in_order:
                return os.pread(file.fileno(), length, start)
            first, piece = self._piece = start, os.pread(file.fileno(), max(length, SEVERAL_ROWS), start)
        return piece[start - first : end - first]


class TableRows(Rows):
    """Rows of Parquet files, or of a data set that `datasets` saved."""

    def __init__(self, split: Split, name: str):
        # A fifth of a second of import that only such files should pay for.
        from llava_jax.data.tables import open_groups

        self._groups, self.format = open_groups(split, name), str(split)
        self.fingerprint = key_of([sources.digest(path) for path in split.files])

    def __len__(self) -> int:
        return len(self._groups)

    def decoded(self, row: int) -> Any:
        try:
            return self._groups.row(row)
        except InputError as error:
            return error


class DatasetRows(Rows):
    """Rows of a TFDS data set, as `prepare arrayrecord` writes it: images come with the row, as bytes."""

    format = "TFDS"

    def __init__(self, name: str):
        self.name = name
        self._source: Any = None
        self._builder: Any = None
        self._length, self.fingerprint = self._describe()

    def __len__(self) -> int:
        return self._length

    def decoded(self, row: int) -> Any:
        if self._source is None:
            self._source = self._open().as_data_source(split=self._split())
        found = self._source[row]
        said = found["conversations"]
        turns = zip(said["from"], said["value"], strict=True)
        # A data set that was packed before it kept the names of images has none.
        names = found.get("image_names", [b""] * len(found["images"]))
        images = [ImageBytes(image, os.fsdecode(name)) for image, name in zip(found["images"], names, strict=True)]
        said = [{"from": _text(who), "value": _text(text)} for who, text in turns]
        return {"id": _text(found["id"]), "images": images, "conversations": said}

    def _open(self) -> Any:
        # Seconds of import that only a run on such a data set should pay for.
        import tensorflow_datasets as tfds

        if self._builder is None:
            try:
                if self.name.startswith(sources.TFDS):
                    self._builder = tfds.builder(self.name.removeprefix(sources.TFDS))
                else:
                    self._builder = tfds.builder_from_directory(self.name)
            except (ValueError, KeyError, OSError, AttributeError, tfds.core.DatasetNotFoundError) as error:
                line = str(error).strip().split("\n")[0]
                raise InputError(f"{self.name}: TFDS cannot read this data set: {line}") from error
        return self._builder

    def _split(self) -> str:
        splits = list(self._open().info.splits)
        if len(splits) != 1 and "train" not in splits:
            raise InputError(f"{self.name}: splits {', '.join(splits) or 'none'}; expected one, or one named train")
        return splits[0] if len(splits) == 1 else "train"

    def _describe(self) -> tuple[int, str]:
        """Return the number of rows in the split, and a hash of the description with names and sizes of the shards."""
        from etils import epath

        info = self._open().info
        missing = {"id", "images", "conversations"} - set(info.features)
        if missing:
            raise InputError(
                f"{self.name}: no feature {sorted(missing)[0]}; expected what `prepare arrayrecord` writes"
            )
        split = info.splits[self._split()]
        files = [epath.Path(path) for path in split.filepaths]
        facts = [split.num_examples, sorted(info.features), [(file.name, file.stat().length) for file in files]]
        facts.append((epath.Path(self._builder.data_path) / sources.INFO).read_text())
        return split.num_examples, sources.key_of(*facts)


class JoinedRows(Rows):
    """Rows of several sources, one source after another."""

    def __init__(self, parts: Sequence[Rows], names: Sequence[str], weights: Sequence[float] | None):
        self.parts, self.names = list(parts), list(names)
        self.ends = np.cumsum([len(part) for part in parts])
        self.fingerprint = sources.key_of([part.fingerprint for part in parts])
        self.mixture = None if weights is None else Mixture(tuple(len(part) for part in parts), tuple(weights))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def entry(self, row: int) -> Record | Rejected:
        which, inside = self._place(row)
        entry = self.parts[which].entry(inside)
        if isinstance(entry, Record):
            return entry
        return Rejected(row, entry.id, f"{entry.reason} (row {inside} of {self.names[which]})")

    def decoded(self, row: int) -> Any:
        which, inside = self._place(row)
        return self.parts[which].decoded(inside)

    def _place(self, row: int) -> tuple[int, int]:
        which = int(np.searchsorted(self.ends, row, side="right"))
        return which, row - int(self.ends[which]) + len(self.parts[which])


def load_records(annotations: str) -> Rows:
    """Return the rows of `data.annotations`, none parsed yet. Raises InputError when a whole source is unusable."""
    found = split_sources(annotations)
    parts = [_open_source(source) for source in found]
    if len(parts) == 1:
        return parts[0]
    weights = [source.weight for source in found if source.weight is not None]
    return JoinedRows(parts, [source.path for source in found], weights if len(weights) == len(found) else None)


def recognised(annotations: str, rows: Rows) -> list[str]:
    """Return a line for each source, for a person: its format, and the form of the rows that it begins with."""
    parts = [(annotations, rows)]
    if isinstance(rows, JoinedRows):
        parts = list(zip(rows.names, rows.parts, strict=True))
    return [
        f"{name}: {part.format}, {describe(part.decoded(row) for row in range(min(len(part), DESCRIBED)))}"
        for name, part in parts
    ]


def _open_source(source: Source) -> Rows:
    name = source.path
    if sources.is_on_hub(name):
        return _open_hub(name)
    if sources.is_dataset(name):
        return DatasetRows(name)
    path = sources.local_copy(name)
    if os.path.isdir(path):
        split = sources.split_in(path)
        if split is None:
            there = f"neither {sources.INFO}, {sources.STATE} nor a Parquet file"
            raise InputError(f"{name}: a folder with {there}; expected {sources.FORMS}")
        return TableRows(split, name)
    if not os.path.isfile(path):
        raise InputError(f"{name}: no such annotations file; expected {sources.FORMS}")
    return _open_file(path, name)


def _open_hub(name: str) -> Rows:
    """Return the rows of a name on the Hub, of which only the files that are read are fetched."""
    where = f"data.annotations={name}"
    repo, revision, inside = sources.on_hub(name)
    commit, files = hub.list_dataset(repo, revision, where)
    if inside in files:
        (path,) = hub.fetch_dataset(repo, commit, [inside], where)
        return _open_file(path, name)
    split = sources.choose_split(files, inside, where)
    return TableRows(split._replace(files=tuple(hub.fetch_dataset(repo, commit, split.files, where))), name)


def _open_file(path: str, name: str) -> Rows:
    """Return the rows of a file of this machine that has this name among the sources."""
    if name.lower().endswith(sources.TABLE):
        return TableRows(Split(sources.PARQUET, (path,)), name)
    content = sources.digest(path)
    has_lines = name.lower().endswith(sources.LINES)
    lines = path if has_lines else lines_of_list(path, content)
    # In these words, so that a run resumes from checkpoints of before.
    line = f"{os.path.basename(name)} {content}\n"
    fingerprint = hashlib.blake2b(line.encode(), digest_size=16).hexdigest()
    return FileRows(lines, index_lines(lines, content), fingerprint, "JSON Lines" if has_lines else "JSON")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


# ---- where the lines are ----


def lines_of_list(path: str, content: str) -> str:
    """Return the file with a JSON list's rows, one a line; it is made where the cache has none of `content` (sha256).

    Raises InputError when it is no such list, and when the cache cannot be written.
    """
    lines = kept_path(key_of("lines", code(), content), ".jsonl")
    try:
        if not os.path.isfile(lines):
            with whole(lines) as file:
                for row in elements(path, "item", "a JSON list of rows"):
                    file.write(json.dumps(row).encode() + b"\n")
        os.utime(lines)
    except OSError as error:
        raise InputError(
            f"{lines}: cannot be written ({error.strerror}), and the rows of {path} are kept there: make room, name "
            "another folder in LLAVA_JAX_CACHE, or give the rows as a .jsonl file"
        ) from error
    return lines


def index_lines(path: str, content: str) -> np.ndarray:
    """Return the (start, length) of each line of a local JSON Lines file that is not blank, as int64[A, 2].

    `content` is the sha256 of the file, under which the index of a large one is kept. Raises InputError when the file
    is not UTF-8, is a JSON list, or holds no row; lines are not decoded.
    """
    name = key_of("index", code(), content)
    kept = recall(name)
    if kept is not None:
        return kept["rows"]
    places = array("q")
    with open(path, "rb") as file:
        start, rest = len(BOM) if file.read(len(BOM)) == BOM else 0, b""
    for piece in itertools.chain(utf8_pieces(path, "LLaVA JSON or JSONL"), [b"\n"]):
        *complete, rest = (rest + piece).split(b"\n")
        for line in complete:
            if line.strip():
                if not places:
                    check_first_line(path, line, "a JSON list of rows: name it .json")
                places.extend((start, len(line)))
            start += len(line) + 1
    rows = np.array(places, np.int64).reshape(-1, 2)
    if not len(rows):
        raise InputError(f"{path}: no rows; expected LLaVA conversations")
    if len(rows) >= KEPT_ROWS:
        keep(name, {"rows": rows})
    return rows
