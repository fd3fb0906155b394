"""A run saved by two processes of two devices continues in any other layout.

`python -m tests.faults.layouts` trains two epochs to the middle of the second one and continues as 2 x 2 (processes x
devices of each), 1 x 1, 1 x 8, 1 x 4, 4 x 2 and 2 x 4. It prints the figures, and exits with 1 unless each begins with
the same parameters to the bit, gives the losses of 2 x 2 within 1e-6, and reads each row once an epoch.
"""

import collections
import json
import pathlib
import shutil
import sys
import tempfile

from llava_jax.settings import write_settings
from tests.faults.rejects import updates
from tests.faults.trainers import run
from tests.tiny_run import make_inputs, make_settings, read_metrics

BATCH, EPOCH, SAVED = 8, 4, 6  # rows, updates, updates
LAYOUTS = ((2, 2), (1, 1), (1, 8), (1, 4), (4, 2), (2, 4))


def main() -> int:
    wrong, parameters = 0, set()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_inputs(folder)
        few = json.loads((folder / "rows.json").read_text())
        rows = [few[n % len(few)] | {"id": f"row-{n}"} for n in range(BATCH * EPOCH)]
        (folder / "rows.json").write_text(json.dumps(rows))
        how = dict(train__batch_size=BATCH, data__max_length=48, optim__schedule="constant", train__checkpoint_every=2)
        settings = make_settings(folder, "finetune", train__steps=2 * EPOCH, **how)
        write_settings(str(folder / "all.json"), settings)
        # Another number of steps would be another config: what is after SAVED is taken away.
        whole = run(["numbers"] * 2, folder / "all.json", folder / "saved", folder / "saved.log", devices=4)
        for step in (folder / "saved" / "checkpoints").iterdir():
            if int(step.name) > SAVED:
                shutil.rmtree(step)
        before = updates(whole[0])[1][: SAVED * BATCH // 2] + updates(whole[1])[1][: SAVED * BATCH // 2]
        wanted = [row["loss"] for row in read_metrics(folder / "saved")]
        for processes, devices in LAYOUTS:
            workdir = folder / f"{processes}x{devices}"
            shutil.copytree(folder / "saved", workdir)
            trainers = run(
                ["numbers"] * processes, folder / "all.json", workdir, workdir.with_suffix(".log"), processes * devices
            )
            found = [row["loss"] for row in read_metrics(workdir)]
            counts = collections.Counter(before + [row for trainer in trainers for row in updates(trainer)[1]])
            off = max((abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=False)), default=1.0)
            codes = [trainer.code() for trainer in trainers]
            parameters |= {line for line in trainers[0].lines() if line.startswith("parameters ")}
            is_right = (
                codes == [0] * processes
                and trainers[0].resumed() == SAVED
                and len(found) == len(wanted) == 2 * EPOCH
                and off <= 1e-6
                and counts == dict.fromkeys(range(BATCH * EPOCH), 2)
            )
            wrong += not is_right
            print(
                f"{processes} x {devices}: exit {codes}, resumed at {trainers[0].resumed()}, "
                f"losses within {off:.1e}, rows read {sorted(set(counts.values()))} times in two epochs",
                flush=True,
            )
    print(json.dumps({"layouts": len(LAYOUTS), "wrong": wrong, "different parameters": len(parameters) - 1}))
    return int(wrong > 0 or len(parameters) != 1)


if __name__ == "__main__":
    sys.exit(main())
