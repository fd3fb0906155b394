"""From records to batches of fixed shape: a grain pipeline whose order is that of the plan and nothing else.

`packing.plan_batches` says before the run which records stand in which row of global batch k. Which worker reads a row,
and which host, changes neither the order nor the content.

Rows are read by threads: Pillow lets go of Python's lock while it decodes and resizes, which is nearly all of the work
on a row with an image, and a batch need not be carried from one process to another. Rows of text alone gain nothing
from a second thread; one makes thousands of them a second (docs/results.md has the figures).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from llava_jax.data.images import CLIP, load_tiles
from llava_jax.data.packing import BatchPlan
from llava_jax.data.records import Rejected
from llava_jax.data.tiles import Tiling, spread
from llava_jax.data.tokenize import TextTokenizer, encode_record, image_paths, image_sizes
from llava_jax.types import Batch, DataSettings, InputError, Pixels, Record


def make_pipeline(
    records: Sequence[Record],
    settings: DataSettings,
    tokenizer: TextTokenizer,
    plan: BatchPlan,
    *,
    image_size: int,
    patches: int,
    image_token_id: int,
    pixels: Pixels = CLIP,
    tiling: Tiling | None = None,
    rows: Sequence[int] | None = None,
    on_reject: Callable[[Rejected, int], None] | None = None,
) -> "BatchIterator":
    """Return a grain iterator over the batches of `plan`, or over these `rows` of each, a host's share.

    A record that cannot be read leaves padding in its place, and `on_reject` is told of it and its batch, in order,
    before that batch is delivered. Without one it raises InputError with row, id and path; the iterator is of no use
    afterwards.
    """
    rows = range(plan.shape.rows) if rows is None else rows
    rejected: dict[int, Rejected] = {}
    how = (rows, image_size, patches, image_token_id, pixels, tiling)
    make_row = _RowMaker(records, settings, tokenizer, plan, *how, None if on_reject is None else rejected)
    places = grain.MapDataset.range(plan.steps * len(rows))
    tell = None if on_reject is None else lambda row, batch: on_reject(rejected[row], batch)
    return BatchIterator(places.map(make_row).batch(len(rows), batch_fn=_stack), max(settings.workers, 1), tell)


@dataclasses.dataclass(frozen=True)
class _RowMaker:
    """Makes one row of a batch, as arguments of `make_pipeline` say.

    `rejected` takes the records that cannot be read; None: they raise.
    """

    records: Sequence[Record]
    settings: DataSettings
    tokenizer: TextTokenizer
    plan: BatchPlan
    rows: Sequence[int]
    image_size: int
    patches: int
    image_token_id: int
    pixels: Pixels
    tiling: Tiling | None
    rejected: dict[int, Rejected] | None

    def __call__(self, place: int) -> Batch:
        """Return the fields of Batch without B."""
        length = self.plan.shape.length
        tokens = np.full(length, self.tokenizer.pad_id, np.int32)
        targets = np.zeros(length, bool)
        segment_ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
        pixels_NXYC = np.zeros((self.plan.shape.images, self.image_size, self.image_size, 3), np.uint8)
        feature_index = None if self.tiling is None else np.zeros(length, np.int32)
        members = self.plan.members(place // len(self.rows), self.rows[place % len(self.rows)])
        rows_M = np.full(self.plan.max_per_row, -1, np.int64)
        start = slot = 0
        for segment, row in enumerate(members.tolist(), start=1):
            first, name = slot, ""
            try:
                record = self.records[row]
                name = record.id
                sizes = [] if self.tiling is None else image_sizes(record, self.settings)
                counts = self.patches if self.tiling is None else self.tiling.tokens(sizes)
                ours, ours_targets = encode_record(record, self.settings, self.tokenizer, self.image_token_id, counts)
                for path in image_paths(record, self.settings):
                    tiles_NXYC = load_tiles(
                        path, self.image_size, self.settings.aspect, self.tiling, self.pixels, self.settings.exif
                    )
                    pixels_NXYC[slot : slot + len(tiles_NXYC)] = tiles_NXYC
                    slot += len(tiles_NXYC)
            except InputError as error:
                problem = Rejected(row, name, str(error))
                if self.rejected is None:
                    raise InputError(str(problem)) from None
                self.rejected[row] = problem
                rows_M[segment - 1] = -2 - row
                pixels_NXYC[first:slot], slot = 0, first
                continue
            rows_M[segment - 1] = row
            end = start + len(ours)
            tokens[start:end], targets[start:end] = ours, ours_targets
            segment_ids[start:end], positions[start:end] = segment, np.arange(len(ours))
            if self.tiling is not None and feature_index is not None:
                feature_index[start:end] = spread(ours, self.image_token_id, self.tiling.feature_index(sizes, first))
            start = end
        image_mask_N = np.arange(self.plan.shape.images) < slot
        return Batch(tokens, targets, segment_ids, positions, pixels_NXYC, image_mask_N, rows_M, feature_index)


def _stack(rows: Sequence[Batch]) -> Batch:
    return Batch(*(None if field[0] is None else np.stack(field) for field in zip(*rows, strict=True)))


class BatchIterator(grain.DatasetIterator):
    """Batches from `batches`, read ahead by so many threads: each makes whole batches, and they come in order.

    `tell` is given each record that was rejected, and its batch.
    The state is `{"batches": k}`, the number delivered: it does not know threads or hosts, so a run may continue with
    others. A fresh reader is made where the state is set.
    """

    def __init__(self, batches: grain.MapDataset, threads: int, tell: Callable[[int, int], None] | None = None):
        super().__init__()
        self._batches, self._tell = batches, tell
        # One batch is made and one is ready for each thread.
        self._how = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        self._delivered = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        try:
            batch = next(self._reading())
        except InputError as error:
            # Grain appends lines about its own traceback to the message.
            raise InputError(str(error).split("\n")[0]) from None
        if self._tell is not None:
            for row in batch.rows_BM[batch.rows_BM < -1].tolist():
                self._tell(-2 - row, self._delivered)
        self._delivered += 1
        return batch

    def start_prefetch(self) -> None:
        """Begin to read ahead."""
        self._reading()

    def _reading(self) -> grain.DatasetIterator:
        if self._reader is None:
            self._reader = iter(self._batches[self._delivered :].to_iter_dataset(self._how))
            self._reader.start_prefetch()
        return self._reader

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._delivered}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop_reader()
        self._delivered = state["batches"]

    def close(self) -> None:
        """Stop reading ahead; nothing waits for the batches that are being made."""
        self._stop_reader()
        super().close()

    def _stop_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
