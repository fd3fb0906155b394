"""torch's .bin files without torch: the pickle inside is read as data, and nothing in it is ever run.

Such a file is a zip archive: `data.pkl` describes the tensors, `data/KEY` holds the bytes of a storage as they are. A
pickle is a program for a small stack machine, and what makes it dangerous are the few instructions that call what it
names. Here the instructions are taken from `pickletools.genops`, which only lists them; a name stays a string, and the
two calls that torch.save writes for a tensor are understood by name. Any other name or instruction is refused.
"""

import dataclasses
import functools
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from llava_jax.types import InputError
from llava_jax.weights.name_table import Stored

# Storage class -> safetensors' name of the dtype.
STORAGES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_ORDERED = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_NAMES = {_ORDERED, _TENSOR, _PARAMETER, *STORAGES}


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that the pickle names and nobody looks up."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor's values lie; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """What the pickle holds beyond tensors."""


def open_torch(path: str) -> dict[str, Stored]:
    """Return the tensors of one .bin file by name; `get` maps the bytes of one tensor and reads nothing else.

    Raises InputError for a file that is no zip archive, holds anything but a dict of tensors, or is cut short.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise InputError(f"{path}: a zip archive without torch's data.pkl; expected a .bin of torch.save")
            root = pickled[0].removesuffix("data.pkl")
            members = {member.filename: member for member in archive.infolist()}
            if root + "byteorder" in members and archive.read(root + "byteorder") != b"little":
                raise InputError(f"{path}: was written on a big-endian machine; save it again on another one")
            _check_plain(path, members[pickled[0]])
            content = archive.read(pickled[0])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path}: is no zip archive, as torch 1.6 and later write; it is cut short (download it again) or "
            "older (load it with torch and save it again)"
        ) from error
    stored = {}
    for name, tensor in _tensors(path, content).items():
        member = members.get(f"{root}data/{tensor.storage.key}")
        if member is None:
            raise InputError(f"{path}: {name} has no data in the archive; download it again")
        _check(path, name, tensor, member)
        stored[name] = Stored(tensor.shape, tensor.storage.dtype, functools.partial(_values, path, tensor, member))
    return stored


def _check_plain(path: str, member: zipfile.ZipInfo) -> None:
    if member.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: is compressed, which torch never does; save it again with torch.save")


def _check(path: str, name: str, tensor: _Tensor, member: zipfile.ZipInfo) -> None:
    """Raise InputError unless the tensor's values lie inside the bytes of its storage."""
    storage = tensor.storage
    _check_plain(path, member)
    if member.file_size != storage.size * np.dtype(NUMPY_DTYPES[storage.dtype]).itemsize:
        raise InputError(f"{path}: {name} has {member.file_size} bytes of {storage.size} values; broken file")
    ends = tensor.offset + _reach(tensor) if math.prod(tensor.shape) else 0
    sizes = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or min(sizes) < 0 or ends > storage.size:
        raise InputError(f"{path}: {name} reaches beyond its data; the file is broken")


def _values(path: str, tensor: _Tensor, member: zipfile.ZipInfo) -> np.ndarray:
    """Return the tensor, read-only, in the file's pages; they are let go with it."""
    dtype = np.dtype(NUMPY_DTYPES[tensor.storage.dtype])
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, dtype)
    # The bytes begin after the member's own header, which may be padded.
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    start = member.header_offset + 30 + name + extra
    if start + member.file_size > os.path.getsize(path):
        raise InputError(f"{path}: is cut short; download it again")
    values = np.memmap(path, dtype, "r", start + tensor.offset * dtype.itemsize, (_reach(tensor),))
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)


