"""A parameter that still lies in files: its shape and dtype are known, its values are read a layer at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter in our layout, in the place of its numpy array.

    shape, dtype  of the array; where `stacked`, its first axis counts layers
    one           layer -> that layer's values in our layout, as the file has them (0 where nothing is stacked)
    An index gives a layer in `dtype`, `np.asarray` the whole array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    one: Callable[[int], np.ndarray]

    def __getitem__(self, layer: int) -> np.ndarray:
        return np.asarray(self.one(layer), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype if dtype is None else dtype)
        if self.stacked:
            for layer in range(self.shape[0]):
                array[layer] = self.one(layer)
        else:
            array[...] = self.one(0)
        return array
