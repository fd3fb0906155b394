"""What a matmul does on a mesh: weights are gathered over fsdp, gradients are summed over the devices.

On a mesh with two fsdp axes (`mesh.fsdp_inner` > 1) the gradient of a weight is summed by a hierarchical
reduce-scatter: along one axis of the chips' network, then along the other. Along a single axis libtpu compiles a true
reduce-scatter, which it runs during the matmuls that follow; over two axes at once it makes a synchronous all-reduce.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llava_jax.parallel.sharding import name_for_remat, scatter_sum, spec_of, unshard


def matmul(x: jax.Array, kernel: jax.Array, axes: Sequence[str], in_dims: int, name: str) -> jax.Array:
    """Multiply x [..., *in] with a kernel [*in, *out] that is stored as its logical `axes` say.

    Args:
      x: activations, in the dtype of the result.
      kernel: the weight, in the same dtype.
      axes: a logical axis of `sharding.RULES` for each dimension of the kernel.
      in_dims: how many dimensions of the kernel are inputs.
      name: the layer; `train.remat` keeps the gathered kernel by NAME_weight.

    Returns:
      [..., *out].
    """
    lead, in_shape = x.shape[: x.ndim - in_dims], x.shape[x.ndim - in_dims :]
    # One leading dimension: over two of them XLA's CPU backend does not take its fast matmul for the gradient.
    rows = x.reshape(-1, *in_shape)
    if "embed" in axes and jax.sharding.get_abstract_mesh().shape.get("fsdp_inner", 1) > 1:
        y = _hierarchical(rows, kernel, tuple(axes), in_dims, name)
    else:
        y = jnp.tensordot(rows, name_for_remat(unshard(kernel, *axes), name), axes=in_dims)
    return y.reshape(*lead, *y.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _hierarchical(x: jax.Array, kernel: jax.Array, axes: tuple[str, ...], in_dims: int, name: str) -> jax.Array:
    return jnp.tensordot(x, unshard(kernel, *axes), axes=in_dims)


def _forward(
    x: jax.Array, kernel: jax.Array, axes: tuple[str, ...], in_dims: int, name: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # A plain dot, not `_hierarchical`: remat policies that keep matmuls look for it.
    full = name_for_remat(unshard(kernel, *axes), name)
    return jnp.tensordot(x, full, axes=in_dims), (x, full)


def _backward(
    axes: tuple[str, ...], in_dims: int, name: str, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, full = residuals
    over_out = tuple(range(1, dy.ndim)), tuple(range(in_dims, full.ndim))
    dx = jnp.tensordot(dy, full, axes=over_out)

    unsharded = ["activation" if axis == "embed" else axis for axis in axes]
    rows_in, rows_out = (spec_of(("batch", *of), 1 + len(of)) for of in (unsharded[:in_dims], unsharded[in_dims:]))
    local = functools.partial(_local_gradient, embed_first=axes[0] == "embed")
    # check_vma: scatter_sum is what makes the result equal on the mesh.
    dkernel = jax.shard_map(local, in_specs=(rows_in, rows_out), out_specs=spec_of(axes, len(axes)), check_vma=False)
    return dx, dkernel(x, dy)


def _local_gradient(x: jax.Array, dy: jax.Array, *, embed_first: bool) -> jax.Array:
    """Sum as a matrix [embed, rest]: a reduce-scatter along the first dimension is what libtpu overlaps."""
    in_shape, out_shape = x.shape[1:], dy.shape[1:]
    x, dy = (a.reshape(a.shape[0], -1) for a in (x, dy))
    if embed_first:
        return scatter_sum(x.T @ dy, 0).reshape(-1, *out_shape)
    return scatter_sum(dy.T @ x, 0).T.reshape(*in_shape, -1)


_hierarchical.defvjp(_forward, _backward)
