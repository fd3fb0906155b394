"""Answers as token ids: prefill a batch of prompts, then decode it on the device until every row has stopped."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_jax.infer.beam import beam_search
from llava_jax.infer.sample import Draw, check_sampling, draw_of, mode_of, next_token
from llava_jax.models.llama import Cache, empty_cache
from llava_jax.models.llava import Llava
from llava_jax.parallel.sharding import batch_sharding, replicated
from llava_jax.types import InputError, ModelConfig, Sampling


class Prompt(NamedTuple):
    """One question ready for the model: tokens int32[t] (images expanded) and pixels float32[n, X, Y, C].

    A LLaVA-NeXT's pixels are tiles, and `feature_index` int32[t] is a row of Batch.feature_index_BT.
    """

    tokens: np.ndarray
    pixels: np.ndarray
    feature_index: np.ndarray | None = None


class Model(Protocol):
    """What chat and batch_generate need of `llava_jax.Llava`."""

    @property
    def name(self) -> str: ...
    @property
    def about(self) -> dict[str, Any]: ...
    @property
    def stream(self) -> Callable[..., Iterator[str]]: ...
    def rows(self, batch_size: int) -> int: ...
    def length(self, messages: Sequence[dict[str, Any]]) -> int: ...
    def prompt(self, messages: Sequence[dict[str, Any]]) -> Prompt: ...
    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, rows: int) -> list[str]: ...


def question_message(text: str, images: Iterable[Any]) -> dict[str, Any]:
    """Return the user's message that shows images and asks."""
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


class Inputs(NamedTuple):
    """A padded batch of prompts; a row with `length_B` 0 is filling and draws nothing."""

    tokens_BT: Any
    length_B: Any
    pixels_BNXYC: Any
    image_mask_BN: Any
    hash_B: Any
    feature_index_BT: Any = None


class Decoding(NamedTuple):
    """A batch being answered: `out_BM` holds the ids so far (-1 after the end), `step` how many of them were drawn."""

    out_BM: jax.Array
    step: jax.Array
    last_B: jax.Array
    stop_B: jax.Array
    done_B: jax.Array
    limit_B: jax.Array
    keys_B: jax.Array
    cache: Cache


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model that answers: graph, weights, the automaton of its stops (`sample.stop_table`) and, over several
    devices, the mesh its batches are split over."""

    graphdef: nnx.GraphDef
    params: dict[str, Any]
    config: ModelConfig
    stops_QV: jax.Array
    mesh: jax.sharding.Mesh | None = None


def bucket(length: int) -> int:
    """Pad `length` tokens to a size: multiples of 64 up to 512, then of 256, which bounds the compilations."""
    unit = 64 if length <= 512 else 256
    return max(1, -(-length // unit)) * unit


def row_bucket(rows: int) -> int:
    """Return the padded size for `rows` rows or images: the next power of two."""
    return 1 << max(0, rows - 1).bit_length()


def collate(prompts: Sequence[Prompt], rows: int) -> Inputs:
    """Return the right-padded numpy batch of `rows` rows; filling rows have length 0."""
    tokens_BT = np.zeros((rows, bucket(max(len(prompt.tokens) for prompt in prompts))), np.int32)
    length_B, hash_B = np.zeros(rows, np.int32), np.zeros(rows, np.uint32)
    images = max(len(prompt.pixels) for prompt in prompts)
    shape = (rows, row_bucket(images), *prompts[0].pixels.shape[1:])
    pixels_BNXYC = np.zeros(shape, np.float32) if images else None
    image_mask_BN = np.zeros(shape[:2], bool) if images else None
    feature_index_BT = None if prompts[0].feature_index is None else np.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt.tokens)] = prompt.tokens
        length_B[row] = len(prompt.tokens)
        if feature_index_BT is not None:
            feature_index_BT[row, : len(prompt.tokens)] = prompt.feature_index
        hash_B[row] = zlib.crc32(prompt.pixels.tobytes(), zlib.crc32(prompt.tokens.tobytes()))
        if pixels_BNXYC is not None and image_mask_BN is not None:
            pixels_BNXYC[row, : len(prompt.pixels)] = prompt.pixels
            image_mask_BN[row, : len(prompt.pixels)] = True
    return Inputs(tokens_BT, length_B, pixels_BNXYC, image_mask_BN, hash_B, feature_index_BT)


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "size"))
def prefill(
    params: dict[str, Any], inputs: Inputs, *, graphdef: nnx.GraphDef, config: ModelConfig, size: int
) -> tuple[jax.Array, Cache]:
    """Return logits float32[B, V] after each row's last token, and a cache with `size` slots a row."""
    model: Llava = nnx.merge(graphdef, params)
    B, T = inputs.tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    # A filling row counts as one token long: attention over nothing would be NaN.
    length_B = jnp.maximum(inputs.length_B, 1)
    segment_ids_BT = (positions_BT < length_B[:, None]).astype(jnp.int32)
    features_BPD = None
    if inputs.pixels_BNXYC is not None:
        features_BPD = model.image_features(inputs.pixels_BNXYC, inputs.image_mask_BN)
    x_BTD = model.embed_and_merge(inputs.tokens_BT, features_BPD, inputs.feature_index_BT)
    cache = empty_cache(config.llm, B, size, config.dtype)
    hidden_BTD, cache = model.llm.prefill(x_BTD, positions_BT, segment_ids_BT, cache)
    last_B1D = jnp.take_along_axis(hidden_BTD, length_B[:, None, None] - 1, axis=1)
    return model.llm.logits(last_B1D)[:, 0], cache


