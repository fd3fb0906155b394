"""Compile the step of `train` ahead of time: does it fit, and how long does it take, before the chips are rented.

libtpu compiles for a named topology without a TPU, XLA's CUDA plugin for named GPUs without a GPU; without a topology
the local devices are compiled for.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import re
import time
from typing import Any

import jax

from llava_jax.aot import hlo
from llava_jax.aot.cost import estimate
from llava_jax.aot.target import Target
from llava_jax.data.packing import UNIT, BatchShape, check_batch_size
from llava_jax.models.flops import step_flops
from llava_jax.models.layers import weights_in
from llava_jax.models.llava import overlaid
from llava_jax.parallel.sharding import make_mesh, mesh_sizes
from llava_jax.settings import RANDOM
from llava_jax.train.setup import Run, abstract_batch, build_run, compile_lowered, compiler_options
from llava_jax.train.step import batch_ranks
from llava_jax.types import InputError, ModelConfig, Settings
from llava_jax.weights.load import adapted, at_hand, described, model_spec
from llava_jax.weights.source import local_folder

STEPS = 1000  # of the schedule, whose length changes constants only
METRIC_BYTES = 2**16  # outputs that replace no input: metrics, and the table of outputs

# Triton's kernels have no tile sizes where none can be tried: cuBLAS takes every matmul.
ABSENT_GPU = {"xla_gpu_enable_triton_gemm": False}

# Share of real tokens in packed rows, for lengths like those of the published data (96.5 to 98.8 %).
FILLED = 0.985


# ---- what is compiled -------------------------------------------------------------------------------------------


def plan_config(settings: Settings) -> ModelConfig:
    """Return the model of a run from its config files, and a tokenizer where `init.model` names no image token."""
    if settings.init.model:
        return model_spec(settings).config
    towers = {"llm": settings.model.llm, "vision": settings.model.vision}
    reasons = {key: _absent(f"model.{key}", spec) for key, spec in towers.items()}
    absent = [key for key, reason in reasons.items() if reason]
    if absent:
        size = "13b" if "13b" in towers["llm"].lower() else "7b"
        examples = {"llm": f"random:vicuna-{size}", "vision": "random:clip-l-14-336"}
        flags = " ".join(f"--config.model.{key}={examples[key]}" for key in absent)
        raise InputError(
            f"{reasons[absent[0]]}; compile needs its sizes only: give {flags} (or random:FILE.json with a Hugging "
            "Face config)"
        )
    return described(at_hand(settings))


def _absent(name: str, spec: str) -> str:
    """Why there is no folder of that backbone, empty where there is one or none is needed."""
    if not spec or spec.startswith(RANDOM):
        return ""
    try:
        folder = local_folder(spec, name)
    except InputError as error:
        return str(error)
    return "" if os.path.isdir(folder) else f"{name}={spec}: no such folder"


def batch_shape(settings: Settings, config: ModelConfig, ways: int, tokens_per_row: float | None) -> BatchShape:
    """Return the shape of the global batch: a conversation with its image a row, or as many packed rows as needed.

    An anyres image counts with the most tiles. The rows must be divisible by `ways`, device shards times microbatches;
    packed ones need `tokens_per_row`, the mean length of a conversation, image tokens included.
    """
    size, data = settings.train.batch_size, settings.data
    check_batch_size(size, ways, data.pack)
    rows, length, images = size, data.max_length, config.tiles
    if data.pack:
        if not tokens_per_row:
            raise InputError(
                "data.pack=True: compile reads no data: give --tokens_per_row=N, the mean length of a conversation "
                "with its image tokens (LLaVA-1.5: about 600 in pretrain, 840 in finetune), or "
                "--config.data.pack=False for one conversation of data.max_length tokens a row"
            )
        tokens = size * tokens_per_row / FILLED
        length = data.pack_length or _pack_length(tokens / ways, data.max_length)
        rows = ways * math.ceil(tokens / length / ways)
        per_row = min(math.ceil(size / rows) + 1, max(1, length // config.vision.patches))
        images = data.pack_images or per_row * config.tiles
    filled = None if tokens_per_row is None else size * tokens_per_row / (rows * length)
    return BatchShape(rows, length, images, filled, min(size * config.tiles, rows * images))


def _pack_length(tokens: float, longest: int) -> int:
    """Return the length of packed rows for a shard's `tokens`: the shortest into which the longest row fits."""
    lengths = [UNIT * math.ceil(tokens / rows / UNIT) for rows in range(1, max(1, int(tokens / longest)) + 1)]
    return max(min((length for length in lengths if length >= longest), default=0), longest)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step before it is compiled; `seconds` is the time it took to trace it."""

    settings: Settings
    target: Target
    run: Run
    shape: BatchShape
    lowered: jax.stages.Lowered
    seconds: float

    @property
    def hash(self) -> str:
        """Return the hash of the program, the compiler options, and the versions of the compilers."""
        versions = f"{jax.__version__} {_libtpu_version()}"
        options = compiler_options(self.settings.train.compiler_options, self.target.devices[0].device_kind)
        text = f"{self.lowered.as_text()} {sorted(options.items())} {versions}"
        return hashlib.sha256(text.encode()).hexdigest()


def _libtpu_version() -> str | None:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def lower(settings: Settings, target: Target, tokens_per_row: float | None = None) -> Lowered:
    """Trace the step of a stage for the devices of a target: seconds, however large the model."""
    start = time.monotonic()
    config = plan_config(settings)
    mesh = make_mesh(settings.mesh, target.devices)
    shape = batch_shape(settings, config, batch_ranks(mesh) * settings.train.accumulate, tokens_per_row)
    with jax.set_mesh(mesh):
        run = build_run(settings, adapted(settings, config), mesh, STEPS, shape.length)
        lowered = run.step.lower(run.state, run.frozen, abstract_batch(config, shape, mesh))
    return Lowered(settings, target, run, shape, lowered, time.monotonic() - start)


# ---- the figures ------------------------------------------------------------------------------------------------


def compile_plan(lowered: Lowered) -> tuple[dict[str, Any], str]:
    """Return (all figures of the step, as `compile --json` writes them; the program's text, '' without one)."""
    figures = describe(lowered)
    start = time.monotonic()
    kind = lowered.target.devices[0].device_kind
    try:
        defaults = ABSENT_GPU if lowered.target.absent_gpu else None
        compiled = compile_lowered(lowered.lowered, lowered.settings.train.compiler_options, kind, defaults)
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error), figures["state_bytes"] + figures["frozen_bytes"])
        if refused is None:
            raise
        return figures | refused | {"compile_seconds": time.monotonic() - start}, ""
    seconds, text = time.monotonic() - start, compiled.as_text() or ""
    figures |= memory_figures(compiled, lowered) | time_figures(text, figures, lowered)
    return figures | {"compile_seconds": seconds}, text


