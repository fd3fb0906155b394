"""Several sources of rows mixed by weight: which rows an epoch has, and in which order.

An epoch of a mixture has as many rows as all its sources together, of each source the share that its weight says. It
takes them from that source's own endless stream, which runs through the source again and again: no row is left out for
good, and a row comes again only after all others of its source.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mixture:
    """`counts` are the rows of each source, which stand one source after another; `weights` are any numbers above 0."""

    counts: tuple[int, ...]
    weights: tuple[float, ...]

    def shares(self) -> np.ndarray:
        """Return each source's rows of an epoch, int64: the weights' shares, rounded so that the sum is exact."""
        total = sum(self.counts)
        exact = np.array(self.weights) / sum(self.weights) * total
        shares = np.floor(exact).astype(np.int64)
        most_lost = np.argsort(shares - exact, kind="stable")
        shares[most_lost[: total - int(shares.sum())]] += 1
        return shares

    def epoch(self, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
        """Return the rows of an epoch in order, int64[sum of counts]; seed and epoch decide, without `shuffle` neither.

        Shuffled, each source goes through its rows in a new order each time, and the epoch's order is random;
        otherwise sources follow the order of their rows and take turns evenly.
        """
        begins = np.cumsum(self.counts) - self.counts
        taken, turns = [], []
        for source, share in enumerate(self.shares().tolist()):
            stream = self._stream(source, epoch * share, (epoch + 1) * share, seed, shuffle)
            taken.append(begins[source] + np.concatenate([np.zeros(0, np.int64), *stream]))
            turns.append((np.arange(share) + 0.5) / max(share, 1))
        rows = np.concatenate(taken)
        if shuffle:
            return rows[np.random.default_rng([seed, epoch]).permutation(len(rows))]
        return rows[np.argsort(np.concatenate(turns), kind="stable")]

    def _stream(self, source: int, start: int, stop: int, seed: int, shuffle: bool) -> Iterator[np.ndarray]:
        """Yield places start to stop of a source's endless stream, pass by pass."""
        count = self.counts[source]
        for run in range(start // count, -(-stop // count)):
            order = np.random.default_rng([seed, run, source]).permutation(count) if shuffle else np.arange(count)
            yield order[max(start - run * count, 0) : stop - run * count]
