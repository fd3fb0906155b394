"""Read scheduled HLO text as data: computations, instructions, array sizes, trip counts, and forbidden arrays."""

import dataclasses
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
# The compiler writes the largest unsigned number where it has no estimate.
NO_ESTIMATE = 1e12
LIMIT = 12  # of findings

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
_ARRAY_AND_LAYOUT = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")
_OPCODE = re.compile(r"([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(slots=True)
class Instruction:
    """`name = type opcode(rest`, where `rest` holds operands and attributes."""

    name: str
    type: str
    opcode: str
    rest: str

    def attribute(self, key: str) -> str | None:
        """Return the computation or word after `key=`."""
        match = re.search(rf"{key}=%?([\w.\-]+)", self.rest)
        return match.group(1) if match else None

    @property
    def calls(self) -> str | None:
        return self.attribute("calls")

    @property
    def operands(self) -> list[str]:
        """Return the names inside the parentheses after the opcode."""
        return _NAME.findall(_parenthesised(self.rest[self.rest.index("(") :]))

    @property
    def cycles(self) -> int | None:
        """Return the compiler's estimate; None where it has none."""
        match = _CYCLES.search(self.rest)
        return int(match.group(1)) if match and int(match.group(1)) < NO_ESTIMATE else None

    @property
    def op_name(self) -> str:
        """Return where in the program it comes from, as jax names it."""
        match = _OP_NAME.search(self.rest)
        return match.group(1) if match else ""

    @property
    def collective(self) -> str | None:
        """Return 'all-gather' for all-gather, all-gather-start and all-gather-done; None for other operations."""
        base = self.opcode.removesuffix("-start").removesuffix("-done")
        return base if base in COLLECTIVES else None


@dataclasses.dataclass(slots=True)
class Program:
    """A module: its computations in the order of the text, each in the order of its schedule."""

    computations: dict[str, list[Instruction]]
    entry: str

    def instructions(self) -> Iterator[Instruction]:
        for body in self.computations.values():
            yield from body


def _parenthesised(text: str) -> str:
    """Return the leading `(…)` of a text, with what it nests."""
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: end + 1]
    return text


def parse(text: str) -> Program:
    """Return the program of `compiled.as_text()`. Raises ValueError when there is no entry computation in it."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if body is None:
            if line.rstrip().endswith("{") and (header := _HEADER.match(line)):
                is_entry, name = header.groups()
                entry = name if is_entry else entry
                body = computations.setdefault(name, [])
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            body = None
        elif match := _INSTRUCTION.match(line):
            body.append(_instruction(*match.groups()))
        elif body:
            body[-1].rest += " " + line  # the attributes of a kernel run over several lines
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    kind = _parenthesised(text) if text.startswith("(") else text.split(" ", 1)[0]
    rest = text[len(kind) + 1 :]
    opcode = _OPCODE.match(rest)
    return Instruction(name, kind, opcode.group(1) if opcode else "", rest)


# ---- sizes ------------------------------------------------------------------------------------------------------


Dims = tuple[int, ...]


def arrays(text: str) -> list[tuple[str, Dims]]:
    """Return (dtype, dimensions) of every array type in a text."""
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _ARRAY.findall(text)]


def array_bytes(text: str) -> list[float]:
    """Return the bytes of every array type in a text, without the padding of its layout."""
    return [ITEM_BYTES.get(dtype, 4) * math.prod(dims) for dtype, dims in arrays(text)]


def in_hbm(text: str) -> list[str]:
    """Return the array types of a text that are not in VMEM (memory space 1)."""
    return [part for part in _ARRAY_AND_LAYOUT.findall(text) if "S(" not in part]


def matmul_flops(instruction: Instruction, types: dict[str, str]) -> float:
    """Return the FLOPs of a dot or a convolution (every matmul of a TPU program is one), twice its multiply-adds."""
    sides = [types[name] for name in instruction.operands[:2] if name in types]
    if len(sides) < 2:
        return 0.0
    (_, lhs), (_, rhs), (_, out) = (arrays(text)[0] for text in (*sides, instruction.type))
    if labels := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest):
        return 2.0 * _convolution(lhs, rhs, out, labels.groups(), _window(instruction.rest))
    contracted = re.findall(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.rest)
    return 2.0 * math.prod(out) * math.prod(lhs[int(d)] for dims in contracted for d in dims.split(","))


def _window(rest: str) -> dict[str, list[str]]:
    """Return a convolution's size, stride, pad, lhs_dilate and rhs_dilate of each spatial dimension."""
    match = re.search(r"window=\{([^}]*)\}", rest)
    items = (item.split("=") for item in match.group(1).split()) if match else ()
    return {key: value.split("x") for key, value in items}


