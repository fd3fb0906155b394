"""One training stage from start to end: mesh, data, model, restore or start, updates, saves."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from llava_jax.data.chat import find_template
from llava_jax.data.pipeline import BatchIterator, check_records, make_pipeline, steps_for
from llava_jax.data.records import load_records
from llava_jax.data.tokenize import TextTokenizer, check_end, load_tokenizer
from llava_jax.models.llava import build, logical_axes
from llava_jax.settings import STAGES, absolute_paths, write_settings
from llava_jax.sharding import batch_sharding, make_mesh, param_shardings
from llava_jax.train import checkpoint, metrics
from llava_jax.train.assemble import (
    Plan,
    check_plan,
    check_unchanged,
    file_inputs,
    frozen_sources,
    model_inputs,
    origins,
    plan_model,
    read_params,
)
from llava_jax.train.optim import describe, make_optimizer, make_schedule, warmup_steps
from llava_jax.train.step import TrainState, batch_ranks, make_step, partition, state_shardings
from llava_jax.types import InputError, ModelConfig, Record, Settings

STOPPED_EXIT_CODE = 42


class Run(NamedTuple):
    """What is fixed before the first update; `state` and `frozen` are ShapeDtypeStructs with shardings."""

    mesh: Mesh
    step: Callable
    tx: optax.GradientTransformation
    state: TrainState
    frozen: Any


def train(settings: Settings, workdir: str) -> None:
    """Trains one stage in `workdir`; goes on by itself where a checkpoint of the same config lies there.

    InputError for anything given that cannot be used, for a batch without targets, and for a loss or gradient that is
    not finite; SystemExit(42) after SIGTERM, once the state is saved.
    """
    settings = absolute_paths(settings)
    find_template(settings.data.template)
    with checkpoint.hold_workdir(workdir, settings):
        done, steps = train_held(settings, workdir)
    print(f"{done}/{steps} steps done, saved in {workdir}")
    if done < steps:
        print("stopped by SIGTERM: the same command goes on from here")
        raise SystemExit(STOPPED_EXIT_CODE)


def train_held(settings: Settings, workdir: str) -> tuple[int, int]:
    """`train` in a workdir that is ours alone: (updates done, updates asked for)."""
    mesh = make_mesh(settings.mesh)
    check_batch_size(settings, mesh)
    plan = plan_model(settings)
    check_plan(settings, plan)
    tokenizer = load_tokenizer(plan.tokenizer)
    check_vocabulary(tokenizer, plan)
    check_end(tokenizer, find_template(settings.data.template))
    records = read_records(settings, plan.config, tokenizer)
    steps = total_steps(settings, len(records))
    meta = meta_of(settings, plan)
    with (
        jax.set_mesh(mesh),
        checkpoint.open_manager(workdir, settings.train.keep) as manager,
        closing(open_data(settings, plan.config, tokenizer, records)) as data,
        stop_signal() as stop,
    ):
        run = prepare(settings, plan.config, mesh, steps)
        print(opening(settings, plan, run, len(records), steps))
        state, frozen = restore_or_start(workdir, settings, plan, run, manager, data, meta)
        write_settings(os.path.join(workdir, "config.json"), settings)
        first = int(state.step)
        with metrics.open_metrics(workdir, first, steps, settings.train.log_every) as writer:
            state = update(
                run,
                state,
                frozen,
                data,
                steps=range(first, steps),
                save_every=settings.train.checkpoint_every,
                report=partial(report, writer=writer, records=records),
                save=partial(checkpoint.save, manager, data=data, meta=meta),
                writer=writer,
                stop=stop,
            )
        return int(state.step), steps


# ---- the updates ------------------------------------------------------------------------------------------------


def update(
    run: Run,
    state: TrainState,
    frozen: Any,
    data: BatchIterator,
    *,
    steps: range,
    save_every: int,
    report: Callable[..., None],
    save: Callable[[TrainState], None],
    writer: metrics.MetricsWriter,
    stop: threading.Event,
) -> TrainState:
    """Runs the updates `steps`, saving every `save_every` and at the end, or at once when `stop` is set.

    An update's metrics are read while the next one runs, so the device does not wait for the host. Before a save they
    are read first: what follows an update that failed is never saved.
    """
    pending = None
    for n in steps:
        batch = next(data)
        arrays = jax.device_put(batch._replace(rows_B=None), batch_sharding(run.mesh))
        if n == steps.start:
            compile_step(run, state, frozen, arrays)
            writer.start_clock()
        state, values = run.step(state, frozen, arrays)
        if pending is not None:
            report(*pending)
        pending = (n, values, batch.rows_B, batch.tokens_BT.size)
        stopping = stop.is_set()
        if stopping or n + 1 == steps.stop or (save_every and (n + 1) % save_every == 0):
            report(*pending)
            pending = None
            save(state)
        if stopping:
            break
    return state


def report(
    n: int, values: dict, rows: np.ndarray, slots: int, *, writer: metrics.MetricsWriter, records: list[Record]
) -> None:
    """Writes the metrics of update `n`; InputError when it had no targets or was not finite (it was not applied)."""
    values = jax.device_get(values)
    where = f"step {n}, rows {', '.join(f'{row} (id {records[row].id})' for row in rows)}"
    if values["targets"] == 0:
        raise InputError(f"{where}: no token of the batch is supervised, expected at least one; check these rows")
    if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
        raise InputError(
            f"{where}: loss {values['loss']} and gradient norm {values['grad_norm']} are not finite; the update was "
            "not applied and nothing was saved since: lower optim.lr, set optim.clip_norm, or check these rows"
        )
    writer.write(n, values, slots)


def compile_step(run: Run, state: TrainState, frozen: Any, arrays: Any) -> None:
    """Compiles the step ahead of its first call, which finds the result, and prints time and memory."""
    start = time.monotonic()
    memory = run.step.lower(state, frozen, arrays).compile().memory_analysis()
    line = f"compiled in {time.monotonic() - start:.1f} s"
    if memory is not None:
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        line += f", {total / 2**30:.2f} GiB a device ({memory.temp_size_in_bytes / 2**30:.2f} of them temporary)"
    print(line)


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside the main thread Python takes no signals and it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- before the first update ------------------------------------------------------------------------------------


def prepare(settings: Settings, config: ModelConfig, mesh: Mesh, steps: int) -> Run:
    """The jitted step of the stage and the shapes and shardings of what it takes; no weight is read yet."""
    graphdef, abstract = build(config)
    shardings = param_shardings(logical_axes(config), abstract, mesh)
    params, frozen = partition(_placed(abstract, shardings), settings.stage)
    params_at, frozen_at = partition(shardings, settings.stage)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.dtype, sharding=x.sharding), frozen)
    tx = make_optimizer(settings.optim, steps, params)
    state_at = state_shardings(mesh, tx, params, params_at)
    schedule = make_schedule(settings.optim, steps)
    step = make_step(
        mesh,
        state_at,
        frozen_at,
        graphdef=graphdef,
        tx=tx,
        learning_rate=lambda n: settings.optim.lr * schedule(n),
        accumulate=settings.train.accumulate,
        loss_norm=settings.train.loss_norm,
    )
    state = TrainState(jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(tx.init, params))
    return Run(mesh, step, tx, _placed(state, state_at), frozen)


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, shardings)


def restore_or_start(
    workdir: str, settings: Settings, plan: Plan, run: Run, manager: Any, data: BatchIterator, meta: dict
) -> tuple[TrainState, Any]:
    """(state, frozen parameters): the newest readable checkpoint with `data` at its position, or a fresh start."""
    restored = checkpoint.restore(workdir, manager, run.state, data)
    frozen_at = jax.tree.map(lambda x: x.sharding, run.frozen)
    frozen_dtypes = dict.fromkeys(run.frozen, settings.train.dtype)
    if restored is not None:
        state, saved = restored
        check_unchanged(workdir, saved, meta)
        print(f"resuming at step {int(state.step)}")
        return state, read_params(settings, plan, frozen_dtypes, frozen_at)
    at = jax.tree.map(lambda x: x.sharding, run.state)
    dtypes = dict.fromkeys(run.state.params, "float32")
    read = read_params(settings, plan, frozen_dtypes | dtypes, frozen_at | at.params)
    params, frozen = partition(read, settings.stage)
    opt_state = jax.jit(run.tx.init, out_shardings=at.opt_state)(params)
    return TrainState(jax.device_put(np.int32(0), at.step), params, opt_state), frozen


def meta_of(settings: Settings, plan: Plan) -> dict:
    """What a checkpoint says about itself."""
    return {
        "stage": settings.stage,
        "trainable": list(STAGES[settings.stage]),
        "frozen": frozen_sources(settings),
        "inputs": model_inputs(plan) | file_inputs("data.annotations", settings.data.annotations),
    }


def open_data(
    settings: Settings, config: ModelConfig, tokenizer: TextTokenizer, records: list[Record]
) -> BatchIterator:
    """The stage's batches."""
    return make_pipeline(
        records,
        settings.data,
        tokenizer,
        image_size=config.vision.image_size,
        patches=config.vision.patches,
        image_token_id=config.image_token_id,
        batch_size=settings.train.batch_size,
        seed=settings.seed,
    )


