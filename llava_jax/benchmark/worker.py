"""One side of a benchmark, as a process of its own: it gets ready, then works one turn for each line it is sent.

Only the standard library: the peer imports this file by its path, where llava_jax need not be installed.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Figures = dict[str, Any]
# Images a batch on both sides, conversations a packed batch on ours.
PICTURE_BATCH, ROW_BATCH = 8, 128
# One turn: seconds a unit of work, under the names that both sides share.
Turn = Callable[[], Mapping[str, float]]


def serve(start: Callable[[Mapping[str, Any]], tuple[Figures, Turn]]) -> None:
    """Run a side: read the work from the JSON file named in argv, call `start`, print its results, then serve turns.

    Each line on stdin is answered by one line of JSON on stdout; anything else that is printed goes to stderr.
    """
    with open(sys.argv[1], encoding="utf-8") as file:
        work = json.load(file)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    results, turn = start(work)
    started = peak_bytes()
    forget_peak()
    print(json.dumps(results), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=answers, flush=True)
    print(json.dumps({"start_bytes": started, "peak_bytes": peak_bytes()}), file=answers, flush=True)


def clock(device: str) -> Callable[[], float]:
    """Return the clock of a device: CPU seconds, which a busy machine lengthens little, or wall seconds elsewhere."""
    return time.process_time if device == "cpu" else time.perf_counter


def fingerprint(pixels_XYC: Any) -> str:
    """Return a hash of an image's values, bit by bit, and of its dtype and shape."""
    return hashlib.sha256(f"{pixels_XYC.dtype} {pixels_XYC.shape}".encode() + pixels_XYC.tobytes()).hexdigest()


def peak_bytes() -> int:
    """Return the most memory this process has held since `forget_peak`, as Linux counts it; 0 on another system."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except FileNotFoundError:
        return 0


def forget_peak() -> None:
    """Count `peak_bytes` anew from here, where the system lets a process do so."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
