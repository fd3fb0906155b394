"""The original's order of rows: batches of like length, of rows with an image or of rows without one, never of both.

LLaVA's `group_by_modality_length`, for runs that are to be compared with it. It draws from torch's global generator, so
torch's `randperm` is here as well, draw for draw.
"""

import math
from collections.abc import Sequence

import numpy as np

from llava_jax.types import InputError, Record


def modality_lengths(records: Sequence[Record], words_A: np.ndarray, images_A: np.ndarray) -> list[int]:
    """Return the words of each row (`count_words`), negative for a row without an image; `images_A` counts its images.

    Raises InputError for a row without words, as the original asserts.
    """
    if not words_A.all():
        row = int(words_A.argmin())
        raise InputError(
            f"row {row} (id {records[row].id!r}): has no words, so data.group_by=modality_length cannot place it: give "
            "it some, or set group_by to none"
        )
    return np.where(images_A > 0, words_A, -words_A).tolist()


def grouped_order(lengths: Sequence[int], batch_size: int, world: int, seed: int, steps: int) -> np.ndarray:
    """Return the rows of the first `steps` batches as int64[steps, batch_size]; `lengths` are `modality_lengths`.

    `world` is the number of ranks times micro-batches, and divides batch_size. Epoch e draws with seed + e and is a
    whole number of batches: its last one is filled up with the first rows of the same epoch.
    """
    epoch_steps = math.ceil(len(lengths) / batch_size)
    epochs = [
        np.resize(grouped_epoch(lengths, batch_size // world, world, seed + epoch), epoch_steps * batch_size)
        for epoch in range(math.ceil(steps / epoch_steps))
    ]
    return np.concatenate(epochs)[: steps * batch_size].reshape(steps, batch_size)


def grouped_epoch(lengths: Sequence[int], rank_batch: int, world: int, seed: int) -> list[int]:
    """Return an epoch of rows; each run of rank_batch * world is an update, each of rank_batch in it a rank's share.

    Both kinds are grouped apart and their updates shuffled together; the last update of each kind, full or not, is set
    aside, and the rows of the two stand at the end in the order of the file.
    """
    draws = np.random.RandomState(seed)
    images = [row for row, length in enumerate(lengths) if length > 0]
    texts = [row for row, length in enumerate(lengths) if length < 0]
    if not images or not texts:
        return [row for update in _group(lengths, rank_batch, world, draws) for row in update]
    updates, rest = [], []
    for rows in (images, texts):
        groups = _group([abs(lengths[row]) for row in rows], rank_batch, world, draws)
        groups = [[rows[index] for index in group] for group in groups]
        updates += groups[:-1]
        rest += groups[-1]
    shuffled = [updates[index] for index in randperm(len(updates), draws)]
    return [row for update in [*shuffled, sorted(rest)] for row in update]


def randperm(n: int, draws: np.random.RandomState) -> list[int]:
    """Return torch.randperm(n) of the CPU generator seeded as `draws`: both are MT19937, one 32-bit draw a swap."""
    order = list(range(n))
    for index, draw in enumerate(draws.randint(0, 2**32, max(n - 1, 0), np.uint32).tolist()):
        other = index + draw % (n - index)
        order[index], order[other] = order[other], order[index]
    return order


def _group(lengths: Sequence[int], rank_batch: int, world: int, draws: np.random.RandomState) -> list[list[int]]:
    """Return the indices of `lengths` in random updates, each sorted by length and dealt evenly to `world` ranks."""
    order, size = randperm(len(lengths), draws), rank_batch * world
    updates = [order[start : start + size] for start in range(0, len(order), size)]
    return [_deal(sorted(update, key=lambda i: lengths[i], reverse=True), lengths, world) for update in updates]


def _deal(update: list[int], lengths: Sequence[int], world: int) -> list[int]:
    """Return the ranks' shares one after another: the next index goes to the lightest share that is not full."""
    if len(update) % world:
        return [index for rank in range(world) for index in update[rank::world]]
    shares: list[list[int]] = [[] for _ in range(world)]
    weights = [0.0] * world
    for index in update:
        rank = weights.index(min(weights))
        shares[rank].append(index)
        weights[rank] = math.inf if len(shares[rank]) == len(update) // world else weights[rank] + lengths[index]
    return [index for share in shares for index in share]
