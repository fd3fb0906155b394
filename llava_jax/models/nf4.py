"""Kernels in four bits (NormalFloat of QLoRA, arXiv 2305.14314), dequantised inside the block that uses them.

Each weight is one of sixteen levels times the largest magnitude of its block of 64 inputs, as in bitsandbytes; that
magnitude is kept in bfloat16 instead of being quantised a second time (4.25 bits a weight in place of 4.13). Levels are
chosen by fifteen selects on a TPU, elementwise next to the matmul, where a table would be a gather. Elsewhere they come
from a table: the selects' sixteen constants would lie in memory during the layer loop, each as large as a kernel.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.parallel.sharding import unshard

# Appendix E of the paper: quantiles of the normal distribution, with an exact zero.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64


def quantise(kernel: jax.Array, axes: tuple[str, ...], in_dims: int) -> tuple[jax.Array, jax.Array]:
    """Return (codes uint8, scale bfloat16) of one kernel [*in, *out] with the logical `axes`.

    Blocks run along the last input dimension, whose place the scale's blocks take. Two codes share a byte along
    `embed`, the first half of that dimension in the low bits: it is gathered before it is dequantised.
    """
    at, packed = in_dims - 1, axes.index("embed")
    blocked = _blocked(kernel.astype(jnp.float32), at, block_of(kernel.shape[at]))
    scale = jnp.max(jnp.abs(blocked), axis=at + 1).astype(jnp.bfloat16)
    divisor = jnp.expand_dims(scale.astype(jnp.float32), at + 1)
    share = (blocked / jnp.where(divisor > 0, divisor, 1.0)).reshape(kernel.shape)
    codes = jnp.zeros(kernel.shape, jnp.uint8)
    for low, high in itertools.pairwise(LEVELS):
        codes += (share > (low + high) / 2).astype(jnp.uint8)
    first, second = jnp.split(codes, 2, axis=packed)
    return first | (second << 4), scale


def dequantise(codes: jax.Array, scale: jax.Array, axes: tuple[str, ...], in_dims: int, dtype: jnp.dtype) -> jax.Array:
    """Return the kernel [*in, *out] that `quantise` stored, in `dtype`."""
    at, packed = in_dims - 1, axes.index("embed")
    share = _level(jnp.concatenate([codes & 15, codes >> 4], axis=packed))
    blocked = _blocked(share, at, share.shape[at] // scale.shape[at])
    return (blocked * jnp.expand_dims(scale.astype(jnp.float32), at + 1)).reshape(share.shape).astype(dtype)


def block_of(inputs: int) -> int:
    """Return how many weights share a scale: 64, or what divides the inputs of a small model."""
    return math.gcd(BLOCK, inputs)


def _blocked(x: jax.Array, at: int, block: int) -> jax.Array:
    return x.reshape(*x.shape[:at], -1, block, *x.shape[at + 1 :])


def _level(code: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(code, tpu=_selected, default=_looked_up)


def _looked_up(code: jax.Array) -> jax.Array:
    return jnp.asarray(LEVELS, jnp.float32)[code]


def _selected(code: jax.Array) -> jax.Array:
    values: list = list(LEVELS)
    for bit in range(4):
        is_set = (code >> bit) & 1 == 1
        values = [jnp.where(is_set, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0].astype(jnp.float32)


class Nf4(nnx.Module):
    """A linear layer's kernel in four bits."""

    def __init__(self, kernel: jax.Array, axes: tuple[str, ...], in_dims: int):
        self.axes, self.in_dims = axes, in_dims
        codes, scale = quantise(kernel, axes, in_dims)
        self.codes = nnx.Variable(codes, axes=axes)
        self.scale = nnx.Variable(scale, axes=self.scale_axes)

    @property
    def scale_axes(self) -> tuple[str, ...]:
        return (*self.axes[: self.in_dims - 1], "block", *self.axes[self.in_dims :])

    def dequantise(self, dtype: jnp.dtype) -> jax.Array:
        """Return the kernel in `dtype`; the devices exchange its codes."""
        codes, scale = unshard(self.codes[...], *self.axes), unshard(self.scale[...], *self.scale_axes)
        return dequantise(codes, scale, self.axes, self.in_dims, dtype)
