"""Rotary position embedding (RoFormer, arXiv 2104.09864) in LLaMA's half-split layout."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.types import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the rotation per position, float32[H/2]; `linear` slows all of them, `llama3` only the slow ones.

    The llama3 rule is the one published with Llama 3.1 (transformers `rope_type` llama3).
    """
    inverse = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.kind == "linear":
        inverse = inverse / config.factor
    elif config.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low = config.original_max_positions / config.low_freq_factor
        high = config.original_max_positions / config.high_freq_factor
        mix = (config.original_max_positions / wavelength - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        between = (1 - mix) * inverse / config.factor + mix * inverse
        inverse = np.where(wavelength > low, inverse / config.factor, np.where(wavelength < high, inverse, between))
    elif config.kind != "default":
        raise ValueError(f"unknown rope kind {config.kind!r}")
    return inverse.astype(np.float32)


def angles(positions_BT: jax.Array, config: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Return float32 cosines and sines [B, T, 1, H/2]."""
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config, head_dim)
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


def rotate(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Rotate the pairs (x[i], x[i + H/2]) in the dtype of x."""
    cos, sin = cos_BT1H.astype(x_BTNH.dtype), sin_BT1H.astype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
