"""torch's .bin files, written without torch: the same archive and pickle instructions as torch.save's."""

import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


def text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def numbers(values):
    return b"(" + b"".join(number(value) for value in values) + b"t"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def tensor(array, key):
    storage = b"(" + text("storage") + name("torch", STORAGES[array.dtype]) + text(key) + text("cpu")
    storage += number(array.size) + b"tQ"
    strides = [stride // array.itemsize for stride in array.strides]
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = storage + number(0) + numbers(array.shape) + numbers(strides) + b"\x89" + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def write_bin(path, tensors, pickled=None, compression=zipfile.ZIP_STORED, **members):
    """`tensors` as torch.save(dict) writes them; `pickled` replaces the pickle, `members` add or replace files."""
    arrays = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
    items = b"".join(text(key) + tensor(array, str(index)) for index, (key, array) in enumerate(arrays.items()))
    files = {"data.pkl": b"\x80\x02}(" + items + b"u." if pickled is None else pickled, "byteorder": b"little"}
    files |= {f"data/{index}": array.tobytes() for index, array in enumerate(arrays.values())}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, content in (files | members).items():
            archive.writestr(f"archive/{member}", content)
    return str(path)
