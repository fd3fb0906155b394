"""Whether the goodput of a run adds up to its wall time, over all its starts.

`python -m tests.faults.goodput WORKDIR [SECONDS]` prints where the time went and exits with 1 where the sum is more
than 1 % off SECONDS, as whoever started the run has measured them; without them, off what the lines' own times say.
"""

import json
import pathlib
import sys

from llava_jax.train.watchdog import BUCKETS


def check(workdir: pathlib.Path, wall: float | None = None) -> tuple[str, float]:
    """Return a line for a person, and by which share the sum differs from the wall time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    total = sum(last["goodput"].values())
    if wall is None:
        wall = last["time"] - first["time"] + sum(first["goodput"].values())
    shares = ", ".join(f"{name} {last['goodput'][name]:.1f}" for name in BUCKETS)
    difference = total / wall - 1
    return f"goodput of {total:.1f} s: {shares}; wall time {wall:.1f} s, {difference:+.2%}", difference


if __name__ == "__main__":
    line, off = check(pathlib.Path(sys.argv[1]), float(sys.argv[2]) if sys.argv[2:] else None)
    print(line)
    sys.exit(abs(off) > 0.01)
