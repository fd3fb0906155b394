"""The model's own promises: parameters, the merge, depth of CLIP, cache, remat. Numbers against torch: tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.infer import passes
from llava_jax.models import llava
from tests.test_sharding import TINY


def tokens_with_images(*rows: str) -> jax.Array:
    """'t' a token, 'i' one image of four slots."""
    made = [sum(([TINY.image_token_id] * 4 if c == "i" else [5 + n] for n, c in enumerate(row)), []) for row in rows]
    return jnp.asarray(made, jnp.int32)


@pytest.fixture(scope="module")
def model():
    graphdef, _ = llava.build(TINY)
    return nnx.merge(graphdef, llava.init(TINY, 0))


def test_random_parameters_fill_the_abstract_ones_exactly():
    _, abstract = llava.build(TINY)
    params = llava.init(TINY, 0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


def test_only_the_blocks_before_the_feature_layer_are_held():
    _, abstract = llava.build(TINY)
    assert abstract["vision"]["layers"]["norm1"]["scale"].shape[0] == TINY.vision.layers - 1
    _, abstract = llava.build(dataclasses.replace(TINY, feature_layer=-1))
    assert abstract["vision"]["layers"]["norm1"]["scale"].shape[0] == TINY.vision.layers
    assert dataclasses.replace(TINY, feature_layer=1).vision_layers == 1


def test_projector_starts_within_the_bounds_of_a_torch_linear():
    projector = llava.init(TINY, 0)["projector"]
    for name, fan_in in (("linear_1", 32), ("linear_2", 32)):
        for leaf in projector[name].values():
            assert float(jnp.abs(leaf).max()) <= fan_in**-0.5
            assert float(jnp.abs(leaf).max()) > 0.5 * fan_in**-0.5
    assert "linear_2" not in llava.init(dataclasses.replace(TINY, projector="linear"), 0)["projector"]


def test_merge_puts_images_in_order_wherever_they_stand():
    rows = [tokens_with_images("ttit"), tokens_with_images("titt")]
    features = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 3)
    merged = llava.merge(jnp.full((2, 7, 3), -1.0), features, jnp.concatenate(rows) == TINY.image_token_id)
    np.testing.assert_array_equal(merged[0, 2:6], features[0])
    np.testing.assert_array_equal(merged[1, 1:5], features[1])
    assert (merged[0, [0, 1, 6]] == -1).all() and (merged[1, [0, 5, 6]] == -1).all()


def test_two_images_in_one_row_and_a_row_without(model):
    tokens = tokens_with_images("titi", "t" * 10)
    pixels = jax.random.normal(jax.random.key(1), (2, 2, 16, 16, 3))
    logits = model(tokens, pixels)
    np.testing.assert_array_equal(logits[1], model(tokens, pixels.at[1].set(9.0))[1])
    assert np.abs(logits[0] - model(tokens, pixels[:, ::-1])[0]).max() > 1e-4
    np.testing.assert_allclose(logits[1:], model(tokens[1:], None), atol=1e-6)


def test_a_slot_is_skipped_by_the_mask_and_not_by_its_pixels(model):
    """An image may be the mean colour everywhere, which is zeros once normalised."""
    pixels = jnp.zeros((2, 2, 16, 16, 3))
    seen = model.projector(model.vision(pixels[0]))
    np.testing.assert_allclose(model.image_features(pixels)[0].reshape(seen.shape), seen, atol=1e-6)
    skipped = model.image_features(pixels, jnp.array([[True, False], [False, False]]))[0].reshape(seen.shape)
    np.testing.assert_allclose(skipped[0], seen[0], atol=1e-6)
    np.testing.assert_array_equal(skipped[1], model.projector(jnp.zeros_like(model.vision(pixels[0])))[1])


def test_segments_in_one_row_equal_rows_of_their_own(model):
    first, second = tokens_with_images("tit"), tokens_with_images("itt")
    pixels = jax.random.normal(jax.random.key(1), (1, 2, 16, 16, 3))
    packed = model(
        jnp.concatenate([first, second], axis=1),
        pixels,
        jnp.array([[1] * 6 + [2] * 6]),
        jnp.concatenate([jnp.arange(6), jnp.arange(6)])[None],
    )
    alone = [model(first, pixels[:, :1]), model(second, pixels[:, 1:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)


def test_prefill_and_decode_equal_the_full_pass_for_rows_of_different_length(model):
    tokens = jnp.concatenate([tokens_with_images("titttttt"), tokens_with_images("tttitttt")])
    lengths = jnp.array([6, 8])
    pixels = jax.random.normal(jax.random.key(1), (2, 1, 16, 16, 3))
    full = model(tokens, pixels)
    x = model.embed_and_merge(tokens, model.image_features(pixels))[:, :8]
    segments = (jnp.arange(8) < lengths[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    params = llava.for_answers(llava.init(TINY, 0))
    llm = llava.unstacked_model(TINY, params).llm
    hidden, cache = passes.prefill(llm, x, positions, segments)
    np.testing.assert_allclose(passes.logits(llm, hidden)[0, :6], full[0, :6], atol=1e-5)
    cache = passes.widened(cache, 16)
    for _ in range(3):
        step = jnp.take_along_axis(tokens, cache.length_B[:, None], axis=1)
        hidden, new = passes.extend(llm, llm.embed(step), cache)
        want = jnp.take_along_axis(full, cache.length_B[:, None, None], axis=1)
        np.testing.assert_allclose(passes.logits(llm, hidden), want, atol=1e-5)
        cache = new._replace(length_B=new.length_B + 1)
    assert cache.length_B.tolist() == [9, 11]


@functools.cache
def gradient(remat: str):
    tokens, params = tokens_with_images("titt"), llava.init(TINY, 0)
    pixels = jax.random.normal(jax.random.key(1), (1, 1, 16, 16, 3))
    graphdef, _ = llava.build(dataclasses.replace(TINY, remat=remat))
    return jax.jit(jax.grad(lambda p: jnp.sin(nnx.merge(graphdef, p)(tokens, pixels)).sum()))(params)


@pytest.mark.parametrize("remat", ["dots", "full", "minimal", "attention+q+up", "minimal+down_weight"])
def test_remat_changes_no_number(remat):
    for want, got in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    graphdef, _ = llava.build(config)
    model = nnx.merge(graphdef, llava.init(config, 0))
    tokens, pixels = tokens_with_images("titt"), jnp.ones((1, 1, 16, 16, 3))
    assert model.hidden(tokens, pixels).dtype == jnp.bfloat16
    assert model(tokens, pixels).dtype == jnp.float32
