"""The paper's choice of captions by noun phrase: rare concepts kept, common ones thinned out (CC3M 3M to 595K).

Phrases that occur in fewer than `min_count` captions are dropped. From the rarest phrase upward, the captions that hold
it are added to the pool, and of a phrase in more than `cap` captions, `cap` at random. Source: the LLaVA paper's
appendix (facts of CC3M-595K); what it leaves open is a flag of `prepare concepts`.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from llava_jax.prepare.phrases import Finder, normalise
from llava_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Rule:
    """The choice's open ends. `pooled` is draw (`cap` captions at random out of all that hold the phrase, some of which
    may be in the pool already; the paper's words) or count (those in the pool count, only the rest is drawn).
    """

    min_count: int = 3
    cap: int = 100
    case: str = "lower"
    articles: str = "drop"
    pooled: str = "draw"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Taken:
    """One kept phrase: how many captions hold it, how many of them its turn chose, how many of these were new."""

    phrase: str
    captions: int
    chosen: int
    new: int


@dataclasses.dataclass(frozen=True)
class Selection:
    """`kept` are the indices of the pool, ascending; `taken` the kept phrases in the order of their turns."""

    captions: int
    phrases: int
    without_phrase: int
    kept: tuple[int, ...]
    taken: tuple[Taken, ...]

    def lines(self) -> list[str]:
        """Return the counts for a person."""
        capped = sum(one.chosen < one.captions for one in self.taken)
        return [
            f"{self.phrases:,} different phrases in {self.captions:,} captions; {self.without_phrase:,} captions hold "
            "none",
            f"{len(self.taken):,} phrases kept, {self.phrases - len(self.taken):,} too rare, {capped:,} above the cap",
            f"{len(self.kept):,} captions kept, {self.captions - len(self.kept):,} left out",
        ]

    def figures(self) -> dict[str, Any]:
        """Return the counts, and every kept phrase in the order of its turn."""
        return {
            "captions": self.captions,
            "phrases": self.phrases,
            "captions_without_phrase": self.without_phrase,
            "kept_phrases": len(self.taken),
            "kept_captions": len(self.kept),
            "taken": [dataclasses.asdict(one) for one in self.taken],
        }


def select(texts: Sequence[str], find: Finder, rule: Rule) -> Selection:
    """Choose the captions that the rule keeps. A phrase counts once a caption; those as rare as another go by alphabet.

    The draws of a phrase depend on the seed, the phrase and the captions alone. Raises InputError when no phrase is
    kept.
    """
    holders: dict[str, list[int]] = {}
    without = 0
    for index, found in enumerate(find(texts)):
        phrases = {normalise(phrase, case=rule.case, articles=rule.articles) for phrase in found} - {""}
        without += not phrases
        for phrase in phrases:
            holders.setdefault(phrase, []).append(index)
    frequent = [phrase for phrase, rows in holders.items() if len(rows) >= rule.min_count]
    if not frequent:
        most = max(map(len, holders.values()), default=0)
        raise InputError(
            f"no phrase occurs in {rule.min_count} (--min_count) of the {len(texts)} captions, the most frequent one "
            f"in {most}; lower --min_count"
        )
    pool: set[int] = set()
    taken = []
    for phrase in sorted(frequent, key=lambda phrase: (len(holders[phrase]), phrase)):
        chosen = draw(phrase, holders[phrase], pool, rule)
        taken.append(Taken(phrase, len(holders[phrase]), len(chosen), len(chosen - pool)))
        pool |= chosen
    return Selection(len(texts), len(holders), without, tuple(sorted(pool)), tuple(taken))


def draw(phrase: str, rows: list[int], pool: set[int], rule: Rule) -> set[int]:
    """Return the captions of a phrase that its turn chooses: all of them, or as many as the cap allows."""
    if len(rows) <= rule.cap:
        return set(rows)
    rng = random.Random(f"{rule.seed}/concept/{phrase}")
    if rule.pooled == "draw":
        return set(rng.sample(rows, rule.cap))
    there = [row for row in rows if row in pool]
    absent = [row for row in rows if row not in pool]
    return {*there[: rule.cap], *rng.sample(absent, max(0, rule.cap - len(there)))}
