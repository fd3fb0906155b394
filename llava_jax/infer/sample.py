"""Choosing the next token, and knowing on the device when an answer has reached a stop string."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.data.tokenize import TextTokenizer
from llava_jax.types import InputError, Sampling


class Draw(NamedTuple):
    """How each row draws: greedily at temperature 0; `hash_B` is of its prompt."""

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    seed_B: Any
    hash_B: Any


def check_sampling(sampling: Sampling) -> None:
    """Raise InputError for the first setting that no answer can be drawn with."""
    wrong = {
        "max_new_tokens must be at least 1": sampling.max_new_tokens < 1,
        "temperature must be 0 (greedy) or positive": not 0 <= sampling.temperature < float("inf"),
        "top_p must be above 0 and at most 1": not 0 < sampling.top_p <= 1,
        "top_k must be 0 (off) or positive": sampling.top_k < 0,
        "beams must be at least 1": sampling.beams < 1,
        "beams above 1 score greedily: set temperature to 0": sampling.beams > 1 and sampling.temperature > 0,
        "seed must be from 0 to 2**32 - 1": not 0 <= sampling.seed < 2**32,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise InputError(f"sampling: {message}, got {sampling}")


def draw_of(samplings: Sequence[Sampling], hashes: Sequence[int]) -> Draw:
    """Return how rows draw; `hashes` of their prompts keep the noise of one from that of another."""
    return Draw(
        np.array([sampling.temperature for sampling in samplings], np.float32),
        np.array([sampling.top_k for sampling in samplings], np.int32),
        np.array([sampling.top_p for sampling in samplings], np.float32),
        np.array([sampling.seed for sampling in samplings], np.uint32),
        np.array(hashes, np.uint32),
    )


def filter_logits(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Return -inf for tokens outside the `top_k_B` likeliest (0: all), then outside the smallest set of mass `top_p_B`.

    The order and the rules are transformers' (TopK, then TopP renormalised over what is left); equal logits stay
    together, so that the kept set does not depend on how they happen to sort.
    """
    V = logits_BV.shape[-1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    kept_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)
    last_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)
    sorted_BV = jnp.where(sorted_BV >= last_B1, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    above_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # The most likely token always stays; at top_p 1 nothing goes, whatever the sum rounds to.
    inside_BV = (above_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    floor_B1 = jnp.min(jnp.where(inside_BV & jnp.isfinite(sorted_BV), sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)


def next_token(logits_BV: jax.Array, step_B: jax.Array, draw: Draw, is_open_B: jax.Array) -> jax.Array:
    """Draw token ids int32[B]; a row's noise comes from its seed, prompt and step, never from its neighbours.

    Nothing is sorted or drawn where no row that `is_open_B` needs it.
    """
    greedy_B = likeliest(logits_BV)
    draws_B = is_open_B & (draw.temperature_B > 0)
    filters_B = draws_B & ((draw.top_k_B > 0) | (draw.top_p_B < 1))

    def key(seed: jax.Array, prompt: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), step)

    def drawn() -> jax.Array:
        warm_BV = logits_BV / jnp.where(draws_B, draw.temperature_B, 1)[:, None]
        kept_BV = jax.lax.cond(
            jnp.any(filters_B), lambda: filter_logits(warm_BV, draw.top_k_B, draw.top_p_B), lambda: warm_BV
        )
        keys_B = jax.vmap(key)(draw.seed_B, draw.hash_B, step_B)
        token_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
        return jnp.where(draws_B, token_B, greedy_B)

    return jax.lax.cond(jnp.any(draws_B), drawn, lambda: greedy_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """Return the id int32[B] of each row's largest logit, the first of equal ones.

    XLA runs both reductions many numbers at a time on a CPU, and `jnp.argmax` one at a time.
    """
    V = logits_BV.shape[-1]
    is_best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    # V - 1: a row of NaN has an id, too.
    return jnp.min(jnp.where(is_best_BV, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def stop_table(stops: Sequence[str], stop_ids: Iterable[int], pieces: Sequence[str]) -> np.ndarray:
    """Build the automaton that reads tokens and accepts where their text completes a stop string: int16[Q + 1, V].

    Row q, column t is the state after token t in state q; a row starts in state 0 and Q is the accepting state.
    A state is the longest end of the text so far that begins a stop string (Aho-Corasick), so a stop string that
    several tokens spell is seen whatever its cut. `pieces[t]` is the text of token t; `stop_ids` accept at once.
    """
    states = ["", *sorted({stop[:size] for stop in stops for size in range(1, len(stop))})]
    number = {state: index for index, state in enumerate(states)}
    accept, alphabet = len(states), frozenset("".join(stops))

    def read(state: str, piece: str) -> int:
        for character in piece:
            text = state + character
            if any(text.endswith(stop) for stop in stops):
                return accept
            state = next(text[cut:] for cut in range(len(text) + 1) if text[cut:] in number)
        return number[state]

    table_QV = np.zeros((accept + 1, len(pieces)), np.int16)
    for token, piece in enumerate(pieces):
        if not piece:
            table_QV[:accept, token] = np.arange(accept)
        elif not alphabet.isdisjoint(piece):
            table_QV[:accept, token] = [read(state, piece) for state in states]
    table_QV[:, [token for token in stop_ids if token < len(pieces)]] = accept
    table_QV[accept] = accept
    return table_QV


# ---- text of an answer while its ids arrive ----


class StreamDecoder:
    """Text of ids that arrive one by one: never half a character, never a stop string or a beginning of one.

    `push` returns what can be shown now, `finish` the rest; `stopped` turns True at the first stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # ids[:shown] are decoded; ids[context:shown] gives the decoder the neighbour that a leading space depends on.
        self._context = self._shown = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Take one id; return new text, often empty."""
        if self.stopped:
            return ""
        self._ids.append(int(token))
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """Return what was held back; incomplete characters become U+FFFD."""
        if self.stopped:
            return ""
        text = self._take(self._new_text())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(known) :]

    def _take(self, text: str) -> str:
        if text:
            self._context = self._shown
        self._shown = len(self._ids)
        self._held += text
        found = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        cut = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


class AnswerDecoder(StreamDecoder):
    """The same, without the white space at the two ends of the answer."""

    _begun, _space = False, ""

    def push(self, token: int) -> str:
        """Take one id; return new text, often empty."""
        return self._stripped(super().push(token))

    def finish(self) -> str:
        """Return what was held back, but for white space."""
        return self._stripped(super().finish())

    def _stripped(self, text: str) -> str:
        text = self._space + (text if self._begun else text.lstrip())
        body = text.rstrip()
        self._space, self._begun = text[len(body) :], self._begun or bool(body)
        return body


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may begin `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
