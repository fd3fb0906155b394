"""Products whose weights are split over the tensor axis: what devices send each other runs beside the products.

Megatron's layout with rows split along T between the products (arXiv 2205.05198). Nothing is gathered before a product
or summed after it: stretches of the rows go round the ring of the axis, and while one is multiplied the next is under
way ("Overlap Communication with Dependent Computation via Decomposition", ASPLOS 2023).

Letters: n devices along the axis, t = T / n tokens of a device's stretch. The pieces of an array [B, T, F] are n arrays
[B, t, F], first a device's own stretch, then its next neighbour's, and so on round: piece i is another stretch on every
device, and nothing but elementwise functions and this module may take it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llava_jax.parallel.sharding import FSDP, RULES, named, scatter_fsdp, spec_of, tensor_ways

Pieces = tuple[jax.Array, ...]

STRETCH = PartitionSpec(None, "tensor")  # [B, T, D]: each device has its t tokens
FEATURES = PartitionSpec(None, None, "tensor")  # [B, t or T, F, ...]: each device has its features of all tokens


def columns(x_BTD: jax.Array, kernels: Sequence[jax.Array]) -> tuple[Pieces, ...]:
    """x, split along T, times each kernel [D, *out], split along the first of `out`: the pieces of [B, T, *out].

    Kernels are whole along D. The compiler sums their gradients over data and fsdp, beside the products that follow.
    """
    ways = tensor_ways()
    of_kernels = (PartitionSpec(None, "tensor"),) * len(kernels)
    out_specs = ((FEATURES,) * ways,) * len(kernels)
    return _around(_columns, (STRETCH, of_kernels), out_specs)(x_BTD, tuple(kernels))


def rows(pieces: Sequence[jax.Array], kernel: jax.Array, axes: tuple[str, ...], name: str) -> jax.Array:
    """The pieces of h [B, T, *in], split along the first of `in`, times the kernel [*in, D]: [B, T, D] split along T.

    The kernel has the logical `axes`, the last `embed`; whole, it has the `name` that train.remat knows. Its gradient
    is summed over fsdp here, as a matrix [D, in]: along the last dimension the sum would be an all-reduce.
    """
    of_pieces = (PartitionSpec(RULES["batch"], None, "tensor"),) * len(pieces)
    # check_vma: scatter_fsdp makes a gradient of the kernel's shape; over data shard_map sums it.
    return jax.shard_map(
        lambda pieces, kernel: _rows(pieces, kernel, name),
        in_specs=(of_pieces, spec_of(axes, kernel.ndim)),
        out_specs=spec_of(("batch", "split_length", "activation"), 3),
        check_vma=False,
    )(tuple(pieces), kernel)


def in_order(pieces: Sequence[jax.Array]) -> jax.Array:
    """[B, T, *features] of its pieces; one piece is all of it."""
    if len(pieces) == 1:
        return pieces[0]
    return _around(_put, ((FEATURES,) * len(pieces),), FEATURES)(tuple(pieces))


def pieces_of(h: jax.Array) -> Pieces:
    """The pieces of h [B, T, *features]."""
    return _around(_take, (FEATURES,), (FEATURES,) * tensor_ways())(h)


# ---- on one device ----------------------------------------------------------------------------------------------


def _around(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each device of the tensor axis; along the other axes the compiler splits it."""
    how = dict(axis_names={"tensor"}, check_vma=False)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, **how)


def _places(t: int) -> list[jax.Array]:
    """Where in T the pieces of this device begin."""
    ways, own = tensor_ways(), jax.lax.axis_index("tensor")
    return [(own + i) % ways * t for i in range(ways)]


def _put(pieces: Pieces) -> jax.Array:
    B, t, *features = pieces[0].shape
    h = jax.lax.empty((B, len(pieces) * t, *features), pieces[0].dtype)
    for place, piece in zip(_places(t), pieces, strict=True):
        h = jax.lax.dynamic_update_slice_in_dim(h, piece, place, axis=1)
    return h


