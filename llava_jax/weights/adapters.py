"""A decoder that learns through adapters, outside the step: kernels into four bits, adapters into kernels."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_jax.models.attention import angles
from llava_jax.models.layers import Linear
from llava_jax.models.llava import Llava, join_parts
from llava_jax.models.lora import linears, merged
from llava_jax.models.nf4 import dequantise, quantise
from llava_jax.parallel.sharding import place
from llava_jax.types import LoraConfig, ModelConfig

Params = dict[str, Any]


def place_quantised(config: ModelConfig, llm: Params, at: Params) -> Params:
    """Place the decoder (numpy) with the kernels of its blocks in four bits at the shardings `at`.

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
    """Return the decoder (numpy, `dtype`) that computes what `llm` with `lora` does: W + alpha/rank A B.

    With `config.nf4` W is the kernel that its four bits stand for: what the adapters were trained on.
    """
    assert config.lora is not None
    for name, linear in _linears(config):
        kernel = _get(llm, name)["kernel"]
        if config.nf4:
            kernel = np.stack([_rounded(layer, linear.axes, linear.in_dims) for layer in kernel])
        if name in config.lora.targets:
            adapter = _get(lora, name)
            kernel = merged(kernel, adapter["a"], adapter["b"], config.lora.scale, jnp.dtype(dtype))
        llm = _with_kernel(llm, name, kernel)
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), llm)


def merge_tower(config: ModelConfig, vision: Params, lora: Params, dtype: str) -> Params:
    """Return the tower (numpy, `dtype`) that computes what `vision` with `lora` does.

    Adapters of fewer blocks than it has are those of its last ones.
    """
    assert config.lora is not None
    for name in config.lora.vision_targets:
        kernel, adapter = _get(vision, name)["kernel"], _get(lora, name)
        start = len(kernel) - len(adapter["a"])
        last = merged(kernel[start:], adapter["a"], adapter["b"], config.lora.scale, jnp.dtype(dtype))
        vision = _with_kernel(vision, name, np.concatenate([kernel[:start].astype(last.dtype), last]))
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), vision)


def merge_difference(config: ModelConfig, llm: Params, lora: Params, merge: Params) -> float:
    """Return the largest difference of the logits of `llm` with adapters and of `merge`, over the largest logit.

    Of a probe of sixteen tokens, in float32, one block at a time, so that no second model has to fit.
    """
    assert config.lora is not None
    rounds = list(_linears(config)) if config.nf4 else []
    graphdefs = [_block(config, lora=None), _block(config, lora=dataclasses.replace(config.lora, dropout=0.0))]
    layers = [merge["layers"], join_parts({"llm": llm, "lora": lora})["llm"]["layers"]]
    ids = np.random.default_rng(0).integers(0, config.llm.vocab_size, 16)
    x = [jnp.asarray(llm["embed"]["table"][ids][None], jnp.float32)] * 2
    with jax.default_matmul_precision("highest"):
        for layer in range(config.llm.layers):
            plain, adapted = (jax.tree.map(lambda w, n=layer: w[n].astype(np.float32), tree) for tree in layers)
            for name, linear in rounds:
                kernel = _get({"layers": adapted}, name)["kernel"]
                rounded = _rounded(kernel, linear.axes, linear.in_dims)
                adapted = _with_kernel({"layers": adapted}, name, rounded)["layers"]
            x = [_through(config, *each) for each in zip(graphdefs, (plain, adapted), x, strict=True)]
    head = llm["embed"]["table"].T if config.llm.tied else llm["head"]["kernel"]
    scale = llm["norm"]["scale"].astype(np.float32)
    hidden = [np.asarray(h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True) + config.llm.norm_eps)) * scale for h in x]
    logits = [h @ head.astype(np.float32) for h in hidden]
    return float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max())


def _block(config: ModelConfig, lora: LoraConfig | None) -> nnx.GraphDef:
    plain = dataclasses.replace(config, lora=lora, nf4=False)
    return nnx.split(nnx.eval_shape(lambda: Llava(plain, rngs=nnx.Rngs(0))).llm.layers)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _through(config: ModelConfig, graphdef: nnx.GraphDef, params: Params, x_BTD: jax.Array) -> jax.Array:
    rope = angles(jnp.arange(x_BTD.shape[1])[None], config.llm.rope, config.llm.head_dim)
    return nnx.merge(graphdef, params)(x_BTD, rope, None)[0]


def _linears(config: ModelConfig) -> Iterator[tuple[str, Linear]]:
    """Return the linear layers of the plain decoder, without weights."""
    plain = dataclasses.replace(config, lora=None, nf4=False)
    return linears(nnx.eval_shape(lambda: Llava(plain, rngs=nnx.Rngs(0))).llm.layers)


def _quantised(linear: Linear, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantise a stacked kernel, one layer at a time, so that only one is there in float32."""
    return jax.lax.map(lambda one: quantise(one, linear.axes, linear.in_dims), kernel)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(kernel: jax.Array, axes: tuple[str, ...], in_dims: int) -> jax.Array:
    """Return one layer's kernel in float32 as its four bits stand for it."""
    return dequantise(*quantise(kernel, axes, in_dims), axes, in_dims, jnp.float32)


def _get(llm: Params, name: str) -> Params:
    module, layer = name.split("/")
    return llm["layers"][module][layer]


def _with_kernel(llm: Params, name: str, kernel: Any) -> Params:
    """Return the tree with another kernel in one linear layer; None takes it out."""
    module, layer = name.split("/")
    layers = llm["layers"]
    leaves = {key: leaf for key, leaf in layers[module][layer].items() if key != "kernel"}
    leaves |= {} if kernel is None else {"kernel": kernel}
    return llm | {"layers": layers | {module: layers[module] | {layer: leaves}}}
