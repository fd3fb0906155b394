"""How tests have XLA compile: most of their time is compiling, and what is optimised away is not what they test."""

import importlib.metadata
import os

# XLA's older emitters compile in half the time of its newer ones; jax 0.12 has the newer ones alone, and ends at a flag
# that it does not know.
HAS_OLDER_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def environment(devices: int = 1) -> dict[str, str]:
    """Variables of a process that compiles fast, for that many CPU devices."""
    flags = [f"--xla_force_host_platform_device_count={devices}"] if devices > 1 else []
    flags += [OLDER_EMITTERS] if HAS_OLDER_EMITTERS else []
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": " ".join(flags),
    }