def describe(lowered: Lowered) -> dict[str, Any]:
    """Return what is known before compiling; every figure that is not is None."""
    settings, target, run, shape = lowered.settings, lowered.target, lowered.run, lowered.shape
    chips = len(target.devices)
    parts = {part: _count(tree) for part, tree in sorted(overlaid(run.frozen, run.state.params).items())}
    flops = step_flops(run.config, run.state.params, rows=shape.rows, length=shape.length, images=shape.images_used)
    train = settings.train
    return {
        "chips": chips,
        "topology": target.name,
        "slices": target.slices,
        "stage": settings.stage,
        "mesh": mesh_sizes(run.mesh),
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "rows": shape.rows,
        "length": shape.length,
        "images_per_row": shape.images,
        "filled": shape.filled,
        "pack": settings.data.pack,
        "dtypes": {key: getattr(train, key) for key in ("dtype", "param_dtype", "moment_dtype", "frozen_dtype")},
        "remat": train.remat,
        "attention": run.config.attention,
        "compiler_options": train.compiler_options,
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "trainable": _count(run.state.params),
        "state_bytes": _bytes_per_device(run.state),
        "frozen_bytes": _bytes_per_device(run.frozen),
        **dict.fromkeys(("argument_bytes", "temporary_bytes", "peak_bytes")),
        "hbm_bytes": None if target.hbm_bytes is None else int(target.hbm_bytes),
        "fits": None,
        "over_bytes": None,
        "model_flops": flops / chips,
        **dict.fromkeys(("flops", "step_seconds", "mfu", "breakdown")),
        "absent_gpu": target.absent_gpu,
        "unknown": unknown_reasons(target),
        "lower_seconds": lowered.seconds,
        "program_sha256": lowered.hash,
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
    }


def unknown_reasons(target: Target) -> dict[str, str]:
    """Return why figures are None, for those that always are for this target."""
    reasons = {}
    if target.hbm_bytes is None:
        reasons["hbm_bytes"] = f"{target.devices[0].device_kind}: memory is not a fixed figure; fits is not decided"
    if target.layout is None:
        reasons["step_seconds"] = "time is estimated for v5e, v5p and v6e only; `train` measures it"
    return reasons


