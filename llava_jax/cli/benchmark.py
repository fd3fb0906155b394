"""The commands that measure: benchmark train, generate and data, alone or next to transformers and PyTorch."""

import argparse
import os
from collections.abc import Mapping
from typing import Any

from llava_jax.benchmark.compare import OURS, PEER, find_peer_python, measure
from llava_jax.benchmark.worker import PICTURE_BATCH, ROW_BATCH
from llava_jax.cli.flags import announce, check_least, check_output
from llava_jax.io import write_json
from llava_jax.parallel.chips import CHIP_OF_KIND
from llava_jax.types import InputError

STAGES = ("pretrain", "finetune")
# (rows, tokens of a row, supervised tokens of a row): captions are short, conversations are not.
SHAPES = {
    ("tiny", "pretrain"): (2, 48, 8),
    ("tiny", "finetune"): (2, 48, 16),
    ("small", "pretrain"): (8, 192, 24),
    ("small", "finetune"): (4, 512, 180),
    ("7b", "pretrain"): (16, 640, 40),
    ("7b", "finetune"): (8, 1024, 200),
}
# Image tokens of an image.
PATCHES = {"tiny": 16, "small": 144, "7b": 576}
# What a side computes in: 7b is for a GPU. `remat` is our train.remat: `minimal` keeps what matrix products and
# attention give; elementwise operations and attention scores are computed again (the scores are in PyTorch as well).
# `full` goes with gradient checkpointing of every block on the other side (`checkpointing`).
ON_CPU = dict(dtype="float32", remat="minimal", checkpointing=False, compiled=False, weights=True)
ON_GPU = dict(dtype="bfloat16", remat="full", checkpointing=True, compiled=True, weights=False)
HOW = {"small": ON_CPU, "7b": ON_GPU, "tiny": ON_CPU}
PEER_NAME = "transformers + PyTorch"


def common_flags(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--peer", action="store_true", help="the same work by transformers and PyTorch, taken in turns")
    parser.add_argument("--peer_python", metavar="PYTHON", help="the Python that has them (this, or .venv-parity's)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each side; medians are shown ({rounds})")
    parser.add_argument("--core", type=int, help="pin both to this core, -1: to none (7b: none, else the last one)")
    parser.add_argument("--json", metavar="FILE", help="written: the figures of each side and their ratio")


def model_flags(parser: argparse.ArgumentParser) -> None:
    size = "small: 39 M, float32; tiny: shows that it runs; 7b: bfloat16, for a GPU"
    parser.add_argument("--size", choices=tuple(HOW), default="small", help=size)
    parser.add_argument("--rows", type=int, help="rows of the batch")
    parser.add_argument("--length", type=int, help="tokens of a row, those of its image included")
    parser.add_argument("--compiler_options", default="none", help="as train.compiler_options: none, tuned, or k=v,k=v")


def train_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", choices=("both", *STAGES), default="both", help="the stage or stages (both)")
    model_flags(parser)
    parser.add_argument("--steps", type=int, default=2, help="updates of a turn (2)")
    common_flags(parser, rounds=7)


def train(args: argparse.Namespace) -> int:
    stages = STAGES if args.stage == "both" else (args.stage,)
    check_least(args, 1, "rows", "length", "steps", "rounds")
    peer, core = sides(args, args.size)
    results = {}
    for stage in stages:
        rows, length, targets = SHAPES[args.size, stage]
        work = model_work(args, core, rows, length, targets)
        work |= dict(job="train", stage=stage, steps=args.steps, lr=1e-4)
        announce_work(f"benchmark train, {stage}", args, work, peer, f"{args.rounds} turns of {args.steps} updates")
        results[stage] = measure(work, args.rounds, peer)
        print_train(work, results[stage])
    return write_figures(args, {"command": "train", "size": args.size, "stages": results}, results.values())


def generate_flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument("--new_tokens", type=int, default=64, help="ids of each answer, 2 or more (64)")
    common_flags(parser, rounds=5)


def generate(args: argparse.Namespace) -> int:
    check_least(args, 1, "rows", "length", "rounds")
    check_least(args, 2, "new_tokens")
    peer, core = sides(args, args.size)
    length = {"tiny": 32, "small": 192, "7b": 640}[args.size]
    work = model_work(args, core, 4, length, targets=0) | dict(job="generate", new_tokens=args.new_tokens)
    announce_work("benchmark generate", args, work, peer, f"{args.rounds} turns, greedy, {args.new_tokens} ids a row")
    result = measure(work, args.rounds, peer)
    for side in (result[name] for name in (OURS, PEER) if name in result):
        side["further_token"] = further(side, args.new_tokens)
    print_table(
        result,
        ("tokens a second", lambda side: f"{work['rows'] / side['token']:.1f}"),
        ("seconds to the first", lambda side: f"{side['first_token']:.3f}"),
        ("ms to each further one", lambda side: f"{1000 * side['further_token']:.1f}"),
    )
    return write_figures(args, {"command": "generate", "size": args.size, **result}, [result])


def further(side: dict[str, Any], new_tokens: int) -> float:
    """Return the seconds from one id of a row to the next, without those to the first."""
    return (side["token"] * new_tokens - side["first_token"]) / (new_tokens - 1)


def data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=32, help="JPEGs of 640 x 480 that are made and read (32)")
    parser.add_argument("--side", type=int, default=336, help="side of the square the model sees (336)")
    parser.add_argument("--rows", type=int, default=2048, help="conversations that are tokenised and packed (2048)")
    common_flags(parser, rounds=7)


