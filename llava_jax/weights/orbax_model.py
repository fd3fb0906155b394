"""A whole model as an orbax checkpoint: our parameters, and next to them the tensors that LLaVA does not run.

It lies in the folder `weights` of a model folder, whose other files are those of an export to Hugging Face.
"""

import functools
import glob
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_jax.types import InputError
from llava_jax.weights import name_table
from llava_jax.weights.source import WEIGHTS, first_line

# What the tree in it holds: our nested dict, and {hub name: tensor}.
PARAMS, BEYOND = "params", "beyond"
SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16"}


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


def open_tensors(folder: str) -> dict[str, name_table.Stored]:
    """Return the tensors of such a folder under the hub's names. Raises InputError when it cannot be read."""
    import orbax.checkpoint as ocp
    import tensorstore
    from etils import epath

    where = os.path.abspath(os.path.join(folder, WEIGHTS))
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": where + os.sep}}
    try:
        # orbax leaves a traceback behind where this fails.
        tensorstore.KvStore.open(store).result().list().result()
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(where)).tree
    except (ValueError, OSError, KeyError) as error:
        raise _broken(where, error) from error

    def get(leaf: Any, row: name_table.Row | None, layer: int | None) -> np.ndarray:
        """Return the tensor, read through tensorstore: orbax itself restores a stack of layers only as a whole."""
        try:
            kvstore = store | {"path": leaf.name + "/"}
            array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
            values = (array if layer is None else array[layer]).read().result()
        except ValueError as error:
            raise _broken(where, error) from error
        return name_table.to_hf(row, values) if row else values

    stored = {}
    for path, leaf in {**name_table.flatten(tree.get(PARAMS, {})), **tree.get(BEYOND, {})}.items():
        row, dtype = name_table.ROWS.get(path), str(np.dtype(leaf.dtype))
        for layer in range(leaf.shape[0]) if row and row.stacked else (None,):
            name, shape = path, tuple(leaf.shape)
            if row:
                name, shape = row.hf.format(layer), name_table.hf_shape(row, shape[0 if layer is None else 1 :])
            values = functools.partial(get, leaf, row, layer)
            stored[name] = name_table.Stored(shape, SAFETENSORS_NAMES.get(dtype, dtype), values)
    return stored


def _broken(where: str, error: BaseException) -> InputError:
    return InputError(f"{where}: cannot be read ({first_line(error)}); convert the model again")
