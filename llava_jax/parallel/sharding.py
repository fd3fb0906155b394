"""The device mesh, and the one table that says along which mesh axes every array dimension is split."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_jax.types import InputError, MeshSettings

# The devices of mesh.fsdp are outer x inner; the inner axis has size 1 unless mesh.fsdp_inner says otherwise.
FSDP = ("fsdp_outer", "fsdp_inner")
MESH_AXES = ("data", *FSDP, "tensor")

# Logical axis of an array dimension -> mesh axes. Batches are split over data and fsdp together; weights over fsdp
# along their width (gathered layer by layer) and over tensor along heads, mlp and vocabulary (Megatron's layout). The
# vision tower is frozen and small (0.6 GB in bfloat16): every device holds all of it and never waits for it.
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

    def sharding(path: tuple, names: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = spec_of(names, leaf.ndim)
        check_divisible("/".join(str(key.key) for key in path), leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, axes, abstract, is_leaf=lambda leaf: isinstance(leaf, tuple))


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
    """Inside shard_map: sum `x` over data and fsdp; each device keeps its chunk along `dimension`.

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
