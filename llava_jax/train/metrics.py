"""Report a run: metrics.jsonl, TensorBoard events, one status line on the screen."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from llava_jax.types import InputError

QUIET_SECONDS = 10.0  # between status lines where the screen is a file


def truncate_metrics(path: str, step: int) -> None:
    """Keep the lines of metrics.jsonl before update `step`: later ones will be written again.

    A last line torn by a kill is dropped. Raises an InputError naming any other broken line.
    """
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines(keepends=True)
    earlier = []
    for number, line in enumerate(lines, 1):
        try:
            logged = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number}: not an object with a step, restore or remove the file") from error
        if logged < step and line.endswith("\n"):
            earlier.append(line)
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(earlier)
    os.replace(temporary, path)


class MetricsWriter:
    """Writes one object a logged step; the time since the last logged one is shared equally by the steps between.

    `mfu` is the time that the update's model FLOPs take at the chips' peak over the time it took (null where the peak
    is unknown), `data_wait` the seconds a step waited for its batch, `compile_seconds` those of the start, in the first
    line after a start and null in the others.
    """

    def __init__(self, workdir: str, first_step: int, steps: int, log_every: int, screen: TextIO):
        path = os.path.join(workdir, "metrics.jsonl")
        truncate_metrics(path, first_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, close() does
        self._board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=first_step)
        self._steps, self._log_every, self._screen = steps, log_every, screen
        self._last_line = -QUIET_SECONDS
        self._start = self._last = time.monotonic()
        self._first, self._pending_steps, self._pending_tokens, self._pending_wait = first_step, 0, 0, 0.0
        self._compile_seconds: float | None = None
        self._ideal_seconds: float | None = None

    def start_clock(self, compile_seconds: float | None = None, ideal_seconds: float | None = None) -> None:
        """Count the next step's time from here (after compiling); at its peak a step would take `ideal_seconds`."""
        self._start = self._last = time.monotonic()
        self._compile_seconds, self._ideal_seconds = compile_seconds, ideal_seconds

    def write(self, step: int, values: dict[str, Any], slots: int, data_wait: float = 0.0) -> None:
        """Record update `step` (0 is the first).

        Args:
          step: the update.
          values: its metrics, as host numbers.
          slots: the batch's size B * T.
          data_wait: seconds it waited for its batch.
        """
        self._pending_steps += 1
        self._pending_tokens += int(values["tokens"])
        self._pending_wait += data_wait
        last = step == self._steps - 1
        if step % self._log_every and not last:
            return
        now = time.monotonic()
        seconds = (now - self._last) / self._pending_steps
        row = {
            "step": step,
            **{name: float(values[name]) for name in ("loss", "grad_norm", "lr")},
            **{name: int(values[name]) for name in ("targets", "tokens")},
            "seconds": seconds,
            "tokens_per_second": self._pending_tokens / max(now - self._last, 1e-9),
            "mfu": None if self._ideal_seconds is None else self._ideal_seconds / max(seconds, 1e-9),
            "data_wait": self._pending_wait / self._pending_steps,
            "compile_seconds": self._compile_seconds,
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, step)
        self._last, self._pending_steps, self._pending_tokens, self._pending_wait = now, 0, 0, 0.0
        self._compile_seconds = None
        self._show(row, slots, last)

    def _show(self, row: dict[str, Any], slots: int, last: bool) -> None:
        now = time.monotonic()
        tty = self._screen.isatty()
        if not tty and now - self._last_line < QUIET_SECONDS and not last:
            return
        self._last_line = now
        done = row["step"] + 1
        left = (now - self._start) / max(1, done - self._first) * (self._steps - done)
        mfu = "" if row["mfu"] is None else f"MFU {100 * row['mfu']:.1f}%  "
        line = (
            f"step {done}/{self._steps} ({100 * done / self._steps:.0f}%)  loss {row['loss']:.4f}  "
            f"grad norm {row['grad_norm']:.3g}  lr {row['lr']:.3g}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{mfu}supervised {100 * row['targets'] / row['tokens']:.0f}%  filled {100 * row['tokens'] / slots:.0f}%  "
            f"ETA {duration(left)}"
        )
        self._screen.write(f"\r\x1b[2K{line}" + ("\n" if last else "") if tty else line + "\n")
        self._screen.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


@contextmanager
def open_metrics(
    workdir: str, first_step: int, steps: int, log_every: int, screen: TextIO | None = None
) -> Iterator[MetricsWriter]:
    """Yield a MetricsWriter that continues at `first_step` and is closed on every way out."""
    writer = MetricsWriter(workdir, first_step, steps, log_every, screen or sys.stdout)
    try:
        yield writer
    finally:
        writer.close()


def duration(seconds: float) -> str:
    """Return '1:02:03' or '2:03'."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
