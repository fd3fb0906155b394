"""What an import of Vicuna-13B's size holds in host memory next to the arrays it makes.

`python -m tests.measure_streaming --folder=DIR --layers=6 --dtype=bfloat16` writes a decoder of 13B's widths with so
many of its 40 blocks (the most held at once does not depend on their number), reads it as `load`, `convert` and `train`
do, and samples the memory of the process. On a CPU the arrays lie in the same memory; they are taken off.
"""

import argparse
import pathlib
import threading
import time
import tracemalloc

import jax
import ml_dtypes
import numpy as np

from llava_jax.models.llava import build, logical_axes
from llava_jax.parallel.sharding import make_mesh, param_shardings, place
from llava_jax.types import ClipConfig, LlamaConfig, MeshSettings, ModelConfig
from llava_jax.weights import hf, name_table
from llava_jax.weights.hf_config import llama_json
from llava_jax.weights.tensors import Piece, write_shards
from tests.test_original import write_config
from tests.torch_files import write_bin

CLIP = ClipConfig(width=8, mlp_width=8, layers=2, heads=1, image_size=8, patch_size=8)


def decoder(layers: int) -> LlamaConfig:
    return LlamaConfig(32000, 5120, 13824, layers, 40, 40, 128, max_positions=4096)


def write(folder: pathlib.Path, config: LlamaConfig, form: str) -> None:
    """The decoder in bfloat16, random bits, in shards of 5 GB or one .bin."""
    rng = np.random.default_rng(0)
    pieces = []
    for path, leaf in name_table.flatten(build(ModelConfig(CLIP, config))[1]["llm"]).items():
        row = name_table.ROWS["llm/" + path]
        shape = name_table.hf_shape(row, leaf.shape[1:] if row.stacked else leaf.shape)
        for layer in range(config.layers if row.stacked else 1):
            name = row.hf.format(layer).removeprefix("language_model.")

            def make(shape=shape) -> np.ndarray:
                return np.frombuffer(rng.bytes(2 * int(np.prod(shape))), ml_dtypes.bfloat16).reshape(shape)

            pieces.append(Piece(name, shape, np.dtype(ml_dtypes.bfloat16), make))
    write_config(folder, llama_json(config))
    if form == "bin":
        write_bin(folder / "pytorch_model.bin", {piece.name: piece.make() for piece in pieces})
    else:
        write_shards(str(folder), pieces)


def anonymous() -> int:
    """Bytes of memory that the process has written itself; pages of files are not counted."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; this needs Linux")


class Peak(threading.Thread):
    """The largest `anonymous()` between start and stop, looked at every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._done = 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.bytes


def measure(folder: pathlib.Path, config: LlamaConfig, dtype: str) -> None:
    model = ModelConfig(CLIP, config)
    at = param_shardings(logical_axes(model), build(model)[1], make_mesh(MeshSettings(1, -1, 1)))["llm"]
    stored = hf.read_llama(str(folder), dtype=dtype, lazy=True)[1]
    jax.tree.map(lambda x: x.delete(), place(stored, at))  # compiles what is compiled once
    before, peak = anonymous(), Peak()
    peak.start()
    tracemalloc.start()
    start = time.perf_counter()
    placed = jax.block_until_ready(place(stored, at))
    seconds = time.perf_counter() - start
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = sum(x.nbytes for x in jax.tree.leaves(placed))
    extra = peak.stop() - before - arrays
    itemsize = jax.tree.leaves(placed)[0].dtype.itemsize
    largest = config.vocab_size * config.width * itemsize
    print(
        f"{config.layers} blocks, {dtype}: arrays {arrays / 1e9:.2f} GB in {seconds:.1f} s, largest tensor "
        f"{largest / 1e6:.0f} MB; next to the arrays at most {extra / 1e6:.0f} MB in the process "
        f"({extra / largest:.2f} x), {(most - kept) / 1e6:.0f} MB in numpy ({(most - kept) / largest:.2f} x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--form", default="safetensors", choices=("safetensors", "bin"))
    args = parser.parse_args()
    config = decoder(args.layers)
    folder = args.folder / f"{args.form}-{args.layers}"
    if not folder.exists():
        write(folder, config, args.form)
    measure(folder, config, args.dtype)


if __name__ == "__main__":
    main()
