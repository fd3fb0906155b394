"""Run one training stage from start to end: mesh, data, model, restore or start, updates, saves."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np

from llava_jax.data.packing import BatchShape, check_batch_size
from llava_jax.data.pipeline import BatchIterator
from llava_jax.data.templates import find_template
from llava_jax.data.tokenize import check_vocabulary, load_tokenizer
from llava_jax.parallel.distributed import check_agreed, is_first, say, stop_signal
from llava_jax.parallel.placement import global_batch
from llava_jax.parallel.sharding import make_mesh
from llava_jax.settings import write_settings
from llava_jax.train import checkpoint, metrics
from llava_jax.train.build_step import Run, compile_step, compiler_options, prepare
from llava_jax.train.checkpoint import absolute_paths, hold_workdir
from llava_jax.train.profiler import Tracer, tracing
from llava_jax.train.setup import (
    ideal_seconds,
    meta_of,
    open_data,
    opening,
    plan_data,
    read_records,
    restore_or_start,
    total_steps,
)
from llava_jax.train.step import TrainState, batch_ranks
from llava_jax.types import Batch, InputError, Record, Settings
from llava_jax.weights.load import model_spec, read_projector

STOPPED_EXIT_CODE = 42


def train(settings: Settings, workdir: str) -> None:
    """Train one stage in `workdir`; resumes by itself where a checkpoint of the same config is there.

    Several processes that `distributed.connected` has joined train together, each calling this with the same arguments.
    Raises InputError for input that cannot be used, a batch without targets, and a loss or gradient that is not finite;
    SystemExit(42) after SIGTERM, once the state is saved.
    """
    settings = absolute_paths(settings)
    find_template(settings.data.template)
    with hold_workdir(workdir, settings):
        done, steps = train_held(settings, workdir)
    say(f"{done}/{steps} steps done, saved in {workdir}")
    if done < steps:
        say("stopped by SIGTERM: the same command resumes from here")
        raise SystemExit(STOPPED_EXIT_CODE)


def train_held(settings: Settings, workdir: str) -> tuple[int, int]:
    """Train in a workdir that is locked for this run; return (updates done, updates asked for)."""
    mesh = make_mesh(settings.mesh)
    check_batch_size(settings.train.batch_size, batch_ranks(mesh) * settings.train.accumulate, settings.data.pack)
    compiler_options(settings.train.compiler_options, mesh.devices.flat[0].device_kind)
    spec = model_spec(settings)
    if settings.init.projector:
        read_projector(settings.init.projector, spec.config)  # fails here, not after the rows are read
    tokenizer = load_tokenizer(spec.tokenizer)
    check_vocabulary(tokenizer, spec.config, spec.tokenizer)
    records, checked = read_records(settings, spec.config, tokenizer)
    steps = total_steps(settings, len(records))
    batches = plan_data(settings, mesh, records, checked, steps)
    run = prepare(settings, spec.config, mesh, steps, batches.shape.length)
    meta = meta_of(settings, spec, records, batches)
    check_agreed({"the config": repr(settings), "what the run reads": json.dumps(meta)})
    with (
        jax.set_mesh(mesh),
        checkpoint.open_manager(workdir, settings.train.keep) as manager,
        closing(open_data(settings, spec.config, tokenizer, records, batches, mesh)) as data,
        stop_signal() as should_stop,
    ):
        say(opening(settings, spec, run, len(records), batches))
        state, frozen = restore_or_start(workdir, settings, spec, run, manager, data, meta)
        if is_first():
            write_settings(os.path.join(workdir, "config.json"), settings)
        todo = range(int(state.step), steps)
        profile = settings.train.profile
        tracing_these = tracing(workdir, todo, profile) if profile else nullcontext()
        with open_metrics(workdir, todo, settings) as writer, tracing_these as tracer:
            state = run_updates(
                run,
                state,
                frozen,
                data,
                steps=todo,
                rows=batches.shape.rows,
                save_every=settings.train.checkpoint_every,
                start=partial(start, run, settings, batches.shape, writer),
                report=partial(report, writer=writer, records=records),
                save=partial(checkpoint.save, manager, data=data, meta=meta),
                tracer=tracer,
                should_stop=should_stop,
            )
        return int(state.step), steps


def open_metrics(workdir: str, steps: range, settings: Settings) -> Any:
    """Open the run's MetricsWriter; in all processes but the first, None."""
    if not is_first():
        return nullcontext()
    return metrics.open_metrics(workdir, steps.start, steps.stop, settings.train.log_every)