def _convolution(lhs: Dims, rhs: Dims, out: Dims, labels: tuple[str, ...], window: dict[str, list[str]]) -> int:
    """Count multiply-adds: batch, features in and out, and the taps of each spatial dimension that meet a value."""
    total = out[labels[2].index("b")] * out[labels[2].index("f")] * rhs[labels[1].index("i")]
    for n, dim in enumerate(sorted(filter(str.isdigit, labels[0]))):
        size, kernel, outputs = (shape[label.index(dim)] for shape, label in zip((lhs, rhs, out), labels, strict=True))
        stride, left, base, dilation = (
            int(window[key][n].split("_")[0]) if key in window else default
            for key, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        taps = (place * stride - left + tap * dilation for place in range(outputs) for tap in range(kernel))
        total *= sum(0 <= at <= (size - 1) * base and at % base == 0 for at in taps)
    return total


def group_size(instruction: Instruction, devices: int) -> int:
    """Return how many devices are in one group of a collective, in any of the three spellings of replica_groups."""
    rest = instruction.rest
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match.group(1).split(","))
    return devices


def trip_count(program: Program, condition: str) -> int | None:
    """Return how often a loop from 0 by 1 runs: the constant its condition compares with; None if unknown."""
    body = program.computations[condition]
    constants = {
        i.name: int(match.group(1)) for i in body if (match := re.match(r"constant\((-?\d+)\)", i.rest)) is not None
    }
    for instruction in body:
        if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            limits = [constants[name] for name in instruction.operands if name in constants]
            if limits:
                return limits[0]
    return max((value for value in constants.values() if value >= 0), default=None)


# ---- what must not be in a program ------------------------------------------------------------------------------


def fused(program: Program) -> set[str]:
    """Return the computations inside a fusion or a reduction: their arrays are never written to memory."""
    inside = set()
    for i in program.instructions():
        if i.opcode == "fusion" and i.calls:
            inside.add(i.calls)
        elif i.opcode in ("reduce", "all-reduce", "reduce-scatter", "reduce-window", "scatter", "sort", "map"):
            inside.add(i.attribute("to_apply") or "")
    return inside


def buffers_shaped(program: Program, shapes: list[Dims]) -> list[str]:
    """Return 'name type' of every array in memory with one of `shapes`, in any order of dimensions, without ones."""
    wanted = {tuple(sorted(d for d in shape if d > 1)) for shape in shapes}
    hidden = fused(program)
    buffers = [
        f"{i.name} {i.type[:80]}"
        for name, body in program.computations.items()
        if name not in hidden
        for i in body
        if any(tuple(sorted(d for d in dims if d > 1)) in wanted for _, dims in arrays(i.type))
    ]
    return buffers[:LIMIT]


def wide_collectives(program: Program, more_than: int = 2**20) -> list[str]:
    """Return 'name type' of every collective that moves a float32 array of more than so many bytes."""
    collectives = [
        f"{i.name} {i.type[:80]}"
        for i in program.instructions()
        if i.collective
        and not i.opcode.endswith("-done")
        and any(dtype == "f32" and 4 * math.prod(dims) > more_than for dtype, dims in arrays(i.type))
    ]
    return collectives[:LIMIT]


def largest_buffers(program: Program) -> list[tuple[int, str]]:
    """Return (bytes, 'name type from') of the largest single arrays that an instruction writes, largest first."""
    hidden = fused(program)
    free = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "constant", "opt-barrier")
    sizes: dict[str, tuple[int, str]] = {}
    for name, body in program.computations.items():
        for i in body if name not in hidden else ():
            if i.opcode not in free and (parts := in_hbm(i.type)):
                part = max(parts, key=lambda part: sum(array_bytes(part)))
                size = int(sum(array_bytes(part)))
                if size > sizes.get(part, (0, ""))[0]:
                    sizes[part] = size, f"{i.name} {part.split('{')[0]} {i.op_name[-80:]}"
    return sorted(sizes.values(), reverse=True)[:LIMIT]
