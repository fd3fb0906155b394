"""The plans that docs/notes/compile_plans.md shows and that CI holds against growth; one command makes them again.

python -m tests.plan_baseline                 every plan compiled again (1-3 minutes each), stored, with the table
python -m tests.plan_baseline NAME NAME       only these
python -m tests.plan_baseline --table         only the table, from what is stored
python -m tests.plan_baseline --check         CI: the two of CHECKED, compiled only when their program changed
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from llava_jax.cli.compile import ENVIRONMENT

ROOT = pathlib.Path(__file__).parent.parent
STORED = ROOT / "tests" / "data" / "plan"
PAGE = ROOT / "docs" / "notes" / "compile_plans.md"
MARKERS = ("<!-- plan table -->", "<!-- /plan table -->")

ROWS = {"pretrain": 558_128, "finetune": 665_298}
DECODER_34B = "tests/data/plan/decoder_34b.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One plan: what the table calls it, and the arguments of `compile`."""

    title: str
    argv: tuple[str, ...]


def entry(title: str, size: str, stage: str, topology: str, *more: str, llm: str = "") -> Entry:
    config = f"--config=configs/llava_v1_5.py:size={size},stage={stage}"
    towers = (f"--config.model.llm={llm or f'random:vicuna-{size}'}", "--config.model.vision=random:clip-l-14-336")
    # One conversation a row, unless `more` packs them.
    given = (config, *towers, "--config.data.pack=False", f"--topology={topology}", f"--rows={ROWS[stage]}")
    return Entry(title, (*given, *more))


def published() -> dict[str, Entry]:
    """Both stages of both sizes at the published global batch and length."""
    return {
        f"{size}-{stage}-{topology.replace(':', '-')}": entry(f"{size.upper()} {stage}", size, stage, topology)
        for topology in ("v5e:8x8", "v5p:4x4x4", "v6e:4x4")
        for size in ("7b", "13b")
        for stage in ("pretrain", "finetune")
    }


def small_and_large() -> dict[str, Entry]:
    """The fewest chips for float32 master weights, a 34B decoder, and two slices."""
    few = ("--config.train.moment_dtype=bfloat16", "--config.train.batch_size=16")
    return {
        "7b-finetune-v5e-2x4": entry(
            "7B finetune, float32 master, bfloat16 moments, batch 16", "7b", "finetune", "v5e:2x4", *few
        ),
        "7b-finetune-v5p-2x2x1": entry("7B finetune, float32 master and moments", "7b", "finetune", "v5p:2x2x1"),
        "34b-finetune-v5p-8x8x8": entry(
            "34B decoder finetune, batch 512",
            "7b",
            "finetune",
            "v5p:8x8x8",
            "--config.train.batch_size=512",
            llm=f"random:{DECODER_34B}",
        ),
        "7b-finetune-2-v5e-16x16": entry(
            "7B finetune, two slices, batch 512",
            "7b",
            "finetune",
            "v5e:16x16",
            "--slices=2",
            "--config.mesh.data=2",
            "--config.train.batch_size=512",
        ),
    }


def tuned(stage: str, topology: str) -> tuple[str, tuple[str, ...]]:
    """How the tuned plans are called, and what they are compiled with next to a batch and train.remat."""
    options = "--config.train.compiler_options=tuned"
    if stage == "finetune" and topology == "v5e:8x8":
        return ", tuned, hierarchical reduce-scatter", (options, "--config.mesh.fsdp_inner=8")
    return ", tuned", (options,)


def four_rows() -> dict[str, Entry]:
    """4 rows of 2048 per chip, without compiler options and with the chip's tuned ones."""
    found = {}
    for size, stage, topology, chips, remat in (
        ("7b", "finetune", "v5e:8x8", 64, "attention+v"),
        ("7b", "finetune", "v5p:4x4x4", 64, "minimal"),
        ("7b", "finetune", "v6e:4x4", 16, "attention+q+k+v+residual+up"),
        ("13b", "finetune", "v5e:8x8", 64, "full"),
        ("7b", "pretrain", "v5e:8x8", 64, "attention+gate"),
    ):
        for options in ("none", "tuned"):
            how, more = tuned(stage, topology) if options == "tuned" else ("", ())
            title = f"{size.upper()} {stage}, 4 rows per chip{how}"
            name = f"{size}-{stage}-{topology.replace(':', '-')}-4rows-{options}"
            flags = (f"--config.train.batch_size={4 * chips}", f"--config.train.remat={remat}")
            found[name] = entry(title, size, stage, topology, *flags, *more)
    only = (
        "--config.train.batch_size=256",
        "--config.train.remat=attention+v",
        "--config.train.compiler_options=tuned",
    )
    title = "7B finetune, 4 rows per chip, tuned"
    found["7b-finetune-v5e-8x8-4rows-one-sum"] = entry(title, "7b", "finetune", "v5e:8x8", *only)
    return found


def packed() -> dict[str, Entry]:
    """7B on v5e 8x8, packed, for its hours: the shapes that train chooses for lengths like the published data's.

    Lengths are assumed (the data is not here): 558,128 captions of 598 tokens and 665,298 conversations of 864 tokens
    on average, image tokens included, the longest 726 and 2,048.
    """
    found = {}
    for stage, batch, tokens, length, images, remat, mesh in (
        ("pretrain", 256, 598, 2560, 4, "minimal+down_weight", ""),
        ("finetune", 512, 864, 3584, 4, "attention", "fsdp_inner=8"),
        ("finetune", 1024, 864, 3584, 4, "full", "fsdp_inner=8"),
    ):
        flags = ("--config.data.pack=True", f"--tokens_per_row={tokens}", f"--config.train.batch_size={batch}")
        flags += (f"--config.data.pack_length={length}", f"--config.data.pack_images={images}")
        flags += (f"--config.train.remat={remat}", "--config.train.compiler_options=tuned")
        flags += (f"--config.mesh.{mesh}",) * bool(mesh)
        how = {"": "", "fsdp_inner=8": ", hierarchical reduce-scatter"}[mesh]
        title = f"{stage} of {batch} conversations, packed, tuned{how}"
        found[f"7b-{stage}-v5e-8x8-packed-{batch}"] = entry(f"7B {title}", "7b", stage, "v5e:8x8", *flags)
    return found


