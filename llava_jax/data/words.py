"""Ids of text a word at a time: what a word becomes is asked of the tokenizer once, and most words come again.

That gives the ids of the whole text wherever blanks become "▁" and no entry of the vocabulary has a "▁" behind another
character, as in SentencePiece's BPE of LLaMA and Mistral: no merge then goes from one word on into the next.
`can_split` asks the tokenizer's own description; where it does not hold, and for two blanks in a row, the tokenizer is
given the whole text.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers

BLANK = "▁"
PREPEND = {"type": "Prepend", "prepend": BLANK}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
# Words that each dictionary keeps, and the most characters of one: 15 MB of English, at most 35 MB.
KEPT_WORDS, LONGEST_WORD = 100_000, 16
# What a BPE model may have that makes the ids of a word depend on where it stands, or drops characters.
EXCLUDED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")

Ids = Callable[[str], Sequence[int]]


def can_split(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the ids of a text are those of its words, each with the blank in front of it.

    Added entries that are not special are found in any text before words are looked at, and may lie across them.
    """
    described = json.loads(tokenizer.to_str())
    model, steps = described["model"], _steps(described["normalizer"])
    cutter = described["pre_tokenizer"]
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in EXCLUDED)
        and bool(model.get("byte_fallback") or model.get("unk_token"))
        and BLANK in model["vocab"]
        and not any(BLANK in piece.lstrip(BLANK) for piece in model["vocab"])
        and all(step in (PREPEND, REPLACE) for step in steps)
        and (REPLACE in steps if cutter is None else _is_metaspace(cutter))
        and all(entry["special"] for entry in described["added_tokens"])
    )


def _steps(normalizer: dict | None) -> list[dict]:
    if normalizer is None:
        return []
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]


def _is_metaspace(cutter: dict) -> bool:
    return cutter["type"] == "Metaspace" and cutter["replacement"] == BLANK


def packed(ids: Sequence[int]) -> bytes:
    """Ids as the bytes of an int32 array, which join faster than anything else here."""
    return np.array(ids, np.int32).tobytes()


class _Known(dict[str, bytes]):
    """Word -> packed ids of a word that stands behind `context`, whose own ids are the first `skipped`."""

    def __init__(self, encode: Ids, check: Callable[[Sequence[int]], None], context: str, skipped: int):
        super().__init__()
        self._encode, self._check, self._context, self._skipped = encode, check, context, skipped

    def __missing__(self, word: str) -> bytes:
        ids = self._encode(self._context + word)[self._skipped :]
        self._check(ids)
        found = packed(ids)
        if len(word) <= LONGEST_WORD and len(self) < KEPT_WORDS:
            self[word] = found
        return found


class Words:
    """Ids of runs of text, which special tokens may stand between."""

    def __init__(self, encode: Ids, check: Callable[[Sequence[int]], None], mark: str):
        """`encode` gives the ids of a text, `check` raises InputError for ids that no text may have; `mark` is a text
        that becomes one token.
        """
        self._first = _Known(encode, check, "", 0)
        self._behind_special = _Known(encode, check, mark, 1)
        self._inside = _Known(encode, check, "a ", len(encode("a")))

    def encode(self, runs: Sequence[str | int]) -> list[bytes] | None:
        """Packed ids of each run; an int is a special token's id, texts are not empty.

        None where the text has to be taken as a whole: blanks stand side by side, or a run ends within a word.
        """
        if not _are_words(runs):
            return None
        ids, opening = [], self._first
        for run in runs:
            if isinstance(run, int):
                ids.append(packed([run]))
                opening = self._behind_special
                continue
            first, *words = run.split(" ")
            inside = b"".join(map(self._inside.__getitem__, words))
            ids.append(inside if opening is None else opening[first] + inside)
            opening = None
        return ids


def _are_words(runs: Sequence[str | int]) -> bool:
    """Whether each text begins with a word where it stands alone, and with a blank where it resumes from another."""
    alone = True
    for run in runs:
        if isinstance(run, str):
            if run.startswith(" ") == alone:
                return False
            alone = False
        else:
            alone = True
    text = "".join([run if isinstance(run, str) else "\0" for run in runs])
    return "  " not in text and BLANK not in text
