"""Estimate the time of a compiled TPU program from its scheduled HLO text alone.

The schedule is walked in order with three clocks: the TensorCore, the links between chips, and copies between memories.
An instruction costs the cycles that the compiler estimates for it; loops cost their body times their trip count; what
runs asynchronously delays its `-done` only. Three things the compiler does not price, or prices wrongly:

- Elementwise operations come out slower than the memory they wait for; they are divided by `Chip.vector_overpricing`,
  and never below the time their bytes in HBM take at 90 % of the bandwidth.
- Pallas kernels carry no estimate: the FLOPs of causal attention over `Chip.splash_forward` and `splash_backward`.
- Collectives: bytes of a ring over the links of the axes they use, in both directions where these are rings. What goes
  between slices is counted in bytes and not priced.
"""

import collections
import dataclasses
import functools
import math
import re

from llava_jax.aot.hlo import Instruction, Program, array_bytes, arrays, group_size, in_hbm, matmul_flops, trip_count
from llava_jax.parallel.chips import Chip

HBM_SHARE = 0.9
HOP_SECONDS = 1e-6
SECONDS = ("matmul", "vector", "copy", "kernels", "communication_exposed", "dma_exposed")
COPIES = ("copy", "transpose", "reshape", "bitcast-convert")
CALLING = ("fusion", "call", "call-start", "async-start")
KEPT = 25  # of the costliest instructions, at each level of loops


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many chips there are along each axis of a slice, and whether these axes are rings."""

    sizes: tuple[int, ...]
    rings: bool

    @property
    def chips(self) -> int:
        return math.prod(self.sizes)


@dataclasses.dataclass
class Cost:
    """Of a computation on one chip: seconds, their parts, its costliest instructions (seconds, what, from).

    Parts are SECONDS, which add up to `seconds`; seconds of `communication`, hidden or not; `wire_bytes` and
    `network_bytes`; `matmul_flops` and `kernel_flops`, those that run, remat included; and `unknown_loops`.
    """

    seconds: float
    parts: dict[str, float]
    costliest: list[tuple[float, str, str]]

    @property
    def breakdown(self) -> dict[str, float]:
        return {name: self.parts[name] for name in SECONDS}


def rings_of(chip: str, sizes: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Return which axes of a slice are rings: v5p's all three where each has 4 chips, v5e's and v6e's those of 16."""
    if chip == "v5p":
        ring = min(sizes) >= 4
        return ring, ring, ring
    return sizes[0] >= 16, sizes[1] >= 16, False


def layout_of(chip: Chip, sizes: tuple[int, ...]) -> Layout:
    """Return the layout of a slice; its axes count as rings where all that it has are."""
    return Layout(sizes, all(rings_of(chip.name, sizes)[: chip.links]))


def estimate(program: Program, chip: Chip, layout: Layout) -> Cost:
    """Return the cost of one run of a program on each chip of a slice."""
    return Pricer(program, chip, layout).of(program.entry)


# ---- single instructions ----------------------------------------------------------------------------------------


def communication(collective: Instruction, chip: Chip, layout: Layout) -> tuple[float, float]:
    """Return (seconds on the links, bytes that a chip sends) of one collective."""
    group = group_size(collective, layout.chips)
    if group <= 1:
        return 0.0, 0.0
    used = sum(size > 1 for size in layout.sizes)
    if group != layout.chips:
        used = max(1, round(used * math.log(group) / math.log(layout.chips)))
    sizes = array_bytes(collective.type)
    others = (group - 1) / group
    wire = {
        "all-gather": (max(sizes, default=0) if collective.type.startswith("(") else sum(sizes)) * others,
        "reduce-scatter": sum(sizes) * (group - 1),
        "all-reduce": 2 * sum(sizes) * others,
        "all-to-all": sum(sizes) * others / 4,
    }.get(collective.collective, sum(sizes))
    ways = 2 if layout.rings else 1
    seconds = wire / (chip.link_bytes_per_second * used * ways) + sum(layout.sizes) / ways * HOP_SECONDS
    # An asynchronous permute's type holds what is sent and what is received: over two axes, its time on one link.
    return seconds, max(sizes, default=0) if collective.collective == "collective-permute" else wire


def kernel(call: Instruction, chip: Chip, fused_backward: bool) -> tuple[float, float]:
    """Return (seconds, FLOPs) of splash attention over a causal row: two matmuls forward; for dq, dk and dv as named.

    `fused_backward`: one kernel gives all three gradients.
    """
    layouts = re.search(r"operand_layout_constraints=\{(.*?)\}, (?:frontend|metadata|backend|custom)", call.rest)
    operands = arrays(layouts.group(1) if layouts else call.type)
    shapes = [d for dtype, d in operands if dtype in ("bf16", "f16", "f32") and len(d) >= 3 and d[-1] in (64, 128, 256)]
    if not shapes:
        return 0.0, 0.0
    *heads, length, head_dim = max(shapes, key=math.prod)
    name = f"{call.name} {call.op_name}"
    matmuls = (5 if fused_backward else 4) if "dkv" in name else 3 if "_dq" in name else 2
    flops = matmuls * math.prod(heads) * length**2 * head_dim
    return flops / (chip.peak_flops * (chip.splash_forward if matmuls == 2 else chip.splash_backward)), flops


