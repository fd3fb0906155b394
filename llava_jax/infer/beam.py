"""Beam search on the device, scored and stopped as transformers does by default.

Rules (transformers' `_beam_search`, length_penalty 1.0, early_stopping False): a beam's score is the sum of its
log-probabilities, a finished one's that sum over its length (the stopping token included); of the best
continuations only the first `beams` may finish; a row is settled once the score of its best running beam, over the
length so far, does not beat its worst finished one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.infer.passes import Cache, widened
from llava_jax.models.llava import Llava, unstacked_model
from llava_jax.types import ModelConfig

# "Impossible", as transformers has it: finite, so that impossible beams still have an order.
NEVER = -1.0e9


class Beams(NamedTuple):
    """W beams a row: running ones and the best finished ones; ids are -1 where nothing was drawn."""

    step: jax.Array
    running_BWM: jax.Array
    running_score_BW: jax.Array
    running_stop_BW: jax.Array
    finished_BWM: jax.Array
    finished_score_BW: jax.Array
    is_finished_BW: jax.Array
    open_B: jax.Array
    logits_RV: jax.Array
    cache: Cache


def _pick(x: jax.Array, index_BK: jax.Array) -> jax.Array:
    """Return x[b, index[b, k]] for every row."""
    return jnp.take_along_axis(x, index_BK.reshape(index_BK.shape + (1,) * (x.ndim - 2)), axis=1)


def _begin(logits_BV: jax.Array, cache: Cache, limit_B: jax.Array, beams: int, size: int) -> Beams:
    """Start all beams of a row from its prompt, with only the first one possible, so that they differ afterwards."""
    B, W = logits_BV.shape[0], beams
    ids_BWM = jnp.full((B, W, size), -1, jnp.int32)
    cache = widened(cache, cache.size + size)
    return Beams(
        step=jnp.int32(0),
        running_BWM=ids_BWM,
        running_score_BW=jnp.full((B, W), NEVER).at[:, 0].set(0.0),
        running_stop_BW=jnp.zeros((B, W), jnp.int32),
        finished_BWM=ids_BWM,
        finished_score_BW=jnp.full((B, W), NEVER),
        is_finished_BW=jnp.zeros((B, W), bool),
        open_B=limit_B > 0,
        logits_RV=jnp.repeat(logits_BV, W, axis=0),
        cache=cache.map(lambda x: jnp.repeat(x, W, axis=0), jnp.repeat(cache.length_B, W)),
    )


def _finish(state: Beams, ids_BKM: jax.Array, score_BK: jax.Array, ends_BK: jax.Array) -> Beams:
    """Merge the continuations that end among the row's first W into its finished beams; keep the W best."""
    W = state.running_score_BW.shape[1]
    ends_BK = ends_BK & (jnp.arange(ends_BK.shape[1]) < W)
    score_BK = score_BK / (state.step + 1).astype(jnp.float32)
    score_BK = score_BK + NEVER * ~ends_BK + NEVER * ~state.open_B[:, None]
    score_BW, best_BW = jax.lax.top_k(jnp.concatenate([state.finished_score_BW, score_BK], axis=1), W)
    return state._replace(
        finished_BWM=_pick(jnp.concatenate([state.finished_BWM, ids_BKM], axis=1), best_BW),
        finished_score_BW=score_BW,
        is_finished_BW=_pick(jnp.concatenate([state.is_finished_BW, ends_BK], axis=1), best_BW),
    )


def _advance(state: Beams, limit_B: jax.Array, stops_QV: jax.Array, keep: int) -> tuple[Beams, jax.Array, jax.Array]:
    """Add a token to every beam; return the state, each running beam's token int32[B, W] and the beam it grew from."""
    B, W, _ = state.running_BWM.shape
    V = state.logits_RV.shape[-1]
    score_BWV = jax.nn.log_softmax(state.logits_RV).reshape(B, W, V) + state.running_score_BW[..., None]
    score_BK, flat_BK = jax.lax.top_k(score_BWV.reshape(B, W * V), keep)
    parent_BK, token_BK = flat_BK // V, flat_BK % V
    ids_BKM = _pick(state.running_BWM, parent_BK).at[:, :, state.step].set(token_BK)
    stop_BK = stops_QV[_pick(state.running_stop_BW, parent_BK), token_BK].astype(jnp.int32)
    ends_BK = (stop_BK == stops_QV.shape[0] - 1) | (state.step + 1 >= limit_B)[:, None]

    score_BW, next_BW = jax.lax.top_k(score_BK + NEVER * ends_BK, W)
    state = _finish(state, ids_BKM, score_BK, ends_BK)
    step = state.step + 1
    best_B = score_BW[:, 0] / step.astype(jnp.float32)
    worst_B = jnp.where(state.is_finished_BW, state.finished_score_BW.min(axis=1, keepdims=True), NEVER).min(axis=1)
    state = state._replace(
        step=step,
        running_BWM=_pick(ids_BKM, next_BW),
        running_score_BW=score_BW,
        running_stop_BW=_pick(stop_BK, next_BW),
        open_B=state.open_B & (best_B > worst_B) & (step < limit_B),
    )
    return state, _pick(token_BK, next_BW), _pick(parent_BK, next_BW)


@functools.partial(jax.jit, static_argnames=("config", "step", "beams", "size"))
def beam_search(
    params: dict[str, Any],
    logits_BV: jax.Array,
    cache: Cache,
    limit_B: jax.Array,
    stops_QV: jax.Array,
    *,
    config: ModelConfig,
    step: Callable[[Llava, jax.Array, Cache], tuple[jax.Array, Cache]],
    beams: int,
    size: int,
) -> jax.Array:
    """Return ids int32[B, size] of each row's best beam (-1 after its end), from the logits and cache of its prefill.

    `limit_B` is the most ids a row may draw (0: none, the row is filling); `stops_QV` is sample.stop_table's;
    `step(model, token_R, cache)` is generate.decode_step, over R = B * beams rows.
    """
    model = unstacked_model(config, params)
    B, W, V = logits_BV.shape[0], beams, logits_BV.shape[1]
    # Enough that W can continue when every beam is also continued by the end token and by one that completes a stop.
    keep = min(W * V, 3 * W)

    def grow(state: Beams) -> Beams:
        state, token_BW, parent_BW = _advance(state, limit_B, stops_QV, keep)
        rows_R = (jnp.arange(B)[:, None] * W + parent_BW).reshape(-1)
        cache = state.cache.map(lambda x: x[rows_R], state.cache.length_B)
        logits_RV, cache = step(model, token_BW.reshape(-1), cache)
        return state._replace(logits_RV=logits_RV, cache=cache)

    state = jax.lax.while_loop(lambda state: jnp.any(state.open_B), grow, _begin(logits_BV, cache, limit_B, W, size))
    return state.finished_BWM[:, 0]