def decode_step(model: Llava, token_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Return logits float32[B, V] after one more token a row."""
    hidden_B1D, cache = model.llm.decode(model.llm.embed(token_B[:, None]), cache)
    return model.llm.logits(hidden_B1D)[:, 0], cache


def _advance(state: Decoding, logits_BV: jax.Array, stops_QV: jax.Array, draw: Draw, mode: str) -> Decoding:
    token_B = next_token(logits_BV, state.keys_B, state.step, draw, mode)
    out_BM = state.out_BM.at[:, state.step].set(jnp.where(state.done_B, -1, token_B))
    stop_B = jnp.where(state.done_B, state.stop_B, stops_QV[state.stop_B, token_B].astype(jnp.int32))
    step = state.step + 1
    done_B = state.done_B | (stop_B == stops_QV.shape[0] - 1) | (step >= state.limit_B)
    return state._replace(out_BM=out_BM, step=step, last_B=token_B, stop_B=stop_B, done_B=done_B)


@functools.partial(jax.jit, static_argnames=("mode", "size"))
def begin(
    logits_BV: jax.Array,
    cache: Cache,
    limit_B: jax.Array,
    hash_B: jax.Array,
    seed: jax.Array,
    stops_QV: jax.Array,
    draw: Draw,
    *,
    mode: str,
    size: int,
) -> Decoding:
    """Return the state after the first token; it holds `size` ids, and a row with limit 0 is done from the start."""
    B = logits_BV.shape[0]
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), hash_B)
    zeros_B = jnp.zeros(B, jnp.int32)
    out_BM = jnp.full((B, size), -1, jnp.int32)
    state = Decoding(out_BM, jnp.int32(0), zeros_B, zeros_B, limit_B == 0, limit_B, keys_B, cache)
    return _advance(state, logits_BV, stops_QV, draw, mode)


@functools.partial(jax.jit, static_argnames=("graphdef", "mode"), donate_argnames="state")
def decode(
    params: dict[str, Any],
    state: Decoding,
    stops_QV: jax.Array,
    draw: Draw,
    until: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    mode: str,
) -> Decoding:
    """Decode until every row is done or `until` ids are drawn, without leaving the device."""
    model: Llava = nnx.merge(graphdef, params)

    def more(state: Decoding) -> jax.Array:
        return ~jnp.all(state.done_B) & (state.step < until)

    def body(state: Decoding) -> Decoding:
        logits_BV, cache = decode_step(model, state.last_B, state.cache)
        return _advance(state._replace(cache=cache), logits_BV, stops_QV, draw, mode)

    return jax.lax.while_loop(more, body, state)


def _place(engine: Engine, tree: Any) -> Any:
    """Place rows over the devices of the mesh where they divide evenly; without a mesh, on the default device."""
    if engine.mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    even = all(leaf.shape[0] % engine.mesh.size == 0 for leaf in jax.tree.leaves(tree))
    return jax.device_put(tree, batch_sharding(engine.mesh) if even else replicated(engine.mesh))


def _prefilled(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, rows: int
) -> tuple[jax.Array, Cache, jax.Array, jax.Array, int]:
    """Return (logits [B, V], cache, limit_B, hash_B, slots for ids) of a batch before its first id."""
    inputs, slots = collate(prompts, rows), bucket(sampling.max_new_tokens)
    left_B = engine.config.llm.max_positions - inputs.length_B
    if np.any(left_B < 1):
        raise InputError(
            f"prompt of {int(inputs.length_B.max())} tokens (image tokens included), but this model holds "
            f"{engine.config.llm.max_positions} with room for an answer: shorten the text or give fewer images"
        )
    # A filling row draws nothing.
    limit_B = np.where(inputs.length_B > 0, np.minimum(sampling.max_new_tokens, left_B), 0).astype(np.int32)
    inputs, limit_B = _place(engine, (inputs, limit_B))
    size = inputs.tokens_BT.shape[1] + slots
    logits_BV, cache = prefill(engine.params, inputs, graphdef=engine.graphdef, config=engine.config, size=size)
    return logits_BV, cache, limit_B, inputs.hash_B, slots


def _begin(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, rows: int) -> tuple[Decoding, Draw, str]:
    logits_BV, cache, limit_B, hash_B, slots = _prefilled(engine, prompts, sampling, rows)
    draw, mode, seed = draw_of(sampling), mode_of(sampling), jnp.uint32(sampling.seed)
    state = begin(logits_BV, cache, limit_B, hash_B, seed, engine.stops_QV, draw, mode=mode, size=slots)
    return state, draw, mode


def generate_ids(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, rows: int | None = None
) -> list[list[int]]:
    """Return the ids each prompt is answered with, the id that ended the answer included.

    A row's answer is a function of its prompt and `sampling` alone: neighbours, batch size and padding leave it as
    it is, also when drawing (the key is `seed` folded with a hash of the prompt). `rows` fixes the batch shape.
    Raises InputError for a sampling nothing can be drawn with and for a prompt that leaves no position for an answer.
    """
    check_sampling(sampling)
    rows = row_bucket(len(prompts)) if rows is None else rows
    params, graphdef, stops_QV, beams = engine.params, engine.graphdef, engine.stops_QV, sampling.beams
    if beams > 1:
        logits_BV, cache, limit_B, _, slots = _prefilled(engine, prompts, sampling, rows)
        out_BM = beam_search(
            params, logits_BV, cache, limit_B, stops_QV, graphdef=graphdef, step=decode_step, beams=beams, size=slots
        )
    else:
        state, draw, mode = _begin(engine, prompts, sampling, rows)
        until = jnp.int32(sampling.max_new_tokens)
        out_BM = decode(params, state, stops_QV, draw, until, graphdef=graphdef, mode=mode).out_BM
    return [[int(token) for token in row if token >= 0] for row in np.asarray(out_BM)[: len(prompts)]]


def stream_ids(engine: Engine, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
    """Yield the ids of one answer, each as soon as it is drawn: those of `generate_ids` for the same prompt."""
    check_sampling(sampling)
    if sampling.beams > 1:
        raise InputError("beam search knows its answer only at the end and cannot be streamed: set beams to 1")
    state, draw, mode = _begin(engine, [prompt], sampling, rows=1)
    step, done = 1, False
    while not done:
        drawn, finished = jax.device_get((state.last_B, state.done_B))
        yield int(drawn[0])
        step, done = step + 1, bool(finished[0])
        if not done:
            until = jnp.int32(step)
            state = decode(engine.params, state, engine.stops_QV, draw, until, graphdef=engine.graphdef, mode=mode)
