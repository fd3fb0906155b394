"""From records to batches of fixed shape: a grain pipeline whose order is that of the plan and nothing else.

`packing.plan_batches` says before the run which records stand in which row of global batch k: a stream that runs
through the records epoch after epoch, shuffled anew in each, of which every update takes batch_size. Which worker reads
a row, and which host, changes neither the order nor the content; where a run stands is therefore one number, the
batches delivered, and that is the iterator's whole state.

Worker processes are spawned: they import the main module again, so that must do nothing when imported.
"""

import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from llava_jax.data.anyres import Tiling, load_tiles, spread
from llava_jax.data.chat import find_template
from llava_jax.data.example import (
    encode_record,
    encode_turns,
    full_length,
    image_paths,
    image_sizes,
    require_images,
)
from llava_jax.data.grouping import count_words
from llava_jax.data.image import CLIP
from llava_jax.data.packing import BatchPlan
from llava_jax.data.records import Rejected, Rows
from llava_jax.data.tokenize import TextTokenizer, cut
from llava_jax.types import Batch, DataSettings, InputError, Pixels, Record

# Below this many records, starting processes takes longer than checking them here.
PARALLEL_CHECK_ROWS = 20_000


# ---- before the run ---------------------------------------------------------------------------------------------


def steps_for(rows: int, batch_size: int, epochs: float) -> int:
    """Steps of `epochs` epochs, each a whole number of steps as in the original: its last batch is filled up."""
    # 1.1 epochs of 10 steps are a hair more than 11 in floating point.
    return math.ceil(round(epochs * math.ceil(rows / batch_size), 6))


@dataclasses.dataclass(frozen=True)
class Checked:
    """What `check_records` saw: the rows that cannot be trained, and counts over all the others.

    `tokens` and `targets` are what is trained on, `longest` the tokens of the longest row; `cut_rows` rows lose
    `cut_tokens` tokens to max_length. `counts_AF` (int32) are the five figures of each row that `_check_row` counts, 0
    where it cannot be trained, and `pictures` the different paths among all rows.
    """

    rows: int
    problems: tuple[Rejected, ...]
    tokens: int
    targets: int
    longest: int
    cut_rows: int
    cut_tokens: int
    counts_AF: np.ndarray = dataclasses.field(compare=False, repr=False)
    pictures: frozenset[str] = dataclasses.field(compare=False, repr=False)

    @property
    def lengths_A(self) -> np.ndarray:
        """Tokens trained of each row."""
        return self.counts_AF[:, 0].copy()

    @property
    def slots_A(self) -> np.ndarray:
        """Pictures (anyres: tiles) that each row shows."""
        return self.counts_AF[:, 3].copy()

    @property
    def words_A(self) -> np.ndarray:
        """Words of the turns of each row."""
        return self.counts_AF[:, 4].copy()

    def require_clean(self, shown: int = 3) -> None:
        """Raise InputError with the number of bad rows and the first of them, if there are any."""
        if self.problems:
            count = len(self.problems)
            first = "; ".join(map(str, self.problems[:shown]))
            more = f"; and {count - shown} more" if count > shown else ""
            raise InputError(
                f"{count} of {self.rows} rows cannot be trained (`prepare verify` lists them): {first}{more}"
            )


