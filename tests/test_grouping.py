"""The grouped sampler: the golden order of the original, and what each of its batches holds."""

import numpy as np
import pytest

from llava_jax.data.grouping import grouped_epoch, grouped_order, modality_lengths, randperm
from llava_jax.data.rows import count_words
from llava_jax.types import Record, Turn

# Words of twelve rows, negative without an image.
LENGTHS = [10, 7, -30, 5, -8, 12, 3, -20, 9, 4, -6, 11]


def random_lengths(count: int, texts: float) -> list[int]:
    rng = np.random.default_rng(7)
    return (rng.integers(1, 400, count) * np.where(rng.random(count) < texts, -1, 1)).tolist()


def test_the_golden_order():
    assert grouped_epoch(LENGTHS, 1, 2, 0) == [5, 11, 7, 10, 8, 3, 0, 6, 1, 2, 4, 9]


def test_randperm_is_that_of_torch():
    # torch.manual_seed(0); torch.randperm(10), and of the same generator torch.randperm(5)
    draws = np.random.RandomState(0)
    assert randperm(10, draws) == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
    assert randperm(5, draws) == [3, 2, 4, 0, 1]
    assert randperm(1, draws) == [0] and randperm(0, draws) == []


@pytest.mark.parametrize("rank_batch, world", [(1, 2), (4, 3), (2, 8), (16, 1)])
def test_batches_are_of_one_kind_and_of_like_length(rank_batch, world):
    lengths, size = random_lengths(500, texts=0.3), rank_batch * world
    order = grouped_epoch(lengths, rank_batch, world, seed=3)
    assert sorted(order) == list(range(500))
    counts = [sum(length > 0 for length in lengths), sum(length < 0 for length in lengths)]
    whole = sum((count - 1) // size for count in counts)
    for start in range(0, whole * size, size):
        update = np.array(lengths)[order[start : start + size]]
        assert (update > 0).all() or (update < 0).all()
        # Each rank's share is sorted, the longest first.
        for share in np.abs(update).reshape(world, rank_batch):
            assert (np.diff(share) <= 0).all()
    assert order[whole * size :] == sorted(order[whole * size :])


def test_ranks_of_an_update_get_much_the_same_words():
    lengths = random_lengths(960, texts=0.0)
    order = np.array(grouped_epoch(lengths, 8, 4, seed=0)).reshape(-1, 4, 8)
    words = np.array(lengths)[order].sum(2)
    in_order = np.sort(np.array(lengths)[order].reshape(-1, 32))[:, ::-1].reshape(-1, 4, 8).sum(2)
    assert np.ptp(words, axis=1).mean() < 0.1 * np.ptp(in_order, axis=1).mean()


def test_rows_of_one_kind_are_grouped_by_length_alone():
    order = grouped_epoch([5, 3, 9, 1, 7, 2], 1, 2, seed=0)
    assert sorted(order) == list(range(6))
    # Without images the lengths are negative: the original then gives the shortest first.
    texts = grouped_epoch([-5, -3, -9, -1, -7, -2], 1, 2, seed=0)
    assert [sorted(order[i : i + 2]) for i in (0, 2, 4)] == [sorted(texts[i : i + 2]) for i in (0, 2, 4)]
    assert texts == [index for i in (0, 2, 4) for index in reversed(order[i : i + 2])]


def test_epochs_are_whole_batches_and_differ():
    order = grouped_order(LENGTHS, 5, 1, seed=4, steps=7)
    assert order.shape == (7, 5)
    for epoch in range(2):
        places = order[3 * epoch : 3 * epoch + 3].ravel()
        assert places[:12].tolist() == grouped_epoch(LENGTHS, 5, 1, 4 + epoch)
        assert places[12:].tolist() == places[:3].tolist()
    assert order[0].tolist() != order[3].tolist()


def test_lengths_are_words_and_the_sign_is_the_kind():
    turns = (Turn("human", "<image>\nWhat  is\tthis?"), Turn("gpt", "A cat."))
    records = [Record("a", ("a.png",), turns), Record("b", (), (Turn("human", "Hi there"), Turn("gpt", "Yes")))]
    words = np.array([count_words(record) for record in records])
    assert modality_lengths(records, words, np.array([1, 0])) == [6, -3]
