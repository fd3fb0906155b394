"""Hangs and lost processes: how long a run takes to end, and with which exit code.

`python -m tests.faults.processes [WORD …]` starts tiny runs of one and of two processes, a few minutes in all; with
words only those whose names have one of them. It prints a line each, and exits with 1 unless every process was gone in
time with a code that the scripts in launch/ start again (2 for a full disk).
"""

import json
import pathlib
import signal
import sys
import tempfile

from llava_jax.settings import write_settings
from tests.faults.trainers import RESTARTED, WATCHDOG, Case, attempt
from tests.tiny_run import make_inputs, make_settings

KILL, STOP, STEP = signal.SIGKILL, signal.SIGSTOP, "step@0.2"
CASES = [
    Case("SIGKILL of one of two", (STEP, STEP), "at step", (1,), KILL, 60, RESTARTED),
    Case("SIGSTOP of one of two", (STEP, STEP), "at step", (1,), STOP, 60, RESTARTED),
    Case("one of two hangs", (STEP, "step@3600"), "at step", (1,), None, 60, RESTARTED),
    Case("one of two raises", (STEP, "raises"), "", (), None, 60, (1, *RESTARTED)),
    Case("one of two dies while the other compiles", ("compile@60",) * 2, "at compile", (1,), KILL, 60, RESTARTED),
    Case("one of two dies before it connects", ("none", "connect@3600"), "at connect", (1,), KILL, 60, RESTARTED),
    Case("the first of two dies before it connects", ("connect@3600", "none"), "at connect", (0,), KILL, 60, RESTARTED),
    Case("one of two is frozen before it connects", ("none", "connect@3600"), "at connect", (1,), STOP, 60, RESTARTED),
    Case("one of two dies before its devices are known", ("none", "backend@99"), "at back", (1,), KILL, 60, RESTARTED),
    Case("one of two hangs before its devices are known", ("none", "backend@99"), "at back", (1,), None, 60, RESTARTED),
    Case("the first of two dies before its rows are read", ("rows@99", "none"), "at rows", (0,), KILL, 60, RESTARTED),
    Case("one of two dies while rows are read", ("none", "rows@99"), "at rows", (1,), KILL, 60, RESTARTED),
    Case("one of two dies while the state is restored", ("none", "restore@99"), "at rest", (1,), KILL, 60, RESTARTED),
    Case("it hangs", ("step@3600",), "at step", (0,), None, 60, (43,)),
    Case("disk full at a save", ("full",), "", (), None, 60, (2,)),
]


def main(chosen: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        inputs = pathlib.Path(folder)
        make_inputs(inputs)
        how = dict(train__watchdog=WATCHDOG, train__checkpoint_every=2, train__batch_size=8, data__max_length=48)
        write_settings(str(inputs / "config.json"), make_settings(inputs, "finetune", train__steps=30, **how))
        cases = [case for case in CASES if not chosen or any(word in case.name for word in chosen)]
        right = [
            attempt(case, inputs / "config.json", inputs / f"run{index}", inputs / f"log{index}")
            for index, case in enumerate(cases)
        ]
        print(json.dumps({"cases": len(right), "wrong": right.count(False)}))
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
