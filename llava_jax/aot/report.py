"""Text of `compile`: figures with their error, what to change where a plan does not fit, hours for a data set."""

from typing import Any

from llava_jax.data.packing import steps_for
from llava_jax.parallel.chips import GIB, GPU_FRACTION
from llava_jax.parallel.sharding import SIZES
from llava_jax.settings import REMATS
from llava_jax.types import WEIGHT_NAMES

Figures = dict[str, Any]

# Same shapes and published settings, compiled and priced as here, against the MFU their authors measured.
CALIBRATION = {
    "relative_errors": {
        "MaxText 16B, 256 v5e": [-0.028],
        "MaxText Llama2-70B, 64 v5p chips": [-0.078],
        "MaxText Llama3.1-8B, 256 v6e": [-0.056, 0.075],
    },
    "relative_error": 0.08,
    "cases": 3,
    "confirmed_on_hardware": False,
}
CALIBRATION_LINE = (
    "take it as ±8 %: against three published MaxText results it was off by -3 %, -8 % and between -6 and +8 % "
    "(n = 3; not confirmed on hardware by us)"
)
ABSENT_GPU_LINE = (
    "arguments are exact; temporaries are those of XLA's GPU compiler with cuBLAS for every matmul, where a GPU tries "
    f"other kernels; not compared with a run. The chip's memory is {GPU_FRACTION:.0%} of the card's, as `train` asks "
    "(XLA_PYTHON_CLIENT_MEM_FRACTION); CUDA and NCCL have the rest"
)
OPTIONS_LINE = (
    "compiler options rest on the compiler's own model of its programs; their gain is not confirmed on hardware"
)
HOST_NETWORK = 100e9 / 8 / 4  # bytes a second and chip
PARTS = {
    "matmul": "matmuls",
    "vector": "elementwise",
    "copy": "layout copies",
    "kernels": "attention kernels",
    "communication_exposed": "exposed communication",
    "dma_exposed": "exposed copies from HBM",
}


def report(figures: Figures) -> str:
    """Return the figures of one plan as text."""
    return "\n".join([*_parameters(figures), *_memory(figures), *_time(figures), *_data_set(figures)])


def _line(name: str, text: str) -> str:
    return f"{name:<26}{text}"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _parameters(figures: Figures) -> list[str]:
    parts = ", ".join(f"{part} {count:,}" for part, count in figures["parameters_by_part"].items())
    dtypes = figures["dtypes"]
    kinds = f"trained {dtypes['param_dtype']}, moments {dtypes['moment_dtype']}, frozen {dtypes['frozen_dtype']}"
    return [
        _line("parameters", f"{figures['parameters']:,} ({parts})"),
        _line("trainable", f"{figures['trainable']:,} in {figures['stage']}; {kinds}"),
    ]


def _memory(figures: Figures) -> list[str]:
    state = f"state {gib(figures['state_bytes'])}, frozen {gib(figures['frozen_bytes'])}"
    lines = [_line("memory of a chip", _known(figures, "hbm_bytes", gib))]
    if figures["argument_bytes"] is None:
        lines.append(_line("  arguments", state))
    else:
        lines.append(_line("  arguments", f"{gib(figures['argument_bytes'])} ({state}, and the batch)"))
        lines.append(_line("  temporaries", gib(figures["temporary_bytes"])))
        if figures.get("workspace_bytes"):
            lines.append(_line("  cuDNN's workspace", f"{gib(figures['workspace_bytes'])}, estimated"))
    peak = gib(figures["peak_bytes"])
    if figures["fits"]:
        peak += f": fits, {gib(figures['hbm_bytes'] - figures['peak_bytes'])} left"
    elif figures["fits"] is False:
        peak += f": does not fit, {gib(figures['over_bytes'])} too much"
    lines.append(_line("  peak", peak))
    if figures["absent_gpu"]:
        lines.append(_line("  what to trust", ABSENT_GPU_LINE))
    return [*lines, *(f"  change: {line}" for line in advice(figures) if figures["fits"] is False)]


