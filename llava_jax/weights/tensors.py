"""Model folders of weight files: one file or shards with an index, read tensor by tensor and written in shards.

Read are .safetensors, torch's .bin files and what we wrote as orbax; written are .safetensors.
"""

import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping

import absl.logging
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llava_jax.io import LFS_POINTER, WRITE_ERRORS, is_lfs_pointer, no_room
from llava_jax.types import InputError
from llava_jax.weights import orbax_model
from llava_jax.weights.hf_config import PLACES, read_json, write_json
from llava_jax.weights.name_table import Stored
from llava_jax.weights.source import is_converted
from llava_jax.weights.torch_bin import NUMPY_DTYPES, open_torch

SINGLE, INDEX = PLACES["weights"]
TORCH_SINGLE, TORCH_INDEX = PLACES["weights where there are no safetensors"]
SHARD_BYTES = 5_000_000_000
FLOATS = {"F32", "F16", "BF16"}


def _open_safetensors(path: str) -> dict[str, Stored]:
    """Open the tensors of one .safetensors file. Raises InputError when it is broken.

    Each tensor is mapped by itself, so that the pages of one that was read do not stay in memory.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is cut short or no safetensors file ({error}); download it again") from error
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))

    def get(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        if dtype not in NUMPY_DTYPES:
            raise InputError(f"{path}: {name} is {dtype}, which is not read; expected one of {', '.join(NUMPY_DTYPES)}")
        if not math.prod(shape):
            return np.zeros(shape, NUMPY_DTYPES[dtype])
        first = 8 + size + header[name]["data_offsets"][0]
        return np.asarray(np.memmap(path, NUMPY_DTYPES[dtype], "r", first, shape or (1,))).reshape(shape)

    stored = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        shape, dtype = tuple(about["shape"]), about["dtype"]
        stored[name] = Stored(shape, dtype, functools.partial(get, name, shape, dtype))
    return stored


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a folder or file by name; nothing is read before it is asked for."""

    where: str
    stored: Mapping[str, Stored]

    def names(self) -> list[str]:
        return sorted(self.stored)

    def __getitem__(self, name: str) -> Stored:
        return self.stored[name]

    def joined(self, other: Mapping[str, Stored], where: str) -> "Tensors":
        """Return these and the other's in one; of two with one name the other's is taken."""
        return Tensors(where, {**self.stored, **other})


def _opened(path: str) -> dict[str, Stored]:
    try:
        return _open_safetensors(path) if path.endswith(".safetensors") else open_torch(path)
    except InputError:
        if os.path.isfile(path) and is_lfs_pointer(path):
            raise InputError(f"{path}: {LFS_POINTER}") from None
        raise


def open_file(path: str) -> Tensors:
    """Open all tensors of one .safetensors or .bin file."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; expected a .safetensors or .bin file")
    return Tensors(path, _opened(path))


def weight_files(folder: str) -> list[str]:
    """Return the files that hold a model folder's tensors, none where it has none: orbax, safetensors, or else .bin."""
    if is_converted(folder):
        return orbax_model.files(folder)
    index, single = _layout(folder)
    if index:
        return sorted(set(_indexed(folder, index).values()))
    return [os.path.join(folder, single)] if single else _shards(folder)


