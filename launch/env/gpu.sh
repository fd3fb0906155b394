# shellcheck shell=bash
# Environment of training on NVIDIA GPUs; every process reads it before train starts. None of it has been measured by us:
# the XLA flags are those of NVIDIA's JAX-Toolbox (docs/GPU_performance.md) that jaxlib 0.10.2 and 0.12.0 both know; one
# that XLA does not know ends the process at its start.

# No GPU is an error, not a run on the CPU; the CPU stays there for what the host computes. Documented by jax.
export JAX_PLATFORMS=cuda,cpu

flags=(
  # Collectives start early and end late, so that they overlap with the computation.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Two iterations of the layer loop at a time, so that no buffer is copied between them.
  --xla_gpu_enable_while_loop_double_buffering=true
  # All weights (and gradients) of a layer in one message; a layer of 7B is 405 MB in bfloat16.
  --xla_gpu_all_gather_combine_threshold_bytes=8589934592
  --xla_gpu_reduce_scatter_combine_threshold_bytes=8589934592
  --xla_gpu_all_reduce_combine_threshold_bytes=8589934592
)
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }${flags[*]}"
unset flags

# On Hopper and before, one hardware queue keeps the order that the scheduler chose. NVIDIA advises against it on
# Blackwell: set it to 8, the default of CUDA, there.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# A wrong network or a lost peer is named in the log.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Compiled programs are kept in ~/.cache/llava_jax/compiled by train itself, so that a start after a preemption does not
# compile again where the nodes share the home folder; elsewhere export JAX_COMPILATION_CACHE_DIR here. Documented by jax.

# Weights and tokenizers are folders, and no host asks the Hub; set it to 0 where models go by their names there.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