def _known(figures: Figures, key: str, say: Any) -> str:
    return f"unknown ({figures['unknown'].get(key, 'not compiled')})" if figures[key] is None else say(figures[key])


def _time(figures: Figures) -> list[str]:
    model = f"{figures['model_flops'] / 1e12:,.3g} TFLOP of the model per chip and step"
    if figures["step_seconds"] is None:
        return [_line("FLOPs", model), _line("time of a step", _known(figures, "step_seconds", str))]
    seconds = figures["step_seconds"]
    lines = [
        _line("FLOPs", f"{model}, {figures['flops'] / 1e12:,.3g} with what remat computes again"),
        _line("time of a step", f"{1000 * seconds:,.1f} ms estimated; {CALIBRATION_LINE}"),
    ]
    for key, name in PARTS.items():
        part = figures["breakdown"][key]
        lines.append(_line(f"  {name}", f"{1000 * part:>10,.1f} ms  {100 * part / seconds:5.1f} %"))
    hidden = figures["communication_seconds"] - figures["breakdown"]["communication_exposed"]
    lines.append(_line("  hidden communication", f"{1000 * max(0.0, hidden):>10,.1f} ms (not in the sum)"))
    if figures["slices"] > 1:
        sent = figures["network_bytes"]
        network = f"{sent / 1e6:,.1f} MB per chip and step over the network, not in the sum: "
        network += f"{1000 * sent / HOST_NETWORK:,.1f} ms where four chips share 100 Gbit/s"
        lines.append(_line("  between slices", network))
    lines.append(_line("MFU", f"{100 * figures['mfu']:.1f} % estimated (causal half of attention, no remat)"))
    lines.append(_line("tokens", f"{figures['tokens_per_second_per_chip']:,.0f} a second and chip, padding included"))
    if figures["compiler_options"] != "none":
        lines.append(_line("compiler options", f"{figures['compiler_options']}: {OPTIONS_LINE}"))
    return lines


def _data_set(figures: Figures) -> list[str]:
    if figures.get("steps") is None:
        return []
    text = f"{figures['data_rows']:,} rows, {figures['steps']:,} steps of {figures['batch_size']}"
    if figures["filled"] is not None:
        text += f", {100 * figures['filled']:.0f} % of their tokens real"
    if figures["hours"] is not None:
        text += f": {60 * figures['hours']:,.0f} minutes ({figures['hours']:.2f} h), estimated"
    return [_line("data set", text)]


def data_set(figures: Figures, rows: int, epochs: float, steps: int) -> Figures:
    """Return steps and hours for a data set of `rows` conversations; `steps` as train.steps (0: epochs decide)."""
    steps = steps or steps_for(rows, figures["batch_size"], epochs)
    seconds = figures["step_seconds"]
    return {"data_rows": rows, "steps": steps, "hours": None if seconds is None else steps * seconds / 3600}