def _shards(folder: str) -> list[str]:
    """Return the shards of a folder that lacks their index, which only repeats what they hold; all of them, or none."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        found = sorted(glob.glob(os.path.join(glob.escape(folder), f"{stem}-?????-of-?????.{ending}")))
        if not found:
            continue
        total = os.path.basename(found[0]).partition("-of-")[2].removesuffix(f".{ending}")
        wanted = [os.path.join(folder, f"{stem}-{n:05d}-of-{total}.{ending}") for n in range(1, int(total) + 1)]
        if found != wanted:
            absent = ", ".join(os.path.basename(path) for path in wanted if path not in found)
            raise InputError(f"{folder}: has shards without an index, and of {total} absent: {absent}; download them")
        return found
    return []


def _layout(folder: str) -> tuple[str, str]:
    """Return (name of the index, name of the only file), the first of them that is there, the other empty."""
    for single, index in ((SINGLE, INDEX), (TORCH_SINGLE, TORCH_INDEX)):
        if os.path.isfile(os.path.join(folder, single)):
            return "", single
        if os.path.isfile(os.path.join(folder, index)):
            return index, ""
    return "", ""


def open_folder(folder: str) -> Tensors:
    """Open all tensors of a model folder: model.safetensors or pytorch_model.bin, an index's shards, or orbax."""
    if is_converted(folder):
        return Tensors(folder, orbax_model.open_tensors(folder))
    files = {path: _opened(path) for path in weight_files(folder)}
    if not files:
        raise InputError(
            f"{folder}: has neither {SINGLE} nor {INDEX} (nor {TORCH_SINGLE} nor {TORCH_INDEX}); expected a Hugging "
            "Face model folder"
        )
    index, _ = _layout(folder)
    path_of = _indexed(folder, index) if index else {}
    absent = [name for name, path in path_of.items() if name not in files[path]]
    if absent:
        raise InputError(
            f"{folder}: {index} lists tensors that their shards do not hold ({', '.join(sorted(absent)[:5])}"
            f"{' …' if len(absent) > 5 else ''}); download the folder again"
        )
    # What a shard holds beyond the index counts, too: it may be what the index forgot, or what nobody expects.
    held = {name: found for stored in files.values() for name, found in stored.items()}
    return Tensors(folder, held | {name: files[path][name] for name, path in path_of.items()})


def _indexed(folder: str, index: str) -> dict[str, str]:
    """Return {tensor name: path of its shard}, as the index says. Raises InputError when shards are absent."""
    weight_map = read_json(os.path.join(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{os.path.join(folder, index)}: has no weight_map; download it again")
    shards = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise InputError(
                f"{os.path.join(folder, index)}: {name} is said to be in {shard!r:.80}; expected the name of a file in "
                "the folder"
            )
        shards.add(shard)
    absent = sorted(shard for shard in shards if not os.path.isfile(os.path.join(folder, shard)))
    if absent:
        raise InputError(f"{folder}: {index} lists shards that are absent: {', '.join(absent)}; download them")
    return {name: os.path.join(folder, shard) for name, shard in weight_map.items()}


# ---- writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def enough_room(path: str) -> Iterator[None]:
    """Raise InputError that names `path` in place of what the libraries raise when the disk is full."""
    # orbax writes tracebacks to stderr of what it raises as well.
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        yield
    except WRITE_ERRORS as error:
        if not no_room(error):
            raise
        raise InputError(f"{path}: cannot be written ({no_room(error)}); make room, run again") from error
    finally:
        absl.logging.set_verbosity(verbosity)


def save_tensors(path: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a .safetensors file that others can read, too: safetensors leaves it to its owner alone."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    os.chmod(path, 0o644)


def save_checked(path: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a .safetensors file, read it back and compare every tensor."""
    save_tensors(path, tensors)
    written = open_file(path)
    for name, tensor in tensors.items():
        if written[name].get().tobytes() != tensor.tobytes():
            raise OSError(f"{path}: {name} read back differs from what was written")


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

    def array(self) -> np.ndarray:
        array = np.ascontiguousarray(self.make(), dtype=self.dtype)
        if array.shape != self.shape:
            raise ValueError(f"{self.name}: made {array.shape}, planned {self.shape}")
        return array


def write_shards(folder: str, pieces: Iterable[Piece], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` (a larger tensor has its own) with their index."""
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
        save_tensors(path, {piece.name: piece.array() for piece in shard})
        weight_map |= {piece.name: file for piece in shard}
    if len(shards) > 1:
        total = sum(piece.nbytes for shard in shards for piece in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder, INDEX, index)


def check_written(folder: str, pieces: Iterable[Piece]) -> None:
    """Read the folder back and compare every tensor bit by bit; a difference means the disk failed us."""
    written = open_folder(folder)
    pieces = list(pieces)
    if written.names() != sorted(piece.name for piece in pieces):
        raise OSError(f"{folder}: the tensors read back are not those written")
    for piece in pieces:
        found, wanted = written[piece.name].get(), piece.array()
        if found.dtype != wanted.dtype or found.shape != wanted.shape or found.tobytes() != wanted.tobytes():
            raise OSError(f"{folder}: {piece.name} read back differs from what was written")
