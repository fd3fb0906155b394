"""What a step is compiled for: a TPU topology by name, described to libtpu without a TPU, or the local devices."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from llava_jax.aot.cost import Layout, layout_of, rings_of
from llava_jax.parallel.chips import CHIP_OF_KIND, CHIPS, Chip
from llava_jax.settings import nearest
from llava_jax.types import InputError

# chip -> its names for libtpu: of the generation, and of how its cores are used.
TPUS = {"v5e": ("v5e", "default"), "v5p": ("v5", "megacore"), "v6e": ("v6e", "default")}


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for. `chip` is None where its figures are unknown, `layout` where no TPU is described."""

    name: str
    devices: list[Any]
    chip: Chip | None
    layout: Layout | None
    slices: int
    hbm_bytes: float | None


def named_target(name: str, slices: int = 1) -> Target:
    """Return a TPU topology such as v5e:8x8 or v5p:4x4x4, `slices` of it joined by the data-centre network.

    Raises InputError for a topology that is not known, and without libtpu.
    """
    kind, _, text = name.partition(":")
    if kind not in TPUS:
        raise InputError(f"--topology={name}: unknown chip{nearest(kind, tuple(TPUS))}; write v5e:8x8 or v5p:4x4x4")
    axes = 3 if kind == "v5p" else 2
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), text):
        example = "v5p:4x4x4" if axes == 3 else f"{kind}:8x8"
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
    return Target(name, devices, chip, layout_of(chip, sizes), slices, chip.hbm_bytes)


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
