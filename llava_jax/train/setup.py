"""What a stage needs before its first update: rows, batches, the step and weights, checked, and said on the screen.

`compile` and `benchmark` build the same step.
"""

import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from llava_jax.data.packing import BatchPlan, BatchShape, steps_for
from llava_jax.data.pipeline import BatchIterator, make_pipeline
from llava_jax.data.records import Rows, load_records, recognised
from llava_jax.data.rows import Rejected
from llava_jax.data.sources import FORMS
from llava_jax.data.templates import OWN
from llava_jax.data.tiles import tiling
from llava_jax.data.tokenize import TextTokenizer
from llava_jax.data.validate import Checked, check_once, summary
from llava_jax.io import reached
from llava_jax.models import attention
from llava_jax.models.flops import step_flops
from llava_jax.models.layers import is_codes, stored_as
from llava_jax.models.llava import ADAPTERS, build, logical_axes, overlaid, partition, split_parts
from llava_jax.parallel.chips import CHIP_OF_KIND, GIB, TUNED
from llava_jax.parallel.distributed import say
from llava_jax.parallel.sharding import batch_sharding, local_rows, mesh_sizes, param_shardings, place, tower_split
from llava_jax.settings import STAGES, alternatives, trainable_pattern
from llava_jax.train import checkpoint
from llava_jax.train.optim import describe, leaf_path, make_optimizer, make_schedule, warmup_steps
from llava_jax.train.step import LossConfig, TrainState, batch_ranks, make_step, state_shardings, train_step
from llava_jax.types import Batch, DataSettings, InputError, ModelConfig, OptimSettings, Settings, TrainSettings
from llava_jax.weights.hf import chat_template_note
from llava_jax.weights.load import (
    ModelSpec,
    check_unchanged,
    file_inputs,
    float_dtype,
    frozen_sources,
    model_inputs,
    origins,
    read_params,
)
from llava_jax.weights.processor import CHAT_FILE

# ---- rows and batches -------------------------------------------------------------------------------------------


def read_records(data: DataSettings, config: ModelConfig, tokenizer: TextTokenizer) -> tuple[Rows, Checked]:
    """Return all rows, each of which can be trained, and what is known of them; print sums and what is left out."""
    if not data.annotations:
        raise InputError(f"data.annotations is empty: expected {FORMS}")
    records = load_records(data.annotations)
    say("\n".join(recognised(data.annotations, records)))
    tiles = tiling(config) if config.pinpoints else None
    checked = check_once(records, data, tokenizer, patches=config.vision.patches, tiling=tiles)
    checked.require_clean()
    checked.require_fit(data.annotations, config.llm.max_positions)
    say("\n".join(summary(checked, data.max_length)))
    return records, checked


def total_steps(train: TrainSettings, rows: int) -> int:
    """Return `train.steps`, or what `train.epochs` makes."""
    return train.steps or steps_for(rows, train.batch_size, train.epochs)


def open_data(
    data: DataSettings,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    records: Rows,
    batches: BatchPlan,
    mesh: Mesh,
    on_reject: Callable[[Rejected, int], None] | None = None,
) -> BatchIterator:
    """Return the rows of the stage's batches that this process reads; `on_reject` as in `make_pipeline`."""
    return make_pipeline(
        records,
        data,
        tokenizer,
        batches,
        image_size=config.vision.image_size,
        patches=config.vision.patches,
        image_token_id=config.image_token_id,
        pixels=config.vision.pixels,
        tiling=tiling(config) if config.pinpoints else None,
        rows=local_rows(mesh, batches.shape.rows),
        on_reject=on_reject,
    )


# ---- the step --------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What is fixed before the first update; `state` and `frozen` are ShapeDtypeStructs with shardings."""

    mesh: Mesh
    config: ModelConfig
    step: jax.stages.Wrapped
    tx: optax.GradientTransformation
    state: TrainState
    frozen: Any


def build_run(settings: Settings, config: ModelConfig, mesh: Mesh, steps: int, length: int) -> Run:
    """Build the jitted step of the stage for rows of `length` tokens, with the shapes and shardings of what it takes.

    `config` is that of the stage (`adapted`).
    Reads no weights. Raises InputError when the attention asked for cannot run on the mesh's devices, a parameter does
    not divide over them, or `train.trainable` finds none.
    """
    config = split_rank(choose_attention(settings.train, config, mesh, length), mesh)
    graphdef, abstract = build(config)
    pattern = trainable_pattern(settings)
    abstract = split_parts(abstract)
    check_trainable(settings, abstract)
    shardings = stored_shardings(config, abstract, pattern, mesh)
    params, frozen = partition(_placed(abstract, shardings), pattern)
    params_at, frozen_at = partition(shardings, pattern)
    train, optim = settings.train, settings.optim
    params, frozen = stored_as(params, train.param_dtype), stored_as(frozen, float_dtype(train.frozen_dtype))
    tx = make_optimizer(optim, steps, params, train.moment_dtype)
    state_at = state_shardings(mesh, tx, params, params_at)
    schedule = make_schedule(optim, steps)
    update = partial(
        train_step,
        config=LossConfig(
            graphdef, train.dtype, settings.data.pack, train.loss_norm, batch_ranks(mesh), train.accumulate
        ),
        tx=tx,
        learning_rate=lambda n: optim.lr * schedule(n),
        pixels=config.vision.pixels,
        dropout_seed=settings.seed if config.lora is not None and config.lora.dropout else None,
    )
    step = make_step(update, mesh, state_at, frozen_at)
    state = TrainState(jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(tx.init, params))
    return Run(mesh, config, step, tx, _placed(state, state_at), frozen)