def check_records(
    records: Sequence[Record],
    settings: DataSettings,
    tokenizer: TextTokenizer,
    *,
    patches: int,
    tiling: Tiling | None = None,
) -> Checked:
    """Tokenise every row and look for its picture files (without decoding them), in settings.workers processes.

    With `tiling` (data.anyres) each picture's header says how many tokens it takes.
    """
    if not records:
        raise InputError(f"{settings.annotations}: no rows; expected at least one")
    find_template(settings.template)  # an unknown one is one error, not one a row
    check = functools.partial(
        _check_part,
        settings=settings,
        tokenizer=tokenizer,
        patches=patches,
        tiling=tiling,
    )
    if settings.workers and len(records) >= PARALLEL_CHECK_ROWS:
        # Rows on disk stay there: a worker gets their places, and reads them itself.
        starts = range(0, len(records), -(-len(records) // (8 * settings.workers)))
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(settings.workers, context, exit_with_parent) as pool:
            results = list(pool.map(check, starts, (records[start : start + starts.step] for start in starts)))
    else:
        results = [check(0, records)]
    counts, problems, pictures = zip(*results, strict=True)
    return summarise(np.concatenate(counts), sum(problems, ()), frozenset().union(*pictures))


def summarise(counts_AF: np.ndarray, problems: tuple[Rejected, ...], pictures: frozenset[str]) -> Checked:
    """What was seen, from the five figures of each row (`_check_row`; zeros for a row that cannot be trained)."""
    lengths_A, targets_A, cut_A = counts_AF.T[:3]
    tokens, targets, cut_tokens = (int(figure_A.sum(dtype=np.int64)) for figure_A in (lengths_A, targets_A, cut_A))
    longest, cut_rows = int(lengths_A.max(initial=0)), int(np.count_nonzero(cut_A))
    return Checked(len(counts_AF), problems, tokens, targets, longest, cut_rows, cut_tokens, counts_AF, pictures)


def _check_part(
    start: int, records: Sequence[Record], **check: Any
) -> tuple[np.ndarray, tuple[Rejected, ...], set[str]]:
    """Five figures of each row as int32, those that cannot be trained, paths of pictures; the first row is `start`."""
    counts_AF, problems, pictures = np.zeros((len(records), 5), np.int32), [], set()
    for row in range(len(records)):
        record = records.entry(row) if isinstance(records, Rows) else records[row]
        if isinstance(record, Record):
            result = _check_row(record, **check)
            if not isinstance(result, str):
                counts_AF[row] = result
                pictures.update(image for image in record.images if isinstance(image, str))
                continue
            record = Rejected(row, record.id, result)
        problems.append(dataclasses.replace(record, row=start + row))
    return counts_AF, tuple(problems), pictures


def _check_row(
    record: Record,
    settings: DataSettings,
    tokenizer: TextTokenizer,
    patches: int,
    tiling: Tiling | None,
) -> tuple[int, int, int, int, int] | str:
    """Tokens, targets, tokens cut off, pictures or tiles, and words; or the reason why the row cannot be trained."""
    try:
        require_images(record, settings)
        encoded = encode_turns(record, settings, tokenizer)
        counts, slots = patches, len(record.images)
        if tiling is not None:
            sizes = image_sizes(record, settings)
            counts, slots = tiling.tokens(sizes), sum(tiling.tiles(sizes))
        trained = cut(encoded, counts, settings.max_length)
    except InputError as error:
        return str(error)
    length = full_length(trained, counts)
    lost = 0 if trained is encoded else full_length(encoded, counts) - length
    return length, int(trained.targets.sum()), lost, slots, count_words(record)


# ---- the stream -------------------------------------------------------------------------------------------------


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
) -> "BatchIterator":
    """A grain iterator over the batches of `plan`, or over these `rows` of each, a host's share.

    A record that cannot be read raises InputError with row, id and path; the iterator is of no use afterwards.
    """
    rows = range(plan.shape.rows) if rows is None else rows
    make_row = functools.partial(
        _make_row,
        rows=rows,
        plan=plan,
        records=records,
        settings=settings,
        tokenizer=tokenizer,
        image_size=image_size,
        patches=patches,
        image_token_id=image_token_id,
        pixels=pixels,
        tiling=tiling,
    )
    places = grain.MapDataset.range(plan.steps * len(rows))
    return BatchIterator(places.map(make_row).batch(len(rows), batch_fn=_stack), settings.workers)


def _make_row(
    place: int,
    rows: Sequence[int],
    plan: BatchPlan,
    records: Sequence[Record],
    settings: DataSettings,
    tokenizer: TextTokenizer,
    image_size: int,
    patches: int,
    image_token_id: int,
    pixels: Pixels,
    tiling: Tiling | None,
) -> Batch:
    """One row of a batch: the fields of Batch without B."""
    length = plan.shape.length
    tokens = np.full(length, tokenizer.pad_id, np.int32)
    targets = np.zeros(length, bool)
    segment_ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    pixels_NXYC = np.zeros((plan.shape.images, image_size, image_size, 3), np.uint8)
    take = None if tiling is None else np.zeros(length, np.int32)
    members = plan.members(place // len(rows), rows[place % len(rows)])
    start = slot = 0
    for segment, row in enumerate(members.tolist(), start=1):
        record = records[row]
        try:
            first, sizes = slot, [] if tiling is None else image_sizes(record, settings)
            counts = patches if tiling is None else tiling.tokens(sizes)
            ours, ours_targets = encode_record(record, settings, tokenizer, image_token_id, counts)
            for path in image_paths(record, settings):
                tiles_NXYC = load_tiles(path, image_size, settings.aspect, tiling, pixels)
                pixels_NXYC[slot : slot + len(tiles_NXYC)] = tiles_NXYC
                slot += len(tiles_NXYC)
        except InputError as error:
            raise InputError(str(Rejected(row, record.id, str(error)))) from None
        end = start + len(ours)
        tokens[start:end], targets[start:end] = ours, ours_targets
        segment_ids[start:end], positions[start:end] = segment, np.arange(len(ours))
        if tiling is not None:
            take[start:end] = spread(ours, image_token_id, tiling.takes(sizes, first))
        start = end
    rows_M = np.full(plan.most, -1, np.int64)
    rows_M[: len(members)] = members
    shown_N = np.arange(plan.shape.images) < slot
    return Batch(tokens, targets, segment_ids, positions, pixels_NXYC, shown_N, rows_M, take)


def _stack(rows: Sequence[Batch]) -> Batch:
    return Batch(*(None if field[0] is None else np.stack(field) for field in zip(*rows, strict=True)))


class BatchIterator(grain.DatasetIterator):
    """Batches from `batches`, read ahead by `workers` processes, or by a thread when there are none.

    The state is `{"batches": k}`, the number delivered: it does not know workers or hosts, so a run may go on with
    others. A fresh reader is made where the state is set.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        super().__init__()
        self._batches = batches
        self._workers = workers
        self._delivered = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        try:
            batch = next(self._reader)
        except InputError as error:
            # Grain appends lines about its own traceback to the message.
            raise InputError(str(error).split("\n")[0]) from None
        self._delivered += 1
        # Workers hand arrays over in shared memory; the copy lets go of it before the next batch.
        return Batch(*(None if x is None else np.array(x) for x in batch)) if self._workers else batch

    def start_prefetch(self) -> None:
        """Begin to read ahead."""
        if self._reader is None:
            self._reader = iter(_reader(self._batches[self._delivered :], self._workers))
            self._reader.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._delivered}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop_reader()
        self._delivered = state["batches"]

    def close(self) -> None:
        """Stop reading ahead; worker processes end."""
        self._stop_reader()
        super().close()

    def _stop_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _reader(batches: grain.MapDataset, workers: int) -> grain.IterDataset:
    """Whole batches are made side by side, and come in order: a worker makes every `workers`-th one."""
    if workers == 0:
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    # Grain reads its own absl flags, which only a program that starts with absl's app.run has parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    in_worker = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return in_worker.mp_prefetch(options, worker_init_fn=exit_with_parent)


def exit_with_parent(*_: int) -> None:
    """In a worker process: end as soon as the parent is gone, however it ended.

    Without it a killed trainer leaves its workers behind. (PR_SET_PDEATHSIG would do the same on Linux only, and fires
    already when the parent's thread that started the worker ends.)
    """

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, name="exit-with-parent", daemon=True).start()
