"""ROUGE-L (Lin 2004): how much of a long answer is in its reference, word for word and in order."""

import re
from collections.abc import Sequence


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words, 0 to 1; case and punctuation do not count."""
    ours, theirs = (re.findall(r"\w+", text.casefold()) for text in (answer, reference))
    return 2 * _common(ours, theirs) / max(1, len(ours) + len(theirs))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    best = [0] * (len(b) + 1)  # of the words of a so far and each beginning of b
    for word in a:
        before = 0
        for index, other in enumerate(b, start=1):
            before, best[index] = best[index], before + 1 if word == other else max(best[index], best[index - 1])
    return best[-1]
