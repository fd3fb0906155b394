"""What a stage needs before its first update: rows, batches and weights, checked, and said on the screen."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llava_jax.data.packing import BatchPlan, BatchShape, steps_for
from llava_jax.data.pipeline import BatchIterator, make_pipeline
from llava_jax.data.records import Rows, load_records
from llava_jax.data.sources import FORMS
from llava_jax.data.tiles import tiling
from llava_jax.data.tokenize import TextTokenizer
from llava_jax.data.validate import Checked, check_once, plan_once, summary
from llava_jax.models.flops import step_flops
from llava_jax.parallel.chips import chip_of
from llava_jax.parallel.distributed import say
from llava_jax.parallel.placement import local_rows, place
from llava_jax.parallel.sharding import mesh_sizes
from llava_jax.settings import STAGES
from llava_jax.train import checkpoint
from llava_jax.train.build_step import Run
from llava_jax.train.optim import describe, warmup_steps
from llava_jax.train.step import TrainState, batch_ranks, partition
from llava_jax.types import InputError, ModelConfig, OptimSettings, Settings
from llava_jax.weights.load import ModelSpec, check_unchanged, frozen_sources, model_inputs, origins, read_params
from llava_jax.weights.processor import chat_template_note

# ---- rows and batches -------------------------------------------------------------------------------------------


def read_records(settings: Settings, config: ModelConfig, tokenizer: TextTokenizer) -> tuple[Rows, Checked]:
    """All rows, each of which can be trained, and what is known of them; prints their sums, and what is left out."""
    if not settings.data.annotations:
        raise InputError(f"data.annotations is empty: expected {FORMS}")
    records = load_records(settings.data.annotations)
    checked = check_once(
        records,
        settings.data,
        tokenizer,
        patches=config.vision.patches,
        tiling=tiling(config) if config.pinpoints else None,
    )
    checked.require_clean()
    checked.require_fit(settings.data.annotations, config.llm.max_positions)
    for line in summary(checked, settings.data.max_length):
        say(line)
    return records, checked


def total_steps(settings: Settings, rows: int) -> int:
    """`train.steps`, or what `train.epochs` makes."""
    return settings.train.steps or steps_for(rows, settings.train.batch_size, settings.train.epochs)


def plan_data(settings: Settings, mesh: Mesh, records: Rows, checked: Checked, steps: int) -> BatchPlan:
    """Which rows stand where in the batches of the whole run, and the shape that all of them have."""
    return plan_once(
        records,
        checked,
        settings.data,
        batch_size=settings.train.batch_size,
        row_multiple=batch_ranks(mesh) * settings.train.accumulate,
        steps=steps,
        seed=settings.seed,
    )


def open_data(
    settings: Settings,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    records: Rows,
    batches: BatchPlan,
    mesh: Mesh,
) -> BatchIterator:
    """The rows of the stage's batches that this process reads."""
    return make_pipeline(
        records,
        settings.data,
        tokenizer,
        batches,
        image_size=config.vision.image_size,
        patches=config.vision.patches,
        image_token_id=config.image_token_id,
        pixels=config.vision.pixels,
        tiling=tiling(config) if config.pinpoints else None,
        rows=local_rows(mesh, batches.shape.rows),
    )


# ---- weights ----------------------------------------------------------------------------------------------------


def restore_or_start(
    workdir: str, settings: Settings, spec: ModelSpec, run: Run, manager: Any, data: BatchIterator, meta: dict
) -> tuple[TrainState, Any]:
    """(state, frozen parameters): the newest readable checkpoint with `data` at its position, or a fresh start."""
    restored = checkpoint.restore(workdir, manager, run.state, data)
    frozen_at = jax.tree.map(lambda x: x.sharding, run.frozen)
    frozen_dtypes = dict.fromkeys(run.frozen, settings.train.frozen_dtype)
    if restored is not None:
        state, saved = restored
        check_unchanged(workdir, saved, meta)
        say(f"resuming at step {int(state.step)}")
        return state, read_params(settings, spec, frozen_dtypes, frozen_at)
    at = jax.tree.map(lambda x: x.sharding, run.state)
    dtypes = dict.fromkeys(run.state.params, settings.train.param_dtype)
    read = read_params(settings, spec, frozen_dtypes | dtypes, frozen_at | at.params)
    params, frozen = partition(read, settings.stage)
    opt_state = jax.jit(run.tx.init, out_shardings=at.opt_state)(params)
    return TrainState(place(np.zeros((), np.int32), at.step), params, opt_state), frozen


def meta_of(settings: Settings, spec: ModelSpec, records: Rows, batches: BatchPlan) -> dict:
    """What a checkpoint says about itself."""
    source = settings.data.annotations
    rows = {"source": source, "fingerprint": records.fingerprint}
    # A run that continues counts batches: with the rows in another order some would come twice and some never.
    order = {"source": source, "fingerprint": hashlib.blake2b(batches.order_UC.data, digest_size=16).hexdigest()}
    return {
        "stage": settings.stage,
        "trainable": list(STAGES[settings.stage]),
        "frozen": frozen_sources(settings),
        "inputs": model_inputs(spec) | {"data.annotations": rows, "the order of rows": order},
    }


# ---- what is checked and said -----------------------------------------------------------------------------------


def ideal_seconds(stage: str, run: Run, shape: BatchShape) -> float | None:
    """Seconds an update would take at the peak of the run's chips; None where that is unknown."""
    chip = chip_of(run.mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    flops = step_flops(run.config, stage, rows=shape.rows, length=shape.length, images=shape.images_used)
    return flops / (chip.peak_flops * run.mesh.size)


def warmup_note(optim: OptimSettings, steps: int) -> list[str]:
    """Return a line where the warmup takes all updates, the first of which has rate 0."""
    if warmup_steps(optim, steps) < steps:
        return []
    what = "nothing is learned" if steps == 1 else f"the learning rate does not reach {optim.lr:g}"
    return [f"all updates are warmup: {what}; give more train.steps or epochs, or optim.warmup_ratio=0"]


def opening(settings: Settings, spec: ModelSpec, run: Run, rows: int, batches: BatchPlan) -> str:
    """What was decided, printed before the first update."""
    t, steps = settings.train, batches.steps
    epochs = steps * t.batch_size / rows
    mesh = ", ".join(f"{name} {size}" for name, size in mesh_sizes(run.mesh).items())
    devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    processes = jax.process_count()
    share = f", {processes} processes" if processes > 1 else ""
    note = chat_template_note(spec.tokenizer, settings.data.template)
    of_tile = " a tile, each tile counted as an image" if spec.config.pinpoints else ""
    return "\n".join(
        [
            f"stage {settings.stage}: {steps:,} steps of {t.batch_size} conversations ({epochs:.2f} epochs), "
            f"warmup {warmup_steps(settings.optim, steps)}, {settings.optim.schedule}, loss {t.loss_norm}",
            f"{batches.shape}, at most {batches.most} conversations a row",
            f"projector {spec.config.projector}, compute {t.dtype}, remat {t.remat}, attention {run.config.attention}, "
            f"accumulate {t.accumulate}, mesh {mesh} on {devices}{share}",
            origins(settings, spec),
            f"tokenizer {spec.tokenizer}, template {settings.data.template}, "
            f"image {spec.config.vision.image_size} px {settings.data.aspect}, "
            f"{spec.config.vision.patches} image tokens{of_tile} (id {spec.config.image_token_id}), "
            f"max_length {settings.data.max_length}",
            *([note] if note else []),
            *warmup_note(settings.optim, steps),
            describe(settings.optim, run.state.params, run.frozen),
        ]
    )
