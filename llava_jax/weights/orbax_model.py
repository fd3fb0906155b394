"""A whole model as an orbax checkpoint: our parameters, and next to them the tensors that LLaVA does not run.

It lies in the folder `weights` of a model folder, whose other files are those of an export to Hugging Face.
"""

import glob
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_jax.types import InputError
from llava_jax.weights import name_table
from llava_jax.weights.source import WEIGHTS

# What the tree in it holds: our nested dict, and {hub name: tensor}.
PARAMS, BEYOND = "params", "beyond"
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def files(folder: str) -> list[str]:
    """Return the files of such a folder that hold its tensors."""
    paths = glob.glob(os.path.join(glob.escape(folder), WEIGHTS, "**"), recursive=True)
    return sorted(path for path in paths if os.path.isfile(path))


def save(folder: str, params: Mapping[str, Any], beyond: Mapping[str, np.ndarray]) -> None:
    """Write both (numpy arrays) into `folder`, each large layer of a stack as a piece that can be read by itself."""
    # Seconds of import that only who reads or writes such a folder should wait for.
    import jax
    import orbax.checkpoint as ocp

    def pieces(path: tuple, leaf: np.ndarray) -> ocp.SaveArgs:
        row = name_table.ROWS.get("/".join(key.key for key in path[1:]))
        layer_bytes = leaf.nbytes // leaf.shape[0] if row and row.stacked else 0
        return ocp.SaveArgs(chunk_byte_size=layer_bytes, shard_axes=(0,)) if layer_bytes >= 2**20 else ocp.SaveArgs()

    item = {PARAMS: params, BEYOND: beyond} if beyond else {PARAMS: params}
    args = ocp.args.PyTreeSave(item, save_args=jax.tree_util.tree_map_with_path(pieces, item))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(os.path.abspath(os.path.join(folder, WEIGHTS)), args=args)


class OrbaxFile:
    """The tensors of such a folder under the hub's names; InputError when it cannot be read."""

    def __init__(self, folder: str):
        import orbax.checkpoint as ocp
        import tensorstore
        from etils import epath

        self._path = os.path.abspath(os.path.join(folder, WEIGHTS))
        self._store = {"driver": "ocdbt", "base": {"driver": "file", "path": self._path + os.sep}}
        try:
            # orbax leaves a traceback behind where this fails.
            tensorstore.KvStore.open(self._store).result().list().result()
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self._path)).tree
        except (ValueError, OSError, KeyError) as error:
            raise self._broken(error) from error
        self._leaves = {**name_table.flatten(tree.get(PARAMS, {})), **tree.get(BEYOND, {})}
        # Hub name -> our path or the name again, and the layer where that is a stack.
        self._place: dict[str, tuple[str, int | None]] = {}
        for path, leaf in self._leaves.items():
            row = name_table.ROWS.get(path)
            for layer in range(leaf.shape[0]) if row and row.stacked else (None,):
                self._place[row.hf.format(layer) if row else path] = path, layer

    def keys(self) -> list[str]:
        return list(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        path, layer = self._place[name]
        shape = tuple(self._leaves[path].shape)
        return (
            name_table.hf_shape(name_table.ROWS[path], shape[0 if layer is None else 1 :])
            if path in name_table.ROWS
            else shape
        )

    def dtype(self, name: str) -> str:
        given = str(np.dtype(self._leaves[self._place[name][0]].dtype))
        return DTYPES.get(given, given)

    def get(self, name: str) -> np.ndarray:
        """Return the tensor, read through tensorstore: orbax itself restores a stack of layers only as a whole."""
        import tensorstore

        path, layer = self._place[name]
        store = self._store | {"path": self._leaves[path].name + "/"}
        try:
            array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
            values = (array if layer is None else array[layer]).read().result()
        except ValueError as error:
            raise self._broken(error) from error
        return name_table.to_hf(name_table.ROWS[path], values) if path in name_table.ROWS else values

    def _broken(self, error: BaseException) -> InputError:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return InputError(f"{self._path}: cannot be read ({line}); convert the model again")
