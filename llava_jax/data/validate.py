"""Every row checked before the run, and what that and the plan found kept: a restart need not tokenise, or plan, again
what has not changed.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import threading
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_jax.data.example import encode_turns, image_sizes, require_images
from llava_jax.data.grouping import count_words
from llava_jax.data.packing import BatchPlan, BatchShape, plan_batches
from llava_jax.data.records import Rejected, Rows
from llava_jax.data.sources import KEPT_ROWS, code, keep, key_of, recall
from llava_jax.data.templates import find_template
from llava_jax.data.tiles import Tiling
from llava_jax.data.tokenize import TextTokenizer, cut, full_length
from llava_jax.types import DataSettings, InputError, Record

# Settings that say where a row stands or who reads it, not what it becomes.
ORDER = ("annotations", "shuffle", "group_by", "pack", "pack_length", "pack_images", "workers")
# Below this many records, starting processes takes longer than checking them here.
PARALLEL_CHECK_ROWS = 20_000
# Figures of a row that `_check_row` counts.
FIGURES = 5


@dataclasses.dataclass(frozen=True)
class Checked:
    """What `check_records` saw: the rows that cannot be trained, and counts over all the others.

    `tokens` and `targets` are what is trained on, `longest` the tokens of the longest row; `cut_rows` rows lose
    `cut_tokens` tokens to max_length. `counts_AF` (int32) are the five figures of each row that `_check_row` counts, 0
    where it cannot be trained, and `images` the different paths among all rows.
    """

    rows: int
    problems: tuple[Rejected, ...]
    tokens: int
    targets: int
    longest: int
    cut_rows: int
    cut_tokens: int
    counts_AF: np.ndarray = dataclasses.field(compare=False, repr=False)
    image_paths: frozenset[str] = dataclasses.field(compare=False, repr=False)

    @property
    def lengths_A(self) -> np.ndarray:
        """Tokens trained of each row."""
        return self.counts_AF[:, 0].copy()

    @property
    def slots_A(self) -> np.ndarray:
        """Images (anyres: tiles) that each row shows."""
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
    """Tokenise every row and look for its image files (without decoding them), in settings.workers processes.

    They are spawned: they import the main module again, so that must do nothing when imported.

    With `tiling` (data.anyres) each image's header says how many tokens it takes.
    """
    if not records:
        raise InputError(f"{settings.annotations}: no rows; expected at least one")
    find_template(settings.template)  # an unknown one is one error, not one a row
    check = functools.partial(_check_part, settings=settings, tokenizer=tokenizer, patches=patches, tiling=tiling)
    if settings.workers and len(records) >= PARALLEL_CHECK_ROWS:
        # Rows on disk stay there: a worker gets their places, and reads them itself. A part starts with no word known.
        starts = range(0, len(records), -(-len(records) // (2 * settings.workers)))
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(settings.workers, context, _exit_with_parent) as pool:
            results = list(pool.map(check, starts, (records[start : start + starts.step] for start in starts)))
    else:
        results = [check(0, records)]
    counts, problems, image_paths = zip(*results, strict=True)
    return summarise(np.concatenate(counts), sum(problems, ()), frozenset().union(*image_paths))


def summarise(counts_AF: np.ndarray, problems: tuple[Rejected, ...], image_paths: frozenset[str]) -> Checked:
    """What was seen, from the five figures of each row (`_check_row`; zeros for a row that cannot be trained)."""
    lengths_A, targets_A, cut_A = counts_AF.T[:3]
    tokens, targets, cut_tokens = (int(figure_A.sum(dtype=np.int64)) for figure_A in (lengths_A, targets_A, cut_A))
    longest, cut_rows = int(lengths_A.max(initial=0)), int(np.count_nonzero(cut_A))
    return Checked(len(counts_AF), problems, tokens, targets, longest, cut_rows, cut_tokens, counts_AF, image_paths)


def _check_part(
    start: int, records: Sequence[Record], **check: Any
) -> tuple[np.ndarray, tuple[Rejected, ...], set[str]]:
    """Five figures of each row as int32, those that cannot be trained, paths of images; the first row is `start`."""
    counts, problems, image_paths = array("i"), [], set()
    for row in range(len(records)):
        record = records.entry(row) if isinstance(records, Rows) else records[row]
        if isinstance(record, Record):
            result = _check_row(record, image_paths, **check)
            if not isinstance(result, str):
                counts.extend(result)
                continue
            record = Rejected(row, record.id, result)
        counts.extend((0,) * FIGURES)
        problems.append(dataclasses.replace(record, row=start + row))
    return np.array(counts, np.int32).reshape(-1, FIGURES), tuple(problems), image_paths


def _check_row(
    record: Record,
    image_paths: set[str],
    settings: DataSettings,
    tokenizer: TextTokenizer,
    patches: int,
    tiling: Tiling | None,
) -> tuple[int, int, int, int, int] | str:
    """Tokens, targets, tokens cut off, images or tiles, and words; or the reason why the row cannot be trained.

    `images` are those that are known to be there; the row's are added.
    """
    try:
        fresh = [image for image in record.images if isinstance(image, str) and image not in image_paths]
        if fresh:
            require_images(fresh, settings)
            image_paths.update(fresh)
        encoded = encode_turns(record, settings, tokenizer)
        counts, slots = patches, len(record.images)
        if tiling is not None:
            sizes = image_sizes(record, settings)
            counts, slots = tiling.tokens(sizes), sum(tiling.tiles(sizes))
        trained = cut(encoded, counts, settings.max_length)
    except InputError as error:
        return str(error)
    full = full_length(encoded, counts)
    length = full if trained is encoded else full_length(trained, counts)
    return length, int(np.count_nonzero(trained.targets)), full - length, slots, count_words(record)


def _exit_with_parent(*_: int) -> None:
    """In a worker process: end as soon as the parent is gone, however it ended.

    Without it a trainer that is killed while it starts leaves its workers behind. (PR_SET_PDEATHSIG would do the same
    on Linux only, and fires already when the parent's thread that started the worker ends.)
    """

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, name="exit-with-parent", daemon=True).start()


# ---- what is kept of it -------------------------------------------------------------------------------------------


def check_once(
    records: Rows,
    settings: DataSettings,
    tokenizer: TextTokenizer,
    *,
    patches: int,
    tiling: Tiling | None = None,
) -> Checked:
    """`check_records`, or what it found before in the same rows with the same tokenizer and settings.

    A result without a problem is kept for data sets of KEPT_ROWS rows or more. Whether the images are there is looked
    up each time; where one is gone, every row is checked again, so that the rows are named. With `tiling` nothing is
    kept: how many tokens a row has then depends on the sizes of its images, which may change in their files.
    """
    model = dict(patches=patches, tiling=tiling)
    if len(records) < KEPT_ROWS or tiling is not None:
        return dataclasses.replace(check_records(records, settings, tokenizer, **model), image_paths=frozenset())
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ORDER}
    name = key_of("check", code(), records.fingerprint, tokenizer.fingerprint, patches, facts)
    kept = recall(name)
    if kept is not None:
        image_paths = kept["images"].tobytes().decode().split("\0") if kept["images"].size else []
        if all(os.path.isfile(os.path.join(settings.images, path)) for path in image_paths):
            return summarise(kept["counts"], (), frozenset())
    checked = check_records(records, settings, tokenizer, **model)
    if not checked.problems:
        image_paths = "\0".join(sorted(checked.image_paths)).encode()
        keep(name, {"counts": checked.counts_AF, "images": np.frombuffer(image_paths, np.uint8)})
    return dataclasses.replace(checked, image_paths=frozenset())


def plan_once(records: Rows, checked: Checked, settings: DataSettings, **sizes: Any) -> BatchPlan:
    """`plan_batches` of these rows, or the plan that was made of the same before, which a long run keeps."""
    lengths_A, slots_A, words_A = checked.lengths_A, checked.slots_A, checked.words_A
    facts = {name: getattr(settings, name) for name in ORDER if name not in ("annotations", "workers")}
    rows = hashlib.sha256(b"|".join(array.tobytes() for array in (lengths_A, slots_A, words_A))).hexdigest()
    name = key_of("plan", code(), rows, settings.max_length, facts, sizes, records.mixture)
    long = sizes["steps"] * sizes["batch_size"] >= KEPT_ROWS
    kept = recall(name) if long else None
    if kept is not None:
        rows_, length, images, filled, used, most = kept["shape"].tolist()
        shape = BatchShape(int(rows_), int(length), int(images), filled, used)
        return BatchPlan(shape, kept["order"], kept["rows"], int(most))
    how = dict(slots_A=slots_A, words_A=words_A, mixture=records.mixture)
    plan = plan_batches(records, lengths_A, settings, **sizes, **how)
    if long:
        shape = np.array([*dataclasses.astuple(plan.shape), plan.most], np.float64)
        keep(name, {"shape": shape, "order": plan.order_UC, "rows": plan.rows_UC})
    return plan
