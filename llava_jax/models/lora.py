"""LoRA (arXiv 2106.09685): low-rank adapters on linear layers, whose own weights stay as they are.

In the model an adapter is part of its Linear (`llm/layers/attn/q/adapter/a`); in a run those of the decoder are the
part `lora` (`lora/layers/attn/q/a`) next to vision, projector and llm, and those of the tower the part `vision_lora`.

qwix 0.1.8 is not used: it puts objects without axes into the tree of weights, which our scan over stacked layers
refuses; its rules select by weight, not by a layer's path, and its dropout draws from a counter, not from the update.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_jax.models.layers import Linear, param, torch_uniform, zeros
from llava_jax.models.nf4 import Nf4
from llava_jax.parallel.sharding import unshard
from llava_jax.types import DECODER_LINEARS, TOWER_LINEARS, LoraConfig

Params = dict[str, Any]


class Adapter(nnx.Module):
    """alpha/rank * dropout(x) A B: A [*in, r] drawn as peft does, B [r, *out] zero; dropout draws from `seed`.

    Both are sharded as the kernel's inputs and outputs. One of them has the axis `embed`; the other one's rank takes
    that axis where `split_rank` says that it divides.
    """

    def __init__(self, kernel: jax.Array, axes: tuple[str, ...], in_dims: int, config: LoraConfig, *, rngs: nnx.Rngs):
        self.in_dims, self.scale, self.dropout = in_dims, config.scale, config.dropout
        in_axes, out_axes = axes[:in_dims], axes[in_dims:]
        self.a_axes = (*in_axes, _rank_axis(in_axes, config))
        self.b_axes = (_rank_axis(out_axes, config), *out_axes)
        inputs, outputs = kernel.shape[:in_dims], kernel.shape[in_dims:]
        self.a = param(rngs, torch_uniform(math.prod(inputs)), (*inputs, config.rank), self.a_axes)
        self.b = param(rngs, zeros, (config.rank, *outputs), self.b_axes)
        if config.dropout:
            self.seed = nnx.Variable(jnp.zeros((), jnp.uint32), axes=())

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [rows, *in] to [rows, *out]."""
        if self.dropout:
            x = jnp.where(keep_mask(x.shape, self.seed[...], self.dropout), x / (1 - self.dropout), 0).astype(x.dtype)
        a, b = unshard(self.a.astype(x.dtype), *self.a_axes), unshard(self.b.astype(x.dtype), *self.b_axes)
        return jnp.tensordot(jnp.tensordot(x, a, axes=self.in_dims), b, axes=1) * self.scale


class LoraLinear(Linear):
    """A linear layer in stage lora: its kernel is frozen, maybe in four bits, and an adapter may be added."""

    def __init__(self, linear: Linear, kernel: nnx.Param | Nf4, adapter: Adapter | None):
        self.in_dims, self.axes, self.name = linear.in_dims, linear.axes, linear.name
        self.kernel, self.bias, self.adapter = kernel, linear.bias, adapter

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.adapter is None:
            return super().__call__(x)
        lead, in_shape = x.shape[: x.ndim - self.in_dims], x.shape[x.ndim - self.in_dims :]
        rows = x.reshape(-1, *in_shape)  # dropout draws by row, whatever the batch dimensions
        y = super().__call__(rows) + self.adapter(rows)
        return y.reshape(*lead, *y.shape[1:])

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        return self.kernel.dequantise(dtype) if isinstance(self.kernel, Nf4) else super().weight(dtype)


def _rank_axis(others: tuple[str, ...], config: LoraConfig) -> str:
    return "embed" if config.split_rank and "embed" not in others else "rank"


def keep_mask(shape: tuple[int, ...], seed: jax.Array, rate: float) -> jax.Array:
    """Return a bool array that is False with probability `rate` (to 1/65536).

    The draw is a hash of the index and the seed: a few integer operations where the values are used, and the same
    however the array is sharded.
    """
    noise = jnp.uint32(seed)
    for dim in range(len(shape)):
        noise = (noise ^ jax.lax.broadcasted_iota(jnp.uint32, shape, dim)) * jnp.uint32(0x85EBCA6B)
        noise = noise ^ (noise >> 13)
    noise = noise * jnp.uint32(0xC2B2AE35)
    return ((noise ^ (noise >> 16)) & 0xFFFF) >= round(rate * 65536)


def adapt_decoder(layers: Any, lora: LoraConfig | None, nf4: bool, *, rngs: nnx.Rngs) -> None:
    """Add the adapters of `lora` to the decoder's stacked blocks, and store their kernels as `nf4` says.

    All else is drawn before, so that a model has the same weights with adapters as without.
    """
    _adapt(layers, DECODER_LINEARS, lora.targets if lora else (), lora, nf4, rngs=rngs)


def adapt_tower(layers: Any, lora: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Add the adapters of `lora` to stacked blocks of the tower."""
    _adapt(layers, TOWER_LINEARS, lora.vision_targets, lora, False, rngs=rngs)


def _adapt(
    layers: Any, names: tuple[str, ...], targets: tuple[str, ...], lora: LoraConfig | None, nf4: bool, *, rngs: nnx.Rngs
) -> None:
    for name, linear in linears(layers, names):
        kernel, axes, in_dims = linear.kernel, linear.axes, linear.in_dims

        def make_nf4(kernel: jax.Array, axes=axes, in_dims=in_dims) -> Nf4:
            return Nf4(kernel, axes, in_dims)

        adapter = None
        if lora is not None and name in targets:

            def make_adapter(rngs: nnx.Rngs, kernel: jax.Array, axes=axes, dims=in_dims, lora=lora) -> Adapter:
                return Adapter(kernel, axes, dims, lora, rngs=rngs)

            adapter = jax.vmap(make_adapter)(rngs.split(kernel.shape[0]), kernel[...])
        module, layer = name.split("/")
        stored = jax.vmap(make_nf4)(kernel[...]) if nf4 else kernel
        setattr(getattr(layers, module), layer, LoraLinear(linear, stored, adapter))


def linears(layers: Any, names: tuple[str, ...] = DECODER_LINEARS) -> Iterator[tuple[str, Linear]]:
    """Yield (name, layer) of the linear layers `names` in stacked blocks; kernels have a leading L."""
    for name in names:
        module, layer = name.split("/")
        yield name, getattr(getattr(layers, module), layer)


def merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, dtype: np.dtype) -> np.ndarray:
    """Return W + scale A B of a stacked kernel [L, *in, *out] in `dtype`; a layer at a time, in float32."""
    result = np.empty(kernel.shape, dtype)
    for layer in range(len(kernel)):
        rank = b.shape[1]
        product = a[layer].astype(np.float32).reshape(-1, rank) @ b[layer].astype(np.float32).reshape(rank, -1)
        result[layer] = kernel[layer].astype(np.float32) + np.float32(scale) * product.reshape(kernel.shape[1:])
    return result
