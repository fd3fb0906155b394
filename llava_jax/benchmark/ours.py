"""Our side of a benchmark, through the rooms that `train`, `generate` and the data pipeline use themselves.

A program, `python -m llava_jax.benchmark.ours WORK.json`, that serves turns (`turns.serve`).
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.benchmark.turns import Figures, Turn, clock, fingerprint, serve
from llava_jax.convert import hf
from llava_jax.data.image import load_image
from llava_jax.flops import step_flops
from llava_jax.infer import generate as answering
from llava_jax.models.llava import build
from llava_jax.settings import STAGES
from llava_jax.sharding import batch_sharding, make_mesh
from llava_jax.train.assemble import random_params
from llava_jax.train.compiling import compile_lowered
from llava_jax.train.prepare import Run, prepare
from llava_jax.train.step import TrainState, partition
from llava_jax.types import (
    UNPACKED,
    Batch,
    DataSettings,
    InitSettings,
    MeshSettings,
    ModelConfig,
    ModelSettings,
    OptimSettings,
    Sampling,
    Settings,
    TrainSettings,
)


def start(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    return {"train": train, "generate": generate, "data": data}[work["job"]](work)


# ---- training -------------------------------------------------------------------------------------------------------


def settings_of(work: Mapping[str, Any]) -> Settings:
    """The settings of a run that does this work and nothing else, on one device."""
    data = DataSettings("", "", "v1", "front", "pad", work["length"], shuffle=False, **UNPACKED)
    optim = OptimSettings(work["lr"], "", "constant", 0.0, weight_decay=0.0, clip_norm=0.0, b1=0.9, b2=0.999, eps=1e-8)
    train = TrainSettings(
        batch_size=work["rows"],
        steps=1,
        epochs=1.0,
        accumulate=1,
        dtype=work["dtype"],
        param_dtype=work["param_dtype"],
        moment_dtype=work["param_dtype"],
        frozen_dtype=work["dtype"],
        remat=work["remat"],
        attention="auto",
        compiler_options=work["compiler_options"],
        profile=0,
        log_every=1,
        checkpoint_every=0,
        keep=1,
        loss_norm="global_token",
    )
    model = ModelSettings(work["model"], work["model"], "mlp2x_gelu", -2)
    return Settings(work["stage"], 0, model, InitSettings("", ""), data, optim, train, MeshSettings(1, 1, 1))


def train(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """One turn: `steps` updates of the stage; seconds an update."""
    settings = settings_of(work)
    config = model_config(work)
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = prepare(settings, config, mesh, steps=10**6, length=work["length"])
        state, frozen = starting_point(work, settings, run)
        batch = jax.device_put(read_batch(work), batch_sharding(mesh))
        lowered = run.step.lower(state, frozen, batch)
        update = compile_lowered(lowered, work["compiler_options"], jax.devices()[0].device_kind)
    seconds = clock(jax.default_backend())
    held = [state]
    del state

    def updates(count: int) -> float:
        for _ in range(count):
            held[0], metrics = update(held[0], frozen, batch)
        return float(metrics["loss"])

    def turn() -> dict[str, float]:
        began = seconds()
        updates(work["steps"])
        return {"step": (seconds() - began) / work["steps"], **device_peak()}

    first = updates(1)
    updates(1)
    flops = step_flops(config, settings.stage, rows=work["rows"], length=work["length"], images=work["rows"])
    return {"loss": first, "model_flops": flops, **about(config)}, turn


def starting_point(work: Mapping[str, Any], settings: Settings, run: Run) -> tuple[TrainState, Any]:
    """(state, frozen parameters) of the model folder, or of random weights drawn on the device."""
    at = jax.tree.map(lambda x: x.sharding, run.state)
    places = jax.tree.map(lambda x: x.sharding, run.frozen) | at.params
    dtypes = {
        part: settings.train.param_dtype if part in STAGES[settings.stage] else settings.train.frozen_dtype
        for part in hf.PARTS
    }
    if work["weights"]:
        params = jax.device_put(hf.read_llava_parts(work["model"], dtypes), places)
    else:
        params = random_params(run.config, settings.seed, dtypes, places)
    params, frozen = partition(params, settings.stage)
    opt_state = jax.jit(run.tx.init, out_shardings=at.opt_state)(params)
    return TrainState(jax.device_put(np.int32(0), at.step), params, opt_state), frozen


def read_batch(work: Mapping[str, Any]) -> Batch:
    """The batch of the file: full rows of one conversation each."""
    with np.load(work["batch"]) as arrays:
        tokens_BT, targets_BT, pixels_BNXYC = arrays["tokens"], arrays["targets"], arrays["pixels"]
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    return Batch(tokens_BT, targets_BT, np.ones_like(tokens_BT), positions_BT, pixels_BNXYC)


def model_config(work: Mapping[str, Any]) -> ModelConfig:
    config = hf.read_llava_config(work["model"])[0]
    return dataclasses.replace(config, dtype=work["dtype"], remat=work["remat"])


# ---- answering ------------------------------------------------------------------------------------------------------


def generate(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """One turn: greedy answers of `new_tokens` ids to a batch of prompts; seconds an id, and to the first one."""
    config = model_config(work)
    if work["weights"]:
        params = jax.device_put(hf.read_llava_parts(work["model"], dict.fromkeys(hf.PARTS, work["dtype"])))
    else:
        params = random_params(config, 0, dict.fromkeys(hf.PARTS, work["dtype"]), None)
    # An automaton that never reaches its last state: no id ends an answer.
    never = jnp.zeros((2, config.llm.vocab_size), jnp.int32)
    engine = answering.Engine(build(config)[0], params, config, never)
    batch = read_batch(work)
    rows = zip(batch.tokens_BT, batch.pixels_BNXYC, strict=True)
    prompts = [answering.Prompt(tokens_T, pixels_NXYC) for tokens_T, pixels_NXYC in rows]
    seconds = clock(jax.default_backend())

    def answer(count: int) -> tuple[float, list[list[int]]]:
        began = seconds()
        ids = answering.generate_ids(engine, prompts, Sampling(max_new_tokens=count), len(prompts))
        return seconds() - began, ids

    def turn() -> dict[str, float]:
        whole, first = answer(work["new_tokens"])[0], answer(1)[0]
        return {"token": whole / work["new_tokens"], "first_token": first, **device_peak()}

    answer(1)
    return {"ids": answer(work["new_tokens"])[1], **about(config)}, turn


# ---- data -----------------------------------------------------------------------------------------------------------


def data(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """One turn: every picture decoded, padded to a square and preprocessed; seconds a picture."""
    seconds = clock("cpu")

    def turn() -> dict[str, float]:
        began = seconds()
        for path in work["pictures"]:
            load_image(path, work["size"], "pad")
        return {"picture": (seconds() - began) / len(work["pictures"])}

    same = sum(fingerprint(load_image(path, work["size"], "pad")) for path in work["pictures"])
    return {"sum": same, "device": "cpu"}, turn


def about(config: ModelConfig) -> Figures:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(build(config)[1]))
    return {"device": jax.devices()[0].device_kind, "parameters": parameters, "jax": jax.__version__}


def device_peak() -> dict[str, float]:
    """Most memory the accelerator has held; nothing on a CPU."""
    if jax.default_backend() == "cpu":
        return {}
    return {"device_bytes": jax.devices()[0].memory_stats()["peak_bytes_in_use"]}


if __name__ == "__main__":
    # jax would take three quarters of a GPU's memory when it starts; the other side is on the same one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    serve(start)
