"""Figures of the chips: peaks, memory, links, what the prices of `compile` need, and compiler flags worth having."""

import dataclasses

GIB = 2**30

# Of a GPU's memory, what XLA takes (XLA_PYTHON_CLIENT_MEM_FRACTION). The rest is for CUDA's context and for NCCL; lower
# the variable where NCCL runs out.
GPU_FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Peaks are of dense bfloat16 matmuls; bytes are what XLA can use, not what the label says.

    Those of a GPU are all that CUDA reports, of which XLA takes GPU_FRACTION. `link_bytes_per_second` is one way over
    one of `links` torus axes (all of NVLink or PCIe on a GPU). The rest is 0 where `compile` prices no program: `clock`
    in Hz; `vector_overpricing`, the factor by which the compiler overestimates elementwise operations; the fraction of
    the peak that splash attention reaches on the causal half of its FLOPs.
    """

    name: str
    peak_flops: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    links: int
    clock: float = 0.0
    vector_overpricing: float = 0.0
    splash_forward: float = 0.0
    splash_backward: float = 0.0


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * GIB, 8.2e11, 45e9, 2, 1.5e9, 2.635, 0.47, 0.55),
        Chip("v5p", 459e12, 95.74 * GIB, 2.765e12, 90e9, 3, 1.75e9, 3.485, 0.40, 0.50),
        Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 90e9, 2, 1.75e9, 3.57, 0.16, 0.25),
        # A chip of two TensorCores; each is a device of jax, and these are its figures.
        Chip("v7x", 1153.5e12, 94.75 * GIB, 3.69e12, 100e9, 3),
        Chip("a100-40g", 312e12, 39.4 * GIB, 1.555e12, 300e9, 1),
        Chip("a100-80g", 312e12, 79.1 * GIB, 2.039e12, 300e9, 1),
        Chip("h100", 989e12, 79.1 * GIB, 3.35e12, 450e9, 1),
        Chip("h200", 989e12, 139.8 * GIB, 4.8e12, 450e9, 1),
        Chip("l40s", 362e12, 44.4 * GIB, 8.64e11, 32e9, 1),
        Chip("rtx4090", 165e12, 23.5 * GIB, 1.008e12, 32e9, 1),
    )
}

# By jax's Device.device_kind. Cards that share a name but not its figures (H100 PCIe, H100 NVL) are left out.
CHIP_OF_KIND = {
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5e": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v5p": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "TPU v6e": CHIPS["v6e"],
    "TPU7x": CHIPS["v7x"],
    "NVIDIA A100-SXM4-40GB": CHIPS["a100-40g"],
    "NVIDIA A100-SXM4-80GB": CHIPS["a100-80g"],
    "NVIDIA H100 80GB HBM3": CHIPS["h100"],
    "NVIDIA H200": CHIPS["h200"],
    "NVIDIA L40S": CHIPS["l40s"],
    "NVIDIA GeForce RTX 4090": CHIPS["rtx4090"],
}

# `train.compiler_options=tuned`: more VMEM for the operands of a matmul; gradients are summed during the matmuls, by
# the SparseCores or, on v5e, with mesh.fsdp_inner. Chosen by the compiler's own estimates; not confirmed on hardware.
SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
TUNED = {
    "v5e": {
        "xla_tpu_scoped_vmem_limit_kib": "32768",
        # Only with mesh.fsdp_inner is there a reduce-scatter that these can overlap with matmuls.
        "xla_enable_async_reduce_scatter_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    },
    "v5p": {"xla_tpu_scoped_vmem_limit_kib": "49152", **SPARSE_CORE},
    "v6e": {"xla_tpu_scoped_vmem_limit_kib": "98304", **SPARSE_CORE},
}