# ---- the walk ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Clocks:
    """The three clocks of one computation, and what is in flight: name or channel -> when it arrives."""

    core: float = 0.0
    link: float = 0.0
    dma: float = 0.0
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    copied: dict[str, float] = dataclasses.field(default_factory=dict)
    offloaded: dict[str, str | None] = dataclasses.field(default_factory=dict)
    parts: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    costliest: list[tuple[float, str, str]] = dataclasses.field(default_factory=list)

    def spend(self, part: str, seconds: float, i: Instruction | None = None) -> None:
        self.core += seconds
        self.parts[part] += seconds
        if i is not None:
            self.costliest.append((seconds, f"{i.name} {i.opcode} {i.type[:60]}", i.op_name[-100:]))

    def wait(self, part: str, until: float | None) -> None:
        if until is not None and until > self.core:
            self.spend(part, until - self.core)

    def include(self, cost: Cost, times: int = 1) -> None:
        """Add a called computation; nothing of it is in flight any more when it ends."""
        self.core += times * cost.seconds
        for name, value in cost.parts.items():
            self.parts[name] += times * value
        prefix = f"{times} x " if times != 1 else ""
        self.costliest += [(times * seconds, prefix + what, where) for seconds, what, where in cost.costliest]


class Pricer:
    """Prices the computations of one program; each is priced once, however often it is called."""

    def __init__(self, program: Program, chip: Chip, layout: Layout):
        self.program, self.chip, self.layout = program, chip, layout
        self.types = {name: {i.name: i.type for i in body} for name, body in program.computations.items()}
        self.fused_backward = not any("_mha_dq" in f"{i.name} {i.rest}" for i in program.instructions())
        self._costs: dict[str, Cost] = {}
        # Caches of the instance: those of a decorated method would hold every program that was ever priced.
        self._inside = functools.cache(self._first_collective)
        self._body_has_matmul = functools.cache(self._any_matmul)
        self._body_matmul_flops = functools.cache(self._all_matmul_flops)

    def of(self, name: str) -> Cost:
        """Return the cost of one run of a computation."""
        if name not in self._costs:
            clocks = _Clocks()
            for instruction in self.program.computations[name]:
                self._run(instruction, clocks, self.types[name])
            clocks.wait("communication_exposed", max(clocks.sent.values(), default=None))
            self._costs[name] = Cost(clocks.core, clocks.parts, sorted(clocks.costliest, reverse=True)[:KEPT])
        return self._costs[name]

    def _run(self, i: Instruction, clocks: _Clocks, types: dict[str, str]) -> None:
        if i.opcode in ("while", "conditional", "call"):
            self._control(i, clocks)
        elif i.opcode.startswith(("custom-call-", "call-")):
            self._offloaded(i, clocks)
        elif (collective := self._collective(i)) is not None and not _carries(i):
            self._communicate(i, collective, clocks)
        elif i.opcode == "custom-call" and "tpu_custom_call" in i.rest:
            seconds, flops = kernel(i, self.chip, self.fused_backward)
            clocks.spend("kernels", seconds, i)
            clocks.parts["kernel_flops"] += flops
        elif i.opcode in ("copy-start", "slice-start", "dynamic-slice-start") and "pinned" not in i.rest:
            sizes = [sum(array_bytes(part)) for part in _data_parts(i.type)]
            clocks.dma = max(clocks.dma, clocks.core) + self._hbm_seconds(min(sizes))
            clocks.copied[i.name] = clocks.dma
        elif i.opcode in ("copy-done", "slice-done", "dynamic-slice-done"):
            clocks.wait("dma_exposed", clocks.copied.pop((i.operands or [""])[0], None))
        elif i.opcode == "send":
            clocks.parts["network_bytes"] += max(array_bytes(i.type), default=0)
        elif i.cycles is not None:
            self._compute(i, clocks, types)

    def _control(self, i: Instruction, clocks: _Clocks) -> None:
        if i.opcode == "while":
            trips = trip_count(self.program, i.attribute("condition") or "")
            clocks.parts["unknown_loops"] += trips is None
            clocks.include(self.of(i.attribute("body") or ""), 1 if trips is None else trips)
            clocks.link = max(clocks.link, clocks.core)
        elif i.opcode == "call":
            clocks.include(self.of(i.attribute("to_apply") or i.calls or ""))
        else:
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            names = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
            names = names or [i.attribute("true_computation"), i.attribute("false_computation")]
            clocks.include(max((self.of(name) for name in names), key=lambda cost: cost.seconds))

    def _offloaded(self, i: Instruction, clocks: _Clocks) -> None:
        """Run a collective on a SparseCore: call-start, or custom-call-start and -update, until its -done."""
        source = (i.operands or [""])[0]
        if i.opcode == "custom-call-start":
            called = re.search(r"called_computations=\{%?([\w.\-]+)", i.rest)
            clocks.offloaded[i.name] = called.group(1) if called else None
        elif i.opcode in ("call-start", "custom-call-update"):
            called = clocks.offloaded.get(source) if i.opcode != "call-start" else i.attribute("to_apply") or i.calls
            collective = self._inside(called) if called else None
            if collective is not None:
                self._send(i.name, collective, clocks)
        else:
            clocks.wait("communication_exposed", clocks.sent.pop(source, None))

    def _send(self, key: str, collective: Instruction, clocks: _Clocks) -> None:
        seconds, wire = communication(collective, self.chip, self.layout)
        clocks.parts["communication"] += seconds
        clocks.parts["wire_bytes"] += wire
        clocks.link = max(clocks.link, clocks.core) + seconds
        clocks.sent[key] = clocks.link

    def _collective(self, i: Instruction) -> Instruction | None:
        """Return the collective that an instruction is, or that its called computation holds."""
        return i if i.collective else self._inside(i.calls) if i.calls else None

    def _first_collective(self, name: str) -> Instruction | None:
        for i in self.program.computations.get(name, ()):
            if i.collective:
                return i
            called = (i.calls or i.attribute("to_apply")) if i.opcode in CALLING else None
            collective = self._inside(called) if called and called != name else None
            if collective is not None:
                return collective
        return None

    def _communicate(self, i: Instruction, collective: Instruction, clocks: _Clocks) -> None:
        channel = re.search(r"channel_id=(\d+)", collective.rest)
        key = channel.group(1) if channel else i.name
        if _ends(i):
            # One that names no channel waits for everything in flight.
            until = clocks.sent.pop(key, None)
            clocks.wait("communication_exposed", max(clocks.sent.values(), default=None) if until is None else until)
        elif _starts(i):
            self._send(key, collective, clocks)
        elif i.opcode != "async-update":
            self._send(key, collective, clocks)
            clocks.spend("communication_exposed", clocks.sent.pop(key) - clocks.core, i)
            clocks.spend("vector", (i.cycles or 0) / self.chip.clock / self.chip.vector_overpricing)

    def _compute(self, i: Instruction, clocks: _Clocks, types: dict[str, str]) -> None:
        seconds = (i.cycles or 0) / self.chip.clock
        clocks.parts["matmul_flops"] += self._matmul_flops(i, types)
        if self._has_matmul(i):
            clocks.spend("matmul", seconds, i)
            return
        moved = sum(sum(array_bytes(part)) for part in in_hbm(i.type))
        for name in i.operands:
            kind = types.get(name, "(")
            if not kind.startswith("(") and "S(" not in kind:
                moved += sum(array_bytes(kind))
        least = min(seconds, self._hbm_seconds(moved))
        is_copy = i.opcode in COPIES or i.name.startswith(("copy", "transpose"))
        clocks.spend("copy" if is_copy else "vector", max(seconds / self.chip.vector_overpricing, least), i)

    def _hbm_seconds(self, size: float) -> float:
        return size / (HBM_SHARE * self.chip.hbm_bytes_per_second)

    def _has_matmul(self, i: Instruction) -> bool:
        return i.opcode in ("convolution", "dot") or (i.calls is not None and self._body_has_matmul(i.calls))

    def _any_matmul(self, name: str) -> bool:
        return any(self._has_matmul(i) for i in self.program.computations.get(name, ()))

    def _matmul_flops(self, i: Instruction, types: dict[str, str]) -> float:
        if i.opcode in ("convolution", "dot"):
            return matmul_flops(i, types)
        return self._body_matmul_flops(i.calls) if i.calls else 0.0

    def _all_matmul_flops(self, name: str) -> float:
        body = [i for i in self.program.computations.get(name, ()) if i.opcode in ("convolution", "dot", "fusion")]
        return sum(self._matmul_flops(i, self.types[name]) for i in body)


def _starts(i: Instruction) -> bool:
    return i.opcode.endswith("-start") or "collective-start" in i.name or i.name.startswith("async-start")


def _ends(i: Instruction) -> bool:
    done = (i.collective and i.opcode.endswith("-done")) or i.opcode == "async-done"
    return bool(done) or "collective-done" in i.name or i.name.startswith("async-done")


def _carries(i: Instruction) -> bool:
    """Return whether a fusion computes while a collective that another instruction started is in flight."""
    return not _ends(i) and "async_collective_fusion" in (i.calls or "")


def _data_parts(kind: str) -> list[str]:
    """Return the array types of an asynchronous copy without its counters."""
    return [part for part in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", kind) if part[:5] not in ("s32[]", "u32[]")]
