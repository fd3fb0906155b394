"""SIGTERM in every phase of a run: each time all processes leave with 42 within 30 s, and nothing is lost.

`python -m tests.faults.terms` sends it at ten points of a run of one process, and at ten of one of two, to either or
both; each start resumes what the one before it saved. It prints a line each, ends both runs, and exits with 1 unless
every process left in time with 42, no update that was logged was lost, and the metrics are those of runs that nobody
stopped.
"""

import json
import pathlib
import signal
import sys
import tempfile

from llava_jax.settings import write_settings
from tests.faults.trainers import WATCHDOG, Case, attempt, run
from tests.tiny_run import make_inputs, make_settings, read_metrics

SECONDS = 30
POINTS = [  # (role of each process, line that is waited for, who is told)
    ("none", "at start 1", (0,)),
    ("rows@60", "at rows 1", (0,)),
    ("step@0.3", "at step 3", (0,)),
    ("step@10", "at step 1", (0,)),
    ("restore@60", "at restore 1", (0,)),
    ("compile@60", "at compile 1", (0,)),
    ("save@5", "at save 1", (0,)),
    ("commit@5", "at commit 1", (0,)),
    ("evaluation@5", "at evaluation 1", (0,)),
    ("batch@2", "at batch 2", (0,)),
]
POINTS_OF_TWO = [
    ("connect@60", "at connect 1", (0, 1)),
    ("rows@60", "at rows 1", (0,)),
    ("step@0.3", "at step 3", (1,)),
    ("restore@60", "at restore 1", (1,)),
    ("compile@60", "at compile 1", (0,)),
    ("compile@60", "at compile 1", (1,)),
    ("compile@60", "at compile 1", (0, 1)),
    ("save@5", "at save 1", (0,)),
    ("commit@5", "at commit 1", (0,)),
    ("evaluation@5", "at evaluation 1", (1,)),
]


def trained(workdir: pathlib.Path) -> list[dict]:
    """The metrics of the updates; a pass over held-out rows that SIGTERM meets is cut short."""
    if not (workdir / "metrics.jsonl").exists():
        return []
    return [{name: row[name] for name in row if not name.startswith("eval")} for row in read_metrics(workdir)]


def finish(count: int, config: pathlib.Path, workdir: pathlib.Path) -> int:
    """Train to the end; return the update that this start began with, -1 where it did not end well."""
    trainers = run(["none"] * count, config, workdir, workdir.with_suffix(".log"))
    return -1 if any(trainer.code() for trainer in trainers) else trainers[0].resumed()


def main(chosen: list[str]) -> int:
    right, lost, different = [], 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_inputs(folder)
        how = dict(train__watchdog=WATCHDOG, train__batch_size=8, data__max_length=48, train__eval_every=1)
        often = dict(train__steps=60, train__checkpoint_every=4, data__eval=f"{folder}/captions.json")
        write_settings(str(folder / "config.json"), make_settings(folder, "finetune", **how, **often))
        for count, points in ((1, POINTS), (2, POINTS_OF_TWO)):
            if chosen and str(count) not in chosen:
                continue
            stopped, whole = folder / f"stopped{count}", folder / f"whole{count}"
            for index, (role, mark, told) in enumerate(points):
                which = "" if count == 1 else ", both" if len(told) == 2 else f", process {told[0]}"
                title = f"SIGTERM at {mark.removeprefix('at ').rstrip(' 123')}{which}"
                case = Case(title, (role,) * count, mark, told, signal.SIGTERM, SECONDS, (42,))
                right.append(attempt(case, folder / "config.json", stopped, folder / f"log{count}.{index}"))
            logged = len(trained(stopped))
            lost += logged - finish(count, folder / "config.json", stopped)
            finish(count, folder / "config.json", whole)
            wanted, found = trained(whole), trained(stopped)
            different += len(wanted) != 60 or wanted != found
    print(json.dumps({"points": len(right), "in time with 42": sum(right), "lost": lost, "different": different}))
    return int(not all(right) or lost != 0 or different != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
