"""Building blocks: `param` (the only place where a parameter is made), Linear, LayerNorm, RMSNorm."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.parallel.sharding import constrain, matmul, unshard
from llava_jax.types import DECODER_LINEARS, REMAT_NAMES, LazyTensor

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]

normal = jax.nn.initializers.normal(0.02)
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def torch_uniform(fan_in: int) -> Initializer:
    """Return U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of torch.nn.Linear and so of LLaVA's projector."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def param(rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """Draw a float32 parameter whose dimensions carry the logical `axes` of sharding.RULES."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=tuple(axes))


class Linear(nnx.Module):
    """Affine map from the last `in_shape` dimensions to `out_shape`; kernel [*in_shape, *out_shape]."""

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
        name: str = "",
    ):
        """Draw kernel and bias.

        Args:
          in_shape, out_shape: the dimensions that are summed over, and those of the result.
          in_axes, out_axes: a logical axis of `parallel.sharding.RULES` for each of them.
          rngs: draws the initial values.
          bias: whether there is one.
          init, bias_init: distributions of kernel and bias.
          name: what `train.remat` calls the kernel of a decoder block ("q": q_weight).
        """
        self.in_dims, self.axes, self.name = len(in_shape), (*in_axes, *out_axes), name
        self.kernel = param(rngs, init, (*in_shape, *out_shape), self.axes)
        self.bias = param(rngs, bias_init, out_shape, out_axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.astype(y.dtype)

    def multiply(self, x: jax.Array) -> jax.Array:
        """Return the product of x [..., *in] with the kernel, without the bias."""
        return matmul(x, self.weight(x.dtype), self.axes, self.in_dims, self.name)

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        """Return the kernel in the dtype of the computation."""
        return self.kernel.astype(dtype)


class TurnedLinear(Linear):
    """A linear layer for answers: its kernel is a matrix [out, in] (`turned`)."""

    def __init__(self, linear: Linear):
        self.in_dims, self.axes, self.name = linear.in_dims, linear.axes, linear.name
        self.kernel, self.bias = linear.kernel, linear.bias

    def multiply(self, x: jax.Array) -> jax.Array:
        lead, kernel_OI = x.shape[: x.ndim - self.in_dims], self.weight(x.dtype)
        kernel_OI = unshard(kernel_OI, *turned_axes(self.axes, self.in_dims))
        return product(x.reshape(-1, kernel_OI.shape[1]), kernel_OI).reshape(*lead, -1)


class Int8(nnx.Module):
    """A kernel in eight bits with a scale for each output, for answers: codes int8 [out, in], scale [out].

    Both come with the parameters (`quantise`).
    """

    def __init__(self, kernel: jax.Array):
        self.codes, self.scale = nnx.Variable(kernel), nnx.Variable(kernel)


class Int8Linear(TurnedLinear):
    """A linear layer with a kernel of eight bits: the product reads them widened, and is scaled."""

    def __init__(self, linear: Linear):
        super().__init__(linear)
        self.kernel = Int8(linear.kernel[...])

    def multiply(self, x: jax.Array) -> jax.Array:
        return super().multiply(x) * self.kernel.scale[...].astype(x.dtype)

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        return self.kernel.codes[...].astype(dtype)


def quantise(kernel_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (codes int8 [out, in], scale float32 [out]): the largest magnitude of an output is 127 steps."""
    kernel_OI = kernel_OI.astype(jnp.float32)
    scale_O = jnp.max(jnp.abs(kernel_OI), axis=-1) / 127
    return jnp.round(kernel_OI / jnp.where(scale_O > 0, scale_O, 1)[..., None]).astype(jnp.int8), scale_O


# A CPU multiplies up to so many rows at the right side of a product: more of them cost less than turning them.
FEW_ROWS = 64


def product(rows_MI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """Multiply rows with a kernel as torch stores it; return [M, O].

    XLA packs the right side of a product anew at each call on a CPU, so that few rows are better off there than the
    kernel. The barriers keep it from turning the product back.
    """

    def few(rows_MI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
        product_OM = kernel_OI @ jax.lax.optimization_barrier(rows_MI.T)
        return jax.lax.optimization_barrier(product_OM).T

    def many(rows_MI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
        return jnp.einsum("MI,OI->MO", rows_MI, kernel_OI)

    if rows_MI.shape[0] > FEW_ROWS:
        return many(rows_MI, kernel_OI)
    return jax.lax.platform_dependent(rows_MI, kernel_OI, cpu=few, default=many)


class LayerNorm(nnx.Module):
    """Normalisation of the last dimension in float32; the result has the dtype of x."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, ones, (width,), ("norm",))
        self.bias = param(rngs, zeros, (width,), ("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale.astype(jnp.float32) + self.bias.astype(jnp.float32)).astype(x.dtype)


class Embed(nnx.Module):
    """Embeddings of tokens."""

    def __init__(self, vocab_size: int, width: int, dtype: str, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.table = param(rngs, normal, (vocab_size, width), ("vocab", "embed"))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Return embeddings [B, T, D] in the compute dtype; an id outside the table (an image slot) reads row 0."""
        inside = (tokens_BT >= 0) & (tokens_BT < self.table.shape[0])
        # Gathered first: a lookup in the sharded table would give the batch the layout of the table.
        table_VD = unshard(self.table.astype(self.dtype), "vocab", "embed")
        x_BTD = jnp.take(table_VD, jnp.where(inside, tokens_BT, 0), axis=0)
        return constrain(x_BTD, "batch", "length", "activation")


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; the result is cast to the dtype of x before the scale, as LLaMA does."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, ones, (width,), ("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale.astype(x.dtype)


def remat_policy(remat: str) -> Callable[..., bool]:
    """Return which results of a block are kept for the backward pass: those named in `remat`, joined by '+'."""
    if remat == "dots":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    names = set() if remat == "full" else set(remat.split("+"))
    if "minimal" in names:
        names = names - {"minimal"} | set(REMAT_NAMES)
    return jax.checkpoint_policies.save_only_these_names(*sorted(names))


def is_codes(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Return whether a leaf of the parameters holds codes, which no cast may touch."""
    return leaf.dtype == jnp.uint8


def weights_in(path: tuple, leaf: Any) -> int:
    """Return how many weights a leaf stands for: two a byte of codes, none in the scale of their blocks."""
    if [key.key for key in path[-2:]] == ["kernel", "scale"]:
        return 0
    return math.prod(leaf.shape) * (2 if is_codes(leaf) else 1)


def stored_as(tree: Any, dtype: str) -> Any:
    """Return the parameters, arrays or ShapeDtypeStructs, in `dtype`, codes as they are."""

    def cast(x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree.map(lambda x: x if is_codes(x) else cast(x), tree)


def unstacked(llm: dict[str, Any]) -> dict[str, Any]:
    """Return a decoder's parameters as infer/ runs them: blocks one by one, {layer: block}, and the head [V, D]."""
    head = {"head": {"kernel": llm["head"]["kernel"].swapaxes(0, 1)}} if "head" in llm else {}
    return llm | {"layers": dict(enumerate(blocks_of(llm["layers"])))} | head


def blocks_of(stack: Any) -> list[Any]:
    """Return the blocks of a stack of them."""

    def block(layer: int) -> Any:
        return jax.tree.map(lambda x: x.layer(layer) if isinstance(x, LazyTensor) else x[layer], stack)

    return [block(layer) for layer in range(jax.tree.leaves(stack)[0].shape[0])]


def turned(llm: dict[str, Any]) -> dict[str, Any]:
    """Return a decoder's parameters with the kernels of its stacked blocks as matrices [L, out, in] (see `product`).

    A TPU decodes with matrices as they lie in memory; a kernel [L, D, N, H] it would copy.
    """

    def matrix(x: Any, in_dims: int) -> Any:
        inputs, outputs = (math.prod(shape) for shape in (x.shape[1 : 1 + in_dims], x.shape[1 + in_dims :]))
        return x.reshape(x.shape[0], inputs, outputs).swapaxes(1, 2)

    return _over_linears(
        llm, {"kernel": matrix, "bias": lambda x, in_dims: x.reshape(x.shape[0], math.prod(x.shape[1:]))}
    )


def axes_for_answers(axes: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the logical axes of a decoder's parameters after `turned` and `unstacked` into `count` blocks."""
    layers = _over_linears(axes, {"kernel": turned_axes, "bias": lambda names, in_dims: names[:1]})["layers"]
    head = {"head": {"kernel": axes["head"]["kernel"][::-1]}} if "head" in axes else {}
    return axes | {"layers": dict.fromkeys(range(count), layers)} | head


def turned_axes(axes: tuple[str, ...], in_dims: int) -> tuple[str, str]:
    """Return the logical axes of a matrix [out, in] made of a kernel [*in, *out]."""
    return axes[in_dims], axes[0]


def _over_linears(tree: dict[str, Any], change: dict[str, Callable[[Any, int], Any]]) -> dict[str, Any]:
    """Change each leaf of the linear layers of the blocks; `change` is told how many dimensions are inputs."""
    layers = dict(tree["layers"])
    for name in DECODER_LINEARS:
        module, layer = name.split("/")
        in_dims = 2 if name == "attn/o" else 1
        changed = {leaf: change[leaf](x, in_dims) for leaf, x in layers[module][layer].items()}
        layers[module] = layers[module] | {layer: changed}
    return tree | {"layers": layers}