@jax.custom_vjp
def _take(h: jax.Array) -> Pieces:
    t = h.shape[1] // tensor_ways()
    return tuple(jax.lax.dynamic_slice_in_dim(h, place, t, axis=1) for place in _places(t))


# Left to find the way back of `_take`, jax adds up arrays that are zero but for a piece. That of `_put` is left to it:
# as `_take`, it made libtpu (0.0.42) lay out a step of 671 ms in 688.
_take.defvjp(lambda h: (_take(h), None), lambda _, dpieces: (_put(dpieces),))


def _received(x_BtD: jax.Array) -> list[jax.Array]:
    """Every stretch in the order of pieces, the first this device's own; none waits for a product."""
    ways, held = tensor_ways(), [x_BtD]
    back = [(i, (i - 1) % ways) for i in range(ways)]
    for _ in range(ways - 1):
        held.append(jax.lax.ppermute(held[-1], "tensor", back))
    return held


def _sum_at_home(pieces: Sequence[Pieces], kernels: Sequence[jax.Array]) -> jax.Array:
    """[B, t, D]: this device's stretch of the sum over products of pieces and kernels [*in, D], and over all devices.

    The sum for a stretch starts at the device after its own and goes round, each device adding to it.
    """
    ways, total = tensor_ways(), None
    on = [(i, (i + 1) % ways) for i in range(ways)]
    for i in reversed(range(ways)):
        part = sum(jnp.tensordot(h[i], k, axes=k.ndim - 1) for h, k in zip(pieces, kernels, strict=True))
        total = part if total is None else jax.lax.ppermute(total, "tensor", on) + part
    return total


def _gradient(inputs: Sequence[jax.Array], outputs: Sequence[jax.Array]) -> jax.Array:
    """[*in, *out] summed over the tokens of all pieces [B, t, *in] and [B, t, *out]."""
    tokens = ((0, 1), (0, 1))
    return sum(jnp.tensordot(x, y, axes=tokens) for x, y in zip(inputs, outputs, strict=True))


@jax.custom_vjp
def _columns(x_BtD: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[Pieces, ...]:
    return _columns_forward(x_BtD, kernels)[0]


def _columns_forward(x_BtD: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[tuple[Pieces, ...], tuple]:
    # The products themselves, not `_columns`: remat policies that keep matrix products look for them.
    held = _received(x_BtD)
    return tuple(tuple(jnp.tensordot(x, kernel, axes=1) for x in held) for kernel in kernels), (x_BtD, kernels)


def _columns_backward(kept: tuple, dys: tuple[Pieces, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x_BtD, kernels = kept
    dx_BtD = _sum_at_home(dys, [jnp.moveaxis(kernel, 0, -1) for kernel in kernels])
    held = _received(x_BtD)
    return dx_BtD, tuple(_gradient(held, dy) for dy in dys)


_columns.defvjp(_columns_forward, _columns_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(pieces: Pieces, kernel: jax.Array, name: str) -> jax.Array:
    return _rows_forward(pieces, kernel, name)[0]


def _rows_forward(pieces: Pieces, kernel: jax.Array, name: str) -> tuple[jax.Array, tuple[Pieces, jax.Array]]:
    whole = named(jax.lax.all_gather(kernel, FSDP, axis=kernel.ndim - 1, tiled=True), name)
    return _sum_at_home((pieces,), (whole,)), (pieces, whole)


def _rows_backward(name: str, kept: tuple[Pieces, jax.Array], dy_BtD: jax.Array) -> tuple[Pieces, jax.Array]:
    pieces, whole = kept
    held = _received(dy_BtD)
    turned = jnp.moveaxis(whole, -1, 0)
    dpieces = tuple(jnp.tensordot(dy, turned, axes=1) for dy in held)
    flat = [h.reshape(*h.shape[:2], -1) for h in pieces]
    # The barrier keeps the compiler from turning the matrix before the sum, which would make it an all-reduce.
    dkernel = jax.lax.optimization_barrier(scatter_fsdp(_gradient(held, flat), 0))
    return dpieces, jnp.moveaxis(dkernel, 0, -1).reshape(*whole.shape[:-1], -1)


_rows.defvjp(_rows_forward, _rows_backward)
