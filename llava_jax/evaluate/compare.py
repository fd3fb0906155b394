"""Is one run better than another on the same questions? A paired bootstrap and McNemar's test."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_jax.evaluate.answers import SCORES, field
from llava_jax.io import read_json
from llava_jax.types import InputError

RESAMPLES, SEED, CHUNK = 10_000, 0, 1 << 22


def compare(path_a: str, path_b: str) -> dict[str, Any]:
    """Compare the figures that two `evaluate … --json=FILE` wrote on the same questions.

    Returns the mean score of each in percent (`a`, `b`), `difference` (b - a) with the 95 % interval `low` to `high`
    of 10,000 paired resamples and their two-sided `p_bootstrap`, and where every score is 0 or 1 the questions that
    one alone has right (`only_a`, `only_b`) with the exact `p_mcnemar`. Raises InputError.
    """
    scores_a, scores_b = (_read(path) for path in (path_a, path_b))
    lost = sorted(scores_a.keys() ^ scores_b.keys())
    if lost:
        has, lacks = (path_a, path_b) if lost[0] in scores_a else (path_b, path_a)
        raise InputError(f"{lacks}: has no score of {lost[0]}, which {has} has ({len(lost)} such); give the same split")
    a, b = (np.array([scores[key] for key in scores_a]) for scores in (scores_a, scores_b))
    figures = {"questions": len(a), "a": 100 * a.mean(), "b": 100 * b.mean(), **_bootstrap(100 * (b - a))}
    if set(np.unique([a, b])) <= {0.0, 1.0}:
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        figures |= {"only_a": only_a, "only_b": only_b, "p_mcnemar": mcnemar(only_a, only_b)}
    return {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p of so many questions that one run alone has right: a binomial of one half."""
    total, fewer = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * sum(math.exp(log - total * math.log(2)) for log in logs))


def _bootstrap(differences: np.ndarray) -> dict[str, float]:
    rng, means, rows = np.random.default_rng(SEED), [], max(1, CHUNK // len(differences))
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(0, len(differences), (min(rows, RESAMPLES - start), len(differences)))
        means.append(differences[drawn].mean(axis=1))
    found = np.concatenate(means)
    low, high = np.percentile(found, [2.5, 97.5])
    p = min(1.0, 2 * min((found <= 0).mean(), (found >= 0).mean()))
    return {"difference": differences.mean(), "low": low, "high": high, "p_bootstrap": p}


def _read(path: str) -> Mapping[str, float]:
    scores = field(read_json(path, "figures of `evaluate`"), SCORES, dict, path)
    if not scores or not all(isinstance(score, int | float) for score in scores.values()):
        raise InputError(f"{path}: scores is empty or has other than numbers; expected figures of `evaluate`")
    return scores
