"""A decoder that learns through adapters, outside the step: kernels into four bits, adapters into kernels."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_jax.layers import Linear
from llava_jax.models.llava import Llava
from llava_jax.models.lora import linears, merged
from llava_jax.models.nf4 import dequantise, quantise
from llava_jax.train.hosts import place
from llava_jax.types import ModelConfig

Params = dict[str, Any]


def place_quantised(config: ModelConfig, llm: Params, at: Params) -> Params:
    """The decoder (numpy) with the kernels of its blocks in four bits, placed at the shardings `at`.

    Each kernel is first placed as it is, split over the devices as its codes will be, and quantised there.
    """
    kernels, rest_at = {}, at
    for name, linear in _linears(config):
        where = _get(at, name)["kernel"]
        plain = place(_get(llm, name)["kernel"], where["codes"])
        shardings = where["codes"], where["scale"]
        codes, scale = jax.jit(functools.partial(_quantised, linear), out_shardings=shardings)(plain)
        kernels[name] = {"codes": codes, "scale": scale}
        llm, rest_at = _with_kernel(llm, name, None), _with_kernel(rest_at, name, None)
    placed = place(llm, rest_at)
    for name, kernel in kernels.items():
        placed = _with_kernel(placed, name, kernel)
    return placed


def merge_adapters(config: ModelConfig, llm: Params, lora: Params, dtype: str) -> Params:
    """The decoder (numpy, `dtype`) that computes what `llm` with the adapters `lora` does: W + alpha/rank A B.

    With `config.nf4` W is the kernel that its four bits stand for: what the adapters were trained on.
    """
    for name, linear in _linears(config):
        kernel = _get(llm, name)["kernel"]
        if config.nf4:
            rounded = _rounded(linear)
            kernel = np.stack([rounded(layer) for layer in kernel])
        if name in config.lora.targets:
            adapter = _get(lora, name)
            kernel = merged(kernel, adapter["a"], adapter["b"], config.lora.scale, jnp.dtype(dtype))
        llm = _with_kernel(llm, name, kernel)
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), llm)


def _linears(config: ModelConfig) -> Iterator[tuple[str, Linear]]:
    """The linear layers of the plain decoder, without weights."""
    plain = dataclasses.replace(config, lora=None, nf4=False)
    return linears(nnx.eval_shape(lambda: Llava(plain, rngs=nnx.Rngs(0))).llm)


def _quantised(linear: Linear, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A stacked kernel, one layer at a time, so that only one is there in float32."""
    return jax.lax.map(lambda one: quantise(one, linear.axes, linear.in_dims), kernel)


def _rounded(linear: Linear) -> Callable[[np.ndarray], np.ndarray]:
    """One layer's kernel in float32 as its four bits stand for it."""

    @jax.jit
    def rounded(kernel: jax.Array) -> jax.Array:
        codes, scale = quantise(kernel, linear.axes, linear.in_dims)
        return dequantise(codes, scale, linear.axes, linear.in_dims, jnp.float32)

    return lambda kernel: np.asarray(rounded(kernel))


def _get(llm: Params, name: str) -> Params:
    room, layer = name.split("/")
    return llm["layers"][room][layer]


def _with_kernel(llm: Params, name: str, kernel: Any) -> Params:
    """The tree with another kernel in one linear layer; None takes it out."""
    room, layer = name.split("/")
    layers = llm["layers"]
    leaves = {key: leaf for key, leaf in layers[room][layer].items() if key != "kernel"}
    leaves |= {} if kernel is None else {"kernel": kernel}
    return llm | {"layers": layers | {room: layers[room] | {layer: leaves}}}
