"""Run the two sides of a benchmark turn by turn, and compare them.

Our turn is followed by the peer's, so that whatever else the machine does slows both. On a CPU both are pinned to one
core and CPU seconds are counted.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_jax.types import InputError

Figures = dict[str, Any]

FOLDER = os.path.dirname(os.path.abspath(__file__))
OURS, PEER = "ours", "peer"
UNIT = {"train": "step", "generate": "token", "data": "image"}  # the seconds whose ratio is the result of a job
LOSS_TOLERANCE = 1e-4  # between the losses of the first update in float32; both sides start from the same file
PARITY_PYTHON = os.path.join(".venv-parity", "bin", "python")


def find_peer_python(choice: str | None) -> str:
    """Return the Python that has torch: `choice` if given, this one, or that of `make parity`. Raises InputError."""
    if choice:
        return choice
    if importlib.util.find_spec("torch") is not None:
        return sys.executable
    if os.path.exists(PARITY_PYTHON):
        return PARITY_PYTHON
    raise InputError(
        f"--peer needs torch and transformers, which neither this Python nor {PARITY_PYTHON} has: run `make parity` "
        "once, or give --peer_python=PYTHON"
    )


def measure(work: Mapping[str, Any], rounds: int, peer_python: str | None) -> Figures:
    """Return medians of each side over `rounds` turns, and the ratio theirs / ours where there is a peer.

    `work` says what a side does (see `jax_side.py`); its files are made in a temporary folder. Raises an InputError
    with the last line that a side printed when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="llava_jax_benchmark_") as folder:
        files: Figures = {"model": os.path.join(folder, "model"), "batch": os.path.join(folder, "batch.npz")}
        if work["job"] in ("data", "scaling"):
            files = {"images": [os.path.join(folder, f"{n}.jpg") for n in range(work["count"])]}
        work = {**work, **files}
        path = os.path.join(folder, "work.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(work, file)
        here = [sys.executable, "-m"]
        on_cpu = dict(os.environ, JAX_PLATFORMS="cpu")
        with pinned(work["core"]), contextlib.ExitStack() as stack:
            run_once([*here, "llava_jax.benchmark.fixtures", path], on_cpu, os.path.join(folder, "fixtures.log"))
            commands = {OURS: [*here, "llava_jax.benchmark.jax_side", path]}
            if peer_python is not None:
                commands[PEER] = [peer_python, os.path.join(FOLDER, "peer.py"), path]
            sides = {name: Side(name, words, f"{folder}/{name}.log") for name, words in commands.items()}
            for side in sides.values():
                stack.enter_context(side)
            for side in sides.values():
                side.ready()
            for _ in range(rounds):
                for side in sides.values():
                    side.turn()
            for side in sides.values():
                side.finish()
    return summary(work, sides)


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Run what is started inside on that core alone; None leaves everything as it is."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Side(contextlib.AbstractContextManager):
    """A process that serves turns (`worker.serve`); it ends with the block."""

    def __init__(self, name: str, command: Sequence[str], log: str):
        self.name, self.command, self.log = name, command, log
        self.results: Figures = {}
        self.turns: list[Mapping[str, float]] = []

    def __enter__(self) -> "Side":
        with open(self.log, "wb") as log:
            try:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            except OSError as error:
                raise InputError(f"{self.command[0]}: {error.strerror}; expected a Python with torch") from error
        assert self.process.stdin is not None and self.process.stdout is not None  # pipes, see above
        self.orders, self.answers = self.process.stdin, self.process.stdout
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        with contextlib.suppress(BrokenPipeError):
            self.orders.close()

    def ready(self) -> None:
        self.results = self._answer()

    def turn(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` says why
            self.orders.write("\n")
            self.orders.flush()
        self.turns.append(self._answer())

    def finish(self) -> None:
        self.orders.close()
        self.results |= self._answer()

    def figures(self) -> Figures:
        """Return its results, and the median of every name over its turns."""
        return self.results | {name: statistics.median(turn[name] for turn in self.turns) for name in self.turns[0]}

    def _answer(self) -> Figures:
        line = self.answers.readline()
        if not line:
            raise InputError(failure(f"{self.name} ({self.command[0]})", self.process.wait(), self.log))
        return json.loads(line)


def run_once(command: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    with open(log, "wb") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
    if code:
        raise InputError(failure("making the model", code, log))


def failure(what: str, code: int, log: str) -> str:
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return f"benchmark: {what} ended with exit code {code}: {lines[-1] if lines else 'it printed nothing'}"


# ---- results --------------------------------------------------------------------------------------------------------


def summary(work: Mapping[str, Any], sides: Mapping[str, Side]) -> Figures:
    """Return the figures of each side; `ratio` is theirs / ours of the medians, `ratios` that of each round."""
    figures = {name: side.figures() for name, side in sides.items()}
    if PEER not in sides:
        return figures
    unit = UNIT[work["job"]]
    same = check_same(work, figures[OURS], figures[PEER])
    ratios = [theirs[unit] / ours[unit] for ours, theirs in zip(sides[OURS].turns, sides[PEER].turns, strict=True)]
    return figures | {"ratio": figures[PEER][unit] / figures[OURS][unit], "ratios": ratios, "same": same}


def check_same(work: Mapping[str, Any], ours: Figures, theirs: Figures) -> str:
    """Return in words how it is known that both sides did the same work. Raises InputError where they did not."""
    if work["job"] == "data":
        pairs = list(zip(ours.pop("pixels"), theirs.pop("pixels"), strict=True))
        differ = [image for image, (one, other) in enumerate(pairs) if one != other]
        if differ:
            raise InputError(f"benchmark: the images differ ({len(differ)} of {len(pairs)}): not the same work")
        return "bit-equal pixels once ours are normalised, which is left to the step"
    if not work["weights"]:
        return "random weights on each side, not compared"
    if work["job"] == "generate":
        rows = zip(ours.pop("ids"), theirs.pop("ids"), strict=True)
        pairs = [pair for ours_row, theirs_row in rows for pair in zip(ours_row, theirs_row, strict=True)]
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} ids are the same"
    if abs(ours["loss"] - theirs["loss"]) > LOSS_TOLERANCE:
        both = f"{ours['loss']} and {theirs['loss']}"
        raise InputError(f"benchmark: the losses of one model differ, {both}: not the same work")
    return f"loss {ours['loss']:.5f} and {theirs['loss']:.5f} from the same weights"
