"""Model folders of safetensors files: one file or shards with an index, read tensor by tensor and written in shards."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llava_jax.convert.config import read_json
from llava_jax.types import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
FLOATS = {"F32", "F16", "BF16"}


class Tensors:
    """The tensors of a folder or file by name; nothing is read before it is asked for.

    Files are opened once each and stay memory-mapped while the object lives.
    """

    def __init__(self, where: str, file_of: dict[str, str]):
        self.where = where
        self._file_of = file_of
        self._open = {path: _opened(path) for path in sorted(set(file_of.values()))}
        absent = [name for name, path in file_of.items() if name not in self._open[path].keys()]
        if absent:
            raise InputError(
                f"{where}: {INDEX} lists tensors that their shards do not hold ({', '.join(sorted(absent)[:5])}"
                f"{' …' if len(absent) > 5 else ''}); download the folder again"
            )

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype, e.g. BF16."""
        return self._slice(name).get_dtype()

    def get(self, name: str) -> np.ndarray:
        return self._open[self._file_of[name]].get_tensor(name)

    def _slice(self, name: str):
        return self._open[self._file_of[name]].get_slice(name)


def _opened(path: str):
    try:
        return safe_open(path, framework="numpy").__enter__()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); download it again") from error


def open_file(path: str) -> Tensors:
    """All tensors of one .safetensors file."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; expected a .safetensors file")
    return Tensors(path, dict.fromkeys(_opened(path).keys(), path))


def open_folder(folder: str) -> Tensors:
    """All tensors of a model folder: model.safetensors, or the shards its index names."""
    index = os.path.join(folder, INDEX)
    single = os.path.join(folder, SINGLE)
    if os.path.isfile(index):
        return Tensors(folder, _indexed(folder, index))
    if os.path.isfile(single):
        return Tensors(folder, dict.fromkeys(_opened(single).keys(), single))
    pickled = sorted(name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        raise InputError(
            f"{folder}: has {pickled[0]} but no safetensors; load it with transformers and save it again "
            "(save_pretrained writes model.safetensors)"
        )
    raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}; expected a Hugging Face model folder")


def _indexed(folder: str, index: str) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; download it again")
    shards = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise InputError(f"{index}: {name} is said to be in {shard!r}; expected the name of a file in the folder")
        shards.add(shard)
    absent = sorted(shard for shard in shards if not os.path.isfile(os.path.join(folder, shard)))
    if absent:
        raise InputError(f"{folder}: {INDEX} lists shards that are absent: {', '.join(absent)}; download them")
    return {name: os.path.join(folder, shard) for name, shard in weight_map.items()}


# ---- writing ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor to write: made only when its shard is written, so that one shard at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: str, pieces: Iterable[Piece], shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or shards of at most `shard_bytes` (a larger tensor has its own) with their index."""
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + piece.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(piece)
    if len(shards) == 1:
        files = [SINGLE]
    else:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        path = os.path.join(folder, file)
        save_file({piece.name: _made(piece) for piece in shard}, path, metadata={"format": "pt"})
        # safetensors leaves it readable by its owner alone, which keeps a server from loading it.
        os.chmod(path, 0o644)
        weight_map |= {piece.name: file for piece in shard}
    if len(shards) > 1:
        total = sum(piece.nbytes for shard in shards for piece in shard)
        with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2, sort_keys=True)


def check_written(folder: str, pieces: Iterable[Piece]) -> None:
    """Read the folder back and compare every tensor bit by bit; a difference means the disk failed us."""
    written = open_folder(folder)
    pieces = list(pieces)
    if written.names() != sorted(piece.name for piece in pieces):
        raise OSError(f"{folder}: the tensors read back are not those written")
    for piece in pieces:
        found, wanted = written.get(piece.name), _made(piece)
        if found.dtype != wanted.dtype or found.shape != wanted.shape or found.tobytes() != wanted.tobytes():
            raise OSError(f"{folder}: {piece.name} read back differs from what was written")


def _made(piece: Piece) -> np.ndarray:
    array = np.ascontiguousarray(piece.make(), dtype=piece.dtype)
    if array.shape != piece.shape:
        raise ValueError(f"{piece.name}: made {array.shape}, planned {piece.shape}")
    return array
