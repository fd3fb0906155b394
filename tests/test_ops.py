"""Attention, rotary embedding and loss against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llava_jax.demo.backbones import masked_nll_rows
from llava_jax.models.attention import angles, attend_to_cache, attention, choose, inverse_frequencies, rotate
from llava_jax.train.step import chunk_length, next_token, weighted_nll
from llava_jax.types import InputError, RopeConfig


def heads(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def reference_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """The definition, term by term in float32."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k_BSKH, v_BSKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH.astype(jnp.float32), k_BSNH) * q_BTNH.shape[-1] ** -0.5
    weights_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH).astype(q_BTNH.dtype)


def summed_nll(logits_BTV: jax.Array, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return masked_nll_rows(logits_BTV, tokens_BT, targets_BT)[0].sum()


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


@pytest.mark.parametrize("window", [1, 100, 300])
def test_a_window_equals_the_definition_forward_and_backward(window):
    """Three chunks of queries, packed; a window that is longer than the row sees all of it."""
    q, k, v = heads(0, 1, 290, 4, 8), heads(1, 1, 290, 2, 8), heads(2, 1, 290, 2, 8)
    ids = jnp.repeat(jnp.array([[1, 2]]), jnp.array([40, 250]), axis=1)
    distance = jnp.arange(290)[:, None] - jnp.arange(290)
    mask = (distance >= 0) & (distance < window) & (ids[:, :, None] == ids[:, None, :])

    def ours(q, k, v):
        return attention(q, k, v, causal=True, segment_ids_BT=ids, window=window)

    def both(f):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2)))(q, k, v)

    (value, grads), (want, want_grads) = both(ours), both(lambda *x: reference_attention(*x, mask))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("segments, window", [(True, 0), (False, 0), (True, 70)])
def test_splash_equals_the_definition_forward_and_backward(segments, window):
    """The TPU kernel in Pallas' interpreter: two blocks a row, two query heads for a key head."""
    q, k, v = heads(0, 1, 256, 2, 64), heads(1, 1, 256, 1, 64), heads(2, 1, 256, 1, 64)
    ids = jnp.repeat(jnp.array([[1, 2, 3, 0]]), jnp.array([100, 60, 90, 6]), axis=1) if segments else None
    mask = jnp.tril(jnp.ones((1, 256, 256), bool))
    if window:
        mask &= ~jnp.tril(mask[0], -window)
    if segments:
        mask &= ids[:, :, None] == ids[:, None, :]

    def ours(q, k, v):
        how = dict(implementation="splash", block=128, window=window)
        return attention(q, k, v, causal=True, segment_ids_BT=ids, **how)

    def both(f):
        return jax.value_and_grad(lambda *x: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2))(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        value, grads = jax.jit(lambda: both(ours))()
    want, want_grads = both(lambda *x: reference_attention(*x, mask))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


RUNS = dict(platform="tpu", dtype="bfloat16", length=2048, head_dim=128)


@pytest.mark.parametrize(
    "changes, chosen",
    [
        ({}, "splash"),
        ({"length": 577}, "xla"),
        ({"head_dim": 80}, "xla"),
        ({"platform": "gpu"}, "cudnn"),
        ({"platform": "gpu", "dtype": "float32"}, "xla"),
        ({"platform": "gpu", "window": 2047}, "xla"),
        ({"platform": "gpu", "window": 2048}, "cudnn"),
        ({"window": 2047}, "splash"),
        ({"platform": "cpu"}, "xla"),
    ],
)
def test_attention_is_chosen_by_platform_and_shape(changes, chosen):
    assert choose("auto", **RUNS | changes) == chosen
    assert choose("xla", **RUNS | changes) == "xla"


@pytest.mark.parametrize(
    "requested, changes, says",
    [
        ("splash", {"platform": "cpu"}, "needs a TPU, the devices are cpu"),
        ("splash", {"length": 1000}, "multiple of 128 tokens, got 1000"),
        ("cudnn", {}, "needs an NVIDIA GPU, the devices are tpu"),
        ("cudnn", {"platform": "gpu", "dtype": "float32"}, "needs train.dtype=bfloat16"),
        ("cudnn", {"platform": "gpu", "window": 1024}, "no sliding window, this decoder's is 1024 .* 2048 tokens"),
    ],
)
def test_attention_asked_for_by_name_is_had_or_refused(requested, changes, says):
    with pytest.raises(InputError, match=f"train.attention={requested}: .*{says}"):
        choose(requested, **RUNS | changes)


def test_neighbouring_segments_have_no_influence_at_all():
    q, k, v = heads(0, 1, 6, 2, 8), heads(1, 1, 6, 2, 8), heads(2, 1, 6, 2, 8)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2]])
    changed = [x.at[:, :3].set(7.0) for x in (q, k, v)]
    before = attention(q, k, v, causal=True, segment_ids_BT=segment_ids)[:, 3:]
    after = attention(*changed, causal=True, segment_ids_BT=segment_ids)[:, 3:]
    np.testing.assert_array_equal(before, after)


