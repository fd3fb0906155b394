"""A thread that ends a process which is stuck, or is told to stop while it has nothing to save.

SIGTERM is heard by `faulthandler`, in C: Python's own handlers wait for the main thread to come back from a compiler or
a collective. What handled the signal before, jax among several processes, still does.
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
from collections.abc import Iterator

from llava_jax.parallel.distributed import HUNG_EXIT_CODE, STOPPED_EXIT_CODE

STEP_SECONDS = 600  # the least that a step may take, and 20 times as long as usual
TERM_SECONDS = 25  # from SIGTERM until the step is over, or six times as long as usual
UNSAVED = ("start", "restore", "compile")  # before the first update: there is nothing to save


class Watchdog:
    """What the process is at, and since when; ends the process where a phase takes more than `limit` seconds.

    With a limit of 0 it only hears SIGTERM.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._steps: deque[float] = deque(maxlen=100)
        self._now = ("start", time.monotonic())
        self._told: float | None = None
        self._ear, self.mouth = os.pipe()
        threading.Thread(target=self._watch, daemon=True).start()

    def enter(self, phase: str) -> None:
        """Begin a phase: start, restore, compile, step, save."""
        before, since = self._now
        self._now = phase, time.monotonic()
        if before == "step":
            self._steps.append(self._now[1] - since)

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
            if self._told is not None and phase in UNSAVED:
                _end(f"stopped by SIGTERM during {phase}: nothing is to be saved", STOPPED_EXIT_CODE)
            usual = statistics.median(self._steps) if self._steps else 0.0
            limit = max(min(self._limit, STEP_SECONDS), 20 * usual) if phase == "step" else self._limit
            if self._limit and now - since > limit:
                faulthandler.dump_traceback()
                _end(f"error: {phase} takes more than {limit:.0f} s (train.watchdog): stuck", HUNG_EXIT_CODE)
            if self._told is not None and phase == "step" and now - self._told > max(TERM_SECONDS, 6 * usual):
                faulthandler.dump_traceback()
                _end("error: SIGTERM is not obeyed: stuck in a step", HUNG_EXIT_CODE)


def _end(line: str, code: int) -> None:
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def watching(limit: int) -> Iterator[Watchdog]:
    """Yield a Watchdog; enter it after `stop_signal`. Outside the main thread it does not hear SIGTERM."""
    watchdog = Watchdog(limit)
    hears = threading.current_thread() is threading.main_thread()
    if hears:
        faulthandler.register(signal.SIGTERM, file=watchdog.mouth, all_threads=False, chain=True)
    try:
        yield watchdog
    finally:
        if hears:
            faulthandler.unregister(signal.SIGTERM)
        watchdog.close()
