"""Updates that are not finite, in two processes: each is skipped to the bit, and several in a row stop the run.

`python -m tests.faults.nonfinite` makes the loss, one element of a gradient that the second process holds, or the
pixels of one image not a number, and compares the parameters at the end with those of a run whose rows lack that batch.
Then it does so in three updates in a row, and continues in the way that docs/howto/resume.md names. It prints the
figures, and exits with 1 unless the parameters are the same to the bit, the run stopped with 2 in both processes, its
rows named, and the new one ends.
"""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from PIL import Image

from llava_jax.settings import write_settings
from llava_jax.weights.source import load_params
from tests.faults.trainers import Trainer, run
from tests.tiny_run import change, make_inputs, make_settings

BATCH, BAD, STEPS, NEVER = 8, 3, 8, 10**6


def make_rows(folder: pathlib.Path) -> None:
    """Write rows of one epoch, `less.json` without those of batch BAD, and `pixels.json` with a black image in it."""
    make_inputs(folder)
    few = json.loads((folder / "rows.json").read_text())
    rows = [few[n % len(few)] | {"id": f"row-{n}"} for n in range(BATCH * STEPS)]
    first = BAD * BATCH
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "less.json").write_text(json.dumps(rows[:first] + rows[first + BATCH :]))
    Image.fromarray(np.full((16, 16, 3), 4, np.uint8)).save(folder / "images" / "black.png")
    rows[first + 2] = rows[first + 2] | {"image": "black.png"}
    (folder / "pixels.json").write_text(json.dumps(rows))


def different(a: pathlib.Path, b: pathlib.Path) -> int:
    """Count the parameters of two runs' newest checkpoints that differ."""
    leaves = (jax.tree.leaves(load_params(str(workdir))[1]) for workdir in (a, b))
    return sum(int(np.sum(x != y)) for x, y in zip(*leaves, strict=True))


def main() -> int:
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_rows(folder)
        how = dict(data__shuffle=False, data__max_length=48, train__batch_size=BATCH, train__checkpoint_every=2)
        settings = make_settings(folder, "finetune", train__max_nonfinite=3, optim__warmup_ratio=0.0, **how)
        settings = change(settings, "optim", schedule="constant")

        def train(title: str, rows: str, role: str, steps: int, model: str = settings.init.model) -> list[Trainer]:
            given = change(change(settings, "data", annotations=f"{folder}/{rows}.json"), "train", steps=steps)
            write_settings(str(folder / f"{title}.json"), change(given, "init", model=model))
            return run([role] * 2, folder / f"{title}.json", folder / title, folder / f"{title}.log")

        for kind, rows, which in (("loss", "rows", BAD), ("gradient", "rows", BAD), ("pixels", "pixels", 4)):
            without, spoiled = f"without-{kind}", f"spoiled-{kind}"
            # The same program: only the number of the bad update, or the colour, is another.
            ended = train(without, "less", f"{kind}@{NEVER if kind != 'pixels' else 4}", STEPS - 1)
            ended += train(spoiled, rows, f"{kind}@{which}", STEPS)
            skipped = sum("the update was skipped" in line for line in ended[2].lines())
            figures[kind] = {"exit": [trainer.code() for trainer in ended], "skipped": skipped, "different": None}
            if figures[kind]["exit"] == [0, 0, 0, 0]:
                figures[kind]["different"] = different(folder / without, folder / spoiled)
        ended = train("three", "rows", f"loss@{BAD},loss@{BAD + 1},loss@{BAD + 2}", STEPS)
        said = [line for trainer in ended for line in trainer.lines() if line.startswith("error: ")]
        figures["three"] = {"exit": [trainer.code() for trainer in ended], "said": said}
        ended = train("on", "less", "none", STEPS - 1, model=f"orbax:{folder}/three")
        figures["continued"] = {"exit": [trainer.code() for trainer in ended]}
    print(json.dumps(figures, indent=1))
    names = [f"(id row-{n})" for n in range(BAD * BATCH, (BAD + 3) * BATCH)]
    is_right = (
        all(figures[kind] == {"exit": [0] * 4, "skipped": 1, "different": 0} for kind in ("loss", "gradient", "pixels"))
        and figures["three"]["exit"] == [2, 2]
        and all(any(name in line for line in said) for name in names)
        and figures["continued"]["exit"] == [0, 0]
    )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
