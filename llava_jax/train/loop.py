"""Run one training stage from start to end: mesh, data, model, restore or start, updates, saves, metrics."""

import contextlib
import glob
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from tensorboardX.proto.summary_pb2 import Summary  # ty: ignore[missing-module-member]

from llava_jax import buckets
from llava_jax.data.packing import check_batch_size
from llava_jax.data.pipeline import BatchIterator
from llava_jax.data.rows import Rejected
from llava_jax.data.tokenize import check_vocabulary, load_tokenizer
from llava_jax.data.validate import excluded_rows, plan_once, rejects_allowed
from llava_jax.io import is_bucket, replacing
from llava_jax.parallel.distributed import check_agreed, is_first, say, stop_signal
from llava_jax.parallel.sharding import global_batch, make_mesh
from llava_jax.train import checkpoint
from llava_jax.train.checkpoint import absolute_paths, hold_workdir, with_commits_of
from llava_jax.train.profiler import Tracer, tracing
from llava_jax.train.setup import (
    Run,
    build_run,
    compile_step,
    compiler_options,
    ideal_seconds,
    meta_of,
    open_data,
    opening,
    read_records,
    restore_or_start,
    total_steps,
)
from llava_jax.train.step import Metrics, TrainState, batch_ranks
from llava_jax.train.validation import Evaluated, evaluate, open_held_out
from llava_jax.train.wandb_run import RUN_ID, WandbRun, check_installed
from llava_jax.train.watchdog import Goodput, Watchdog, watching
from llava_jax.types import STOPPED_EXIT_CODE, DataSettings, InputError, Record, Settings
from llava_jax.weights.load import model_spec, read_projector, with_template
from llava_jax.weights.source import EVAL_LOSS, EVAL_ROWS

METRICS, REJECTS = "metrics.jsonl", "rejects.jsonl"
# Figures of held-out rows in the status line.
HELD_OUT = {
    "eval_loss": "eval loss {:.4f}  ",
    "eval_exact_match": "exact match {:.1f}%  ",
    "eval_rouge_l": "ROUGE-L {:.1f}%  ",
}
QUIET_SECONDS = 10.0  # between status lines where the screen is a file


def train(settings: Settings, workdir: str) -> None:
    """Train one stage in `workdir`; resumes by itself where a checkpoint of the same config is there.

    Several processes that `distributed.connected` has joined train together, each calling this with the same arguments.
    Raises InputError for input that cannot be used, and after `train.max_nonfinite` updates in a row whose loss or
    gradient is not finite; SystemExit(42) after SIGTERM, once the state is saved.
    """
    with stop_signal() as should_stop, watching(settings.train.watchdog) as watchdog:
        train_watched(settings, workdir, watchdog, should_stop)


def train_watched(settings: Settings, workdir: str, watchdog: Watchdog, should_stop: Callable[[int], bool]) -> None:
    """Do what `train` does, under a watchdog that has begun before: `stop_signal` gives `should_stop`."""
    if jax.process_count() > 1:
        watchdog.leave_together(should_stop, is_first())
    settings = with_template(absolute_paths(with_commits_of(workdir, settings)))
    with hold_workdir(workdir, settings):
        done, steps = train_held(settings, workdir, watchdog, should_stop)
    say(f"{done}/{steps} steps done, saved in {workdir}\n{watchdog.goodput}")
    if done < steps:
        say("stopped by SIGTERM: the same command resumes from here")
        raise SystemExit(STOPPED_EXIT_CODE)