def _count(tree: Any) -> int:
    return sum(weights_in(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_SIZE = r"([\d.]+[KMGT]?)"


def refusal(message: str, arguments: int) -> dict[str, Any] | None:
    """Return the figures of a program that the compiler refuses because HBM is too small; None for another error.

    The message gives the sum of all that is needed, or that of the temporaries, to which `arguments` bytes are added.
    """
    used = re.search(rf"[Uu]sed {_SIZE} of {_SIZE} hbm", message)
    match = used or re.search(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", message)
    if match is None:
        return None
    needed, limit = (_read_size(text) for text in match.groups())
    figures = {"fits": False, "hbm_bytes": limit}
    if used is None:
        figures |= {"argument_bytes": arguments, "temporary_bytes": needed}
        needed += arguments
    return figures | {"peak_bytes": needed, "over_bytes": needed - limit}


def _read_size(text: str) -> int:
    unit = " KMGT".find(text[-1])
    return int(float(text[:-1]) * 1024**unit) if unit > 0 else int(float(text))


def memory_figures(compiled: jax.stages.Compiled, lowered: Lowered) -> dict[str, Any]:
    """Return bytes per chip: arguments, temporaries, and the sum of all that must be in memory at once."""
    memory: Any = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    workspace = workspace_bytes(lowered)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + new
    peak += workspace
    limit = lowered.target.hbm_bytes
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "workspace_bytes": workspace,
        "code_bytes": memory.generated_code_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "donated_whole": new <= METRIC_BYTES and memory.alias_size_in_bytes >= _bytes_per_device(lowered.run.state),
        "peak_bytes": peak,
        "fits": None if limit is None else peak <= limit,
        "over_bytes": None if limit is None else max(0, int(peak - limit)),
    }


def workspace_bytes(lowered: Lowered) -> int:
    """Return what cuDNN asks for when it runs, of which a GPU's program says nothing before it has seen one.

    It is the float32 gradient of a layer's queries, which the backward pass sums in memory.
    """
    if lowered.run.config.attention != "cudnn" or not lowered.target.absent_gpu:
        return 0
    config, mesh = lowered.run.config.llm, lowered.run.mesh
    rows = lowered.shape.rows // batch_ranks(mesh) // lowered.settings.train.accumulate
    return 4 * rows * lowered.shape.length * -(-config.heads // mesh.shape["tensor"]) * config.head_dim


def time_figures(text: str, figures: dict[str, Any], lowered: Lowered) -> dict[str, Any]:
    """Return the estimated time of a TPU program and what its text holds; nothing for other devices."""
    target = lowered.target
    if target.layout is None or target.chip is None:
        return {}
    program = hlo.parse(text)
    cost = estimate(program, target.chip, target.layout)
    parts = cost.parts
    scores, logits = forbidden_shapes(lowered)
    return {
        "flops": parts["matmul_flops"] + parts["kernel_flops"],
        "step_seconds": cost.seconds,
        "mfu": figures["model_flops"] / target.chip.peak_flops / cost.seconds,
        "tokens_per_second_per_chip": lowered.shape.rows * lowered.shape.length / cost.seconds / figures["chips"],
        "breakdown": cost.breakdown,
        "communication_seconds": parts["communication"],
        "wire_bytes": parts["wire_bytes"],
        "network_bytes": parts["network_bytes"],
        "unknown_loops": int(parts["unknown_loops"]),
        "costliest": [{"seconds": s, "instruction": what, "from": where} for s, what, where in cost.costliest],
        "largest_buffers": [{"bytes": size, "array": what} for size, what in hlo.largest_buffers(program)],
        "score_buffers": hlo.buffers_shaped(program, scores),
        "logit_buffers": hlo.buffers_shaped(program, logits),
        "float32_collectives": hlo.wide_collectives(program),
    }


def forbidden_shapes(lowered: Lowered) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of a chip's attention scores [B, H, T, T] and logits [B, T, V], were they ever in memory."""
    config, mesh, T = lowered.run.config.llm, lowered.run.mesh, lowered.shape.length
    B = lowered.shape.rows // batch_ranks(mesh) // lowered.settings.train.accumulate
    H = -(-config.heads // mesh.shape["tensor"])
    widths = {config.vocab_size, -(-config.vocab_size // mesh.shape["tensor"])}
    scores: list[tuple[int, ...]] = [(B, H, T, T), (B * H, T, T)]
    logits: list[tuple[int, ...]] = [(B, t, V) for V in widths for t in (T, T - 1)]
    # A flat [B*T, V] looks like the embedding table where B*T is the model's width.
    logits += [(B * T, V) for V in widths if config.width != B * T]
    return scores, logits
