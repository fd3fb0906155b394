"""Count what answers cost, and stop before the limit."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.synthesize.teacher import Message, Reply, estimate_tokens

UNBOUNDED = 4096  # tokens of the longest answer, where a request does not limit it


class BudgetSpent(Exception):
    """The next answer could cost more than is left; its text says what the limit is."""


@dataclasses.dataclass(frozen=True)
class Prices:
    """The price of a million prompt tokens and of a million completion tokens."""

    tokens_in: float
    tokens_out: float

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


def longest_answer(settings: Mapping[str, Any]) -> int:
    """Return how many tokens an answer can have at most, as its request says."""
    return int(settings.get("max_completion_tokens") or settings.get("max_tokens") or UNBOUNDED)


def metered(reply: Reply, asked: int) -> Reply:
    """Return the reply with its token counts; where the endpoint gives none, `asked` and an estimate from its text."""
    if reply.tokens_in or reply.tokens_out:
        return reply
    return dataclasses.replace(reply, tokens_in=asked, tokens_out=estimate_tokens([reply.text]))


class Budget:
    """Tokens and money spent, counted from `tokens_in` and `tokens_out` of earlier runs; thread-safe.

    The most that a request may cost is reserved before it is sent, so that requests in flight cannot pass the limit
    together. A limit of 0 is none.
    """

    def __init__(self, tokens: int, money: float, prices: Prices | None, tokens_in: int, tokens_out: int):
        self.tokens_in, self.tokens_out = tokens_in, tokens_out
        self._tokens, self._money = tokens, money
        self._prices = prices or Prices(0.0, 0.0)
        self._reserved_in = self._reserved_out = 0
        self._changed = threading.Condition()

    @property
    def money(self) -> float:
        return self._prices.cost(self.tokens_in, self.tokens_out)

    def reserve(self, messages: Sequence[Message], settings: Mapping[str, Any], wait: bool = True) -> tuple[int, int]:
        """Reserve the most that a request may cost. Raises BudgetSpent when it is more than is left.

        Waits while other requests are in flight that may cost less than was reserved for them, unless `wait` is False,
        as where all are sent at once.
        """
        # Three bytes a token is cautious: the limit holds for languages that need more tokens than English.
        asked = sum(8 + len(message["content"].encode("utf-8", "replace")) // 3 for message in messages)
        answered = longest_answer(settings)
        with self._changed:
            while not self._fits(asked, answered):
                if not wait or not self._reserved_in:
                    limits = [f"{self._tokens} tokens"] if self._tokens else []
                    limits += [f"{self._money:g} USD"] if self._money else []
                    raise BudgetSpent(f"the next answer may pass the budget of {' and '.join(limits)}")
                self._changed.wait()
            self._reserved_in += asked
            self._reserved_out += answered
        return asked, answered

    def settle(self, reserved: tuple[int, int], tokens_in: int = 0, tokens_out: int = 0) -> None:
        """Release what was reserved for a request and count what it has cost."""
        with self._changed:
            self._reserved_in -= reserved[0]
            self._reserved_out -= reserved[1]
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out
            self._changed.notify_all()

    def _fits(self, asked: int, answered: int) -> bool:
        tokens_in = self.tokens_in + self._reserved_in + asked
        tokens_out = self.tokens_out + self._reserved_out + answered
        within = not self._tokens or tokens_in + tokens_out <= self._tokens
        return within and (not self._money or self._prices.cost(tokens_in, tokens_out) <= self._money)
