"""Product with a weight that is split over both fsdp axes: its gradient is summed along one after the other."""

import functools

import jax
import jax.numpy as jnp

from llava_jax.parallel.sharding import gathered, named, scatter_sum, spec_of


def sums_in_two_steps() -> bool:
    """Whether the mesh of `jax.set_mesh` has two fsdp axes (mesh.fsdp_inner > 1).

    Round the tensor axis (ops.ring) only o and down are summed along one after the other.
    """
    return jax.sharding.get_abstract_mesh().shape.get("fsdp_inner", 1) > 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(x: jax.Array, kernel: jax.Array, axes: tuple[str, ...], in_dims: int, name: str) -> jax.Array:
    """x [rows, *in] times kernel [*in, *out] with logical `axes`, of which the first or the last is `embed`.

    Whole, the kernel has the `name` that train.remat knows. Its gradient is made on each device from its own rows and
    summed by `scatter_sum` as a matrix [embed, rest]: a reduce-scatter along the first dimension is what libtpu runs
    beside the products that follow.
    """
    return jnp.tensordot(x, gathered(kernel, *axes), axes=in_dims)


def _forward(
    x: jax.Array, kernel: jax.Array, axes: tuple[str, ...], in_dims: int, name: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The product itself, not `product`: remat policies that keep matrix products look for it.
    whole = named(gathered(kernel, *axes), name)
    return jnp.tensordot(x, whole, axes=in_dims), (x, whole)


def _backward(
    axes: tuple[str, ...], in_dims: int, name: str, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, whole = kept
    out_dims = whole.ndim - in_dims
    over_out = tuple(range(1, 1 + out_dims)), tuple(range(in_dims, whole.ndim))
    dx = jnp.tensordot(dy, whole, axes=over_out)

    used = ["activation" if axis == "embed" else axis for axis in axes]
    rows_in, rows_out = (spec_of(("batch", *of), 1 + len(of)) for of in (used[:in_dims], used[in_dims:]))
    local = functools.partial(_local_gradient, embed_first=axes[0] == "embed")
    # check_vma: scatter_sum is what makes the result equal on the mesh.
    dkernel = jax.shard_map(local, in_specs=(rows_in, rows_out), out_specs=spec_of(axes, len(axes)), check_vma=False)
    return dx, dkernel(x, dy)


def _local_gradient(x: jax.Array, dy: jax.Array, *, embed_first: bool) -> jax.Array:
    in_shape, out_shape = x.shape[1:], dy.shape[1:]
    x, dy = (a.reshape(a.shape[0], -1) for a in (x, dy))
    if embed_first:
        return scatter_sum(x.T @ dy, 0).reshape(-1, *out_shape)
    return scatter_sum(dy.T @ x, 0).T.reshape(*in_shape, -1)


product.defvjp(_forward, _backward)