def advice(figures: Figures) -> list[str]:
    """Return what makes a plan smaller, cheapest first, each with its flag and, where known, what it saves."""
    mesh, slices, dtypes = figures["mesh"], figures["slices"], figures["dtypes"]
    trainable = figures["trainable"] / (mesh["fsdp"] * mesh["tensor"])
    micro = figures["rows"] // (mesh["data"] * mesh["fsdp"] * figures["accumulate"])
    lines = []
    without = "+".join(name for name in figures["remat"].split("+") if name not in WEIGHT_NAMES) or "full"
    if without != figures["remat"]:
        lines.append(f"--config.train.remat={without} gathers weights again for the backward pass")
    if without != "full":
        # A remat of single names is not in the list, and "full" keeps less than any of them.
        after = REMATS[REMATS.index(without) + 1] if without in REMATS else "full"
        lines.append(f"--config.train.remat={after} keeps less for the backward pass and computes it again")
    if micro > 1:
        flag = f"--config.train.accumulate={figures['accumulate'] * micro}"
        sums = f" (and {gib(4 * trainable)} for sums of gradients)" if figures["accumulate"] == 1 else ""
        lines.append(f"{flag}: 1 row per chip at a time, not {micro}{sums}")
    if figures["accumulate"] > 1:
        size = figures["batch_size"] // figures["accumulate"]
        flags = f"--config.train.accumulate=1 --config.train.batch_size={size}"
        lines.append(f"{flags}: a smaller batch needs no sums of gradients, -{gib(4 * trainable)}")
    if mesh["data"] > slices:
        stored = figures["state_bytes"] + figures["frozen_bytes"]
        saved = stored * (1 - mesh["fsdp"] / (figures["chips"] // slices // mesh["tensor"]))
        flags = f"--config.mesh.data={slices} --config.mesh.fsdp=-1"
        lines.append(f"{flags}: weights spread over all chips of a slice, up to -{gib(saved)}")
    savings = (
        ("moment_dtype", 4 * trainable, "of Adam's moments"),
        ("param_dtype", 2 * trainable, "of trained weights"),
        ("frozen_dtype", figures["frozen_bytes"] / 2, "of frozen weights"),
    )
    for key, saved, what in savings:
        if dtypes[key] == "float32" and saved > GIB / 100:
            lines.append(f"--config.train.{key}=bfloat16: -{gib(saved)} {what}")
    if figures["stage"] == "lora" and dtypes["frozen_dtype"] != "nf4":
        lines.append("--config.train.frozen_dtype=nf4: kernels of the frozen decoder in four bits")
    return [*lines, "a topology with more chips, or --sweep, which tries batch, remat and mesh"]


# ---- tables -----------------------------------------------------------------------------------------------------

COLUMNS = ("mesh", "rows per chip", "remat", "peak GiB", "step ms", "MFU %", "tokens/s/chip", "")


def sweep_head() -> str:
    return _row(COLUMNS)


def sweep_line(figures: Figures) -> str:
    """Return one plan as a line of the sweep's table."""
    mesh = figures["mesh"]
    shape = "x".join(str(mesh[axis]) for axis in SIZES), f"{figures['rows'] / (mesh['data'] * mesh['fsdp']):g}"
    time = ["-"] * 3
    if figures["step_seconds"] is not None:
        time = [f"{1000 * figures['step_seconds']:,.0f}", f"{100 * figures['mfu']:.1f}"]
        time.append(f"{figures['tokens_per_second_per_chip']:,.0f}")
    peak = "-" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / GIB:.2f}"
    fits = "does not fit" if figures["fits"] is False else ""
    return _row((*shape, figures["remat"], peak, *time, figures.get("skipped", fits)))


def _row(cells: tuple[str, ...]) -> str:
    widths = (11, 11, 9, 9, 9, 7, 13, 0)
    return " ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def best(plans: list[Figures]) -> Figures | None:
    """Return the plan that fits with the most tokens a second and chip; None when none fits or none has a time."""
    fitting = [plan for plan in plans if plan["fits"] and plan["step_seconds"] is not None]
    return max(fitting, key=lambda plan: plan["tokens_per_second_per_chip"], default=None)


def sweep_end(plans: list[Figures], chosen: Figures | None) -> str:
    """Return what the sweep found, with the flags that choose it."""
    if chosen is None:
        if all(plan["fits"] is False for plan in plans if "skipped" not in plan):
            return "none fits"
        fitting = sum(bool(plan["fits"]) for plan in plans)
        counted = f"{fitting} of {len(plans)} fit; " if fitting else ""
        return f"{counted}no time is known here, so none is called the best"
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in chosen["mesh"].items())
    flags = f"--config.train.batch_size={chosen['batch_size']} --config.train.remat={chosen['remat']} {mesh}"
    flags += " --config.train.accumulate=1" + f" --config.data.pack_length={chosen['length']}" * chosen["pack"]
    best_line = f"best that fits, by estimated tokens a second and chip ({CALIBRATION_LINE}):"
    return "\n".join([best_line, sweep_line(chosen), f"  {flags}", *_data_set(chosen)])
