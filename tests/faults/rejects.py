"""Images that cannot be read: a run of two processes leaves them out and names them, until there are too many.

`python -m tests.faults.rejects` trains 1,000 rows once, one with a corrupt and one with a missing image, and once more
where data.max_rejects allows only one of them. It prints the figures, and exits with 1 unless the first run ends, both
rows are in rejects.jsonl of the process that reads them, every other row was trained on exactly once with the same
losses in both processes, and the second run ends with 2 in both, its state saved.
"""

import json
import pathlib
import shutil
import sys
import tempfile

from llava_jax.settings import write_settings
from tests.faults.trainers import Trainer, run
from tests.tiny_run import make_inputs, make_settings

ROWS, CORRUPT, MISSING = 1000, 400, 700


def make_rows(folder: pathlib.Path) -> None:
    """Write the inputs of a tiny run with ROWS rows, each with an image of its own."""
    make_inputs(folder)
    row = json.loads((folder / "captions.json").read_text())[0]
    rows = [row | {"id": f"row-{n}", "image": f"row{n}.png"} for n in range(ROWS)]
    (folder / "captions.json").write_text(json.dumps(rows))
    for n in range(ROWS):
        shutil.copy(folder / "images" / f"{n % 4}.png", folder / "images" / f"row{n}.png")


def updates(trainer: Trainer) -> tuple[list[str], list[int]]:
    """(step and loss of each update, rows that were read) of a process with the role `numbers`."""
    lines = [line.split(" ", 3) for line in trainer.lines() if line.startswith("update ")]
    return [f"{step} {loss}" for _, step, loss, _ in lines], [row for *_, rows in lines for row in json.loads(rows)]


def named(workdir: pathlib.Path) -> dict[int, str]:
    """Row -> reason, of all processes."""
    lines = [line for path in workdir.glob("rejects*.jsonl") for line in path.read_text().splitlines()]
    return {line["row"]: line["reason"] for line in map(json.loads, lines)}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_rows(folder)
        (folder / "images" / f"row{CORRUPT}.png").write_bytes(b"no image")
        how = dict(data__shuffle=False, data__max_length=48, train__batch_size=8, train__steps=ROWS // 8)
        settings = make_settings(folder, "pretrain", data__max_rejects=2.0, train__checkpoint_every=50, **how)
        write_settings(str(folder / "two.json"), settings)
        settings = make_settings(folder, "pretrain", data__max_rejects=1.0, train__checkpoint_every=100, **how)
        write_settings(str(folder / "one.json"), settings)
        # There is a second corrupt one here: a missing one is found before the first update.
        (folder / "images" / f"row{MISSING}.png").write_bytes(b"")
        stopped = run(["none"] * 2, folder / "one.json", folder / "one", folder / "one.log")
        (folder / "images" / f"row{MISSING}.png").unlink()
        both = run(["numbers"] * 2, folder / "two.json", folder / "two", folder / "two.log")
        (losses, rows), (other_losses, other_rows) = map(updates, both)
        found, steps = named(folder / "two"), sorted(int(path.name) for path in (folder / "one/checkpoints").iterdir())
        figures = {
            "ended": [trainer.code() for trainer in both],
            "rejected": found,
            "accepted": len({*rows, *other_rows}),
            "read twice": len(rows) + len(other_rows) - len({*rows, *other_rows}),
            "losses that differ": sum(a != b for a, b in zip(losses, other_losses, strict=True)),
            "updates": len(losses),
            "ended past the budget": [trainer.code() for trainer in stopped],
            "saved past the budget": steps,
            "said past the budget": [line for trainer in stopped for line in trainer.lines() if "error:" in line],
        }
    print(json.dumps(figures, indent=1))
    is_right = (
        figures["ended"] == [0, 0]
        and sorted(found) == [CORRUPT, MISSING]
        and figures["accepted"] + len(found) == ROWS
        and figures["read twice"] == figures["losses that differ"] == 0
        and figures["updates"] == ROWS // 8
        and figures["ended past the budget"] == [2, 2]
        and steps == [100]
    )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
