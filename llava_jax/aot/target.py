"""What a step is compiled for: TPUs or GPUs by name, described to their compilers without one, or the local devices."""

import ctypes
import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from llava_jax.aot.cost import Layout, layout_of, rings_of
from llava_jax.parallel.chips import CHIP_OF_KIND, CHIPS, GPU_FRACTION, Chip
from llava_jax.settings import nearest
from llava_jax.types import InputError

# chip -> its names for libtpu: of the generation, and of how its cores are used.
TPUS = {
    "v5e": ("v5e", "default"),
    "v5p": ("v5", "megacore"),
    "v6e": ("v6e", "default"),
    "v7x": ("tpu7x", "default"),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler is told of a card: its name and version for CUDA, and what CUDA says of its processors."""

    name: str
    capability: tuple[int, int]
    processors: int
    lanes: int  # float32 units of a processor
    threads: int  # that a processor holds
    shared_kib: int  # of a processor
    cache_mib: int
    clock_ghz: float


GPUS = {
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 164, 40, 1.41),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164, 40, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 50, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 228, 50, 1.98),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 128, 1536, 100, 96, 2.52),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 100, 72, 2.52),
}
NODE = 8  # GPUs of a machine


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for. `chip` is None where its figures are unknown, `layout` where no time can be estimated.

    `absent_gpu`: the compiler cannot try kernels, as it does where there is a GPU.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    layout: Layout | None
    slices: int
    hbm_bytes: float | None
    absent_gpu: bool = False


def named_target(name: str, slices: int = 1) -> Target:
    """Return a TPU topology such as v5e:8x8 or v5p:4x4x4, or GPUs such as h100:8.

    `slices` of a TPU topology are joined by the data-centre network. Raises InputError for a target that is not known,
    and without its compiler.
    """
    kind, _, text = name.partition(":")
    if kind in TPUS:
        return _tpus(name, kind, text, slices)
    if kind in GPUS:
        return _gpus(name, kind, text, slices)
    example = "write v5e:8x8, v5p:4x4x4 or h100:8"
    raise InputError(f"--topology={name}: unknown chip{nearest(kind, (*TPUS, *GPUS))}; {example}")


def _tpus(name: str, kind: str, text: str, slices: int) -> Target:
    axes = 3 if kind in ("v5p", "v7x") else 2
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), text):
        example = f"{kind}:4x4x4" if axes == 3 else f"{kind}:8x8"
        raise InputError(f"--topology={name}: expected {axes} sizes for {kind}, such as {example}")
    sizes = tuple(int(size) for size in text.split("x"))
    libtpu_name, config = TPUS[kind]
    try:
        devices = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{libtpu_name}:{text}",
            chip_config_name=config,
            chips_per_host_bounds=tuple(map(min, (*sizes, 1)[:3], (2, 2, 1))),
            num_slices=slices,
            wrap=rings_of(kind, sizes),
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--topology={name}: libtpu knows no such topology ({reason}); choose another") from error
    except RuntimeError as error:
        raise InputError(f'--topology={name} needs libtpu: pip install -e ".[tpu]" ({error})') from error
    chip = CHIPS[kind]
    return Target(name, devices, chip, layout_of(chip, sizes) if chip.clock else None, slices, chip.hbm_bytes)


def _gpus(name: str, kind: str, text: str, slices: int) -> Target:
    count = int(text) if text.isdecimal() else 0
    if not count or (count > NODE and count % NODE):
        raise InputError(f"--topology={name}: expected 1 to {NODE} GPUs, or a multiple of {NODE}, such as {kind}:8")
    if slices > 1:
        raise InputError(f"--slices={slices}: only TPUs have slices; --topology={kind}:{count * slices} is all GPUs")
    nodes = -(-count // NODE)
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", target_config=_described(kind), topology=f"1x{nodes}x{count // nodes}"
        ).devices
        ctypes.CDLL("libcudnn.so.9")  # jax asks its version when it traces attention; the plugin has loaded it
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        needs = 'needs the CUDA plugin of jax and cuDNN, no GPU: pip install -e ".[cuda]"'
        raise InputError(f"--topology={name} {needs} ({reason})") from error
    chip = CHIPS[kind]
    return Target(name, devices, chip, None, 1, GPU_FRACTION * chip.hbm_bytes, absent_gpu=True)


def _described(kind: str) -> str:
    """Return a card as XLA's GpuTargetConfigProto, in text form."""
    gpu, chip = GPUS[kind], CHIPS[kind]
    major, minor = gpu.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        runtime_version {{ major: 12 minor: 9 }}
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.processors}
          fpus_per_core: {gpu.lanes}
          clock_rate_ghz: {gpu.clock_ghz}
          memory_bandwidth: {int(chip.hbm_bytes_per_second)}
          device_memory_size: {int(chip.hbm_bytes)}
          l2_cache_size: {gpu.cache_mib * 2**20}
          shared_memory_per_core: {gpu.shared_kib * 2**10}
          shared_memory_per_block_optin: {(gpu.shared_kib - 1) * 2**10}
          shared_memory_per_block: 49152
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_core_limit: {gpu.threads}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
    """


def local_target() -> Target:
    """Return the devices of this machine; their memory as the runtime gives it, else as the chip's."""
    devices = jax.devices()
    chip = CHIP_OF_KIND.get(devices[0].device_kind)
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    limit = (stats or {}).get("bytes_limit", chip.hbm_bytes if chip else None)
    layout = layout_of(chip, _local_sizes(devices)) if chip and devices[0].platform == "tpu" else None
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return Target(f"local: {len(devices)} x {devices[0].device_kind}", devices, chip, layout, slices, limit)


def _local_sizes(devices: list[Any]) -> tuple[int, ...]:
    coordinates = np.array([device.coords for device in devices])
    return tuple(int(size) for size in coordinates.max(0) - coordinates.min(0) + 1)
