"""Beam search against a plain reference that runs the whole sequence again at every step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.infer import beam
from llava_jax.infer.engine import Engine, IdModel
from llava_jax.infer.generate import Prompt
from llava_jax.models import llava
from llava_jax.types import InputError, Sampling
from tests.test_generate import CONFIG, PROMPTS, SHORT, ids_of, placed
from tests.tiny_llava import sharp_params


@functools.cache
def next_log_probabilities() -> callable:
    """log p [n, V] after each of n sequences of one length."""
    model = nnx.merge(llava.build(CONFIG)[0], jax.tree.map(jnp.asarray, sharp_params(CONFIG)))
    run = jax.jit(lambda tokens, pixels, last: jax.nn.log_softmax(model(tokens, pixels)[:, last]))

    def after(given: Prompt, answers: list[list[int]]) -> np.ndarray:
        tokens = np.zeros((4, 64), np.int32)
        for row, answer in enumerate(answers):
            tokens[row, : len(given.tokens) + len(answer)] = [*given.tokens, *answer]
        pixels = np.zeros((4, 1, 16, 16, 3), np.float32)
        pixels[:, : len(given.pixels)] = given.pixels
        last = len(given.tokens) + len(answers[0]) - 1
        return np.asarray(run(tokens, pixels, last))[: len(answers)]

    return after


def reference(given: Prompt, beams: int, stops: tuple[int, ...], limit: int) -> list[int]:
    """transformers' default beam search: finished beams score sum / length; a worse best running beam ends it."""
    running, finished = [(0.0, [])], []
    for step in range(limit):
        table = next_log_probabilities()(given, [ids for _, ids in running])
        grown = [
            (score + float(table[row, token]), [*ids, token])
            for row, (score, ids) in enumerate(running)
            for token in np.argsort(-table[row])[: 4 * beams]
        ]
        grown.sort(key=lambda pair: -pair[0])
        running = []
        for rank, (score, ids) in enumerate(grown):
            if ids[-1] in stops or step + 1 == limit:
                finished += [(score / len(ids), ids)] if rank < beams else []
            elif len(running) < beams:
                running.append((score, ids))
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        if not running or (len(finished) == beams and running[0][0] / (step + 1) <= finished[-1][0]):
            break
    return [int(token) for token in finished[0][1]]


@functools.cache
def stops() -> tuple[int, ...]:
    """Two tokens that end some of the answers early, and not all at one length."""
    sampling = Sampling(max_new_tokens=10, beams=2)
    tokens = sorted({token for ids in ids_of(placed(), SHORT, sampling, slots=4) for token in ids})
    for pair in itertools.combinations(tokens, 2):
        lengths = {len(ids) for ids in ids_of(placed(pair), SHORT, sampling, slots=4)}
        if len(lengths) > 2:
            return pair
    raise AssertionError("no two tokens end these answers at different lengths")


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("ending", [False, True])
def test_beams_equal_the_reference(beams, ending):
    stop_ids = stops() if ending else ()
    found = ids_of(placed(stop_ids), SHORT, Sampling(max_new_tokens=10, beams=beams), slots=4)
    assert found == [reference(given, beams, stop_ids, 10) for given in SHORT]
    if ending and beams == 2:
        assert len({len(ids) for ids in found}) > 2


def test_beams_find_likelier_answers_than_greedy():
    def score(given: Prompt, ids: list[int]) -> float:
        return sum(next_log_probabilities()(given, [ids[:n]])[0, token] for n, token in enumerate(ids))

    greedy = ids_of(placed(), SHORT, Sampling(max_new_tokens=8), slots=4)
    wide = ids_of(placed(), SHORT, Sampling(max_new_tokens=8, beams=4), slots=4)
    gains = [score(given, ids) - score(given, plain) for given, ids, plain in zip(SHORT, wide, greedy, strict=True)]
    assert max(gains) > 0.1


def test_batched_beams_equal_single_ones():
    sampling = Sampling(max_new_tokens=10, beams=2)
    together = ids_of(placed(stops()), SHORT, sampling, slots=4)
    assert [ids_of(placed(stops()), [given], sampling, slots=4)[0] for given in SHORT] == together
    assert ids_of(placed(stops()), SHORT[:1], sampling, slots=1) == together[:1]


def test_one_compilation_for_all_limits():
    ids_of(placed(), SHORT, Sampling(max_new_tokens=5, beams=2), slots=4)
    before = beam.beam_search._cache_size()
    ids_of(placed(), SHORT[::-1], Sampling(max_new_tokens=9, beams=2), slots=4)
    assert beam.beam_search._cache_size() == before


def test_beams_cannot_be_streamed():
    with pytest.raises(InputError, match="cannot be streamed"):
        Engine(IdModel(placed())).stream(PROMPTS[0], Sampling(beams=2))
