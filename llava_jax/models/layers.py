"""Building blocks: `param` (the only place where a parameter is made), Linear, LayerNorm, RMSNorm."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.parallel.matmul import product, sums_in_two_steps
from llava_jax.parallel.ring import Pieces, columns, rows
from llava_jax.parallel.sharding import gathered, named

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]

normal = jax.nn.initializers.normal(0.02)
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch.nn.Linear's default for weight and bias, LLaVA's projector init."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def param(rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """A float32 parameter whose dimensions carry the logical `axes` of sharding.RULES."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=tuple(axes))


class Linear(nnx.Module):
    """Affine map from the last `in_shape` dimensions to `out_shape`; kernel [*in_shape, *out_shape].

    models.lora may add an `adapter` and keep the kernel in four bits. `remat_name` is what train.remat calls the
    kernel once it is gathered from all devices.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        in_axes: Sequence[str],
        out_axes: Sequence[str],
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        init: Initializer = normal,
        bias_init: Initializer = zeros,
        remat_name: str = "",
    ):
        self.in_dims, self.axes, self.remat_name = len(in_shape), (*in_axes, *out_axes), remat_name
        self.kernel = param(rngs, init, (*in_shape, *out_shape), self.axes)
        if bias:
            self.bias = param(rngs, bias_init, out_shape, out_axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        # Rows as one dimension: over two of them XLA's CPU backend does not take its fast product for the gradient.
        lead, in_shape = x.shape[: x.ndim - self.in_dims], x.shape[x.ndim - self.in_dims :]
        flat = x.reshape(-1, *in_shape)
        if "embed" in self.axes and sums_in_two_steps():
            y = product(flat, self.kernel.astype(x.dtype), self.axes, self.in_dims, self.remat_name)
        else:
            y = jnp.tensordot(flat, self.whole_kernel(x.dtype), axes=self.in_dims)
        if hasattr(self, "adapter"):
            y = y + self.adapter(flat)
        y = y.reshape(*lead, *y.shape[1:])
        return self.biased(y)

    def whole_kernel(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel whole along `embed`, in the dtype of a product."""
        return named(gathered(self.kernel.astype(dtype), *self.axes), self.remat_name)

    def biased(self, y: jax.Array) -> jax.Array:
        return y + self.bias.astype(y.dtype) if hasattr(self, "bias") else y


def through_columns(x_BTD: jax.Array, linears: Sequence[Linear], around: bool) -> tuple[Pieces, ...]:
    """x times each layer. `around`: x is split along T, and each result is the pieces of ops.ring; else one array."""
    if not around:
        return tuple((linear(x_BTD),) for linear in linears)
    results = columns(x_BTD, [linear.whole_kernel(x_BTD.dtype) for linear in linears])
    return tuple(tuple(map(linear.biased, pieces)) for linear, pieces in zip(linears, results, strict=True))


def through_rows(pieces: Pieces, linear: Linear, around: bool) -> jax.Array:
    """Features, in pieces or one array as `through_columns` gives them, times a layer: [B, T, D], `around` along T."""
    if not around:
        return linear(*pieces)
    dtype = pieces[0].dtype
    return linear.biased(rows(pieces, linear.kernel.astype(dtype), linear.axes, linear.remat_name))


class LayerNorm(nnx.Module):
    """Normalises the last dimension in float32, result in the dtype of x."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, ones, (width,), ("norm",))
        self.bias = param(rngs, zeros, (width,), ("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale.astype(jnp.float32) + self.bias.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; the result is cast to the dtype of x before the scale, as LLaMA does."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, ones, (width,), ("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale.astype(x.dtype)
