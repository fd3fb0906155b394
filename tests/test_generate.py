"""Prefill, cache, drawing and stopping, on a random two-layer model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.infer import generate, passes, sample
from llava_jax.infer.engine import Engine, IdModel
from llava_jax.infer.generate import (
    Prompt,
    Row,
    bucket,
    collate,
    decode_step,
    encode_images,
    prefill,
)
from llava_jax.infer.placed_model import PlacedModel
from llava_jax.models import llava
from llava_jax.types import InputError, Sampling
from tests.tiny_llava import VOCAB, config, sharp_params

CONFIG = config()
PATCHES = CONFIG.vision.patches
DRAWS = {
    "greedy": Sampling(max_new_tokens=24),
    "sample": Sampling(max_new_tokens=24, temperature=0.8, seed=5),
    "top_k_top_p": Sampling(max_new_tokens=24, temperature=1.5, top_k=40, top_p=0.9, seed=5),
}


@functools.cache
def placed(stop_ids: tuple[int, ...] = ()) -> PlacedModel:
    params = jax.tree.map(jnp.asarray, sharp_params(CONFIG))
    stops = sample.stop_table([], stop_ids, [""] * VOCAB)
    return PlacedModel(llava.for_answers(params), CONFIG, jnp.asarray(stops))


def ids_of(model: PlacedModel, prompts: list[Prompt], sampling: Sampling, slots: int = 8) -> list[list[int]]:
    return [answer.ids for answer in sorted(Engine(IdModel(model), slots=slots).answers(prompts, sampling))]


def prompt(seed: int, text: int, images: int = 0) -> Prompt:
    rng = np.random.default_rng(seed)
    words = rng.integers(3, VOCAB, text)
    tokens = np.concatenate([[1], *[[CONFIG.image_token_id] * PATCHES] * images, words]).astype(np.int32)
    return Prompt(tokens, rng.normal(size=(images, 16, 16, 3)).astype(np.float32))


PROMPTS = [prompt(0, 9, 1), prompt(1, 30), prompt(2, 70, 2), prompt(3, 12, 1), prompt(4, 5)]
SHORT = [PROMPTS[0], PROMPTS[1], PROMPTS[3], PROMPTS[4]]


@functools.cache
def full_logits() -> callable:
    """Logits [1, T, V] of a whole sequence, padded to one length so that it compiles once."""
    model = nnx.merge(llava.build(CONFIG)[0], jax.tree.map(jnp.asarray, sharp_params(CONFIG)))
    run = jax.jit(lambda tokens_BT, pixels_BNXYC: model(tokens_BT, pixels_BNXYC))

    def logits(tokens: list[int], pixels: np.ndarray) -> np.ndarray:
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        images = np.zeros((1, 2, 16, 16, 3), np.float32)
        images[0, : len(pixels)] = pixels
        return np.asarray(run(padded, images))[0, : len(tokens)]

    return logits


def test_cached_decode_gives_the_logits_of_the_full_forward():
    rng, steps = np.random.default_rng(9), 12
    forced = rng.integers(3, VOCAB, (len(PROMPTS), steps)).astype(np.int32)
    images = np.concatenate([given.pixels for given in PROMPTS])
    ends = np.cumsum([len(given.pixels) for given in PROMPTS])
    entries = [range(end - len(given.pixels), end) for end, given in zip(ends, PROMPTS, strict=True)]
    inputs, pool = (
        collate([Row(*pair) for pair in zip(PROMPTS, entries, strict=True)], CONFIG, len(PROMPTS)),
        jnp.zeros((len(images), PATCHES, CONFIG.llm.width)),
    )
    pool = encode_images(placed().params, pool, images, np.arange(len(images)), config=CONFIG)
    logits, cache = prefill(placed().params, inputs, pool, config=CONFIG)
    cache = passes.widened(cache, cache.size + steps)
    step = jax.jit(lambda params, token, cache: decode_step(llava.unstacked_model(CONFIG, params), token, cache))
    seen = [np.asarray(logits)]
    for token_B in forced.T:
        logits, cache = step(placed().params, token_B, cache)
        seen.append(np.asarray(logits))
    for row, given in enumerate(PROMPTS):
        whole = full_logits()([*given.tokens, *forced[row]], given.pixels)[len(given.tokens) - 1 :]
        scale = np.abs(whole).max()
        np.testing.assert_allclose(np.stack(seen)[:, row] / scale, whole / scale, atol=1e-5)


def test_greedy_takes_the_argmax_of_the_full_forward():
    given = PROMPTS[0]
    ids = ids_of(placed(), [given], Sampling(max_new_tokens=16))[0]
    assert len(ids) == 16 and len(set(ids)) > 3
    whole = full_logits()([*given.tokens, *ids], given.pixels)
    assert ids == list(whole[len(given.tokens) - 1 : -1].argmax(-1))


@pytest.mark.parametrize("sampling", DRAWS.values(), ids=DRAWS.keys())
def test_an_answer_does_not_depend_on_its_neighbours(sampling):
    together = ids_of(placed(), PROMPTS, sampling)
    assert ids_of(placed(), PROMPTS[::-1], sampling) == together[::-1]
    # Slots are taken again while others still draw.
    assert ids_of(placed(), PROMPTS, sampling, slots=2) == together
    assert len({tuple(ids) for ids in together}) == len(PROMPTS)


def test_the_seed_decides_a_draw():
    draw = DRAWS["sample"]
    first, again = (ids_of(placed(), PROMPTS, draw) for _ in range(2))
    other = ids_of(placed(), PROMPTS, dataclasses.replace(draw, seed=6))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_a_row_ends_with_its_stop_and_its_neighbours_continue():
    free = ids_of(placed(), PROMPTS, DRAWS["greedy"])
    stop = free[0][5]
    ended = ids_of(placed((stop,)), PROMPTS, DRAWS["greedy"])
    for before, after in zip(free, ended, strict=True):
        assert after == (before[: before.index(stop) + 1] if stop in before else before)
    assert len(ended[0]) < 24 == max(len(ids) for ids in ended)


def test_answers_end_where_the_positions_do():
    few = dataclasses.replace(CONFIG.llm, max_positions=len(PROMPTS[1].tokens) + 5)
    close = dataclasses.replace(placed(), config=dataclasses.replace(CONFIG, llm=few))
    free = ids_of(placed(), PROMPTS, DRAWS["greedy"])
    ended = ids_of(close, [*PROMPTS[:2], *PROMPTS[3:]], DRAWS["greedy"])
    assert ended[1] == free[1][:5] and ended[0] == free[0][:22] and ended[3] == free[4]
    with pytest.raises(InputError, match="prompt of 79 tokens .* holds 36 "):
        ids_of(close, [PROMPTS[2]], DRAWS["greedy"])


def test_images_lengths_and_sampling_compile_nothing():
    sizes = []
    for seed, images in ((1, 2), (2, 1), (3, 1)):
        sampling = Sampling(max_new_tokens=10 + seed, temperature=0.5 + seed, top_k=seed, seed=seed)
        ids_of(placed(), [prompt(seed, 22 - seed - 4 * images, images)], sampling, slots=1)
        sizes.append([function._cache_size() for function in (generate.admit, generate.draw_first, generate.decode)])
    assert sizes[0] == sizes[1] == sizes[2]


def test_buckets():
    assert [bucket(n) for n in (1, 17, 33, 79, 129, 512, 513, 769)] == [16, 32, 48, 96, 192, 512, 768, 1024]
    assert [placed().group(n) for n in (1, 2, 3, 11, 12, 47, 48, 64)] == [1, 1, 4, 4, 16, 16, 16, 16]


@pytest.mark.parametrize(
    "changes",
    [
        dict(max_new_tokens=0),
        dict(temperature=-0.1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_k=-1),
        dict(beams=0),
        dict(beams=2, temperature=1.0),
        dict(seed=-1),
    ],
)
def test_impossible_sampling_is_refused(changes):
    with pytest.raises(InputError, match="sampling: "):
        ids_of(placed(), PROMPTS[:1], Sampling(**changes))


# ---- sample.py --------------------------------------------------------------------------------------------------


def kept_by_hand(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    order = np.argsort(-logits)[: top_k or None]
    probability = np.exp(logits[order] - logits[order].max())
    probability /= probability.sum()
    mass, kept = 0.0, set()
    for token, share in zip(order, probability, strict=True):
        if mass < top_p:
            kept.add(int(token))
        mass += share
    return kept


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.3), (0, 0.95), (9, 0.6), (500, 1e-6)])
def test_filter_keeps_what_the_rules_say(top_k, top_p):
    logits = np.random.default_rng(top_k).normal(size=(4, 60)).astype(np.float32) * 2
    # The last row is not filtered.
    rows = np.array([top_k] * 3 + [0]), np.array([top_p] * 3 + [1.0], np.float32)
    kept = np.isfinite(sample.filter_logits(jnp.asarray(logits), *map(jnp.asarray, rows)))
    expected = [kept_by_hand(row, top_k, top_p) for row in logits[:3]]
    assert [set(np.flatnonzero(row)) for row in kept] == [*expected, set(range(60))]


def test_the_likeliest_id_is_the_first_of_the_largest_logits():
    few_values = np.random.default_rng(0).integers(0, 4, (50, 30)).astype(np.float32)
    banned = np.where(few_values == 3, -np.inf, few_values)
    for logits in (few_values, banned, np.random.default_rng(1).normal(size=(50, 30))):
        np.testing.assert_array_equal(sample.likeliest(jnp.asarray(logits)), np.argmax(logits, axis=-1))
    assert 0 <= sample.likeliest(jnp.full((1, 30), jnp.nan))[0] < 30


def test_draws_follow_the_distribution():
    logits = jnp.tile(jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125])), (4000, 1))
    zeros, true = np.zeros(4000, np.int32), np.ones(4000, bool)

    def drawn(temperature: float) -> np.ndarray:
        samplings = [Sampling(temperature=temperature, seed=seed) for seed in range(4000)]
        tokens = sample.next_token(logits, zeros, sample.draw_of(samplings, zeros), true)
        return np.bincount(tokens, minlength=4) / 4000

    np.testing.assert_allclose(drawn(1.0), [0.5, 0.25, 0.125, 0.125], atol=0.03)
    squared = np.array([0.25, 0.0625, 0.015625, 0.015625])
    np.testing.assert_allclose(drawn(0.5), squared / squared.sum(), atol=0.03)
    assert list(drawn(0.0)) == [1, 0, 0, 0]


@pytest.mark.parametrize("stops", [["###"], ["aab", "b#"], ["\n"], ["ab", "abc", "#a#a"]])
def test_the_automaton_finds_what_a_text_search_finds(stops):
    pieces = ["", "#", "##", "a", "aa", "b", "ab", "#b", "c", "\n", "#a", "a\nb"]
    table = sample.stop_table(stops, [8], pieces)
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(300):
        tokens, state, text = rng.integers(0, len(pieces), 12), 0, ""
        for token in tokens:
            text += pieces[token]
            state = int(table[state, token])
            over = token == 8 or any(stop in text for stop in stops)
            assert (state == len(table) - 1) == over
            if over:
                ended += 1
                break
    assert ended > 100


def test_stripped_pieces_join_to_the_stripped_text():
    class Characters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    for text in ("\n  a b\n c  ", " \n"):
        decoder = sample.AnswerDecoder(Characters())
        found = [decoder.push(ord(character)) for character in text] + [decoder.finish()]
        assert "".join(found) == text.strip() and not any(piece.endswith((" ", "\n")) for piece in found)
