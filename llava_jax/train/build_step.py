"""Build the step of a stage, ready to be compiled: the same for `train`, which runs it, and `compile`."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from llava_jax.models import attention
from llava_jax.models.layers import is_codes
from llava_jax.models.llava import build, logical_axes, split_parts
from llava_jax.parallel.chips import GIB, chip_of
from llava_jax.parallel.chips import compiler_options as tuned_options
from llava_jax.parallel.sharding import mesh_sizes, param_shardings
from llava_jax.train.optim import make_optimizer, make_schedule
from llava_jax.train.step import LossConfig, TrainState, batch_ranks, make_step, partition, state_shardings
from llava_jax.types import InputError, ModelConfig, Settings
from llava_jax.weights.load import adapted, float_dtype


class Run(NamedTuple):
    """What is fixed before the first update; `state` and `frozen` are ShapeDtypeStructs with shardings."""

    mesh: Mesh
    config: ModelConfig
    step: jax.stages.Wrapped
    tx: optax.GradientTransformation
    state: TrainState
    frozen: Any


def prepare(settings: Settings, config: ModelConfig, mesh: Mesh, steps: int, length: int) -> Run:
    """Build the jitted step of the stage for rows of `length` tokens, with the shapes and shardings of what it takes.

    Reads no weights. Raises InputError when the attention asked for cannot run on the mesh's devices, or a parameter
    does not divide over them.
    """
    config = split_rank(adapted(settings, choose_attention(settings, config, mesh, length)), mesh)
    graphdef, abstract = build(config)
    shardings = split_parts(param_shardings(logical_axes(config), abstract, mesh))
    params, frozen = partition(_placed(split_parts(abstract), shardings), settings.stage)
    params_at, frozen_at = partition(shardings, settings.stage)
    params, frozen = _cast(params, settings.train.param_dtype), _cast(frozen, float_dtype(settings.train.frozen_dtype))
    tx = make_optimizer(settings.optim, steps, params, settings.train.moment_dtype)
    state_at = state_shardings(mesh, tx, params, params_at)
    schedule = make_schedule(settings.optim, steps)
    loss = LossConfig(
        graphdef,
        dtype=settings.train.dtype,
        packed=settings.data.pack,
        loss_norm=settings.train.loss_norm,
        ranks=batch_ranks(mesh),
        accumulate=settings.train.accumulate,
    )
    step = make_step(
        mesh,
        state_at,
        frozen_at,
        config=loss,
        tx=tx,
        learning_rate=lambda n: settings.optim.lr * schedule(n),
        pixels=config.vision.pixels,
        dropout_seed=settings.seed if config.lora is not None and config.lora.dropout else None,
    )
    state = TrainState(jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(tx.init, params))
    return Run(mesh, config, step, tx, _placed(state, state_at), frozen)


def choose_attention(settings: Settings, config: ModelConfig, mesh: Mesh, length: int) -> ModelConfig:
    """Return the config with the decoder's attention chosen for the mesh's devices and rows of `length` tokens."""
    device = mesh.devices.flat[0]
    chosen = attention.choose(
        settings.train.attention,
        platform=device.platform,
        dtype=settings.train.dtype,
        length=length,
        head_dim=config.llm.head_dim,
        window=config.llm.window,
    )
    # v6e's matrix unit is twice as wide.
    chip = chip_of(device.device_kind)
    block = 1024 if chip is not None and chip.name == "v6e" else 512
    return dataclasses.replace(config, attention=chosen, attention_block=block)


def split_rank(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """Return the config with adapters split_parts over the fsdp devices wherever their rank divides."""
    if config.lora is None or config.lora.rank % mesh_sizes(mesh)["fsdp"]:
        return config
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, split_rank=True))


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, shardings)


def _cast(abstract: Any, dtype: str) -> Any:
    def cast(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype if is_codes(x) else dtype, sharding=x.sharding)

    return jax.tree.map(cast, abstract)


# ---- the step as a compiled program ----


COMPILED_FOLDER = os.path.join("~", ".cache", "llava_jax", "compiled")


def keep_compiled() -> str:
    """Turn on the cache of compiled programs and return its folder ('' for none); call it before the first program.

    JAX_COMPILATION_CACHE_DIR names the folder. Without it a GPU or TPU has one under the home folder and a CPU none:
    its programs compile in seconds, and may not run on another processor. Several CPU devices never use it: with
    programs that are read back (jax 0.10.2) they run the collectives in different orders, and abort.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(COMPILED_FOLDER))
    return jax.config.jax_compilation_cache_dir or ""


def compiler_options(spec: str, device_kind: str) -> dict[str, str | bool]:
    """Return the XLA options of `train.compiler_options`, as jax takes them, for devices of that kind."""
    if spec in ("none", ""):
        return {}
    if spec == "tuned":
        return {**tuned_options(chip_of(device_kind))}
    options: dict[str, str | bool] = {}
    for item in spec.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals and value):
            raise InputError(f"train.compiler_options={spec}: {item!r} is not option=value; or give none, or tuned")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def compile_lowered(lowered: jax.stages.Lowered, spec: str, device_kind: str) -> jax.stages.Compiled:
    """Compile with the options of `train.compiler_options`; raise InputError for one that the compiler refuses."""
    options = compiler_options(spec, device_kind)
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        kind, _, rest = str(error).partition(":")
        if options and kind in ("INVALID_ARGUMENT", "FAILED_PRECONDITION"):
            reason = rest.splitlines()[0].strip().rstrip(":")
            raise InputError(
                f"train.compiler_options={spec}: the compiler for {device_kind} says {reason!r}; correct the option or "
                "leave it out"
            ) from error
        raise


def compile_step(run: Run, state: Any, frozen: Any, batch: Any, spec: str) -> tuple[Callable, float, str]:
    """Return (the compiled step, the seconds it took, a line about them and about its memory)."""
    start = time.monotonic()
    try:
        step = compile_lowered(run.step.lower(state, frozen, batch), spec, run.mesh.devices.flat[0].device_kind)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the step does not fit: {str(error).splitlines()[0]}; `llava-jax compile` with the same config says by "
            "how much, and what to change"
        ) from error
    seconds = time.monotonic() - start
    line = f"compiled in {seconds:.1f} s"
    memory = step.memory_analysis()
    if memory is not None:
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        line += f", {total / GIB:.2f} GiB a device ({memory.temp_size_in_bytes / GIB:.2f} of them temporary)"
    return step, seconds, line
