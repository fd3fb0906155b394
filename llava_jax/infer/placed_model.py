"""A model on the devices that answer with it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from llava_jax.models.layers import axes_for_answers, quantise
from llava_jax.models.llava import build, for_answers, logical_axes
from llava_jax.parallel.sharding import RULES, batch_sharding, make_mesh, param_shardings, place, replicated
from llava_jax.types import DECODER_LINEARS, InputError, LazyTensor, MeshSettings, ModelConfig

ALIGNMENT = 64  # bytes; XLA copies what lies otherwise


@dataclasses.dataclass(frozen=True)
class PlacedModel:
    """A model on its devices: its weights with the decoder's blocks one by one (`llava.for_answers`), the
    automaton of its stops (`sample.stop_table`) and, over several devices, their mesh."""

    params: dict[str, Any]
    config: ModelConfig
    stops_QV: jax.Array
    mesh: Mesh | None = None

    @property
    def row_multiple(self) -> int:
        """Return over how many devices the rows of a batch are split."""
        return 1 if self.mesh is None else int(np.prod([self.mesh.shape[axis] for axis in RULES["batch"] or ()]))

    def rows(self, count: int) -> int:
        """Return `count` rounded up to what divides over the devices."""
        return -(-count // self.row_multiple) * self.row_multiple

    def group(self, waiting: int) -> int:
        """Return for how many of `waiting` rows to make room at once: the largest power of four that they fill to three
        quarters, so that few sizes are compiled, and that gives no device more than 16."""
        most = min(waiting * 4 // 3, 16 * self.row_multiple)
        return self.rows(4 ** (most.bit_length() - 1 >> 1))

    def place(self, tree: Any) -> Any:
        """Place arrays of rows: split over the devices of a mesh."""
        return tree if self.mesh is None else jax.device_put(tree, batch_sharding(self.mesh))

    def replicate(self, tree: Any) -> Any:
        """Place arrays where the weights are: on every device of a mesh."""
        at = self.stops_QV.sharding if self.mesh is None else replicated(self.mesh)
        return jax.device_put(tree, at)


def place_model(
    params: dict[str, Any], config: ModelConfig, stops_QV: np.ndarray, mesh: Mesh | None = None
) -> PlacedModel:
    """Return the model of parameters (numpy or `LazyTensor`) over a mesh or on the first device.

    Weights are in the dtype of the config; `stops_QV` is of `sample.stop_table`.
    """
    params = for_answers(params)
    if mesh is None:
        everywhere: jax.sharding.Sharding = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: everywhere, params)
        # Not where kernels are quantised: the buffer would hold them next to their codes.
        if jax.default_backend() == "cpu" and not config.int8:
            params = in_one_buffer(params, jnp.dtype(config.dtype))
    else:
        everywhere, axes = replicated(mesh), logical_axes(config)
        axes |= {"llm": axes_for_answers(axes["llm"], config.llm.layers)}
        shardings = param_shardings(axes, params, mesh)

    def put(path: tuple, x: Any, at: jax.sharding.Sharding) -> Any:
        whole = (
            place(x, at) if isinstance(x, LazyTensor) else jax.device_put(np.asarray(x, jnp.dtype(config.dtype)), at)
        )
        module = "/".join(key.key for key in path[3:-1])
        if not config.int8 or path[0].key != "llm" or module not in DECODER_LINEARS or path[-1].key != "kernel":
            return whole
        codes, scale = _quantise(whole)
        return {"codes": codes, "scale": scale}

    placed = jax.tree_util.tree_map_with_path(put, params, shardings)
    return PlacedModel(placed, config, jax.device_put(stops_QV, everywhere), mesh)


_quantise = jax.jit(quantise)


def in_one_buffer(tree: Any, dtype: np.dtype) -> Any:
    """Copy arrays (numpy or `LazyTensor`) into one buffer; return numpy arrays that JAX takes on a CPU as they lie.

    Linux keeps numpy's large buffers in pages of 2 MiB, and a step of decoding reads its weights faster from these than
    from pages of 4 KiB, in which XLA's own memory is.
    """
    leaves, structure = jax.tree.flatten(tree)
    sizes = [-(-math.prod(x.shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for x in leaves]
    buffer = np.empty(sum(sizes) + ALIGNMENT, np.uint8)
    start, copies = -buffer.ctypes.data % ALIGNMENT, []
    for x, size in zip(leaves, sizes, strict=True):
        copies.append(np.ndarray(x.shape, dtype, buffer, start))
        copies[-1][...] = np.asarray(x)
        start += size
    return jax.tree.unflatten(structure, copies)


def mesh_for_answers(config: ModelConfig, tensor: int) -> Mesh | None:
    """Return the mesh over all devices, None for one: batches over some, each model split over `tensor` of them.

    `tensor` 0 is as few as can hold the weights. Raises InputError for one that does not divide devices or heads.
    """
    devices, heads = jax.devices(), math.gcd(config.llm.heads, config.llm.kv_heads)
    held = sum(leaf.size for leaf in jax.tree.leaves(build(config)[1])) * jnp.dtype(config.dtype).itemsize
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    ways = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and heads % n == 0]
    if tensor and tensor not in ways:
        raise InputError(
            f"tensor={tensor}: expected one of {ways}, which divide {len(devices)} devices and {heads} attention heads"
        )
    # A third of the memory is left to the cache.
    fitting = [n for n in ways if held / n <= memory * 2 / 3]
    return make_mesh(MeshSettings(-1, 1, tensor or min(fitting, default=ways[-1]))) if len(devices) > 1 else None
