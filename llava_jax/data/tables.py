"""Rows of Parquet files, and of the Arrow files in which `datasets` saves a data set: read by number, from disk.

In memory are, of Parquet, the number of rows in each row group and one row group a thread; Arrow's files are mapped.
"""

import abc
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from llava_jax.data.rows import CONVERSATION_KEYS, image_of, is_null
from llava_jax.data.sources import PARQUET, Split
from llava_jax.types import InputError

# What pyarrow raises over files that are damaged, or no text where text is expected.
UNREADABLE = (OSError, ValueError, pa.ArrowException)


class Groups(abc.ABC):
    """Rows that stand in groups; `ends` int64[G] counts them up to the end of each."""

    def __init__(self, sizes: Sequence[int]):
        self.ends = np.cumsum(np.array(sizes, np.int64))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def row(self, row: int) -> dict[str, Any]:
        """Return a row with what comes with it as images; raises InputError where it cannot be read."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        start = int(self.ends[group - 1]) if group else 0
        try:
            (found,) = self.read(group).slice(row - start, 1).to_pylist()
        except UNREADABLE as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"row {row - start} of {self.name(group)} cannot be read ({reason})") from error
        found = {name: value for name, value in found.items() if not is_null(value)}
        for key in {"image", "images"} & found.keys():
            images = found[key] if isinstance(found[key], list) else [found[key]]
            found[key] = [image_of(image) if isinstance(image, dict) else image for image in images]
        return found

    @abc.abstractmethod
    def read(self, group: int) -> pa.Table | pa.RecordBatch:
        """Return a group."""

    @abc.abstractmethod
    def name(self, group: int) -> str:
        """Return what messages call a group."""


class ParquetGroups(Groups):
    """The row groups of Parquet files. Each thread keeps the one it read last: rows in order read each group once."""

    def __init__(self, files: Sequence[str]):
        self.files, self.places, sizes = files, [], []
        for which, path in enumerate(files):
            with parquet.ParquetFile(path) as file:
                groups = range(file.metadata.num_row_groups)
                self.places += [(which, group) for group in groups]
                sizes += [file.metadata.row_group(group).num_rows for group in groups]
                self.columns = file.schema_arrow.names
        self._held = threading.local()
        super().__init__(sizes)

    def read(self, group: int) -> pa.Table:
        held = self._held
        if getattr(held, "group", None) != group:
            held.group = held.table = None  # not two at a time
            which, inside = self.places[group]
            with parquet.ParquetFile(self.files[which]) as file:
                held.table = file.read_row_group(inside, use_threads=False)
            held.group = group
        return held.table

    def name(self, group: int) -> str:
        which, inside = self.places[group]
        return f"row group {inside} of {os.path.basename(self.files[which])}"


class ArrowGroups(Groups):
    """The record batches of Arrow files, mapped into memory."""

    def __init__(self, files: Sequence[str]):
        self.batches, self.names = [], []
        for path in files:
            with pa.ipc.open_stream(pa.memory_map(path)) as stream:
                batches = list(stream)
                self.columns = stream.schema.names
            self.batches += batches
            self.names += [f"batch {number} of {os.path.basename(path)}" for number in range(len(batches))]
        super().__init__([batch.num_rows for batch in self.batches])

    def read(self, group: int) -> pa.RecordBatch:
        return self.batches[group]

    def name(self, group: int) -> str:
        return self.names[group]


def open_groups(split: Split, where: str) -> Groups:
    """Return the rows of the files. Raises InputError, which `where` begins, where the files hold none to train on."""
    expected = f"expected rows with {' or '.join(CONVERSATION_KEYS)}"
    try:
        groups = (ParquetGroups if split.format == PARQUET else ArrowGroups)(split.files)
    except UNREADABLE as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{where}: no {split.format} that can be read ({reason}); {expected}") from error
    if not len(groups):
        raise InputError(f"{where}: no rows; {expected}")
    if not set(CONVERSATION_KEYS) & set(groups.columns):
        raise InputError(f"{where}: columns {', '.join(groups.columns)}; {expected}")
    return groups
