"""Attention, rotary embedding and loss against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.ops.attention import attention, reference_attention
from llava_jax.ops.loss import masked_nll, masked_nll_rows
from llava_jax.ops.rope import angles, inverse_frequencies, rotate
from llava_jax.types import RopeConfig


def heads(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [True, False])
def test_attention_equals_its_definition_forward_and_backward(causal, segments):
    q, k, v = heads(0, 2, 9, 4, 8), heads(1, 2, 9, 2, 8), heads(2, 2, 9, 2, 8)
    segment_ids = jnp.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9]) if segments else None
    mask = jnp.ones((2, 9, 9), bool)
    if causal:
        mask &= jnp.tril(mask[0])
    if segments:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]

    def ours(q, k, v):
        return attention(q, k, v, causal=causal, segment_ids_BT=segment_ids)

    np.testing.assert_allclose(ours(q, k, v), reference_attention(q, k, v, mask), atol=1e-6)
    grads = [
        jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2))(q, k, v)
        for f in (ours, lambda *x: reference_attention(*x, mask))
    ]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_neighbouring_segments_have_no_influence_at_all():
    q, k, v = heads(0, 1, 6, 2, 8), heads(1, 1, 6, 2, 8), heads(2, 1, 6, 2, 8)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2]])
    changed = [x.at[:, :3].set(7.0) for x in (q, k, v)]
    before = attention(q, k, v, causal=True, segment_ids_BT=segment_ids)[:, 3:]
    after = attention(*changed, causal=True, segment_ids_BT=segment_ids)[:, 3:]
    np.testing.assert_array_equal(before, after)


def test_hidden_cache_slots_are_not_read():
    q, k, v = heads(0, 2, 1, 2, 8), heads(1, 2, 5, 2, 8), heads(2, 2, 5, 2, 8)
    seen = jnp.arange(5) < jnp.array([[3], [5]])
    out = attention(q, k, v, key_mask_BS=seen)
    np.testing.assert_allclose(out, reference_attention(q, k, v, seen[:, None, :]), atol=1e-6)
    np.testing.assert_array_equal(out[0], attention(q, k.at[0, 3:].set(9), v.at[0, 3:].set(9), key_mask_BS=seen)[0])


def test_rotation_depends_on_distance_only_and_keeps_length():
    cos, sin = angles(jnp.arange(20)[None], RopeConfig(), 8)
    q, k = (jnp.broadcast_to(heads(s, 1, 1, 1, 8), (1, 20, 1, 8)) for s in (0, 1))
    scores = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T
    np.testing.assert_allclose(scores[3, 1], scores[18, 16], rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(rotate(q, cos, sin), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-6)


def test_llama3_keeps_fast_and_stretches_slow_frequencies():
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 128)
    scaled = inverse_frequencies(RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192), 128)
    np.testing.assert_array_equal(scaled[:20], plain[:20])
    np.testing.assert_allclose(scaled[-10:], plain[-10:] / 8, rtol=1e-6)
    with pytest.raises(ValueError, match="yarn"):
        inverse_frequencies(RopeConfig(kind="yarn"), 8)


def test_loss_counts_targets_only_and_is_shifted():
    logits = heads(0, 2, 5, 7)
    tokens = jnp.array([[1, 2, 3, 4, 5], [6, 5, 999, 3, 2]])
    targets = jnp.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]], bool)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    want = -(log_probs[0, 1, 3] + log_probs[0, 2, 4]), -(log_probs[1, 0, 5] + log_probs[1, 3, 2])
    nll, count = masked_nll_rows(logits, tokens, targets)
    np.testing.assert_allclose(nll, want, rtol=1e-6)
    assert count.tolist() == [2, 2]
    total, number = masked_nll(logits, tokens, targets)
    np.testing.assert_allclose(total, sum(want), rtol=1e-6)
    assert int(number) == 4


def test_what_is_no_target_has_no_gradient():
    tokens, targets = jnp.array([[1, 2, 3, 4]]), jnp.array([[False, False, True, False]])
    grad = jax.grad(lambda logits: masked_nll(logits, tokens, targets)[0])(heads(0, 1, 4, 7))
    assert np.abs(grad[0, 1]).sum() > 0
    np.testing.assert_array_equal(np.abs(grad[0, jnp.array([0, 2, 3])]).sum(), 0.0)