def test_hidden_cache_slots_are_not_read():
    q, k, v = heads(0, 2, 2, 4, 8), heads(1, 2, 5, 2, 8), heads(2, 2, 5, 2, 8)
    seen = jnp.arange(5) < jnp.array([[2, 3], [4, 5]])[:, :, None]
    k_BKSH, v_BKSH = k.swapaxes(1, 2), v.swapaxes(1, 2)
    out = attend_to_cache(q, k_BKSH, v_BKSH, seen)
    np.testing.assert_allclose(out, reference_attention(q, k, v, seen), atol=1e-6)
    hidden = attend_to_cache(q, k_BKSH.at[0, :, 3:].set(9), v_BKSH.at[0, :, 3:].set(9), seen)
    np.testing.assert_array_equal(out[0], hidden[0])


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


def test_what_is_no_target_has_no_gradient():
    tokens, targets = jnp.array([[1, 2, 3, 4]]), jnp.array([[False, False, True, False]])
    grad = jax.grad(lambda logits: summed_nll(logits, tokens, targets))(heads(0, 1, 4, 7))
    assert np.abs(grad[0, 1]).sum() > 0
    np.testing.assert_array_equal(np.abs(grad[0, jnp.array([0, 2, 3])]).sum(), 0.0)


@pytest.mark.parametrize("length", [8, 200, 400])
def test_loss_in_chunks_equals_the_plain_one_forward_and_backward(length):
    """One chunk, two and four of 256 positions, the last one short; most have no target."""
    hidden, head = heads(0, 2, length, 8), heads(1, 8, 11)
    tokens = jax.random.randint(jax.random.key(2), (2, length), 0, 11)
    targets = jnp.zeros((2, length), bool).at[0, 3:6].set(True).at[1, length // 2 :].set(True)

    def plain(hidden, head):
        return summed_nll(hidden @ head, tokens, targets) / 7

    def ours(hidden, head, learns=True):
        labels, counted = next_token(tokens, targets, jnp.ones((2, length), jnp.int32))
        return weighted_nll(hidden, head, labels, counted / 7, learns)

    (want, want_grads), (got, grads) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head) for f in (plain, ours)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda h: ours(h, head, False))(hidden), grads[0])


def test_chunks_bound_the_logits_in_memory():
    """The compiled loss holds a quarter of the logits and little else, where the plain one holds them all."""
    hidden, head = jnp.zeros((2, 1024, 8)), jnp.zeros((8, 4096))
    tokens, targets = jnp.zeros((2, 1024), jnp.int32), jnp.ones((2, 1024), bool)

    def temporary(f):
        lowered = jax.jit(jax.grad(f, argnums=(0, 1))).lower(hidden, head)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 1024 * 4096 * 4
    assert temporary(lambda h, w: summed_nll(h @ w, tokens, targets)) > logits
    assert temporary(lambda h, w: weighted_nll(h, w, tokens, targets.astype(jnp.float32), True)) < 0.27 * logits


def test_chunks_follow_positions_and_vocabulary():
    assert chunk_length(4 * 2048, 32000) == 2048
    assert chunk_length(16 * 4096, 128256) == 512
    assert chunk_length(100, 2048) == 256


def test_the_first_token_of_a_segment_is_predicted_by_nobody():
    tokens, targets = jnp.array([[5, 6, 7, 8, 9, 0]]), jnp.ones((1, 6), bool)
    labels, counted = next_token(tokens, targets, jnp.array([[1, 1, 2, 2, 2, 0]]))
    assert counted.tolist() == [[True, False, True, True, False, False]]
    assert labels[counted].tolist() == [6, 8, 9]
