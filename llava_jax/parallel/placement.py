"""Host arrays onto devices: weights still in their files, layer by layer, and the rows of a batch a process reads."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.parallel.sharding import batch_sharding
from llava_jax.types import Batch, LazyTensor

# A stack up to this size is read at once: layer by layer costs a compilation, and a wait for each layer.
AT_ONCE = 16 * 2**20


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """Return the rows of a global batch of `rows` that this process reads, in order: those its devices hold.

    They need not be adjacent: on a TPU a host has a square of chips, and the mesh runs along the rows of the slice.
    Processes whose devices hold the same rows (a tensor axis across hosts) read the same ones.
    """
    where = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for index in where for row in range(*index[0].indices(rows))}))


def global_batch(batch: Batch, mesh: Mesh, rows: int) -> Batch:
    """Return the batch of `rows` rows as global arrays, to which each process gives its `local_rows`; does not wait."""
    at = batch_sharding(mesh)
    index_of = {row: index for index, row in enumerate(local_rows(mesh, rows))}

    def global_array(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            # A device's own rows are adjacent, in the batch and so in x.
            return x[index_of[start] : index_of[start] + stop - start]

        return jax.make_array_from_callback((rows, *x.shape[1:]), at, shard)

    return jax.tree.map(global_array, batch._replace(rows_BM=None))


def place(tree: Any, shardings: Any) -> Any:
    """Put host arrays onto devices as global ones; each process copies what its devices hold, of values equal in all.

    A `LazyTensor` of more than AT_ONCE bytes is read one layer at a time, so that host memory never holds all of it.
    (device_put would first compare the values of all processes, and so send every weight over the network.)
    """

    def put(x: np.ndarray | LazyTensor, at: jax.sharding.Sharding) -> jax.Array:
        if isinstance(x, LazyTensor):
            if math.prod(x.shape) * x.dtype.itemsize > AT_ONCE:
                return _streamed(x, at)
            x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, at, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def _streamed(x: LazyTensor, at: jax.sharding.Sharding) -> jax.Array:
    """Copy a stored parameter to its sharding; the host holds one layer, or one parameter that has none."""
    if not x.stacked:
        return _settled(_layer(x.one(0), x, at))
    at_layer = at
    if isinstance(at, NamedSharding):
        # Stacks are never split along their layers (sharding.spec_of).
        at_layer = NamedSharding(at.mesh, PartitionSpec(*at.spec[1:]), memory_kind=at.memory_kind)
    stack = jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=at)()
    write = jax.jit(jax.lax.dynamic_update_index_in_dim, static_argnums=3, donate_argnums=0, out_shardings=at)
    for layer in range(x.shape[0]):
        stack = _settled(write(stack, _layer(x.one(layer), x, at_layer), layer, 0))
    return stack


def _settled(x: jax.Array) -> jax.Array:
    """Wait for the array and release the host's copy, or copies of many would wait for the device at once."""
    x.block_until_ready()
    jax.device_put(0)  # jax releases a copy at the next call into it
    return x


def _layer(one: np.ndarray, x: LazyTensor, at: jax.sharding.Sharding) -> jax.Array:
    """Copy one layer's values, which may lie in a file's pages, shard by shard in the order they are used."""
    return jax.make_array_from_callback(one.shape, at, lambda index: np.array(one[index], x.dtype, order="C"))
