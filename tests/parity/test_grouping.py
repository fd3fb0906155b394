"""Our grouped order and random permutation next to torch's own generator and a plain transcription of the sampler."""

import numpy as np
import pytest
import torch

from llava_jax.data.grouping import grouped_epoch, randperm


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31 - 1])
def test_randperm(seed):
    torch.manual_seed(seed)
    draws = np.random.RandomState(seed)
    for n in (1, 2, 3, 10, 623, 624, 625, 7, 0, 40_001, 12):
        assert randperm(n, draws) == torch.randperm(n).tolist()


def theirs(lengths: list[int], rank_batch: int, world: int, seed: int) -> list[int]:
    """What the sampler does, step by step, with torch's global generator."""
    torch.manual_seed(seed)
    size = rank_batch * world

    def chunks(indices: list[int], words: list[int]) -> list[list[int]]:
        if len(indices) % world != 0:
            return [indices[i::world] for i in range(world)]
        result, sums = [[] for _ in range(world)], [0 for _ in range(world)]
        for index in indices:
            lightest = sums.index(min(sums))
            result[lightest].append(index)
            sums[lightest] += words[index]
            if len(result[lightest]) == len(indices) // world:
                sums[lightest] = float("inf")
        return result

    def by_length(words: list[int]) -> list[int]:
        indices = torch.randperm(len(words))
        batches = [indices[i : i + size].tolist() for i in range(0, len(words), size)]
        batches = [sorted(batch, key=lambda i: words[i], reverse=True) for batch in batches]
        return [i for batch in batches for chunk in chunks(batch, words) for i in chunk]

    if min(lengths) > 0 or max(lengths) < 0:
        return by_length(lengths)
    kinds = []
    for sign in (1, -1):
        rows = [i for i, length in enumerate(lengths) if length * sign > 0]
        order = [rows[i] for i in by_length([lengths[i] * sign for i in rows])]
        kinds.append([order[i : i + size] for i in range(0, len(order), size)])
    batches = kinds[0][:-1] + kinds[1][:-1]
    batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
    batches.append(sorted(kinds[0][-1] + kinds[1][-1]))
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize("rank_batch, world", [(1, 2), (4, 1), (3, 4), (16, 8)])
@pytest.mark.parametrize("count, texts", [(12, 0.4), (777, 0.1), (1024, 0.5), (300, 0.0), (300, 1.0)])
def test_whole_order(rank_batch, world, count, texts):
    rng = np.random.default_rng(count)
    lengths = (rng.integers(1, 300, count) * np.where(rng.random(count) < texts, -1, 1)).tolist()
    for seed in (0, 5):
        assert grouped_epoch(lengths, rank_batch, world, seed) == theirs(lengths, rank_batch, world, seed)
