"""A large import never lies in host memory: parameters go from the file to the devices a layer at a time."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from llava_jax.models.layers import turned
from llava_jax.models.llava import build, logical_axes
from llava_jax.parallel import sharding
from llava_jax.parallel.sharding import make_mesh, param_shardings, place
from llava_jax.types import ClipConfig, LlamaConfig, MeshSettings, ModelConfig
from llava_jax.weights import hf, name_table
from llava_jax.weights.hf_config import llama_json
from tests.test_original import write_config
from tests.torch_files import write_bin

# The proportions of Vicuna-13B, whose largest tensor is the embedding: a layer's is less than half of it.
LLAMA = LlamaConfig(vocab_size=800, width=128, mlp_width=344, layers=24, heads=8, kv_heads=8, head_dim=16)
CLIP = ClipConfig(width=8, mlp_width=8, layers=2, heads=1, image_size=8, patch_size=8)
MODEL = ModelConfig(vision=CLIP, llm=LLAMA)
LARGEST = 800 * 128


@pytest.fixture(autouse=True)
def nothing_at_once(monkeypatch):
    monkeypatch.setattr(sharding, "AT_ONCE", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder of 24 layers in two forms, in bfloat16."""
    folder = tmp_path_factory.mktemp("m")
    rng = np.random.default_rng(0)
    tensors = {}
    for path, leaf in name_table.flatten(build(MODEL)[1]["llm"]).items():
        row = name_table.ROWS["llm/" + path]
        shape = name_table.hf_shape(row, leaf.shape[1:] if row.stacked else leaf.shape)
        for layer in range(leaf.shape[0] if row.stacked else 1):
            name = row.hf.format(layer).replace("language_model.", "")
            tensors[name] = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
    for form, save in (
        ("s", lambda f: save_file(tensors, f / "model.safetensors")),
        ("b", lambda f: write_bin(f / "pytorch_model.bin", tensors)),
    ):
        write_config(folder / form, llama_json(LLAMA))
        save(folder / form)
    return folder


def shardings(mesh):
    return param_shardings(logical_axes(MODEL), build(MODEL)[1], mesh)["llm"]


@pytest.mark.parametrize("form, dtype", [("s", "bfloat16"), ("b", "float32")])
def test_the_host_holds_one_tensor_at_a_time(folder, form, dtype):
    """numpy's memory next to what the arrays keep, at its highest: less than 1.5 times the largest tensor."""
    at = shardings(make_mesh(MeshSettings(1, -1, 1)))
    stored = hf.read_llama(str(folder / form), dtype=dtype, lazy=True)[1]
    place(stored, at)  # what is compiled once is not the import's
    tracemalloc.start()
    placed = jax.block_until_ready(place(stored, at))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize
    assert peak - kept < 1.5 * LARGEST * size
    whole = hf.read_llama(str(folder / form), dtype=dtype)[1]
    for path, array in name_table.flatten(whole).items():
        found = name_table.flatten(placed)[path]
        assert found.dtype == array.dtype and np.asarray(found).tobytes() == array.tobytes(), path
    jax.tree.map(lambda x, where: x.sharding.is_equivalent_to(where, x.ndim) or pytest.fail(str(where)), placed, at)


def test_the_measurement_sees_a_part_that_is_made_whole(folder):
    tracemalloc.start()
    whole = hf.read_llama(str(folder / "s"), dtype="bfloat16")[1]
    place(whole, shardings(make_mesh(MeshSettings(1, -1, 1))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak > 10 * 1.5 * LARGEST * 2


def test_one_device_with_turned_kernels(folder):
    stored = turned(hf.read_llama(str(folder / "s"), lazy=True)[1])
    at = SingleDeviceSharding(jax.devices()[0])
    placed = place(stored, jax.tree.map(lambda _: at, stored))
    whole = turned(hf.read_llama(str(folder / "s"))[1])
    for path, array in name_table.flatten(whole).items():
        np.testing.assert_array_equal(name_table.flatten(placed)[path], array)