def train_held(
    settings: Settings, workdir: str, watchdog: Watchdog, should_stop: Callable[[int], bool]
) -> tuple[int, int]:
    """Train in a workdir that is locked for this run; return (updates done, updates asked for)."""
    mesh, train = make_mesh(settings.mesh), settings.train
    if train.wandb:
        check_installed(train.wandb)
    row_multiple = batch_ranks(mesh) * train.accumulate
    check_batch_size(train.batch_size, row_multiple, settings.data.pack)
    compiler_options(train.compiler_options, mesh.devices.flat[0].device_kind)
    spec = model_spec(settings)
    if settings.init.projector:
        read_projector(settings.init.projector, spec.config)  # fails here, not after the rows are read
    tokenizer = load_tokenizer(spec.tokenizer)
    check_vocabulary(tokenizer, spec.config, spec.tokenizer)
    records, checked = read_records(settings.data, spec.config, tokenizer)
    steps = total_steps(train, len(records))
    batches = plan_once(
        records,
        checked,
        settings.data,
        batch_size=train.batch_size,
        row_multiple=row_multiple,
        steps=steps,
        seed=settings.seed,
    )
    excluded = excluded_rows(records, settings.data.exclude) if settings.data.exclude else []
    if excluded:
        say(f"data.exclude={settings.data.exclude} leaves out {len(excluded):,} of {len(records):,} rows")
        batches = batches.without(np.isin(batches.order_UC, excluded))
    run = build_run(settings, spec.stage_config, mesh, steps, batches.shape.length)
    meta = meta_of(settings, spec, run, records, batches) | {"excluded": excluded}
    check_agreed({"the config": repr(settings), "what the run reads": json.dumps(meta)})
    rejects, held_out_rejects = Rejects(settings.data), Rejects(settings.data)
    tell = rejects.among(len(records))
    losses: dict[int, float] = {}  # of held-out rows, at the checkpoints there are
    with (
        jax.set_mesh(mesh),
        checkpoint.open_manager(workdir, train.keep, losses) as manager,
        closing(open_data(settings.data, spec.config, tokenizer, records, batches, mesh, tell)) as data,
    ):
        say(opening(settings, spec, run, len(records), batches))
        held_out = None
        if settings.data.eval:
            held_out = open_held_out(settings, spec.stage_config, tokenizer, run, held_out_rejects.among)
        watchdog.enter("restore")
        state, frozen = restore_or_start(workdir, settings, spec, run, manager, data, meta)
        if held_out is not None and train.keep_best:
            losses |= checkpoint.best_loss(workdir, held_out.rows)
        if is_first():
            checkpoint.write_config(workdir, settings, int(state.step))
        todo = range(int(state.step), steps)
        in_bucket = is_first() and is_bucket(workdir)
        mirrored = (
            buckets.mirrored(workdir, METRICS, REJECTS, RUN_ID) if in_bucket else nullcontext((workdir, lambda: None))
        )
        with (
            nullcontext() if held_out is None else closing(held_out.data),
            mirrored as (here, upload),
            closing(WandbRun(settings, workdir, here)) if train.wandb and is_first() else nullcontext() as wandb_run,
            open_metrics(here, todo, train.log_every, watchdog.goodput, wandb_run=wandb_run) as writer,
            tracing(here, todo, train.profile, workdir) if train.profile else nullcontext() as tracer,
        ):
            rejects.open(here, todo.start)

            def start(*inputs: Any) -> Callable:
                watchdog.enter("compile")
                step, seconds = compile_step(run, *inputs, train.compiler_options)
                if writer is not None:
                    writer.start_clock(seconds, ideal_seconds(run, batches.shape))
                return step

            def validate(n: int, state: TrainState, values: Metrics) -> Evaluated:
                due = n + 1 == steps or (train.eval_every and (n + 1) % train.eval_every == 0)
                if held_out is None or not due:
                    return {}
                jax.block_until_ready(values)
                began = time.monotonic()

                def told_to_stop() -> bool:  # asked before each batch
                    watchdog.enter("evaluation")
                    return should_stop(n + 1)

                found = evaluate(held_out, state.params, frozen, told_to_stop)
                if writer is not None:
                    writer.stop_clock(time.monotonic() - began)
                return found

            def is_best(evaluated: Evaluated) -> bool:
                return train.keep_best and evaluated.get(EVAL_LOSS, math.inf) < min(losses.values(), default=math.inf)

            def save(state: TrainState, evaluated: Evaluated) -> None:
                watchdog.enter("save")
                upload()  # first, so that no checkpoint is there without the metrics before it
                loss, found = evaluated.get(EVAL_LOSS, math.nan), {}
                if held_out is not None and math.isfinite(loss):
                    found = {EVAL_LOSS: loss, EVAL_ROWS: held_out.rows}
                if train.keep_best and found:
                    losses[int(state.step)] = loss
                checkpoint.save(manager, state, data, meta | found)
                rejects.check_total()
                held_out_rejects.check_total()

            state = run_updates(
                run,
                state,
                frozen,
                data,
                steps=todo,
                rows=batches.shape.rows,
                save_every=train.checkpoint_every,
                start=start,
                validate=validate,
                is_best=is_best,
                log=partial(log_update, writer=writer, records=records, in_row=[], most=train.max_nonfinite),
                save=save,
                tracer=tracer,
                should_stop=should_stop,
                enter=watchdog.enter,
            )
        watchdog.enter("save")  # what is in flight
        return int(state.step), steps


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
    validate: Callable[[int, TrainState, Metrics], Evaluated],
    is_best: Callable[[Evaluated], bool],
    log: Callable[..., None],
    save: Callable[[TrainState, Evaluated], None],
    tracer: Tracer | None,
    should_stop: Callable[[int], bool],
    enter: Callable[[str], None],
) -> TrainState:
    """Run the updates `steps` with what `start` compiles.

    Save every `save_every`, after a pass over held-out rows that `is_best`, when told to stop, and at the end.

    The device never waits for the host: while an update runs, the metrics of the previous one are read and the next
    batch is fetched and copied. The latest metrics are read before every save, so that no state after a failed update
    is saved. When a row cannot be read, of held-out ones too, a single process saves the updates done and raises;
    several processes only raise, because the others have started the next update already.
    """
    pending = None

    def save_done() -> None:
        if pending is not None and jax.process_count() == 1:
            log(*pending)
            save(state, {})

    for n in steps:
        before = time.monotonic()
        enter("start" if n == steps.start else "step")
        try:
            batch = next(data)
        except InputError:
            save_done()
            raise
        waited = time.monotonic() - before
        arrays = global_batch(batch, run.mesh, rows)
        if n == steps.start:
            # The first batch is waited for before the clock starts.
            step, waited = start(state, frozen, arrays), 0.0
            enter("step")
            # From here on processes that are told to stop do so after the next number that none has asked with.
            should_stop(n)
        if tracer is not None:
            tracer.before(n, state)
        state, values = step(state, frozen, arrays)
        if pending is not None:
            log(*pending)
        if tracer is not None:
            tracer.after(n, state)
        pending = (n, values, batch.rows_BM, arrays.tokens_BT.size, waited, {})
        try:
            pending = (*pending[:-1], validate(n, state, values))
        except (InputError, jax.errors.JaxRuntimeError):  # of the latter: no memory for what only a pass needs
            save_done()
            raise
        stopped, evaluated = should_stop(n + 1), pending[-1]
        if stopped or n + 1 == steps.stop or (save_every and (n + 1) % save_every == 0) or is_best(evaluated):
            log(*pending)
            pending = None
            save(state, evaluated)
        if stopped:
            break
    return state


