"""Where the wall time of a run went, over all its starts."""

import time
from typing import Any

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

    def wait(self, seconds: float) -> None:
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
