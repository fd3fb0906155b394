"""Trace a few updates for the profiler (`train.profile`)."""

import os
from contextlib import AbstractContextManager, closing
from typing import Any

import jax

from llava_jax.io import absolute_path
from llava_jax.parallel.distributed import is_first, say

# The first updates still wait for the data and for the device to warm up.
SKIPPED = 2


class Tracer:
    """Traces `updates` of the updates `steps` into `folder`, in the first process; the numbers do not change.

    `shown` is where the folder will be found.
    """

    def __init__(self, folder: str, shown: str, steps: range, updates: int):
        first = steps.start + min(SKIPPED, max(0, len(steps) - updates))
        self._updates = range(first, min(first + updates, steps.stop)) if is_first() else range(0)
        self._folder, self._shown = folder, shown
        self._running = False

    def before(self, n: int, state: Any) -> None:
        """Start with the first update to trace, once the device is done with those before."""
        if self._updates and n == self._updates.start:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, n: int, state: Any) -> None:
        """Stop after the last update to trace, once the device is done with it."""
        if self._running and n + 1 == self._updates.stop:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace and print how to look at it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            say(
                f"profile of updates {self._updates.start} to {self._updates.stop - 1} in {self._shown}: "
                f"pip install xprof, then xprof --port=8791 --logdir={self._shown} and open http://localhost:8791"
            )


def tracing(folder: str, steps: range, updates: int, workdir: str = "") -> AbstractContextManager[Tracer]:
    """Return a Tracer into FOLDER/profile for a `with`; `workdir` is the one in a bucket that the folder goes to."""
    into, shown = (os.path.join(absolute_path(path), "profile") for path in (folder, workdir or folder))
    return closing(Tracer(into, shown, steps, updates))