def read_records(settings: Settings, config: ModelConfig, tokenizer: TextTokenizer) -> list[Record]:
    """All rows, each of which can be trained; prints what max_length cuts off."""
    if not settings.data.annotations:
        raise InputError("data.annotations is empty: expected the JSON or JSONL file to train on")
    records = load_records(settings.data.annotations)
    checked = check_records(
        records,
        settings.data,
        tokenizer,
        image_token_id=config.image_token_id,
        patches=config.vision.patches,
    )
    checked.require_clean()
    if checked.longest > config.llm.max_positions:
        raise InputError(
            f"{settings.data.annotations}: the longest row has {checked.longest} tokens, the decoder "
            f"{config.llm.max_positions} positions (max_position_embeddings); lower data.max_length to that"
        )
    print(f"{checked.rows:,} rows, {checked.tokens:,} tokens, {checked.targets:,} of them supervised")
    if checked.cut_rows:
        cut = f"{checked.cut_tokens:,} tokens off {checked.cut_rows:,} rows"
        print(f"data.max_length={settings.data.max_length} cuts {cut}")
    return records


def total_steps(settings: Settings, rows: int) -> int:
    """`train.steps`, or what `train.epochs` makes; an epoch is a whole number of steps, as in the original."""
    if settings.train.steps:
        return settings.train.steps
    return math.ceil(settings.train.epochs * steps_for(rows, settings.train.batch_size, 1.0))


