"""What the device runs to answer: prompts into slots, the next ids of all slots, and beam search from one prefill."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.infer import passes
from llava_jax.infer.beam import beam_search
from llava_jax.infer.passes import Cache, empty_cache, widened
from llava_jax.infer.placed_model import PlacedModel
from llava_jax.infer.sample import Draw, draw_of, next_token
from llava_jax.models.llava import Llava, merge, unstacked_model
from llava_jax.parallel.sharding import constrain
from llava_jax.types import ModelConfig, Sampling


class Prompt(NamedTuple):
    """One question ready for the model: tokens int32[t] (images expanded) and pixels float32[n, X, Y, C].

    A LLaVA-NeXT's pixels are tiles, and `feature_index` int32[t] is a row of Batch.feature_index_BT.
    """

    tokens: np.ndarray
    pixels: np.ndarray
    feature_index: np.ndarray | None = None


def question_message(text: str, images: Iterable[Any]) -> dict[str, Any]:
    """Return the user's message that shows images and asks."""
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def bucket(length: int) -> int:
    """Pad `length` tokens to a size: a multiple of 16, or of a quarter of the next power of two.

    It bounds the compilations: two sizes for twice the length.
    """
    unit = max(16, row_bucket(length) // 4)
    return max(1, -(-length // unit)) * unit


def row_bucket(rows: int) -> int:
    """Return the next power of two."""
    return 1 << max(0, rows - 1).bit_length()


# ---- images ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config", donate_argnames="pool_CPD")
def encode_images(
    params: dict[str, Any], pool_CPD: jax.Array, pixels_NXYC: Any, entry_N: Any, *, config: ModelConfig
) -> jax.Array:
    """Write the features of images into entries of the pool; an entry that it does not have is dropped."""
    features_NPD = unstacked_model(config, params).image_features(pixels_NXYC[:, None])
    return constrain(pool_CPD.at[entry_N].set(features_NPD.astype(pool_CPD.dtype)), *("activation",) * 3)


# ---- prefill --------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Right-padded prompts, or what of them follows a prefix that is in the cache; filling rows are one token long.

    `feature_BT` is the row of all features in the pool that an image token takes, -1 for image_newline (None: no image
    in any row). `start_B` tokens of each row come first, in the slot `source_B` (None: nothing does).
    """

    tokens_BT: Any
    length_B: Any
    feature_BT: Any = None
    start_B: Any = None
    source_B: Any = None


class Row(NamedTuple):
    """A prompt to be run from token `start` on, the entries of its images (or tiles) in the pool, if it needs them,
    and the slot that has what is before."""

    prompt: Prompt
    entries: Sequence[int] = ()
    start: int = 0
    source: int = 0


def collate(given: Sequence[Row], config: ModelConfig, rows: int) -> Inputs:
    """Return the padded numpy arrays of `rows` rows, filling ones included."""
    tokens_BT = np.zeros((rows, bucket(max(len(row.prompt.tokens) - row.start for row in given))), np.int32)
    feature_BT, length_B = np.zeros_like(tokens_BT), np.ones(rows, np.int32)
    start_B, source_B = np.zeros((2, rows), np.int32)
    for index, row in enumerate(given):
        tokens = row.prompt.tokens[row.start :]
        tokens_BT[index, : len(tokens)], length_B[index] = tokens, len(tokens)
        start_B[index], source_B[index] = row.start, row.source
        if row.entries:
            feature_BT[index, : len(tokens)] = _features(row, config)[row.start :]
    has_images, follows = any(row.entries for row in given), any(row.start for row in given)
    inputs = Inputs(tokens_BT, length_B, feature_BT if has_images else None)
    return inputs._replace(start_B=start_B, source_B=source_B) if follows else inputs


def image_index(prompt: Prompt, config: ModelConfig) -> np.ndarray:
    """Return which feature of the prompt's images (image * P + patch) each token takes: -1 for image_newline, -2 for
    a token of text."""
    is_image_T = prompt.tokens == config.image_token_id
    in_order = np.cumsum(is_image_T) - 1 if prompt.feature_index is None else prompt.feature_index
    return np.where(is_image_T, in_order, -2)


def _features(row: Row, config: ModelConfig) -> np.ndarray:
    index_T, P = image_index(row.prompt, config), config.vision.patches
    return np.where(index_T < 0, index_T.clip(-1), np.array(row.entries)[index_T.clip(0) // P] * P + index_T % P)


@functools.partial(jax.jit, static_argnames="config")
def prefill(
    params: dict[str, Any],
    inputs: Inputs,
    pool_CPD: jax.Array | None,
    prefix: Cache | None = None,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, Cache]:
    """Return logits float32[B, V] after each row's last token, and its cache: `prefix` with the row, else T slots with
    the row alone."""
    model = unstacked_model(config, params)
    B, T = inputs.tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    x_BTD = model.llm.embed(inputs.tokens_BT)
    if inputs.feature_BT is not None and pool_CPD is not None:
        taken_BTD = pool_CPD.reshape(-1, pool_CPD.shape[-1])[jnp.maximum(inputs.feature_BT, 0)]
        newline_D = model.projector.image_newline[...] if config.pinpoints else None
        index_BT = jnp.where(inputs.feature_BT < 0, -1, positions_BT)
        x_BTD = merge(x_BTD, taken_BTD, inputs.tokens_BT == config.image_token_id, index_BT, newline_D)
    last_B = inputs.length_B - 1
    if prefix is None:
        segment_ids_BT = (positions_BT < inputs.length_B[:, None]).astype(jnp.int32)
        hidden_B1D, cache = passes.prefill(model.llm, x_BTD, positions_BT, segment_ids_BT, last_B=last_B)
    else:
        hidden_B1D, cache = passes.extend(model.llm, x_BTD, prefix, last_B=last_B)
        cache = cache._replace(length_B=prefix.length_B + inputs.length_B)
    return passes.logits(model.llm, hidden_B1D)[:, 0], cache


def decode_step(model: Llava, token_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Return logits float32[B, V] after one more token a row."""
    hidden_B1D, cache = passes.extend(model.llm, model.llm.embed(token_B[:, None]), cache)
    return passes.logits(model.llm, hidden_B1D)[:, 0], cache._replace(length_B=cache.length_B + 1)


# ---- slots ----------------------------------------------------------------------------------------------------------


class Slots(NamedTuple):
    """The answers under way, a row each: `step_B` ids are drawn, of at most `limit_B`; the last one, `last_B`, is not
    in the cache yet. A row that is done, or was never used, draws nothing."""

    cache: Any
    last_B: Any
    step_B: Any
    limit_B: Any
    stop_B: Any
    done_B: Any
    draw: Draw


class Drawn(NamedTuple):
    """What a call drew for each row: ids (-1: none), and where they are asked for the logarithm of each id's
    probability, and the likeliest ids with theirs."""

    ids_BM: Any
    logprob_BM: Any = None
    top_BMN: Any = None
    top_logprob_BMN: Any = None


def _pinned(slots: Slots) -> Slots:
    """Keep the layout over the mesh from call to call."""
    heads = "batch", "kv_heads", "length", "head_dim"
    return jax.tree.map(lambda x: constrain(x, *heads[: x.ndim]), slots)


@functools.partial(jax.jit, static_argnames=("config", "rows", "size"))
def empty_slots(*, config: ModelConfig, rows: int, size: int) -> Slots:
    """Return `rows` slots for `size` tokens each, none of them in use."""
    cache = empty_cache(config.llm, rows, size, config.dtype)
    zeros_B, reals_B, bits_B = (jnp.zeros(rows, dtype) for dtype in (jnp.int32, jnp.float32, jnp.uint32))
    draw = Draw(reals_B, zeros_B, reals_B, bits_B, bits_B)
    return _pinned(Slots(cache, zeros_B, zeros_B, zeros_B, zeros_B, jnp.ones(rows, bool), draw))


@functools.partial(jax.jit, static_argnames="size")
def resized(slots: Slots, *, size: int) -> Slots:
    """Return the slots with room for more tokens each."""
    return _pinned(slots._replace(cache=widened(slots.cache, size)))


def _advance(slots: Slots, logits_BV: jax.Array, stops_QV: jax.Array, top: int) -> tuple[Slots, Drawn]:
    """Draw one id for each row that is not done; the ids drawn are [B] here."""
    token_B = next_token(logits_BV, slots.step_B, slots.draw, ~slots.done_B)
    drawn = Drawn(jnp.where(slots.done_B, -1, token_B))
    if top:
        logprob_BV = jax.nn.log_softmax(logits_BV)
        values_BN, ids_BN = jax.lax.top_k(logprob_BV, min(top, logits_BV.shape[-1]))
        drawn = Drawn(drawn.ids_BM, jnp.take_along_axis(logprob_BV, token_B[:, None], axis=1)[:, 0], ids_BN, values_BN)
    stop_B = jnp.where(slots.done_B, slots.stop_B, stops_QV[slots.stop_B, token_B].astype(jnp.int32))
    step_B = slots.step_B + ~slots.done_B
    done_B = slots.done_B | (stop_B == stops_QV.shape[0] - 1) | (step_B >= slots.limit_B)
    return slots._replace(last_B=token_B, step_B=step_B, stop_B=stop_B, done_B=done_B), drawn


@functools.partial(jax.jit, static_argnames=("config", "size"), donate_argnames="slots")
def admit(
    params: dict[str, Any],
    slots: Slots,
    pool_CPD: jax.Array | None,
    inputs: Inputs,
    slot_R: Any,
    *,
    config: ModelConfig,
    size: int,
) -> tuple[Slots, jax.Array]:
    """Prefill R prompts into the cache of the slots `slot_R`; return the slots and the logits after each prompt.

    Args:
        params: of the model.
        slots: all slots; donated.
        pool_CPD: features of images, for `inputs.feature_BT`.
        inputs: the prompts.
        slot_R: int32, where each goes; a row for a slot that there is not is dropped.
        config: of the model.
        size: of the longest prompt, its prefix included, in a bucket: so much of each prefix is copied.
    """
    prefix = None
    if inputs.start_B is not None:
        prefix = slots.cache.map(lambda x: x[inputs.source_B, :, :size], inputs.start_B)
    logits_RV, rows = prefill(params, inputs, pool_CPD, prefix, config=config)
    layers = jax.tree.map(lambda old, new: old.at[slot_R, :, :size].set(new), slots.cache.layers, rows.layers)
    cache = Cache(layers, slots.cache.length_B.at[slot_R].set(rows.length_B))
    return _pinned(slots._replace(cache=cache)), logits_RV


# A program of its own: it takes as long to compile as a prefill, of which there is one for each length.
@functools.partial(jax.jit, static_argnames="top", donate_argnames="slots")
def draw_first(
    slots: Slots, logits_RV: jax.Array, limit_R: Any, draw: Draw, slot_R: Any, stops_QV: jax.Array, *, top: int
) -> tuple[Slots, Drawn, jax.Array]:
    """Draw the first id of each answer that `admit` has made ready.

    Args:
        slots: all slots; donated.
        logits_RV: of `admit`.
        limit_R: int32, the most ids each may be answered with.
        draw: how each row draws.
        slot_R: as `admit` had them.
        stops_QV: the automaton of the stops.
        top: how many of the likeliest ids are returned with each; 0: no probabilities.

    Returns:
        The slots, what was drawn (M is 1), and whether each row has reached a stop, bool[R].
    """
    zeros_R = jnp.zeros_like(limit_R)
    begun, drawn = _advance(
        Slots(None, zeros_R, zeros_R, limit_R, zeros_R, zeros_R > 0, draw), logits_RV, stops_QV, top
    )
    put = jax.tree.map(lambda old, new: old.at[slot_R].set(new), slots._replace(cache=None), begun)
    stopped_R = begun.stop_B == stops_QV.shape[0] - 1
    return _pinned(put._replace(cache=slots.cache)), jax.tree.map(lambda x: x[:, None], drawn), stopped_R


@functools.partial(jax.jit, static_argnames=("config", "steps", "top"), donate_argnames="slots")
def decode(
    params: dict[str, Any],
    slots: Slots,
    stops_QV: jax.Array,
    keep_B: Any,
    enough: Any,
    most: Any,
    *,
    config: ModelConfig,
    steps: int,
    top: int,
) -> tuple[Slots, Drawn, jax.Array]:
    """Draw up to `most` more ids for every slot that is not done, without leaving the device.

    Args:
        params: of the model.
        slots: all slots; donated.
        stops_QV: the automaton of the stops.
        keep_B: bool, False for slots that draw no more.
        enough: int32, ends the call once no more than so many slots draw.
        most: int32, ids a slot, at most `steps`.
        config: of the model.
        steps: ids a slot that there is room for in what is returned.
        top: as in `draw_first`.

    Returns:
        The slots, what was drawn, and whether each slot has reached a stop, bool[B].
    """
    model = unstacked_model(config, params)
    slots = slots._replace(done_B=slots.done_B | ~keep_B)
    B, like = slots.last_B.shape[0], jax.eval_shape(lambda: _advance(slots, _no_logits(slots, stops_QV), stops_QV, top))
    out = jax.tree.map(lambda x: jnp.full((B, steps, *x.shape[1:]), -1, x.dtype), like[1])

    def more(carry: tuple[Slots, Drawn, jax.Array]) -> jax.Array:
        slots, _, step = carry
        drawing = jnp.sum(~slots.done_B)
        # One step at least: all slots are taken or nobody waits.
        return (step < most) & (drawing > jnp.where(step == 0, 0, enough))

    def body(carry: tuple[Slots, Drawn, jax.Array]) -> tuple[Slots, Drawn, jax.Array]:
        slots, out, step = carry
        logits_BV, cache = decode_step(model, slots.last_B, slots.cache)
        # A slot that is done stays as long as it is.
        length_B = jnp.where(slots.done_B, slots.cache.length_B, cache.length_B)
        slots, drawn = _advance(slots._replace(cache=cache._replace(length_B=length_B)), logits_BV, stops_QV, top)
        return slots, jax.tree.map(lambda all, new: all.at[:, step].set(new), out, drawn), step + 1

    slots, out, _ = jax.lax.while_loop(more, body, (slots, out, jnp.int32(0)))
    return _pinned(slots), out, slots.stop_B == stops_QV.shape[0] - 1


def _no_logits(slots: Slots, stops_QV: jax.Array) -> jax.Array:
    return jnp.zeros((slots.last_B.shape[0], stops_QV.shape[1]), jnp.float32)


# ---- beam search ----------------------------------------------------------------------------------------------------


def beam_ids(
    placed: PlacedModel, inputs: Inputs, pool_CPD: jax.Array | None, limit_B: Any, beams: int
) -> list[list[int]]:
    """Return the ids that beam search answers each row with, at most `limit_B` of them."""
    size = bucket(int(np.max(limit_B)))
    logits_BV, cache = prefill(placed.params, inputs, pool_CPD, config=placed.config)
    out_BM = beam_search(
        placed.params,
        logits_BV,
        cache,
        limit_B,
        placed.stops_QV,
        config=placed.config,
        step=decode_step,
        beams=beams,
        size=size,
    )
    return [[int(token) for token in row if token >= 0] for row in np.asarray(out_BM)]


# ---- a batch at once ------------------------------------------------------------------------------------------------


def greedy_ids(placed: PlacedModel, prompts: Sequence[Prompt], limit: int) -> list[list[int]]:
    """Return the ids that greedy decoding answers each prompt with, at most `limit` (2 or more) of them.

    All are answered together, by the programs of the engine. The processes of a mesh call it with the same prompts.
    """
    config, rows = placed.config, placed.rows(len(prompts))
    pixels_NXYC = np.concatenate([prompt.pixels for prompt in prompts])
    ends = np.cumsum([len(prompt.pixels) for prompt in prompts]).tolist()
    given = [Row(prompt, range(end - len(prompt.pixels), end)) for prompt, end in zip(prompts, ends, strict=True)]
    pool_CPD = None
    if ends[-1]:
        size = placed.rows(row_bucket(ends[-1]))
        pixels_NXYC = np.pad(pixels_NXYC, ((0, size - ends[-1]), (0, 0), (0, 0), (0, 0)))
        pool_CPD = placed.replicate(np.zeros((size, config.vision.patches, config.llm.width), jnp.dtype(config.dtype)))
        shown = placed.place((pixels_NXYC, np.arange(size, dtype=np.int32)))
        pool_CPD = encode_images(placed.params, pool_CPD, *shown, config=config)
    inputs, limit_R = collate(given, config, rows), np.zeros(rows, np.int32)
    limit_R[: len(prompts)] = limit
    slots = empty_slots(config=config, rows=rows, size=bucket(inputs.tokens_BT.shape[1] + limit))
    draw, slot_R = draw_of([Sampling()] * rows, [0] * rows), np.arange(rows, dtype=np.int32)
    inputs, limit_R, draw, slot_R = placed.place((inputs, limit_R, draw, slot_R))
    slots, logits_RV = admit(
        placed.params, slots, pool_CPD, inputs, slot_R, config=config, size=inputs.tokens_BT.shape[1]
    )
    slots, first, _ = draw_first(slots, logits_RV, limit_R, draw, slot_R, placed.stops_QV, top=0)
    keep_R = placed.place(np.ones(rows, bool))
    _, rest, _ = decode(
        placed.params,
        slots,
        placed.stops_QV,
        keep_R,
        np.int32(0),
        np.int32(limit - 1),
        config=config,
        steps=limit - 1,
        top=0,
    )
    first_R1, rest_RM = jax.device_get(placed.replicate((first.ids_BM, rest.ids_BM)))
    ids_RM = np.concatenate([first_R1, rest_RM], axis=1)[: len(prompts)]
    return [row[row >= 0].tolist() for row in ids_RM]
