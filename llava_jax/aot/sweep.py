"""Compile a grid of batch, remat and mesh for one target, one plan after the other (`compile --sweep`)."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from llava_jax.aot.compile import FILLED, compile_plan, lower
from llava_jax.aot.target import Target
from llava_jax.parallel.sharding import SIZES
from llava_jax.settings import settings_from_dict
from llava_jax.types import InputError, MeshSettings, Settings

DEFAULT_ROWS = (2, 4, 8)
DEFAULT_REMATS = ("full", "minimal")


Mesh = tuple[int, int, int]  # data, fsdp, tensor


class Grid(NamedTuple):
    """What is tried: rows per chip, values of train.remat, and meshes."""

    rows: tuple[int, ...]
    remats: tuple[str, ...]
    meshes: tuple[Mesh, ...]


def parse_grid(rows: str | None, remats: str | None, meshes: str | None, settings: Settings, target: Target) -> Grid:
    """Return the grid of `--sweep_rows=2,4`, `--sweep_remat=full,minimal`, `--sweep_mesh=1x64x1,2x32x1`.

    Each has a default; that of the meshes: weights over all chips of a slice, over half of them, and as the config
    says. Raises InputError for a value that cannot be compiled on the target.
    """
    chips, slices = len(target.devices), target.slices
    counts = tuple(_number("--sweep_rows", word) for word in rows.split(",")) if rows else DEFAULT_ROWS
    policies = tuple(remats.split(",")) if remats else DEFAULT_REMATS
    for policy in policies:
        train = dataclasses.replace(settings.train, remat=policy)
        settings_from_dict(dataclasses.asdict(dataclasses.replace(settings, train=train)))
    inner = settings.mesh.fsdp_inner
    if meshes:
        shapes = [_mesh(word, chips, slices, inner) for word in meshes.split(",")]
    else:
        configured = _config_mesh(settings.mesh, chips)
        shapes = [(slices, chips // slices, 1)]
        if configured[0] % slices == 0:
            shapes.append(configured)
        if chips // slices % 2 == 0:
            shapes.append((2 * slices, chips // slices // 2, 1))
        shapes = [shape for shape in shapes if shape[1] % inner == 0]
        if not shapes:
            raise InputError(f"mesh.fsdp_inner={inner}: divides no mesh of {chips} chips; give a divisor of fsdp")
    return Grid(counts, policies, tuple(dict.fromkeys(shapes)))


def _number(flag: str, word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise InputError(f"{flag}: {word!r} is not a whole number of 1 or more")
    return int(word)


def _mesh(word: str, chips: int, slices: int, inner: int) -> Mesh:
    sizes = tuple(_number("--sweep_mesh", size) for size in word.split("x"))
    if len(sizes) != 3 or math.prod(sizes) != chips:
        raise InputError(f"--sweep_mesh: {word!r} is not DATAxFSDPxTENSOR with a product of {chips} chips")
    if sizes[0] % slices:
        raise InputError(f"--sweep_mesh: {word!r}: on {slices} slices DATA is a multiple of {slices}")
    if sizes[1] % inner:
        raise InputError(f"--sweep_mesh: {word!r}: FSDP is not a multiple of mesh.fsdp_inner={inner}")
    return sizes


def _config_mesh(mesh: MeshSettings, chips: int) -> Mesh:
    """Return the config's mesh with its -1 filled in, as far as it divides the chips."""
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    if -1 in sizes:
        known = -sizes[0] * sizes[1] * sizes[2]
        sizes[sizes.index(-1)] = max(1, chips // known)
    return tuple(sizes)


def plans(settings: Settings, target: Target, grid: Grid, tokens_per_row: float | None) -> Iterator[dict[str, Any]]:
    """Yield the figures of every point as they come; `skipped` says why one was not compiled.

    Where a batch does not fit, larger ones of the same remat and mesh are not compiled.
    """
    for mesh, remat in itertools.product(grid.meshes, grid.remats):
        too_large = 0
        for rows in sorted(grid.rows):
            if too_large:
                figures = dict.fromkeys(("peak_bytes", "step_seconds", "fits")) | {
                    "mesh": dict(zip(SIZES, mesh, strict=True), fsdp_inner=settings.mesh.fsdp_inner),
                    "rows": rows * mesh[0] * mesh[1],
                    "remat": remat,
                    "skipped": f"not compiled: {too_large} rows do not fit",
                }
            else:
                point = _point(settings, rows, remat, mesh, tokens_per_row)
                figures, _ = compile_plan(lower(point, target, tokens_per_row))
                too_large = rows if figures["fits"] is False else 0
            yield figures


def _point(settings: Settings, rows: int, remat: str, mesh: Mesh, tokens_per_row: float | None) -> Settings:
    size, data = rows * mesh[0] * mesh[1], settings.data
    if data.pack and tokens_per_row:
        # A fixed length: else batch_shape would choose another, and fewer rows than this point is about.
        data = dataclasses.replace(data, pack_length=data.pack_length or data.max_length)
        size = int(size * data.pack_length * FILLED / tokens_per_row)
    train = dataclasses.replace(settings.train, batch_size=size, accumulate=1, remat=remat)
    sizes = MeshSettings(*mesh, fsdp_inner=settings.mesh.fsdp_inner)
    return dataclasses.replace(settings, data=data, train=train, mesh=sizes)
