"""A whole model as an orbax checkpoint: our parameters, and beside them the tensors that LLaVA does not run.

It lies in the folder `weights` of a model folder, whose other files are those of an export to Hugging Face.
"""

import glob
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_jax.convert import table
from llava_jax.types import InputError

WEIGHTS = "weights"
# What the tree in it holds: our nested dict, and {hub name: tensor}.
PARAMS, BEYOND = "params", "beyond"
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def is_converted(folder: str) -> bool:
    """Whether a folder is a whole model that we wrote as orbax, by what lies in it."""
    return os.path.isfile(os.path.join(folder, WEIGHTS, "_METADATA"))


def files(folder: str) -> list[str]:
    """The files of such a folder that hold its tensors."""
    paths = glob.glob(os.path.join(glob.escape(folder), WEIGHTS, "**"), recursive=True)
    return sorted(path for path in paths if os.path.isfile(path))


def save(folder: str, params: Mapping[str, Any], beyond: Mapping[str, np.ndarray]) -> None:
    """Write both (numpy arrays) into `folder`."""
    import orbax.checkpoint as ocp  # seconds that only who reads or writes such a folder should wait for

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        item = {PARAMS: params, BEYOND: beyond} if beyond else {PARAMS: params}
        checkpointer.save(os.path.abspath(os.path.join(folder, WEIGHTS)), args=ocp.args.PyTreeSave(item))


class OrbaxFile:
    """The tensors of such a folder under the hub's names; InputError when it cannot be read.

    A parameter is read when one of its layers is first asked for, and kept until another parameter is.
    """

    def __init__(self, folder: str):
        import orbax.checkpoint as ocp
        from etils import epath

        self._path = epath.Path(os.path.abspath(os.path.join(folder, WEIGHTS)))
        self._handler, self._unreadable = ocp.PyTreeCheckpointHandler(), (ValueError, OSError, KeyError)
        try:
            tree = self._handler.metadata(self._path).tree
        except self._unreadable as error:
            raise self._broken(error) from error
        self._leaves = {**table.flatten(tree.get(PARAMS, {})), **tree.get(BEYOND, {})}
        # Hub name -> our path or the name again, and the layer where that is a stack.
        self._place: dict[str, tuple[str, int | None]] = {}
        for path, leaf in self._leaves.items():
            row = table.ROWS.get(path)
            for layer in range(leaf.shape[0]) if row and row.stacked else (None,):
                self._place[row.hf.format(layer) if row else path] = path, layer
        self._read: tuple[str, np.ndarray] | None = None

    def keys(self) -> list[str]:
        return list(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        path, layer = self._place[name]
        shape = tuple(self._leaves[path].shape)
        return table.hf_shape(table.ROWS[path], shape[0 if layer is None else 1 :]) if path in table.ROWS else shape

    def dtype(self, name: str) -> str:
        given = str(np.dtype(self._leaves[self._place[name][0]].dtype))
        return DTYPES.get(given, given)

    def get(self, name: str) -> np.ndarray:
        path, layer = self._place[name]
        array = self._leaf(path)
        return table.to_hf(table.ROWS[path], array if layer is None else array[layer]) if path in table.ROWS else array

    def _leaf(self, path: str) -> np.ndarray:
        import jax
        import orbax.checkpoint as ocp

        if self._read is None or self._read[0] != path:
            self._read = None  # the one before goes before the next comes
            leaf = self._leaves[path]
            keys = [PARAMS, *path.split("/")] if path in table.ROWS else [BEYOND, path]
            item: Any = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
            for key in reversed(keys):
                item, how = {key: item}, {key: how}
            try:
                args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
                found = self._handler.restore(self._path, args=args)
            except self._unreadable as error:
                raise self._broken(error) from error
            self._read = path, jax.tree.leaves(found)[0]
        return self._read[1]

    def _broken(self, error: BaseException) -> InputError:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return InputError(f"{self._path}: cannot be read ({line}); convert the model again")
