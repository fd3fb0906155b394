# shellcheck shell=bash
# Environment of training on TPU v5e; every worker reads it before train starts. Edit it here; it travels with the package.
# None of this has been confirmed on hardware by us: there was no TPU at hand. Each setting names its source.
#
# Compile options are not here but in the config, where they are part of the run and where `compile` sees them:
# --config.train.compiler_options=tuned. So LIBTPU_INIT_ARGS stays unset; a flag in both places could contradict itself.

# A worker whose TPU does not come up (still held by another process, say) fails at once instead of training on its
# CPU; the CPU stays there for what the host computes. Documented by jax.
export JAX_PLATFORMS=tpu,cpu

# Compiled programs are kept in ~/.cache/llava_jax/compiled by train itself. On a TPU VM that is the worker's own disk,
# which a recreated node does not have: export JAX_COMPILATION_CACHE_DIR here as a folder that outlives the node (or
# gs://…) and a start after a preemption does not compile again. Documented by jax.

# Log warnings and errors of libtpu, no informational messages. The names are in libtpu 0.0.42.1.
export TPU_MIN_LOG_LEVEL=1
export TPU_STDERR_LOG_LEVEL=1

# Weights and tokenizers are folders, and no host asks the Hub; set it to 0 where models go by their names there.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# What `tuned` adds for this chip stands in llava_jax/chips.py. The flags of asynchronous all-gathers are this chip's
# alone and already on by default (seen in the compiled program).
