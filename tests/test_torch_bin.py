"""torch's .bin files: read bit by bit without torch, and nothing in them is ever run."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from llava_jax.types import InputError
from llava_jax.weights.torch_bin import open_torch
from tests.torch_files import name, tensor, text, write_bin

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "b": RNG.normal(size=5).astype(ml_dtypes.bfloat16),
    "c": RNG.normal(size=(2, 1, 3)).astype(np.float16),
    "ids": np.arange(7)[None],
    "none": np.zeros((0, 2), np.float32),
}


def pickled(values):
    return b"\x80\x02}(" + values + b"u."


def test_tensors_are_bit_equal(tmp_path):
    file = open_torch(write_bin(tmp_path / "x.bin", TENSORS))
    assert list(file) == list(TENSORS)
    for key, array in TENSORS.items():
        found = file[key].get()
        assert found.shape == file[key].shape == array.shape and found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()
    assert file["b"].dtype == "BF16" and file["ids"].dtype == "I64"


def test_values_stay_in_the_file_until_they_are_used(tmp_path):
    values = open_torch(write_bin(tmp_path / "x.bin", TENSORS))["a.weight"].get()
    while not isinstance(values, np.memmap):
        values = values.base
    assert not values.flags.writeable


def test_strides_parameters_and_metadata(tmp_path):
    """A transposed tensor, an nn.Parameter, and the attribute _metadata of a module's state dict."""
    array = TENSORS["a.weight"]
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x0ctQ"
    rebuilt = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x01K\x03K\x02\x86K\x01K\x04\x86\x89}tR"
    parameter = name("torch._utils", "_rebuild_parameter") + rebuilt + b"\x88}\x87R"
    content = b"\x80\x02" + name("collections", "OrderedDict") + b")R(" + text("p") + parameter + b"u"
    content += b"}" + text("_metadata") + b"}sb."
    file = open_torch(write_bin(tmp_path / "x.bin", {"a": array}, content))
    np.testing.assert_array_equal(file["p"].get(), array.reshape(-1)[np.array([[1, 5], [2, 6], [3, 7]])])


class Runs:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("what", ["system", "eval", "nested"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, what, protocol):
    trace = tmp_path / "ran"
    hostile = {
        "system": lambda: Runs(os.system, f"touch {trace}"),
        "eval": lambda: Runs(eval, f"open({str(trace)!r}, 'w')"),
        "nested": lambda: {"weight": [Runs(getattr, Runs(__import__, "os"), "system")]},
    }[what]()
    content = pickle.dumps(hostile, protocol)
    says = dict(system=r"names (posix|os)\.system", eval=r"names (__builtin__|builtins)\.eval", nested="names ")[what]
    with pytest.raises(InputError, match=f"nothing in it was run: its pickle ({says}|holds the instruction)"):
        open_torch(write_bin(tmp_path / "x.bin", TENSORS, content))
    assert not trace.exists()


CALL = name("collections", "OrderedDict")
BROKEN = {
    "instance": (b"\x80\x02(" + text("id") + b"ios\nsystem\n.", "INST of 'os system'"),
    "new object": (b"\x80\x02" + CALL + b")\x81.", "NEWOBJ"),
    "state of a name": (b"\x80\x02" + CALL + b"}" + text("__code__") + b"Nsb.", "sets the state"),
    "state of a dict": (b"\x80\x02}}" + text("x") + b"Nsb.", "sets the state"),
    "call of a storage": (b"\x80\x02" + name("torch", "FloatStorage") + b")R.", "calls torch.FloatStorage"),
    "call of a value": (b"\x80\x02K\x01)R.", "calls a value"),
    "arguments": (b"\x80\x02" + CALL + b"K\x01\x85R.", "calls collections.OrderedDict"),
    "other storage": (pickled(text("a") + b"(" + text("module") + b"}}}}tQ"), "refers to something"),
    "no dict": (b"\x80\x02]K\x01a.", "no dict of tensors"),
    "more than tensors": (pickled(text("a") + b"K\x01" + text("steps") + b"K\x02"), "a, steps: not tensors"),
    "cut": (b"\x80\x02}(", "pickle is broken"),
    "empty stack": (b"\x80\x020.", "POP"),
    "no value": (b"\x80\x02R.", "pickle is broken"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_anything_but_tensors_is_refused(tmp_path, case):
    content, says = BROKEN[case]
    with pytest.raises(InputError, match=says):
        open_torch(write_bin(tmp_path / "x.bin", TENSORS, content))


def test_files_that_are_none(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    with pytest.raises(InputError, match="no zip archive, as torch 1.6"):
        open_torch(str(path))
    write_bin(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="no zip archive"):
        open_torch(str(path))
    with pytest.raises(InputError, match="compressed"):
        open_torch(write_bin(path, TENSORS, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match="big-endian"):
        open_torch(write_bin(path, TENSORS, byteorder=b"big"))
    with pytest.raises(InputError, match="a.weight has 8 bytes of 12 values"):
        open_torch(write_bin(path, TENSORS, **{"data/0": b"12345678"}))
    with pytest.raises(InputError, match="w has no data"):
        open_torch(write_bin(path, {}, pickled(text("w") + tensor(TENSORS["b"], "0"))))
    beyond = tensor(TENSORS["a.weight"], "0").replace(b"J\x03\0\0\0", b"J\x05\0\0\0")
    with pytest.raises(InputError, match="w reaches beyond its data"):
        open_torch(write_bin(path, TENSORS, pickled(text("w") + beyond)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "no model")
    with pytest.raises(InputError, match="without torch's data.pkl"):
        open_torch(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        open_torch(str(tmp_path / "nowhere.bin"))
