"""Build the step of a stage, ready to be compiled: the same for `train`, which runs it, and `compile`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from llava_jax.models import attention
from llava_jax.models.llava import build, logical_axes
from llava_jax.models.lora import split
from llava_jax.models.nf4 import is_codes
from llava_jax.parallel.chips import chip_of
from llava_jax.parallel.sharding import mesh_sizes, param_shardings
from llava_jax.train.optim import make_optimizer, make_schedule
from llava_jax.train.step import LossConfig, TrainState, batch_ranks, make_step, partition, state_shardings
from llava_jax.types import ModelConfig, Settings
from llava_jax.weights.spec import adapted, float_dtype


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
    shardings = split(param_shardings(logical_axes(config), abstract, mesh))
    params, frozen = partition(_placed(split(abstract), shardings), settings.stage)
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
    """Return the config with adapters split over the fsdp devices wherever their rank divides."""
    if config.lora is None or config.lora.rank % mesh_sizes(mesh)["fsdp"]:
        return config
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, split_rank=True))


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, shardings)


def _cast(abstract: Any, dtype: str) -> Any:
    def cast(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype if is_codes(x) else dtype, sharding=x.sharding)

    return jax.tree.map(cast, abstract)