def stored_shardings(config: ModelConfig, params: Any, trainable: str | re.Pattern, mesh: Mesh) -> Any:
    """Return where a run keeps each of `params` (shapes in the structure of `split_parts`)."""
    axes = split_parts(logical_axes(config))
    learning = partition(axes, trainable)[0].get("vision", {})
    axes |= {"vision": overlaid(axes["vision"], tower_split(learning, config.vision.width, mesh))}
    return param_shardings(axes, params, mesh)


def check_trainable(settings: Settings, params: Any) -> None:
    """Raise InputError unless `train.trainable` finds what it names and that can learn.

    `params` is a tree of `split_parts`, arrays or shapes.
    """
    train = settings.train
    learns, frozen = partition(params, trainable_pattern(settings))
    text = train.trainable or STAGES[settings.stage]
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for alternative in alternatives(text):
        if not any(re.search(alternative, path) for path in paths):
            raise InputError(
                f"train.trainable: {alternative!r} finds no parameter, expected a pattern that finds some among "
                f"{', '.join(sorted({path.partition('/')[0] + '/' for path in paths}))}, as in {paths[0]}"
            )
    if train.vision_blocks and not {"vision", "vision_lora"} & set(learns):
        raise InputError(
            f"train.vision_blocks={train.vision_blocks}: of the tower {text!r} lets nothing learn; set "
            "train.trainable, as in 'projector|llm|vision/layers', or train.vision_blocks=0"
        )
    lost = [part for part in ADAPTERS.values() if part in frozen]
    if lost:
        raise InputError(
            f"train.trainable={text!r} leaves out adapters of stage=lora, which lie in no file to be read from: "
            f"expected {lost[0]}/ in it"
        )
    if any(is_codes(leaf) for leaf in jax.tree.leaves(learns)):
        raise InputError(
            f"train.trainable={text!r} finds kernels that train.frozen_dtype=nf4 stores in four bits, which cannot "
            "learn: expected a pattern without them, or another train.frozen_dtype"
        )


def choose_attention(train: TrainSettings, config: ModelConfig, mesh: Mesh, length: int) -> ModelConfig:
    """Return the config with the decoder's attention chosen for the mesh's devices and rows of `length` tokens."""
    device = mesh.devices.flat[0]
    chosen = attention.choose(
        train.attention,
        platform=device.platform,
        dtype=train.dtype,
        length=length,
        head_dim=config.llm.head_dim,
        window=config.llm.window,
    )
    # v6e's matrix unit is twice as wide.
    chip = CHIP_OF_KIND.get(device.device_kind)
    block = 1024 if chip is not None and chip.name == "v6e" else 512
    return dataclasses.replace(config, attention=chosen, attention_block=block)


def split_rank(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """Return the config with adapters split over the fsdp devices wherever their rank divides."""
    if config.lora is None or config.lora.rank % mesh_sizes(mesh)["fsdp"]:
        return config
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, split_rank=True))


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, at: x.update(sharding=at), abstract, shardings)


def abstract_batch(config: ModelConfig, shape: BatchShape, mesh: Mesh) -> Batch:
    """Return the batch that `train` gives to its step, as shapes with shardings."""
    at, size = batch_sharding(mesh), config.vision.image_size

    def array(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.rows, *dims), dtype, sharding=at)

    ids = array(np.int32, shape.length)
    return Batch(
        tokens_BT=ids,
        targets_BT=array(np.bool_, shape.length),
        segment_ids_BT=ids,
        positions_BT=ids,
        pixels_BNXYC=array(np.uint8, shape.images, size, size, 3),
        image_mask_BN=array(np.bool_, shape.images),
        feature_index_BT=ids if config.pinpoints else None,
    )


# ---- the step as a compiled program ----------------------------------------------------------------------------------


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
        chip = CHIP_OF_KIND.get(device_kind)
        return {**TUNED.get(chip.name, {})} if chip else {}
    options: dict[str, str | bool] = {}
    for item in spec.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals and value):
            raise InputError(f"train.compiler_options={spec}: {item!r} is not option=value; or give none, or tuned")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def compile_lowered(
    lowered: jax.stages.Lowered, spec: str, device_kind: str, defaults: Mapping[str, str | bool] | None = None
) -> jax.stages.Compiled:
    """Compile with the options of `train.compiler_options`; raise InputError for one that the compiler refuses.

    Options of `defaults` hold where the spec does not name them.
    """
    options = {**(defaults or {}), **compiler_options(spec, device_kind)}
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