ENTRIES = {**published(), **small_and_large(), **four_rows(), **packed()}
CHECKED = ("7b-finetune-v5e-8x8", "7b-pretrain-v5e-8x8")
# Of no use for a comparison, and different with every run.
DROPPED = ("costliest", "largest_buffers", "compile_seconds", "lower_seconds", "unknown", "calibration")
GROWTH = {"peak_bytes": 0.01, "step_seconds": 0.02, "wire_bytes": 0.01}
EMPTY = ("score_buffers", "logit_buffers", "float32_collectives")


def stored(name: str) -> dict | None:
    path = STORED / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def make(name: str) -> None:
    """Compiles one plan with the command itself and stores its figures. CalledProcessError when it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "compile.json"
        argv = [sys.executable, "-m", "llava_jax", "compile", *ENTRIES[name].argv, f"--json={path}"]
        subprocess.run(argv, cwd=ROOT, check=True)
        store(name, json.loads(path.read_text(encoding="utf-8")))


def store(name: str, figures: dict) -> None:
    STORED.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in figures.items() if key not in DROPPED}
    (STORED / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def grown(figures: dict, before: dict) -> list[str]:
    """What is worse than what is stored, and what a program must never hold: one line each."""
    lines = [
        f"{key}: {figures.get(key)}, stored {before[key]}, at most {100 * share:g} % more"
        for key, share in GROWTH.items()
        if figures.get(key) is None or figures[key] > before[key] * (1 + share)
    ]
    lines += [f"{key}: {', '.join(figures[key])}" for key in EMPTY if figures.get(key)]
    if not figures.get("donated_whole"):
        lines.append(f"donated {figures.get('donated_bytes')} bytes of a state of {figures['state_bytes']}")
    if figures.get("unknown_loops"):
        lines.append(f"{figures['unknown_loops']} loops of unknown length: the time is too short")
    return lines if figures["fits"] else [*lines, "does not fit"]


def check(name: str) -> list[str]:
    """Lines about what grew; compiles only when the lowered program is not the stored one. Run in ENVIRONMENT."""
    from llava_jax.aot import compile as ahead
    from llava_jax.aot import target
    from llava_jax.cli.main import split_passed
    from llava_jax.cli.train import load_settings

    before = stored(name)
    if before is None:
        return [f"{name}: nothing stored, run python -m tests.plan_baseline {name}"]
    passed, _ = split_passed(ENTRIES[name].argv, "--config")
    lowered = ahead.lower(load_settings(passed), target.named_target(before["topology"]))
    if lowered.hash == before["program_sha256"]:
        print(f"{name}: program unchanged")
        return []
    figures, _ = ahead.compile_plan(lowered)
    seconds = figures["compile_seconds"]
    print(f"{name}: program changed, compiled in {seconds:.0f} s; python -m tests.plan_baseline {name} stores it")
    return [f"{name}: {line}" for line in grown(figures, before)]


# ---- the table --------------------------------------------------------------------------------------------------


def table() -> str:
    """Markdown of every stored plan, in the order of ENTRIES."""
    lines = [
        "| plan | chips | rows per chip | remat | GiB per chip: arguments + temporaries, peak of HBM "
        "| est. step | est. MFU | est. hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [row(ENTRIES[name].title, figures) for name in ENTRIES if (figures := stored(name)) is not None]
    return "\n".join(lines)


def row(title: str, figures: dict) -> str:
    gib = {key: figures[key] / 2**30 for key in ("argument_bytes", "temporary_bytes", "peak_bytes", "hbm_bytes")}
    held = f"{gib['argument_bytes']:.1f} + {gib['temporary_bytes']:.1f}"
    memory = f"{held}, {gib['peak_bytes']:.1f} of {gib['hbm_bytes']:.1f}"
    slices = f"{figures['slices']} x " if figures["slices"] > 1 else ""
    cells = (
        title,
        f"{slices}{figures['topology']}",
        f"{figures['rows'] / figures['chips']:g} x {figures['length']}",
        figures["remat"],
        memory,
        f"{1000 * figures['step_seconds']:,.0f} ms",
        f"{100 * figures['mfu']:.1f} %",
        f"{figures['hours']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def write_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise SystemExit(f"{PAGE.name}: expected {MARKERS[0]} and {MARKERS[1]} once each")
    head, rest = text.split(MARKERS[0])
    tail = rest.split(MARKERS[1])[1]
    PAGE.write_text(f"{head}{MARKERS[0]}\n{table()}\n{MARKERS[1]}{tail}", encoding="utf-8")


def main(argv: list[str]) -> int:
    if argv == ["--check"]:
        os.environ.update(ENVIRONMENT)
        with contextlib.chdir(ROOT):
            found = [line for name in CHECKED for line in check(name)]
        print("\n".join(found))
        return 1 if found else 0
    names = [] if argv == ["--table"] else argv or ENTRIES
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        print(f"{unknown[0]}: no such plan; there are {', '.join(ENTRIES)}")
        return 2
    for name in names:
        make(name)
    write_table()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
