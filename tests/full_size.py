"""A data set of full size through what `train` does before its first update; and a run that is killed and continues.

`python -m tests.full_size --rows=665000 --folder=DIR` makes the rows (once), then starts twice, in processes of their
own: from nothing, and again with what the first start has kept. Each start opens the rows, checks them, plans the
batches, fetches the first batch and says how long each took and what was resident. A third process is killed with
SIGKILL after `--batches` batches, the next one resumes from there, and their rows are held against the plan.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from llava_jax.data.packing import BatchPlan
from llava_jax.data.pipeline import BatchIterator, make_pipeline
from llava_jax.data.records import load_records
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.data.validate import check_once, plan_once
from llava_jax.types import UNPACKED, DataSettings

TOKENIZER = str(pathlib.Path(__file__).parent.parent / "llava_jax" / "demo" / "backbones" / "llama")
WORDS = (
    "a red dog stands near the old bench in quiet street while two people with large white boats walk between".split()
)
IMAGE_ID, PATCHES, SIZE = 32000, 16, 56


def make_rows(folder: pathlib.Path, count: int) -> str:
    """Writes rows.json (about 550 bytes a row) and a few images; returns the path of the rows."""
    path, images = folder / "rows.json", folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(16):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(images / f"{n}.jpg")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=k)).capitalize() + "." for k in (4, 12, 25, 60) for _ in range(200)]
    with open(path, "w", encoding="utf-8") as file:
        for row in range(count):
            said = [
                text
                for _ in range(draw.choice((1, 1, 2, 3)))
                for text in (draw.choice(texts[:400]), draw.choice(texts))
            ]
            speakers = ("human", "gpt") * (len(said) // 2)
            turns = [{"from": who, "value": text} for who, text in zip(speakers, said, strict=True)]
            content = {"id": f"{row}", "conversations": turns}
            if row % 16:  # every sixteenth without an image
                turns[0]["value"] = f"<image>\n{turns[0]['value']}"
                content["image"] = f"{row % 7}.jpg"
            file.write(("[" if row == 0 else ",\n") + json.dumps(content))
        file.write("]\n")
    return str(path)


def settings_of(folder: pathlib.Path, workers: int, pack: bool) -> DataSettings:
    changes = UNPACKED | dict(workers=workers, pack=pack)
    return DataSettings(f"{folder}/rows.json", f"{folder}/images", "v1", "front", "pad", 512, shuffle=True, **changes)


def reading(settings: DataSettings, annotations: str) -> DataSettings:
    """The same settings with rows from elsewhere."""
    return dataclasses.replace(settings, annotations=annotations)


def open_batches(settings: DataSettings, batch: int) -> tuple[BatchIterator, BatchPlan, dict[str, float]]:
    """What `train` does with its data before the first batch, and the seconds of each part."""
    seconds, began = {}, time.monotonic()

    def done(name: str) -> None:
        nonlocal began
        seconds[name] = round(time.monotonic() - began, 2)
        began = time.monotonic()

    tokenizer = load_tokenizer(TOKENIZER)
    done("tokenizer")
    records = load_records(settings.annotations)
    done("index")
    checked = check_once(records, settings, tokenizer, patches=PATCHES)
    checked.require_clean()
    done("check")
    steps = -(-len(records) // batch)
    sizes = dict(batch_size=batch, row_multiple=8, steps=steps, seed=0)
    plan = plan_once(records, checked, settings, **sizes)
    done("plan")
    model = dict(image_size=SIZE, patches=PATCHES, image_token_id=IMAGE_ID)
    return make_pipeline(records, settings, tokenizer, plan, **model), plan, seconds


def start(args: argparse.Namespace) -> None:
    """One start, in this process; what it saw is a line of JSON."""
    began = time.monotonic()
    data, plan, seconds = open_batches(settings_of(args.folder, args.workers, args.pack), args.batch)
    seconds["all"] = round(time.monotonic() - began, 2)
    if args.start_at:
        data.set_state({"batches": args.start_at})
    began = time.monotonic()
    rows = [next(data).rows_BM]
    seconds["first batch"] = round(time.monotonic() - began, 2)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "peak_gb": memory}), flush=True)
    expected = sorted(np.concatenate([plan.order_UC[args.start_at]]).tolist())
    print(json.dumps({"rows": sorted(rows[0][rows[0] >= 0].tolist()), "expected": expected}), flush=True)
    for delivered in range(args.start_at + 2, args.start_at + args.batches + 1):
        next(data)
        print(json.dumps({"delivered": delivered}), flush=True)
    if args.wait:
        signal.pause()
    data.close()


def play(args: argparse.Namespace, **changes: object) -> subprocess.Popen:
    given = vars(args) | changes
    words = [f"--{name}={value}" for name, value in given.items() if name not in ("pack", "wait") and value is not None]
    words += [f"--{name}" for name in ("pack", "wait") if given[name]]
    command = [sys.executable, "-m", "tests.full_size", *words, "--inside=1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def show(args: argparse.Namespace) -> dict:
    """The whole show; raises AssertionError where a start reads other rows than the plan says."""
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "rows.json").exists():
        make_rows(args.folder, args.rows)
    os.environ["LLAVA_JAX_CACHE"] = str(args.folder / "cache")
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    figures = {"rows": args.rows, "bytes": (args.folder / "rows.json").stat().st_size, "load": os.getloadavg()[0]}
    for name in ("first start", "restart"):
        began = time.monotonic()
        process = play(args, batches=1, start_at=0, wait=False)
        lines = [json.loads(line) for line in process.communicate()[0].splitlines()]
        assert process.returncode == 0 and lines[1]["rows"] == lines[1]["expected"]
        figures[name] = lines[0] | {"process_seconds": round(time.monotonic() - began, 2)}
    process = play(args, start_at=0, wait=True)
    delivered = 1
    while delivered < args.batches:
        delivered = max(delivered, json.loads(process.stdout.readline()).get("delivered", 0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = play(args, batches=1, start_at=delivered, wait=False)
    lines = [json.loads(line) for line in process.communicate()[0].splitlines()]
    assert lines[1]["rows"] == lines[1]["expected"]
    figures["after the kill"] = {"at_batch": delivered, "rows_as_planned": len(lines[1]["rows"])}
    return figures


def flags_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=665_000)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="rows, images and what is kept lie here")
    parser.add_argument("--workers", type=int, default=2, help="data.workers")
    parser.add_argument("--batch", type=int, default=128, help="train.batch_size")
    parser.add_argument("--batches", type=int, default=5, help="delivered before the kill")
    parser.add_argument("--pack", action="store_true", help="data.pack")
    parser.add_argument("--start_at", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = flags_of()
    if given.inside:
        start(given)
    else:
        print(json.dumps(show(given), indent=1))
