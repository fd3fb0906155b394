"""`compile`: its flags, the environment that libtpu needs, and what is printed and written."""

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from llava_jax.cli.flags import announce, check_output
from llava_jax.io import replacing, write_json
from llava_jax.types import InputError, Settings

if TYPE_CHECKING:
    from llava_jax.aot.target import Target

# Read when libtpu is loaded: it looks for no machine and shares its lock; jax looks for no chip, and what is written
# about source files holds no folders. The type of the accelerator is that of no machine: the topology says what counts.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX": ".*/",
}


def compile_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", metavar="CHIP:SIZES", help="v5e:8x8, v7x:2x2x1, h100:8, …; else what is here")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology, joined by the network (1)")
    parser.add_argument("--json", metavar="FILE", help="written: all figures")
    parser.add_argument("--hlo", metavar="FILE", help="written: the compiled program")
    parser.add_argument("--rows", type=int, metavar="N", help="conversations of the data set, for the hours it takes")
    length = "their mean length, image tokens included: packed rows"
    parser.add_argument("--tokens_per_row", type=float, metavar="N", help=length)
    sweep, what = (
        parser.add_argument_group("try several"),
        "batch x remat x mesh; prints a table and the best that fits",
    )
    sweep.add_argument("--sweep", action="store_true", help=what)
    sweep.add_argument("--sweep_rows", metavar="N,N", help="rows per chip (2,4,8)")
    sweep.add_argument("--sweep_remat", metavar="R,R", help="values of train.remat (full,minimal)")
    sweep.add_argument("--sweep_mesh", metavar="DxFxT,…", help="data x fsdp x tensor (all, half, the config's)")
    parser.add_argument_group("config").description = (
        "--config=FILE[:arg]      as for `train`, with its --config.KEY=VALUE; folders of weights, tokenizer and data\n"
        "                         need not be there: random:NAME or random:FILE.json gives the sizes"
    )


def compile_(args: argparse.Namespace) -> int:
    """Return exit code 1 when the step does not fit (with --sweep: when none does)."""
    check_flags(args)
    settings, rows = unpacked_without_lengths(args.settings(), args.tokens_per_row)
    if args.topology:
        os.environ.update(ENVIRONMENT)
    # Only now: jax reads the environment when it is imported.
    from llava_jax.aot.target import local_target, named_target

    target = named_target(args.topology, args.slices) if args.topology else local_target()
    train = settings.train
    announce(
        "compile",
        config=" ".join(args.passed),
        target=f"{target.name}, {len(target.devices)} chips" + (f", {target.slices} slices" * (target.slices > 1)),
        stage=settings.stage,
        batch=f"{train.batch_size} conversations an update, accumulate {train.accumulate}, remat {train.remat}",
        rows=rows,
        options=f"compiler options {train.compiler_options}, attention {train.attention}",
    )
    return sweep(args, settings, target) if args.sweep else single(args, settings, target)


def unpacked_without_lengths(settings: Settings, tokens_per_row: float | None) -> tuple[Settings, str]:
    """Return the settings, and what is compiled of the rows: packed ones only where their mean length is known.

    A config that packs says nothing of lengths, which `train` reads from the data.
    """
    data = settings.data
    if data.pack and (tokens_per_row or data.pack_length or data.pack_images):
        return settings, "packed"
    hint = "; --tokens_per_row=N compiles packed ones" if data.pack else ""
    data = dataclasses.replace(data, pack=False)
    return dataclasses.replace(settings, data=data), f"one conversation of {data.max_length} tokens each{hint}"


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags that do not go together, and files that could not be written after a long compile."""
    if args.slices < 1 or (args.slices > 1 and not args.topology):
        raise InputError(f"--slices={args.slices}: expected 1 or more slices of a --topology")
    for name in ("rows", "tokens_per_row"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name}={value}: expected a number above 0")
    check_output("--json", args.json)
    check_output("--hlo", args.hlo)
    if args.sweep and args.hlo:
        raise InputError("--sweep compiles many programs: give --hlo to a run without it")
    if not args.sweep and (args.sweep_rows or args.sweep_remat or args.sweep_mesh):
        raise InputError("--sweep_rows, --sweep_remat and --sweep_mesh need --sweep")


def single(args: argparse.Namespace, settings: Settings, target: "Target") -> int:
    from llava_jax.aot import compile, report

    lowered = compile.lower(settings, target, args.tokens_per_row)
    shape = lowered.shape
    print(
        f"{shape.rows} rows of {shape.length} tokens and {shape.images} images, "
        f"attention {lowered.run.config.attention}, lowered in {lowered.seconds:.1f} s; compiling …",
        flush=True,
    )
    figures, text = compile.compile_plan(lowered)
    if args.rows:
        figures |= report.data_set(figures, args.rows, settings.train.epochs, settings.train.steps)
    if figures["step_seconds"] is not None:
        figures["calibration"] = report.CALIBRATION
    print(f"compiled in {figures['compile_seconds']:.1f} s\n")
    print(report.report(figures))
    write_figures(args.json, figures)
    if args.hlo and text:
        with replacing(args.hlo) as file:
            file.write(text)
        print(f"program written to {args.hlo}")
    elif args.hlo:
        print(f"{args.hlo} has no program to write: the step does not fit")
    return 1 if figures["fits"] is False else 0


def sweep(args: argparse.Namespace, settings: Settings, target: "Target") -> int:
    from llava_jax.aot import report, sweep

    grid = sweep.parse_grid(args.sweep_rows, args.sweep_remat, args.sweep_mesh, settings, target)
    count = len(grid.rows) * len(grid.remats) * len(grid.meshes)
    print(f"{count} program{'s' * (count > 1)}, a minute or two each for a 7B on TPUs; tokens a second are estimates\n")
    print(report.sweep_head(), flush=True)
    done = []
    for figures in sweep.plans(settings, target, grid, args.tokens_per_row):
        if args.rows and "skipped" not in figures:
            figures |= report.data_set(figures, args.rows, settings.train.epochs, settings.train.steps)
        print(report.sweep_line(figures), flush=True)
        done.append(figures)
    chosen = report.best(done)
    print("\n" + report.sweep_end(done, chosen))
    write_figures(args.json, {"plans": done, "best": chosen})
    return 1 if all(figures["fits"] is False for figures in done if "skipped" not in figures) else 0


def write_figures(path: str | None, figures: dict[str, Any]) -> None:
    if path:
        write_json(path, figures)
        print(f"figures written to {path}")
