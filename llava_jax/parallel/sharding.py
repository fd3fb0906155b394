"""The device mesh, the one table that says along which mesh axes every array dimension is split, and arrays put so."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_jax.types import Batch, InputError, LazyTensor, MeshSettings

# The devices of mesh.fsdp are outer x inner; the inner axis has size 1 unless mesh.fsdp_inner says otherwise.
FSDP = ("fsdp_outer", "fsdp_inner")
MESH_AXES = ("data", *FSDP, "tensor")

# Logical axis of an array dimension -> mesh axes. Batches are split over data and fsdp together; weights over fsdp
# along their width (gathered layer by layer) and over tensor along heads, mlp and vocabulary (Megatron's layout). A
# frozen vision tower is small (0.6 GB in bfloat16): every device holds all of it and never waits for it. What of it
# learns has float32 weights and moments (six times that): `tower_split` stores them over fsdp.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", *FSDP),
    "length": None,
    "embed": FSDP,
    "vision_embed": None,
    "vision_heads": None,
    "vision_mlp": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "activation": None,
    "patch": None,
    "norm": None,
    "position": None,
    "projected": None,
    "rank": None,
    "block": None,
}

SIZES = ("data", "fsdp", "tensor")  # what mesh.* of a config gives


def make_mesh(settings: MeshSettings, devices: list[jax.Device] | None = None) -> Mesh:
    """Return a mesh with MESH_AXES over `devices` (default: all); one size may be -1 and takes the rest.

    On TPUs the axes follow the links between the chips; where there are several slices, `data` runs across them, so
    that only the sum of the gradients crosses the slower network. Raises InputError where the settings, valid by
    themselves (`settings_from_dict`), do not suit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [settings.data, settings.fsdp, settings.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        needed = f"{known} devices" + " or a multiple" * (-1 in sizes)
        raise InputError(f"mesh: {SIZES} = {sizes} needs {needed}, found {len(devices)}: set mesh.* to what is there")
    data, fsdp, tensor = sizes
    inner = settings.fsdp_inner
    if fsdp % inner:
        raise InputError(f"mesh.fsdp_inner={inner}: expected a divisor of mesh.fsdp, which is {fsdp}")
    shape = [data, fsdp // inner, inner, tensor]
    return Mesh(_arranged(devices, shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(mesh: Mesh) -> dict[str, int]:
    """Return the mesh in the terms of MeshSettings: devices along data, fsdp (both axes) and tensor, and fsdp_inner."""
    data, outer, inner, tensor = (mesh.shape[axis] for axis in MESH_AXES)
    return {"data": data, "fsdp": outer * inner, "tensor": tensor, "fsdp_inner": inner}


def _arranged(devices: list[jax.Device], sizes: list[int]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise InputError(
            f"mesh.data={sizes[0]}: the devices are {slices} slices and data runs across them (else weights would be "
            f"gathered over the network between them): expected a multiple of {slices}, set --config.mesh.data={slices}"
        )
    inside = [sizes[0] // slices, *sizes[1:]]
    across = [slices] + [1] * len(sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def spec_of(axes: tuple[str, ...], ndim: int) -> PartitionSpec:
    """Return the spec of an array whose last dimensions carry `axes`; leading ones (stacked layers) are not split."""
    return PartitionSpec(*(None,) * (ndim - len(axes)), *(RULES[axis] for axis in axes))


def check_divisible(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    """Raise InputError naming the parameter whose dimension does not divide over its mesh axes."""
    for dim, names in zip(shape, spec, strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        ways = int(np.prod([mesh.shape[name] for name in names]))
        if dim % ways:
            where = f"{path}: size {dim} of shape {shape}"
            raise InputError(f"{where} does not divide over mesh axes {names} ({ways} ways); choose another mesh")


def param_shardings(axes: Any, abstract: Any, mesh: Mesh) -> Any:
    """Return a NamedSharding for every parameter; `axes` has their structure, with logical axes as leaves."""

    def sharding(path: tuple, names: tuple[str, ...], leaf: jax.ShapeDtypeStruct | LazyTensor) -> NamedSharding:
        spec = spec_of(names, len(leaf.shape))
        check_divisible("/".join(str(key.key) for key in path), leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, axes, abstract, is_leaf=lambda leaf: isinstance(leaf, tuple))


def tower_split(axes: Any, width: int, mesh: Mesh) -> Any:
    """Return the logical axes of a vision tower that learns: its width is stored as a decoder's, where it divides."""
    if width % mesh_sizes(mesh)["fsdp"]:
        return axes

    def stored(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("embed" if name == "vision_embed" else name for name in names)

    return jax.tree.map(stored, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def gathered(tree: Any) -> Any:
    """Gather weights that are split in storage only: once for all that is computed with them."""
    return jax.tree.map(lambda x: constrain(x, *("activation",) * x.ndim), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pin an activation's layout under the mesh of `jax.set_mesh`; without a mesh there is nothing to pin."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(axes, x.ndim))


def scatter_sum(x: jax.Array, dimension: int) -> jax.Array:
    """Sum `x` over data and fsdp, inside shard_map; each device keeps its chunk along `dimension`.

    One fsdp axis after the other: along a single axis of a TPU's network this is a true reduce-scatter, over two at
    once the compiler makes an all-reduce of it and slices the result.
    """
    for axis in FSDP:
        if jax.sharding.get_abstract_mesh().shape[axis] > 1:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, "data")


def unshard(kernel: jax.Array, *axes: str) -> jax.Array:
    """Gather a weight along `embed`, which is split in storage only.

    Without the pin the compiler may leave it split and pass chunks around between small matmuls (on a TPU of 8 or 16
    chips it does), which takes twice the time.
    """
    return constrain(kernel, *("activation" if axis == "embed" else axis for axis in axes))


def name_for_remat(kernel: jax.Array, layer: str) -> jax.Array:
    """Name a gathered weight LAYER_weight, so that train.remat can keep it; where fsdp is 1 nothing was gathered."""
    sizes = jax.sharding.get_abstract_mesh().shape
    was_gathered = layer and any(sizes.get(axis, 1) > 1 for axis in FSDP)
    return checkpoint_name(kernel, f"{layer}_weight") if was_gathered else kernel


# ---- what a matmul does on a mesh ----


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


# ---- host arrays onto devices ----


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
        if isinstance(x, LazyTensor) and math.prod(x.shape) * x.dtype.itemsize > AT_ONCE:
            return _streamed(x, at)
        whole = np.asarray(x)
        placed = jax.make_array_from_callback(x.shape, at, lambda index: whole[index])
        return _settled(placed) if isinstance(x, LazyTensor) else placed

    return jax.tree.map(put, tree, shardings)


def _streamed(x: LazyTensor, at: jax.sharding.Sharding) -> jax.Array:
    """Copy a stored parameter to its sharding; the host holds one layer, or one parameter that has none."""
    if not x.stacked:
        return _settled(_layer(x.one(0), x, at))
    at_layer = at
    if isinstance(at, NamedSharding):
        # Stacks are never split along their layers (spec_of).
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
