"""Kill storm: two processes of two devices, killed again and again, give the numbers of a run that nobody killed.

`python -m tests.faults.storm [--kills=30] [--steps=300] [--seed=0]` trains packed rows with images, once undisturbed
and once under a supervisor that kills one process or both with SIGKILL (two thirds at an update, the others at a random
moment from the start on) and starts both again as long as their exit codes are those on which launch/ does. It prints
what was lost, and exits with 1 unless the metrics are those of the undisturbed run to the bit, no more updates were
lost than between two checkpoints while one more is being written, nothing hung or stayed behind, and the goodput in the
metrics adds up to the wall time.
"""

import argparse
import collections
import itertools
import json
import pathlib
import random
import signal
import sys
import tempfile
import time
from typing import NamedTuple

from llava_jax.settings import write_settings
from tests.faults import goodput, trainers
from tests.tiny_run import make_inputs, make_settings, read_metrics

SAVE_EVERY = 4
ROLES = ["step@0.03"] * 2
GONE_SECONDS = 60


class Kill(NamedTuple):
    """Which processes get SIGKILL, and when: after so many updates, or so many seconds after the start."""

    processes: tuple[int, ...]
    update: int | None
    seconds: float = 0.0

    def __str__(self) -> str:
        when = f"{self.seconds:.1f} s" if self.update is None else f"update {self.update}"
        return f"process {' and '.join(map(str, self.processes))} at {when}"


class Attempt(NamedTuple):
    """One start of both processes."""

    first: int | None  # update that it began with; None: it did not get there
    last: int  # updates done when the signal was sent, or at the end
    codes: list[int]
    hung: bool
    orphans: int
    began: float  # when the first process had read its modules; seconds of the monotonic clock


def logged(workdir: pathlib.Path) -> int:
    """Updates in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def attempt(config: pathlib.Path, workdir: pathlib.Path, logs: pathlib.Path, kill: Kill | None) -> Attempt:
    """Train until `kill` says, and wait until both processes are gone."""
    both, began = trainers.start(ROLES, config, workdir, logs, devices=4), time.monotonic()

    def due(kill: Kill) -> bool:
        if kill.update is None:
            return time.monotonic() - began > kill.seconds
        return both[0].has_said("at step") and logged(workdir) >= kill.update

    training = 0.0
    while all(trainer.code() is None for trainer in both) and time.monotonic() - began < 300:
        if not training and both[0].has_said("at start"):
            training = time.monotonic()
        if kill is not None and due(kill):
            for index in kill.processes:
                both[index].send(signal.SIGKILL)
            break
        time.sleep(0.01)
    last = logged(workdir)
    is_gone = trainers.wait(both, GONE_SECONDS)
    codes = [trainer.code() or 0 for trainer in both]
    is_begun = both[0].has_said("resuming") or both[0].has_said("compiled")
    return Attempt(both[0].resumed() if is_begun else None, last, codes, not is_gone, trainers.alive(workdir), training)


def storm(config: pathlib.Path, folder: pathlib.Path, kills: list[Kill]) -> list[Attempt]:
    """Start again until both processes end with 0, or with a code that launch/ does not start again."""
    attempts: list[Attempt] = []
    left = list(kills)
    while True:
        kill = left.pop(0) if left else None
        found = attempt(config, folder / "storm", folder / f"log{len(attempts)}", kill)
        attempts.append(found)
        title = "nobody" if kill is None else str(kill)
        print(f"{title:<30} updates {found.first} to {found.last}, exit {found.codes}", flush=True)
        if not all(code in trainers.RESTARTED for code in found.codes):
            return attempts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    kills = []
    for n in range(args.kills):
        processes = rng.choice(((0,), (1,), (0, 1)))
        update = int((n + rng.random()) * args.steps / (args.kills + 1))
        kills.append(Kill(processes, None, rng.uniform(1, 15)) if n % 3 == 2 else Kill(processes, update))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_inputs(folder)
        how = dict(data__pack=True, data__max_length=112, optim__warmup_ratio=0.1)
        often = dict(train__watchdog=trainers.WATCHDOG, train__checkpoint_every=SAVE_EVERY, train__keep=2)
        settings = make_settings(folder, "finetune", train__steps=args.steps, train__batch_size=8, **how, **often)
        write_settings(str(folder / "config.json"), settings)
        whole = attempt(folder / "config.json", folder / "whole", folder / "whole.log", None)
        print(f"undisturbed: {whole.last} updates, exit {whole.codes}, {time.monotonic() - began:.0f} s", flush=True)
        attempts = storm(folder / "config.json", folder, kills)
        wall = time.monotonic() - attempts[0].began
        line, off = goodput.check(folder / "storm", wall)
        print(line, flush=True)
        wanted, found = read_metrics(folder / "whole"), read_metrics(folder / "storm")
    lost, reached = [0], 0
    for one in attempts:
        if one.first is not None:
            lost.append(max(0, reached - one.first))
        reached = one.last
    figures = {
        "kills": sum(137 in one.codes for one in attempts),
        "starts": len(attempts),
        "ended": attempts[-1].codes,
        "updates": len(found),
        "different": sum(a != b for a, b in itertools.zip_longest(wanted, found)),
        "lost": sum(lost),
        "most_lost": max(lost),
        "hung": sum(one.hung for one in attempts),
        "orphans": sum(one.orphans for one in attempts),
        "codes": dict(sorted(collections.Counter(code for one in attempts for code in one.codes).items())),
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(figures))
    is_right = (
        whole.codes == attempts[-1].codes == [0, 0]
        and len(wanted) == args.steps
        and figures["different"] == figures["hung"] == figures["orphans"] == 0
        # A checkpoint is whole by the time that the next but one begins.
        and figures["most_lost"] <= 2 * SAVE_EVERY
        and abs(off) <= max(0.01, 3 / wall)  # in a short storm what comes after the last line counts for more
    )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
