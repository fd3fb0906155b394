"""Attention: one function for the vision tower, training, prefill and decode."""

import jax
import jax.numpy as jnp


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    segment_ids_BT: jax.Array | None = None,
    key_mask_BS: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads; returns BTNH in the dtype of q.

    `segment_ids_BT` lets a position see only its own segment (T == S); `key_mask_BS` bool hides cache slots that
    hold nothing. The softmax runs in float32.
    """
    mask = None
    if segment_ids_BT is not None:
        mask = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    if key_mask_BS is not None:
        key_mask = key_mask_BS[:, None, None, :]
        mask = key_mask if mask is None else mask & key_mask
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=causal, implementation="xla")


def reference_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """The definition, term by term in float32; what every other implementation is held against."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k_BSKH, v_BSKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH.astype(jnp.float32), k_BSNH) * q_BTNH.shape[-1] ** -0.5
    weights_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH).astype(q_BTNH.dtype)