def log_update(
    n: int,
    values: dict,
    rows: np.ndarray,
    slots: int,
    waited: float,
    evaluated: Evaluated,
    *,
    writer: "MetricsWriter | None",
    records: Sequence[Record],
    in_row: list[str],
    most: int,
) -> None:
    """Write the metrics of update `n`; one without targets, or that is not finite, was skipped: that is said.

    Args:
      n: the update; 0 is the first.
      values: its metrics, on the device.
      rows: those that this process read, -1 for none.
      slots: B * T.
      waited: seconds for the batch.
      writer: in the first process.
      records: all rows.
      evaluated: what held-out rows gave after it; nothing where there was no pass.
      in_row: the updates before this one that were not finite; kept here.
      most: how many of them there may be.

    Raises InputError when `most` updates in a row were not finite.
    """
    values = jax.device_get(values)
    if writer is not None:
        writer.goodput.count_waiting(waited)

    def where() -> str:  # only on error: the ids are read from disk
        return f"step {n}, rows {', '.join(f'{row} (id {records[row].id})' for row in rows[rows >= 0].tolist())}"

    is_finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
    if values["targets"] == 0 or not is_finite:
        what = f"loss {values['loss']} and gradient norm {values['grad_norm']} are not finite"
        line = f"{where()}: {what if values['targets'] else 'no token of the batch is supervised'}"
        also = f"; held-out rows: {evaluated}" if evaluated else ""
        print(f"warning: {line}; the update was skipped{also}", file=sys.stderr, flush=True)
        if writer is not None:
            writer.skipped += 1
        in_row += [line] if values["targets"] else []
        if len(in_row) >= most:
            raise InputError(
                f"{len(in_row)} updates in a row are not finite and none was applied ({'; '.join(in_row)}): lower "
                "optim.lr, set optim.clip_norm, or name a file with the ids of these rows in data.exclude, and resume"
            )
        return
    in_row.clear()
    if writer is not None:
        writer.write(n, values, slots, waited, evaluated)


# ---- rows that cannot be read ---------------------------------------------------------------------------------------


