"""The phases of a run: where its time went, and a thread that ends a process which is stuck.

It also ends one that is told to stop while there is nothing to save. SIGTERM is heard by `faulthandler`, in C: Python's
own handlers wait for the main thread to come back from a compiler or a collective. What handled the signal before, jax
among several processes, still does.
"""

import contextlib
import faulthandler
import os
import select
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from llava_jax.parallel.distributed import LAST_SECONDS
from llava_jax.types import HUNG_EXIT_CODE, STOPPED_EXIT_CODE

STEP_SECONDS = 600  # the least that a step may take, and 20 times as long as usual
TERM_SECONDS = 25  # from SIGTERM, or a pass or save after it, until the step is over, or six times as long as usual
UNSAVED = ("start", "restore", "compile")  # before the first update: there is nothing to save
UNHURRIED = ("evaluation", "save")  # after SIGTERM, too: several processes finish them and do one more update
TOGETHER_SECONDS = 8  # that a process which is told to stop waits until the others know

# What an update costs: lost where it is run again.
WORK = ("data", "step", "checkpoint", "evaluation")
BUCKETS = ("start", "compile", *WORK, "lost", "down")
PHASES = {"restore": "start", "save": "checkpoint"}


class Goodput:
    """Seconds since the first start of a run by what they went to; their sum is the wall time.

    start (up to the first batch, a restore included), compile, data (waiting for a batch), step, checkpoint,
    evaluation; lost, the last four where a kill made a later start do them again; and down, from the last line that a
    start wrote until the next start.
    """

    def __init__(self, began: float):
        self._began, self._at = began, "start"
        self._seconds = dict.fromkeys(BUCKETS, 0.0)
        self._since = time.monotonic() - max(0.0, time.time() - began)

    def enter(self, phase: str) -> None:
        """Begin a phase of the Watchdog."""
        now = time.monotonic()
        self._seconds[self._at] += now - self._since
        self._at, self._since = PHASES.get(phase, phase), now

    def count_waiting(self, seconds: float) -> None:
        """Count seconds of the updates as waiting for a batch."""
        self._seconds["step"] -= seconds
        self._seconds["data"] += seconds

    def resume(self, kept: dict[str, Any], last: dict[str, Any]) -> None:
        """Continue the count of earlier starts: of the last line before the updates to come, and of the last of all."""
        if "goodput" not in last:  # a run of an earlier version
            return
        before = kept.get("goodput", dict.fromkeys(BUCKETS, 0.0))
        for bucket, seconds in last["goodput"].items():
            again = seconds - before[bucket] if bucket in WORK else 0.0
            self._seconds[bucket] += seconds - again
            self._seconds["lost"] += again
        self._seconds["down"] += max(0.0, self._began - last["time"])

    def so_far(self) -> dict[str, float]:
        """Return the seconds of each bucket until now."""
        self.enter(self._at)
        return {bucket: round(seconds, 3) for bucket, seconds in self._seconds.items()}

    def __str__(self) -> str:
        seconds = self.so_far()
        total = max(sum(seconds.values()), 1e-9)
        shares = [f"{name} {part / total:.1%}" for name, part in seconds.items() if part]
        return f"goodput {seconds['step'] / total:.1%} of {total:,.0f} s: {', '.join(shares)}"


class Watchdog:
    """What the process is at, and since when; ends the process where a phase takes more than `limit` seconds.

    With a limit of 0 it only hears SIGTERM.
    """

    def __init__(self, limit: int, began: float):
        self.goodput = Goodput(began)
        self._limit = limit
        self._steps: deque[float] = deque(maxlen=100)
        self._now = ("start", time.monotonic())
        self._told: float | None = None
        self._unhurried = 0.0
        self._should_stop: Callable[[int], bool] | None = None
        self._last_seconds, self._agreed = 0.0, float("inf")
        self._ear, self.mouth = os.pipe()
        threading.Thread(target=self._watch, daemon=True).start()

    def enter(self, phase: str) -> None:
        """Begin a phase: start, restore, compile, step, evaluation, save."""
        self.goodput.enter(phase)
        before, since = self._now
        if before in UNHURRIED:
            self._unhurried = time.monotonic()
        self._now = phase, time.monotonic()
        if before == "step":
            self._steps.append(self._now[1] - since)

    def leave_together(self, should_stop: Callable[[int], bool], is_first: bool) -> None:
        """Leave with the other processes when one is told to stop before the first update.

        jax passes the signal on within a second or two, without which the others would notice only that this process is
        gone; the first one leaves last, because they abort without it.
        """
        self._should_stop, self._last_seconds = should_stop, LAST_SECONDS if is_first else 0.0

    def close(self) -> None:
        """Stop watching."""
        os.close(self.mouth)

    def _watch(self) -> None:
        while True:
            heard = select.select([self._ear], [], [], 0.5)[0]
            if heard and not os.read(self._ear, 65536):  # what faulthandler says of one thread is of no use
                os.close(self._ear)
                return
            phase, since = self._now
            now = time.monotonic()
            if heard and self._told is None:
                self._told = now
            if phase in UNSAVED and self._leaves(now):
                _end(f"stopped by SIGTERM during {phase}: nothing is to be saved", STOPPED_EXIT_CODE)
            usual = statistics.median(self._steps) if self._steps else 0.0
            limit = max(min(self._limit, STEP_SECONDS), 20 * usual) if phase == "step" else self._limit
            if self._limit and now - since > limit:
                faulthandler.dump_traceback()
                _end(f"error: {phase} takes more than {limit:.0f} s (train.watchdog): stuck", HUNG_EXIT_CODE)
            since = max(self._told or now, self._unhurried)
            if self._told is not None and phase == "step" and now - since > max(TERM_SECONDS, 6 * usual):
                faulthandler.dump_traceback()
                _end("error: SIGTERM is not obeyed: stuck in a step", HUNG_EXIT_CODE)

    def _leaves(self, now: float) -> bool:
        if self._should_stop is None:
            return self._told is not None
        # All processes stop at one more than the highest number that any of them has asked with.
        if self._should_stop(1) or self._should_stop(0):
            self._agreed = min(self._agreed, now)
        told = float("inf") if self._told is None else self._told
        return now - self._agreed >= self._last_seconds or now - told > TOGETHER_SECONDS


def _end(line: str, code: int) -> None:
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def watching(limit: int, began: float | None = None) -> Iterator[Watchdog]:
    """Yield a Watchdog; enter it after `stop_signal`. Outside the main thread it does not hear SIGTERM.

    `began` is when the process did, in Unix time; None: now.
    """
    watchdog = Watchdog(limit, began or time.time())
    hears = threading.current_thread() is threading.main_thread()
    if hears:
        faulthandler.register(signal.SIGTERM, file=watchdog.mouth, all_threads=False, chain=True)
    try:
        yield watchdog
    finally:
        if hears:
            faulthandler.unregister(signal.SIGTERM)
        watchdog.close()