def check_batch_size(settings: Settings, mesh: Mesh) -> None:
    """InputError when the batch does not divide over the devices and micro-batches."""
    ways = batch_ranks(mesh) * settings.train.accumulate
    if settings.train.batch_size % ways:
        raise InputError(
            f"train.batch_size={settings.train.batch_size} does not divide into {batch_ranks(mesh)} device shards "
            f"times train.accumulate={settings.train.accumulate}: expected a multiple of {ways}"
        )


def check_vocabulary(tokenizer: TextTokenizer, plan: Plan) -> None:
    """InputError when the tokenizer has text tokens without a row in the embedding table."""
    rows = plan.config.llm.vocab_size
    outside = {i for i in (plan.config.image_token_id, tokenizer.pad_id) if rows <= i < tokenizer.size}
    if tokenizer.size - len(outside) > rows:
        raise InputError(
            f"{plan.tokenizer}: the tokenizer has {tokenizer.size} ids and the decoder's embedding {rows} rows: "
            "expected the tokenizer that belongs to the decoder"
        )


def opening(settings: Settings, plan: Plan, run: Run, rows: int, steps: int) -> str:
    """What was decided, printed before the first update."""
    t = settings.train
    epochs = steps * t.batch_size / rows
    mesh = ", ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    return "\n".join(
        [
            f"stage {settings.stage}: {steps:,} steps of {t.batch_size} rows ({epochs:.2f} epochs), "
            f"warmup {warmup_steps(settings.optim, steps)}, {settings.optim.schedule}, loss {t.loss_norm}",
            f"projector {plan.config.projector}, compute {t.dtype}, remat {t.remat}, accumulate {t.accumulate}, "
            f"mesh {mesh} on {jax.default_backend()}",
            origins(settings, plan),
            f"tokenizer {plan.tokenizer}, template {settings.data.template}, "
            f"image {plan.config.vision.image_size} px {settings.data.aspect}, "
            f"{plan.config.vision.patches} image tokens (id {plan.config.image_token_id}), "
            f"max_length {settings.data.max_length}",
            describe(settings.optim, run.state.params, run.frozen),
        ]
    )
