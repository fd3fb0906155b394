"""Which conversations stand in which row of which batch, and the one shape that every batch of a run has.

All of it is decided before the run from the lengths of the conversations, the settings and the seed. An update takes
exactly `batch_size` conversations, packed or not. Letters of this file: U updates of the run, A rows of the
annotations, C conversations of an update.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np

from llava_jax.data.grouping import grouped_order, modality_lengths
from llava_jax.data.mixture import Mixture
from llava_jax.types import DataSettings, InputError, Record

# Shapes with at least this share of real tokens are preferred to any with less.
TARGET = 0.95
# A chosen row length is a multiple of UNIT, attention is at its best at one of BLOCK: it then works in whole tiles.
UNIT, BLOCK = 128, 512
# Of an unpacked row below UNIT.
SHORT = 16
# A decoder of width D spends T / (12 D) as much on causal attention over T tokens as on its matrices; this is 12 D of
# the 4096 of a 7B.
ATTENTION = 12 * 4096
# Lengths looked at for each number of rows, in steps of UNIT, and ways tried to pack an update into them.
LENGTHS, TRIES = 32, 8


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Rows of a batch, tokens and image slots of a row; and of the run's batches the mean share of tokens that are not
    padding (None: unknown), and of images.
    """

    rows: int
    length: int
    images: int
    filled: float | None
    images_used: float

    def __str__(self) -> str:
        return (
            f"batches of {self.rows} x {self.length} tokens with {self.images} images a row, "
            f"{self.filled:.1%} of the tokens real"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of a run: conversation c of update u is annotation row order_UC[u, c], in batch row rows_UC[u, c],
    or in none where that is -1.

    `max_per_row` is the largest number of conversations in a row. Both arrays are int32.
    """

    shape: BatchShape
    order_UC: np.ndarray
    rows_UC: np.ndarray
    max_per_row: int

    @property
    def steps(self) -> int:
        return len(self.order_UC)

    def members(self, step: int, row: int) -> np.ndarray:
        """Return the annotation rows in row `row` of batch `step`, in the order in which they stand there."""
        return self.order_UC[step, self.rows_UC[step] == row]

    def without(self, out_UC: np.ndarray) -> "BatchPlan":
        """Return the plan with padding in place of the conversations where `out_UC` is True."""
        return dataclasses.replace(self, rows_UC=np.where(out_UC, -1, self.rows_UC))


def check_batch_size(batch_size: int, row_multiple: int, pack: bool) -> None:
    """Raise InputError when an update's conversations cannot be dealt over device shards times micro-batches."""
    if pack and batch_size < row_multiple:
        raise InputError(
            f"train.batch_size={batch_size} is less than {row_multiple} device shards times train.accumulate, some "
            "would have nothing to do: expected at least as many conversations"
        )
    if not pack and batch_size % row_multiple:
        raise InputError(
            f"train.batch_size={batch_size} does not divide into {row_multiple} device shards times train.accumulate: "
            f"expected a multiple of {row_multiple}"
        )


def check_order(
    records: Sequence[Record],
    lengths_A: np.ndarray,
    slots_A: np.ndarray,
    words_A: np.ndarray | None,
    settings: DataSettings,
    mixture: Mixture | None,
) -> None:
    """Raise InputError when these rows cannot stand in batches as the settings ask for; see `plan_batches`."""
    if settings.group_by == "modality_length":
        if mixture is not None:
            raise InputError(
                f"data.group_by=modality_length orders all rows, and data.annotations={settings.annotations} mixes "
                "them by weight: leave the weights out, or set group_by to none"
            )
        assert words_A is not None  # group_by needs them
        modality_lengths(records, words_A, slots_A)
    for key, given, needed_A, what in (
        ("data.pack_length", settings.pack_length, lengths_A, "tokens"),
        ("data.pack_images", settings.pack_images, slots_A, "tiles" if settings.aspect == "anyres" else "images"),
    ):
        row = int(needed_A.argmax())
        if 0 < given < needed_A[row]:
            raise InputError(
                f"{key}={given}: row {row} of {settings.annotations} has {needed_A[row]} {what}, expected at least "
                f"that many, or 0 to have it chosen"
            )


def steps_for(rows: int, batch_size: int, epochs: float) -> int:
    """Return the steps of `epochs` epochs, each a whole number as in the original: its last batch is filled up."""
    # 1.1 epochs of 10 steps are a hair more than 11 in floating point.
    return math.ceil(round(epochs * math.ceil(rows / batch_size), 6))


def plan_batches(
    records: Sequence[Record],
    lengths_A: np.ndarray,
    settings: DataSettings,
    *,
    batch_size: int,
    row_multiple: int,
    steps: int,
    seed: int,
    slots_A: np.ndarray,
    words_A: np.ndarray | None = None,
    mixture: Mixture | None = None,
) -> BatchPlan:
    """Return the plan of `steps` updates of `batch_size` conversations, of which `Checked` knows the rest.

    `lengths_A` are their tokens, `slots_A` their images (tiles under anyres), `words_A` their words, which group_by
    needs. Rows are a multiple of `row_multiple`, the device shards times micro-batches. Unpacked, a row holds one
    conversation, and the tokens of the longest. Raises InputError when that does not divide, or the settings contradict
    each other or the data.
    """
    check_batch_size(batch_size, row_multiple, settings.pack)
    check_order(records, lengths_A, slots_A, words_A, settings, mixture)
    if settings.pack:
        order_UC = _packed_order(lengths_A, slots_A, settings.shuffle, seed, (steps, batch_size), mixture)
        lengths_UC, slots_UC = lengths_A[order_UC].astype(np.int64), slots_A[order_UC].astype(np.int64)
        shape, rows_UC = _choose(lengths_UC, slots_UC, int(lengths_A.max()), int(slots_A.max()), row_multiple, settings)
        max_per_row = max(int(np.bincount(rows_C).max()) for rows_C in rows_UC)
        return BatchPlan(shape, order_UC.astype(np.int32), rows_UC, max_per_row)
    if settings.group_by == "modality_length":
        assert words_A is not None
        lengths = modality_lengths(records, words_A, slots_A)
        order_UC = grouped_order(lengths, batch_size, row_multiple, seed, steps)
    else:
        places = steps * batch_size
        order_UC = _stream(len(records), settings.shuffle, seed, places, mixture).reshape(steps, batch_size)
    longest = int(lengths_A.max())
    unit = UNIT if longest > UNIT else SHORT  # as attention kernels want it
    length = min(math.ceil(longest / unit) * unit, settings.max_length)
    filled = float(lengths_A[order_UC].mean() / length)
    images_used = float(slots_A[order_UC].sum(axis=1).mean())
    shape = BatchShape(batch_size, length, int(slots_A.max()), filled, images_used)
    rows_UC = np.tile(np.arange(batch_size, dtype=np.int32), (steps, 1))
    return BatchPlan(shape, order_UC.astype(np.int32), rows_UC, max_per_row=1)


# ---- the order --------------------------------------------------------------------------------------------------


def _packed_order(
    lengths_A: np.ndarray,
    images_A: np.ndarray,
    shuffle: bool,
    seed: int,
    shape: tuple[int, int],
    mixture: Mixture | None,
) -> np.ndarray:
    """Return int64[U, C] of `shape`: the endless stream epoch after epoch, cut into updates.

    The last update of an epoch is filled up from the next. With `shuffle` an epoch is dealt (`deal`) to the updates it
    reaches into, anew with the seed and the epoch's number. The order depends on neither row lengths nor devices.
    """
    count, places = len(lengths_A), math.prod(shape)
    if not shuffle:
        return _stream(count, False, seed, places, mixture).reshape(shape)
    epochs = []
    for epoch in range(math.ceil(places / count)):
        rows_E = mixture.epoch(epoch, seed, shuffle=True) if mixture else np.arange(count)
        # An epoch may share its first and its last update with the epochs next to it.
        start, stop = epoch * count, (epoch + 1) * count
        bounds = np.arange(start // shape[1], (stop - 1) // shape[1] + 2) * shape[1]
        shares_U, rng = np.diff(bounds.clip(start, stop)), np.random.default_rng([seed, epoch])
        epochs.append(rows_E[deal(lengths_A[rows_E], images_A[rows_E], shares_U, rng)])
    return np.concatenate(epochs)[:places].reshape(shape)


def _stream(count: int, shuffle: bool, seed: int, places: int, mixture: Mixture | None) -> np.ndarray:
    """Return the first `places` of the endless stream of rows: epoch after epoch, shuffled anew in each."""
    if mixture is None and not shuffle:
        return np.arange(places) % count
    order = mixture.epoch if mixture else lambda epoch, *_: np.random.default_rng([seed, epoch]).permutation(count)
    return np.concatenate([order(epoch, seed, shuffle) for epoch in range(math.ceil(places / count))])[:places]


def deal(lengths_A: np.ndarray, images_A: np.ndarray, shares_U: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random order that gives all updates much the same tokens and images; update u takes shares_U[u] places.

    The conversations, sorted by images and length, are dealt in rounds of one to each update: every second round at
    random, the others giving the longest to the update that has had least.
    """
    order = rng.permutation(len(lengths_A))
    order = order[np.lexsort((-lengths_A[order], -images_A[order]))]
    update_of_A = np.empty(len(lengths_A), np.int64)
    excess_U, mean, rounds = np.zeros(len(shares_U)), lengths_A.mean(), int(shares_U.max())
    for left in range(rounds, 0, -1):
        # A small share takes part in rounds far apart, none of them the first or the last.
        due_U, after_U = ((shares_U * rest + rounds // 2) // rounds for rest in (left, left - 1))
        updates = np.flatnonzero(due_U > after_U)
        dealt, order = np.split(order, [len(updates)])
        dealt = dealt[np.argsort(-lengths_A[dealt], kind="stable")]
        by_excess = left % 2 == 1
        updates = updates[np.argsort(excess_U[updates], kind="stable")] if by_excess else rng.permutation(updates)
        update_of_A[dealt] = updates
        excess_U[updates] += lengths_A[dealt] - mean
    return np.argsort(update_of_A, kind="stable")


# ---- the shape --------------------------------------------------------------------------------------------------


def _choose(
    lengths_UC: np.ndarray,
    images_UC: np.ndarray,
    longest: int,
    most_images: int,
    row_multiple: int,
    settings: DataSettings,
) -> tuple[BatchShape, np.ndarray]:
    """Return the cheapest shape into which every update packs, and each conversation's batch row as int32[U, C]."""
    totals_U, images_U = lengths_UC.sum(1), images_UC.sum(1)
    shapes = list(_shapes(lengths_UC.shape[1], int(totals_U.max()), longest, row_multiple, settings.pack_length))
    # Long updates fail soonest; one that has failed is tried first from then on.
    hardest = np.argsort(-totals_U, kind="stable").tolist()
    pack = functools.partial(_pack_all, lengths_UC, images_UC, hardest)
    for rows, length in sorted(shapes, key=lambda shape: _cost(*shape, totals_U.mean())):
        fewest = max(most_images, math.ceil(images_U.max() / rows))
        allowed = int(images_U.max())
        if settings.pack_images:
            fewest = allowed = settings.pack_images if most_images else 0
        rows_UC = pack(rows, length, allowed)
        if rows_UC is None:
            continue
        needed = max(int(np.bincount(r, i).max()) for r, i in zip(rows_UC, images_UC, strict=True))
        for images in range(fewest, needed):
            fewer = pack(rows, length, images)
            if fewer is not None:
                rows_UC, needed = fewer, images
                break
        images = allowed if settings.pack_images else max(needed, most_images)
        filled = float(totals_U.mean() / (rows * length))
        return BatchShape(rows, length, images, filled, float(images_U.mean())), rows_UC
    raise AssertionError("one conversation a row always fits")


def _shapes(conversations: int, tokens: int, longest: int, row_multiple: int, fixed: int) -> Iterator[tuple[int, int]]:
    """Yield (rows, length) that could hold `tokens`, from row_multiple rows to one for each conversation."""
    most = math.ceil(conversations / row_multiple) * row_multiple
    for rows in range(row_multiple, most + 1, row_multiple):
        least = max(longest, math.ceil(tokens / rows))
        if fixed:
            if fixed >= least:
                yield rows, fixed
            continue
        unit = UNIT if least >= UNIT else 8
        first = math.ceil(least / unit) * unit
        yield from ((rows, first + extra * unit) for extra in range(LENGTHS))


def _cost(rows: int, length: int, tokens: float) -> tuple[bool, float, int]:
    """Return a key to sort by: enough real tokens or not, then work in token slots, attention double off the tiles."""
    attention = length / ATTENTION * (1 if length % BLOCK == 0 else 2)
    return tokens / (rows * length) < TARGET, rows * length * (1 + attention), length


def _pack_all(
    lengths_UC: np.ndarray, images_UC: np.ndarray, hardest: list[int], rows: int, length: int, images: int
) -> np.ndarray | None:
    """Return the batch row of each conversation as int32[U, C]; None as soon as an update does not fit."""
    rows_UC = np.empty(lengths_UC.shape, np.int32)
    for place, update in enumerate(hardest):
        rows_C = pack_update(lengths_UC[update], images_UC[update], rows, length, images)
        if rows_C is None:
            hardest.insert(0, hardest.pop(place))
            return None
        rows_UC[update] = rows_C
    return rows_UC


# ---- one update -------------------------------------------------------------------------------------------------


def pack_update(lengths_C: np.ndarray, images_C: np.ndarray, rows: int, length: int, images: int) -> np.ndarray | None:
    """Return the row of each conversation so that no row exceeds `length` tokens or `images` images, or None.

    The longest come first, each into the emptiest row (or, in every second try, the fullest that it fits); then
    conversations of the fullest row change places with shorter ones until none is too full. Later tries start from
    lengths that are a little off. The same input gives the same answer.
    """
    rng = np.random.default_rng(0)
    for attempt in range(TRIES):
        weights_C = lengths_C if attempt < 2 else lengths_C * rng.uniform(0.8, 1.25, len(lengths_C))
        first = np.argsort(-weights_C, kind="stable")
        given = (lengths_C, images_C, first, rows, images)
        packed = _place_into_fullest(*given, length) if attempt % 2 else _place_into_emptiest(*given)
        if packed is not None and _relieve(lengths_C, images_C, *packed, length, images):
            return packed[0]
    return None


Packed = tuple[np.ndarray, np.ndarray, np.ndarray]  # row of each conversation; tokens and images of each row


def _place_into_emptiest(
    lengths_C: np.ndarray, images_C: np.ndarray, order: np.ndarray, rows: int, images: int
) -> Packed | None:
    """Put each conversation into the row of fewest tokens that has slots for its images; return None without one."""
    rows_C = np.empty(len(order), np.int64)
    tokens_R, images_R, emptiest = [0] * rows, [0] * rows, [(0, row) for row in range(rows)]
    for c, tokens, added in zip(*(x.tolist() for x in (order, lengths_C[order], images_C[order])), strict=True):
        full = []
        while emptiest and images_R[emptiest[0][1]] + added > images:
            full.append(heapq.heappop(emptiest))
        if not emptiest:
            return None
        rows_C[c] = row = emptiest[0][1]
        tokens_R[row] += tokens
        images_R[row] += added
        heapq.heapreplace(emptiest, (tokens_R[row], row))
        for entry in full:
            heapq.heappush(emptiest, entry)
    return rows_C, np.array(tokens_R, np.int64), np.array(images_R, np.int64)


def _place_into_fullest(
    lengths_C: np.ndarray, images_C: np.ndarray, order: np.ndarray, rows: int, images: int, limit: int
) -> Packed | None:
    """Put each conversation into the fullest row within `limit`, else into the emptiest; return None without slots."""
    rows_C = np.empty(len(order), np.int64)
    tokens_R, images_R = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for c in order:
        free_R = images_R + images_C[c] <= images
        fits_R = free_R & (tokens_R + lengths_C[c] <= limit)
        if fits_R.any():
            row = np.where(fits_R, tokens_R, -1).argmax()
        elif free_R.any():
            row = np.where(free_R, tokens_R, np.iinfo(np.int64).max).argmin()
        else:
            return None
        rows_C[c] = row
        tokens_R[row] += lengths_C[c]
        images_R[row] += images_C[c]
    return rows_C, tokens_R, images_R


def _relieve(
    lengths_C: np.ndarray,
    images_C: np.ndarray,
    rows_C: np.ndarray,
    tokens_R: np.ndarray,
    images_R: np.ndarray,
    length: int,
    images: int,
) -> bool:
    """Exchange, in place, until no row is over `length`; return False where no exchange lowers the fullest row.

    Each row also holds an empty conversation, so that an exchange may be a plain move.
    """
    conversations, rows = len(rows_C), len(tokens_R)
    sizes = np.concatenate([lengths_C, np.zeros(rows, np.int64)])
    counts = np.concatenate([images_C, np.zeros(rows, np.int64)])
    while True:
        full = tokens_R.argmax()
        if tokens_R[full] <= length:
            return True
        places = np.concatenate([rows_C, np.arange(rows)])
        inside, outside = np.flatnonzero(rows_C == full), np.flatnonzero(places != full)
        tokens = sizes[inside, None] - sizes[outside]
        moved = counts[inside, None] - counts[outside]
        others = places[outside]
        fuller = np.maximum(tokens_R[full] - tokens, tokens_R[others] + tokens)
        fits = (images_R[full] - moved <= images) & (images_R[others] + moved <= images)
        fuller = np.where(fits, fuller, np.iinfo(np.int64).max)
        if not fuller.size or fuller.min() >= tokens_R[full]:
            return False
        i, j = np.unravel_index(fuller.argmin(), fuller.shape)
        change_R = np.zeros(rows, np.int64)
        change_R[[full, others[j]]] = -1, 1
        tokens_R += change_R * tokens[i, j]
        images_R += change_R * moved[i, j]
        rows_C[inside[i]] = others[j]
        if outside[j] < conversations:
            rows_C[outside[j]] = full