def data(args: argparse.Namespace) -> int:
    check_least(args, 1, "images", "side", "rows", "rounds")
    for name, batch in (("images", PICTURE_BATCH), ("rows", ROW_BATCH)):
        if getattr(args, name) % batch:
            raise InputError(f"--{name}={getattr(args, name)}: expected whole batches, a multiple of {batch}")
    peer, core = sides(args, "small")
    work = dict(job="data", count=args.images, size=args.side, rows=args.rows, core=core)
    images = f"{args.images} JPEGs of 640 x 480 to {args.side} x {args.side}, padded, in batches"
    announce("benchmark data", images=images, rows=args.rows, turns=args.rounds, **where(core, peer))
    result = measure(work, args.rounds, peer)
    print_table(result, ("images per CPU second", lambda side: f"{1 / side['image']:.1f}"))
    ours = result["ours"]
    print(f"  tokenise and pack: {1 / ours['row']:,.0f} rows of {ours['row_tokens']:.0f} tokens per CPU second")
    # As many batches as images: each image as often as a batch has places.
    work = dict(job="scaling", count=args.images, size=args.side, batches=args.images, core=None)
    scaled = measure(work, args.rounds, None)["ours"]
    one, two, ratio = 1 / scaled["workers_1"], 1 / scaled["workers_2"], scaled["ratio"]
    print(f"  workers: {one:.1f} images a second from one, {two:.1f} from two, {ratio:.2f} times as many")
    scaling = {"one": one, "two": two, "ratio": ratio, "load": os.getloadavg()[0]}
    return write_figures(args, {"command": "data", **result, "scaling": scaling}, [result])


# ---- what the three share -------------------------------------------------------------------------------------------


def sides(args: argparse.Namespace, size: str) -> tuple[str | None, int | None]:
    """Return (Python of the peer or None, core both are pinned to or None). Raises InputError."""
    check_output("--json", args.json)
    if args.peer_python and not args.peer:
        raise InputError("--peer_python without --peer: add --peer, or leave it out")
    peer = find_peer_python(args.peer_python) if args.peer else None
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if args.core is None:
        return peer, cores[-1] if cores and size != "7b" else None
    if args.core != -1 and args.core not in cores:
        raise InputError(f"--core={args.core}: this process may use {', '.join(map(str, cores)) or 'none by number'}")
    return peer, None if args.core == -1 else args.core


def model_work(args: argparse.Namespace, core: int | None, rows: int, length: int, targets: int) -> dict[str, Any]:
    """Return what train and generate both do; `rows` and `length` where no flag says. Raises InputError."""
    how, patches, length = HOW[args.size], PATCHES[args.size], args.length or length
    least = patches + targets + 2
    if length < least:
        needed = f"for an image of {patches} tokens and {targets} supervised ones"
        raise InputError(f"--length={length}: expected {least} or more, {needed}")
    shape = dict(rows=args.rows or rows, length=length, targets=targets, param_dtype=how["dtype"])
    return dict(size=args.size, core=core, compiler_options=args.compiler_options, **shape, **how)


def where(core: int | None, peer: str | None) -> dict[str, str]:
    """Return what is announced of the machine and of the other side."""
    return {
        "core": "not pinned" if core is None else f"{core}, the only one of each side",
        "peer": f"{PEER_NAME} of {peer}, in turns with ours" if peer else "none (--peer)",
    }


def announce_work(title: str, args: argparse.Namespace, work: Mapping[str, Any], peer: str | None, turns: str) -> None:
    announce(
        title,
        model=f"{args.size}, random weights, {work['dtype']}",
        remat=work["remat"] if work["job"] == "train" else "",
        batch=f"{work['rows']} rows of {work['length']} tokens, an image each",
        turns=turns,
        compiler_options="" if args.compiler_options == "none" else args.compiler_options,
        **where(work["core"], peer),
    )


def print_train(work: Mapping[str, Any], result: dict[str, Any]) -> None:
    chip = CHIP_OF_KIND.get(result["ours"]["device"])
    for side in result.values():
        if isinstance(side, dict):
            side["tokens_per_second"] = work["rows"] * work["length"] / side["step"]
            side["model_flops_per_second"] = result["ours"]["model_flops"] / side["step"]
            side["mfu"] = side["model_flops_per_second"] / chip.peak_flops if chip else None
    print_table(
        result,
        ("seconds an update", lambda side: f"{side['step']:.3f}"),
        ("tokens a second", lambda side: f"{side['tokens_per_second']:.0f}"),
        ("model GFLOP/s", lambda side: f"{side['model_flops_per_second'] / 1e9:.1f}"),
        *([("MFU", lambda side: f"{side['mfu']:.1%}")] if chip else []),
    )


def print_table(result: Mapping[str, Any], *lines: tuple) -> None:
    """Print a line a figure, a column a side."""
    columns = {"ours": result[OURS]} | ({PEER_NAME: result[PEER]} if PEER in result else {})
    memory = ("peak memory, MB", lambda side: f"{side.get('device_bytes', side['peak_bytes']) / 1e6:.0f}")
    print(" " * 24 + "".join(f"{name:>24}" for name in columns))
    for name, show in (*lines, memory):
        print(f"  {name:<22}" + "".join(f"{show(side):>24}" for side in columns.values()))
    if "ratio" in result:
        low, high = min(result["ratios"]), max(result["ratios"])
        print(f"  ratio {result['ratio']:.2f} (single rounds {low:.2f} to {high:.2f}); {result['same']}")
    print(flush=True)


def write_figures(args: argparse.Namespace, figures: dict[str, Any], results: Any) -> int:
    """Write `--json`; its `ratio` is the smallest of the results."""
    ratios = [result["ratio"] for result in results if "ratio" in result]
    if args.json:
        write_json(args.json, {**figures, "ratio": min(ratios) if ratios else None})
    return 0