# ---- the updates ------------------------------------------------------------------------------------------------


def run_updates(
    run: Run,
    state: TrainState,
    frozen: Any,
    data: BatchIterator,
    *,
    steps: range,
    rows: int,
    save_every: int,
    start: Callable[..., Callable],
    report: Callable[..., None],
    save: Callable[[TrainState], None],
    tracer: Tracer | None,
    should_stop: Callable[[int], bool],
) -> TrainState:
    """Run the updates `steps`; save every `save_every`, at the end, and when `should_stop` says so.

    The device never waits for the host: while an update runs, the metrics of the previous one are read and the next
    batch is fetched and copied. The latest metrics are read before every save, so that no state after a failed update
    is saved. When a row cannot be read, a single process saves the updates done and raises; several processes only
    raise, because the others have started the next update already.
    """
    pending = None
    for n in steps:
        before = time.monotonic()
        try:
            batch = next(data)
        except InputError:
            if pending is not None and jax.process_count() == 1:
                report(*pending)
                save(state)
            raise
        waited = time.monotonic() - before
        arrays = global_batch(batch, run.mesh, rows)
        if n == steps.start:
            # The first batch is waited for before the clock starts.
            step, waited = start(state, frozen, arrays), 0.0
        if tracer is not None:
            tracer.before(n, state)
        state, values = step(state, frozen, arrays)
        if pending is not None:
            report(*pending)
        pending = (n, values, batch.rows_BM, arrays.tokens_BT.size, waited)
        if tracer is not None:
            tracer.after(n, state)
        stopped = should_stop(n + 1)
        if stopped or n + 1 == steps.stop or (save_every and (n + 1) % save_every == 0):
            report(*pending)
            pending = None
            save(state)
        if stopped:
            break
    return state


def start(
    run: Run,
    settings: Settings,
    shape: BatchShape,
    writer: metrics.MetricsWriter | None,
    state: TrainState,
    frozen: Any,
    arrays: Batch,
) -> Callable:
    """Compile the step, print what it takes, and start the clock of the metrics; return the compiled step."""
    step, seconds, line = compile_step(run, state, frozen, arrays, settings.train.compiler_options)
    say(line)
    if writer is not None:
        writer.start_clock(seconds, ideal_seconds(settings.stage, run, shape))
    return step


def report(
    n: int,
    values: dict,
    rows: np.ndarray,
    slots: int,
    waited: float,
    *,
    writer: metrics.MetricsWriter | None,
    records: Sequence[Record],
) -> None:
    """Write the metrics of update `n`; `rows` are those that this process read.

    Raises InputError when the update had no targets or was not finite; a non-finite one was not applied.
    """
    values = jax.device_get(values)

    def where() -> str:  # only on error: the ids are read from disk
        return f"step {n}, rows {', '.join(f'{row} (id {records[row].id})' for row in rows[rows >= 0].tolist())}"

    if values["targets"] == 0:
        raise InputError(f"{where()}: no token of the batch is supervised, expected at least one; check these rows")
    if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
        raise InputError(
            f"{where()}: loss {values['loss']} and gradient norm {values['grad_norm']} are not finite; the update was "
            "not applied and nothing was saved since: lower optim.lr, set optim.clip_norm, or check these rows"
        )
    if writer is not None:
        writer.write(n, values, slots, waited)