def compile_step(run: Run, state: Any, frozen: Any, batch: Any, spec: str) -> tuple[Callable, float]:
    """Return (the compiled step, the seconds it took); print them and what memory it takes."""
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
        line += f", {total / GIB:.2f} GiB per device ({memory.temp_size_in_bytes / GIB:.2f} of them temporary)"
    say(line)
    return step, seconds


# ---- weights ----------------------------------------------------------------------------------------------------


def restore_or_start(
    workdir: str, settings: Settings, spec: ModelSpec, run: Run, manager: Any, data: BatchIterator, meta: dict
) -> tuple[TrainState, Any]:
    """Return (state, frozen parameters): the newest readable checkpoint, `data` at its position, or a fresh start."""
    with reached(workdir):
        restored = checkpoint.restore(workdir, manager, run.state, data)
    if restored is not None:
        state, saved = restored
        check_unchanged(workdir, saved, meta)
        say(f"resuming at step {int(state.step)}")
        before, now = saved.get("excluded", []), meta["excluded"]
        if before != now:
            say(f"data.exclude: {len(before):,} rows were left out until there, {len(now):,} are from there on")
        return state, read_params(spec, run.frozen)
    return first_state(run, trainable_pattern(settings), read_params(spec, overlaid(run.frozen, run.state.params)))


def first_state(run: Run, trainable: re.Pattern, read: Any) -> tuple[TrainState, Any]:
    """Return (state before the first update, frozen parameters) of parameters that lie where the run wants them."""
    at = jax.tree.map(lambda x: x.sharding, run.state)
    params, frozen = partition(read, trainable)
    opt_state = jax.jit(run.tx.init, out_shardings=at.opt_state)(params)
    return TrainState(place(np.zeros((), np.int32), at.step), params, opt_state), frozen


def meta_of(settings: Settings, spec: ModelSpec, run: Run, records: Rows, batches: BatchPlan) -> dict:
    """Return what a checkpoint says about itself."""
    source = settings.data.annotations
    own = settings.data.template == OWN
    chat = file_inputs("the chat template", os.path.join(spec.tokenizer, CHAT_FILE)) if own else {}
    rows = {"source": source, "fingerprint": records.fingerprint, "rows": len(records)}
    # A run that continues counts batches: with the rows in another order some would come twice and some never.
    order = {"source": source, "fingerprint": hashlib.blake2b(batches.order_UC.data, digest_size=16).hexdigest()}
    return {
        "stage": settings.stage,
        "trainable": list(run.state.params),
        "frozen": frozen_sources(settings, spec),
        "inputs": model_inputs(spec) | chat | {"data.annotations": rows, "the order of rows": order},
    }


# ---- what is checked and said -----------------------------------------------------------------------------------


def ideal_seconds(run: Run, shape: BatchShape) -> float | None:
    """Return the seconds an update would take at the peak of the run's chips; None where that is unknown."""
    chip = CHIP_OF_KIND.get(run.mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    learns, images = run.state.params, shape.images_used
    flops = step_flops(run.config, learns, rows=shape.rows, length=shape.length, images=images)
    return flops / (chip.peak_flops * run.mesh.size)


def warmup_note(optim: OptimSettings, steps: int) -> list[str]:
    """Return a line where the warmup takes all updates, the first of which has rate 0."""
    if warmup_steps(optim, steps) < steps:
        return []
    what = "nothing is learned" if steps == 1 else f"the learning rate does not reach {optim.lr:g}"
    return [f"all updates are warmup: {what}; give more train.steps or epochs, or optim.warmup_ratio=0"]


def opening(settings: Settings, spec: ModelSpec, run: Run, rows: int, batches: BatchPlan) -> str:
    """Return what was decided, as it is printed before the first update."""
    t, steps = settings.train, batches.steps
    epochs = steps * t.batch_size / rows
    mesh = ", ".join(f"{name} {size}" for name, size in mesh_sizes(run.mesh).items())
    devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    processes = jax.process_count()
    share = f", {processes} processes" if processes > 1 else ""
    note = chat_template_note(spec.tokenizer, settings.data.template)
    own = " (its own chat template)" if settings.data.template == OWN else ""
    of_tile = " a tile, each tile counted as an image" if spec.config.pinpoints else ""
    return "\n".join(
        [
            f"stage {settings.stage}: {steps:,} steps of {t.batch_size} conversations ({epochs:.2f} epochs), "
            f"warmup {warmup_steps(settings.optim, steps)}, {settings.optim.schedule}, loss {t.loss_norm}",
            f"{batches.shape}, at most {batches.max_per_row} conversations a row",
            f"projector {spec.config.projector}, compute {t.dtype}, remat {t.remat}, attention {run.config.attention}, "
            f"accumulate {t.accumulate}, mesh {mesh} on {devices}{share}",
            origins(spec),
            f"tokenizer {spec.tokenizer}, template {settings.data.template}{own}, "
            f"image {spec.config.vision.image_size} px {settings.data.aspect}, "
            f"{spec.config.vision.patches} image tokens{of_tile} (id {spec.config.image_token_id}), "
            f"max_length {settings.data.max_length}",
            *([note] if note else []),
            *warmup_note(settings.optim, steps),
            describe(settings.optim, run.state.params, run.frozen),
        ]
    )