class Rejects:
    """The rows that turned out unreadable, data.max_rejects at most, in rejects.jsonl.

    Each process names those that it reads, in a file of its own: rejects.1.jsonl is the second one's. In a bucket only
    the first one has a file, and the others say it. In a single process one too many is an InputError at once; several
    count theirs together after each save.
    """

    def __init__(self, data: DataSettings):
        self._data, self._most, self._path = data, 0, ""
        self._found: set[int] = set()

    def among(self, rows: int) -> Callable[[Rejected, int], None] | None:
        """Return what is called with one of so many rows and the batch it is missing from; None: none may be."""
        self._most = rejects_allowed(self._data, rows)
        return self._tell if self._most else None

    def open(self, workdir: str, step: int) -> None:
        """Continue the file of `workdir` at update `step`; those after it will be found again.

        What all processes found counts. There may have been more of them: the first one cuts the files that are left.
        """
        if is_bucket(workdir):
            return
        count, index = jax.process_count(), jax.process_index()
        ours = [os.path.join(workdir, f"rejects.{i}.jsonl" if i else REJECTS) for i in range(count)]
        self._path = ours[index]
        for path in glob.glob(os.path.join(glob.escape(workdir), "rejects.*jsonl")):
            self._found |= {json.loads(line)["row"] for line in lines_before(path, step)[0]}
            if path == self._path or (path not in ours and is_first()):
                truncate_lines(path, step)

    def _tell(self, rejected: Rejected, batch: int) -> None:
        if rejected.row in self._found:
            return  # in an earlier epoch
        if len(self._found) == self._most and jax.process_count() == 1:
            raise InputError(
                f"{rejected}: {self._most} rows before it were unreadable, which is all that data.max_rejects allows; "
                "fix them, or train on what `prepare verify --output=FILE` writes"
            )
        self._found.add(rejected.row)
        print(f"warning: left out {rejected}", file=sys.stderr, flush=True)
        if self._path:
            row = {"step": batch, "row": rejected.row, "id": rejected.id, "reason": rejected.reason}
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def check_total(self) -> None:
        """Raise InputError in all processes alike when there are too many; each must call it."""
        if jax.process_count() == 1 or not self._most:
            return
        rows = np.full(self._most + 1, -1, np.int32)
        rows[: len(self._found)] = sorted(self._found)[: self._most + 1]
        total = np.count_nonzero(np.unique(multihost_utils.process_allgather(rows)) >= 0)
        if total > self._most:
            raise InputError(
                f"{total} rows or more were unreadable, and data.max_rejects allows {self._most}: the state is saved; "
                "train on what `prepare verify --output=FILE` writes, or allow more and resume"
            )


# ---- metrics.jsonl, TensorBoard events, the status line --------------------------------------------------------------