def _reach(tensor: _Tensor) -> int:
    """Count the elements from the tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=False))


# ---- the pickle, as data ----------------------------------------------------------------------------------------


def _tensors(path: str, content: bytes) -> dict[str, _Tensor]:
    try:
        value = _read(content)
    except _Refused as error:
        raise InputError(f"{path}: refused, nothing in it was run: its pickle {error}; expected tensors only") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its pickle is broken ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no dict of tensors; expected a state dict as torch.save writes it")
    others = [name for name, tensor in value.items() if not isinstance(tensor, _Tensor)]
    if others:
        raise InputError(f"{path}: {', '.join(others[:5])}: not tensors; expected a state dict, a tensor for each name")
    return value


class _Mark:
    pass


def _read(content: bytes) -> Any:
    """Return what the pickle describes: dicts, lists, tuples, numbers, strings and `_Tensor`s.

    Raises _Refused for anything else.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = len(stack) - 1
        while not isinstance(stack[start], _Mark):
            start -= 1  # IndexError where there is none
        items = stack[start + 1 :]
        del stack[start:]
        return items

    def popped(count: int) -> list[Any]:
        if count > len(stack):
            raise IndexError("too few values")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def fill(pairs: list[Any]) -> None:
        if not all(isinstance(key, str) for key in pairs[::2]):
            raise _Refused("has keys that are no strings")
        stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def build() -> None:
        # A state dict's attribute _metadata, the versions of its modules; nothing else has a state.
        (state,) = popped(1)
        if not (isinstance(stack[-1], dict) and isinstance(state, dict) and set(state) <= {"_metadata"}):
            raise _Refused("sets the state of an object")

    does: dict[str, Callable[[Any], Any]] = {
        "PROTO": lambda _: None,
        "FRAME": lambda _: None,
        "MARK": lambda _: stack.append(_Mark()),
        "NONE": lambda _: stack.append(None),
        "NEWTRUE": lambda _: stack.append(True),
        "NEWFALSE": lambda _: stack.append(False),
        "EMPTY_DICT": lambda _: stack.append({}),
        "EMPTY_LIST": lambda _: stack.append([]),
        "EMPTY_TUPLE": lambda _: stack.append(()),
        "TUPLE": lambda _: stack.append(tuple(since_mark())),
        "TUPLE1": lambda _: stack.append(tuple(popped(1))),
        "TUPLE2": lambda _: stack.append(tuple(popped(2))),
        "TUPLE3": lambda _: stack.append(tuple(popped(3))),
        "APPEND": lambda _: (items := popped(1), stack[-1].extend(items)),
        "APPENDS": lambda _: (items := since_mark(), stack[-1].extend(items)),
        "SETITEM": lambda _: fill(popped(2)),
        "SETITEMS": lambda _: fill(since_mark()),
        "MEMOIZE": lambda _: memo.update({len(memo): stack[-1]}),
        "GLOBAL": lambda name: stack.append(_named(name)),
        "STACK_GLOBAL": lambda _: stack.append(_named(" ".join(popped(2)))),
        "BINPERSID": lambda _: stack.append(_storage(*popped(1))),
        "REDUCE": lambda _: stack.append(_called(*popped(2))),
        "BUILD": lambda _: build(),
    }
    literals = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in literals:
            stack.append(argument)
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name in does:
            does[opcode.name](argument)
        elif opcode.name != "STOP":
            named = f" of {argument!r}" if opcode.name == "INST" else ""
            raise _Refused(f"holds the instruction {opcode.name}{named}")
    (value,) = stack
    return value


def _named(text: str) -> _Name:
    if text not in _NAMES:
        raise _Refused(f"names {'.'.join(text.split(' '))}")
    return _Name(text)


def _storage(given: Any) -> _Storage:
    kind, name, key, _, size = given
    if kind != "storage" or not isinstance(name, _Name) or name.text not in STORAGES:
        raise _Refused("refers to something outside that is no storage")
    if not (isinstance(key, str) and isinstance(size, int)):
        raise ValueError("a storage without key or size")
    return _Storage(STORAGES[name.text], key, size)


def _called(function: Any, arguments: Any) -> Any:
    """Return what a call in the pickle gives: the one meaning of each name that torch.save calls."""
    name = function.text if isinstance(function, _Name) else ""
    if name == _ORDERED and arguments == ():
        return {}
    if name == _TENSOR:
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Storage) or not all(isinstance(x, int) for x in (offset, *shape, *strides)):
            raise ValueError("a tensor that is none")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))
    if name == _PARAMETER and isinstance(arguments[0], _Tensor):
        return arguments[0]
    raise _Refused(f"calls {name.replace(' ', '.') or 'a value'}")