def truncate_lines(path: str, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keep the lines of metrics or rejects before update `step`, as `lines_before` has them: others come again.

    Returns the last line kept and the last of all, {} for none.
    """
    if not os.path.exists(path):
        return {}, {}
    earlier, last = lines_before(path, step)
    with replacing(path) as file:
        file.writelines(earlier)
    return json.loads(earlier[-1]) if earlier else {}, last


def lines_before(path: str, step: int) -> tuple[list[str], dict[str, Any]]:
    """Return the lines of a file before update `step`, and the last of all as it is decoded, {} for none.

    A last line torn by a kill is left out. Raises an InputError naming any other broken line.
    """
    last: dict[str, Any] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines(keepends=True)
    earlier = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            logged = row["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number}: not an object with a step, restore or remove the file") from error
        last = row
        if logged < step and line.endswith("\n"):
            earlier.append(line)
    return earlier, last


class MetricsWriter:
    """Writes one object a logged step; the time since the last logged one is shared equally by the steps between.

    `mfu` is the time that the update's model FLOPs take at the chips' peak over the time it took (null where the peak
    is unknown), `data_wait` the seconds a step waited for its batch, `compile_seconds` those of the start, in the first
    line after a start and null in the others, `skipped` the updates since the last line that had no targets or were not
    finite, which have no line; `time` is the Unix time of the line, `goodput` what the seconds since the first start
    went to. After a pass over held-out rows the line also has what `validation.evaluate` returns. A file that cannot be
    written does not stop the run: that is said once, and at the end how many lines are lost.
    """

    def __init__(
        self,
        workdir: str,
        steps: range,
        log_every: int,
        goodput: Goodput,
        screen: TextIO,
        wandb_run: WandbRun | None = None,
    ):
        path = os.path.join(workdir, METRICS)
        self.goodput = goodput
        goodput.resume(*truncate_lines(path, steps.start))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, close() does
        self._lost = self.skipped = 0
        board = os.path.join(workdir, "tensorboard")
        os.makedirs(board, exist_ok=True)
        # The thread of tensorboardX's SummaryWriter ends where the disk is full, and its caller then waits for ever.
        self._board = EventsWriter(os.path.join(board, "events"))
        self._board.write_event(Event(step=steps.start, session_log=SessionLog(status=SessionLog.START)))
        self._steps, self._log_every, self._screen, self._wandb_run = steps, log_every, screen, wandb_run
        self._last_line = -QUIET_SECONDS
        self._start = self._last = time.monotonic()
        self._pending_steps, self._pending_tokens, self._pending_wait = 0, 0, 0.0
        self._compile_seconds: float | None = None
        self._ideal_seconds: float | None = None

    def start_clock(self, compile_seconds: float | None = None, ideal_seconds: float | None = None) -> None:
        """Count the next step's time from here (after compiling); at its peak a step would take `ideal_seconds`."""
        self._start = self._last = time.monotonic()
        self._compile_seconds, self._ideal_seconds = compile_seconds, ideal_seconds

    def stop_clock(self, seconds: float) -> None:
        """Leave out `seconds` that were spent on something else than updates."""
        self._start, self._last = self._start + seconds, self._last + seconds

    def write(
        self, step: int, values: Metrics, slots: int, data_wait: float = 0.0, evaluated: Evaluated | None = None
    ) -> None:
        """Record update `step` (0 is the first): its metrics, the batch's size B * T, the seconds it waited for it.

        A line with `evaluated` is always written.
        """
        self._pending_steps += 1
        self._pending_tokens += int(values["tokens"])
        self._pending_wait += data_wait
        last = step == self._steps.stop - 1
        if step % self._log_every and not last and not evaluated:
            return
        now = time.monotonic()
        seconds = (now - self._last) / self._pending_steps
        row: dict[str, Any] = {
            "step": step,
            **{name: float(values[name]) for name in ("loss", "grad_norm", "lr")},
            **{name: int(values[name]) for name in ("targets", "tokens")},
            "seconds": seconds,
            "tokens_per_second": self._pending_tokens / max(now - self._last, 1e-9),
            "mfu": None if self._ideal_seconds is None else self._ideal_seconds / max(seconds, 1e-9),
            "data_wait": self._pending_wait / self._pending_steps,
            "compile_seconds": self._compile_seconds,
            "skipped": self.skipped,
            **(evaluated or {}),
        }
        figures = [Summary.Value(tag=k, simple_value=v) for k, v in row.items() if k != "step" and v is not None]
        row |= {"time": round(time.time(), 3), "goodput": self.goodput.so_far()}
        event = Event(wall_time=row["time"], step=step, summary=Summary(value=figures))
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._board.write_event(event)
            self._board.flush()
        except OSError as error:
            if not self._lost:
                print(f"warning: metrics cannot be written ({error}); training continues without", file=sys.stderr)
            self._lost += 1
        if self._wandb_run is not None:
            self._wandb_run.write(row)
        self._last, self._pending_steps, self._pending_tokens, self._pending_wait = now, 0, 0, 0.0
        self._compile_seconds, self.skipped = None, 0
        self._show(row, slots, last or bool(evaluated))

    def _show(self, row: dict[str, Any], slots: int, stays: bool) -> None:
        now = time.monotonic()
        tty = self._screen.isatty()
        if not tty and now - self._last_line < QUIET_SECONDS and not stays:
            return
        self._last_line = now
        done, total = row["step"] + 1, self._steps.stop
        left = (now - self._start) / max(1, done - self._steps.start) * (total - done)
        mfu = "" if row["mfu"] is None else f"MFU {100 * row['mfu']:.1f}%  "
        held_out = "".join(text.format(row[name]) for name, text in HELD_OUT.items() if name in row)
        line = (
            f"step {done}/{total} ({100 * done / total:.0f}%)  loss {row['loss']:.4f}  {held_out}"
            f"grad norm {row['grad_norm']:.3g}  lr {row['lr']:.3g}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{mfu}supervised {100 * row['targets'] / row['tokens']:.0f}%  filled {100 * row['tokens'] / slots:.0f}%  "
            f"ETA {duration(left)}"
        )
        self._screen.write(f"\r\x1b[2K{line}" + ("\n" if stays else "") if tty else line + "\n")
        self._screen.flush()

    def close(self) -> None:
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()
        if self._lost:
            print(f"warning: {self._lost} lines of metrics could not be written", file=sys.stderr)


def open_metrics(
    workdir: str,
    steps: range,
    log_every: int,
    goodput: Goodput,
    screen: TextIO | None = None,
    wandb_run: WandbRun | None = None,
) -> AbstractContextManager[MetricsWriter | None]:
    """Return a MetricsWriter of the updates `steps` for a `with`; None in all processes but the first."""
    if not is_first():
        return nullcontext()
    return closing(MetricsWriter(workdir, steps, log_every, goodput, screen or sys.stdout, wandb_run))


def duration(seconds: float) -> str:
    """Return '1:02:03' or '2:03'."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
