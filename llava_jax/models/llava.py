"""LLaVA (arXiv 2304.08485): a vision tower, a projector, and a decoder that reads image features as tokens."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.models.clip import Clip
from llava_jax.models.layers import Int8Linear, Linear, TurnedLinear, blocks_of, param, torch_uniform, turned, unstacked
from llava_jax.models.llama import Llama
from llava_jax.models.lora import adapt_decoder, adapt_tower, linears
from llava_jax.parallel.sharding import constrain
from llava_jax.types import ModelConfig

Params = dict[str, Any]


class Projector(nnx.Module):
    """`linear`, or `mlp2x_gelu`: two layers with the exact (erf) GELU between them (LLaVA-1.5 §3.2).

    A LLaVA-NeXT's also holds `image_newline`, which ends each line of tile features.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        E, D = config.vision.width, config.llm.width
        init_E, init_D = torch_uniform(E), torch_uniform(D)
        out = ("projected",)
        self.linear_1 = Linear((E,), (D,), ("vision_embed",), out, bias=True, init=init_E, bias_init=init_E, rngs=rngs)
        self.two_layers = config.projector == "mlp2x_gelu"
        if self.two_layers:
            self.linear_2 = Linear((D,), (D,), ("embed",), out, bias=True, init=init_D, bias_init=init_D, rngs=rngs)
        if config.pinpoints:
            self.image_newline = param(rngs, jax.nn.initializers.normal(D**-0.5), (D,), ("projected",))

    def __call__(self, features_BPE: jax.Array) -> jax.Array:
        x_BPD = self.linear_1(features_BPE)
        if self.two_layers:
            x_BPD = self.linear_2(jax.nn.gelu(x_BPD, approximate=False))
        return x_BPD


def merge(
    x_BTD: jax.Array,
    features_BPD: jax.Array,
    is_image_BT: jax.Array,
    feature_index_BT: jax.Array | None = None,
    newline_D: jax.Array | None = None,
) -> jax.Array:
    """Replace embeddings where `is_image_BT` is True by the row's image features; shapes are static.

    Args:
      x_BTD: embeddings.
      features_BPD: the row's image features.
      is_image_BT: bool.
      feature_index_BT: int32, used with `newline_D`: which feature stands where, -1 for the newline.
      newline_D: a LLaVA-NeXT's newline; without it the features are taken in order.
    """
    index_BT = jnp.cumsum(is_image_BT, axis=1) - 1 if feature_index_BT is None else feature_index_BT
    index_BT = jnp.clip(index_BT, 0, features_BPD.shape[1] - 1)
    taken_BTD = jnp.take_along_axis(features_BPD, index_BT[..., None], axis=1)
    if feature_index_BT is not None and newline_D is not None:
        taken_BTD = jnp.where((feature_index_BT < 0)[..., None], newline_D.astype(taken_BTD.dtype), taken_BTD)
    return jnp.where(is_image_BT[..., None], taken_BTD.astype(x_BTD.dtype), x_BTD)


class Llava(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = Clip(
            config.vision, config.vision_layers, rngs=rngs, learning=config.learning_blocks, remat=config.remat
        )
        self.projector = Projector(config, rngs=rngs)
        self.llm = Llama(
            config.llm,
            rngs=rngs,
            dtype=config.dtype,
            remat=config.remat,
            attention=config.attention,
            attention_block=config.attention_block,
        )
        if not config.is_dense:
            adapt_decoder(self.llm.layers, config.lora, config.nf4, rngs=rngs)
        if config.lora is not None and config.lora.vision_targets:
            adapt_tower(self.vision.layers, config.lora, rngs=rngs)

    def image_features(self, pixels_BNXYC: jax.Array, image_mask_BN: jax.Array | None = None) -> jax.Array:
        """Return projected features [B, N*P, D] of N image slots a row; those of `image_mask_BN` (None: all) are used.

        Slots go through the tower one after the other, each for all rows at once; a slot that no row uses is skipped.
        """

        def encode(pixels_BXYC: jax.Array) -> jax.Array:
            return self.vision(constrain(pixels_BXYC.astype(self.config.dtype), "batch", "patch", "patch", "patch"))

        def encode_slot(_: None, slot: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            pixels_BXYC, is_used_B = slot
            like = jax.eval_shape(encode, pixels_BXYC)
            blank = lambda pixels: jnp.zeros(like.shape, like.dtype)  # noqa: E731
            return None, jax.lax.cond(jnp.any(is_used_B), encode, blank, pixels_BXYC)

        if image_mask_BN is None:
            image_mask_BN = jnp.ones(pixels_BNXYC.shape[:2], bool)
        _, features_NBPE = jax.lax.scan(encode_slot, None, (pixels_BNXYC.swapaxes(0, 1), image_mask_BN.T))
        B, E = features_NBPE.shape[1], features_NBPE.shape[3]
        features_BPE = features_NBPE.swapaxes(0, 1).reshape(B, -1, E)
        features_BPD = self.projector(constrain(features_BPE, "batch", "position", "activation"))
        return constrain(features_BPD, "batch", "position", "activation")

    def embed_and_merge(
        self, tokens_BT: jax.Array, features_BPD: jax.Array | None, feature_index_BT: jax.Array | None = None
    ) -> jax.Array:
        """Return embeddings [B, T, D] with `features_BPD` (None: no image in any row) in the image slots.

        `feature_index_BT` (see Batch) says which feature a LLaVA-NeXT puts where; other models put them in order.
        """
        x_BTD = self.llm.embed(tokens_BT)
        if features_BPD is None:
            return x_BTD
        is_image_BT = tokens_BT == self.config.image_token_id
        if not self.config.pinpoints:
            return merge(x_BTD, features_BPD, is_image_BT)
        return merge(x_BTD, features_BPD, is_image_BT, feature_index_BT, self.projector.image_newline[...])

    def hidden(
        self,
        tokens_BT: jax.Array,
        pixels_BNXYC: jax.Array | None,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        feature_index_BT: jax.Array | None = None,
        image_mask_BN: jax.Array | None = None,
    ) -> jax.Array:
        """Return decoder states [B, T, D] before the head; positions default to 0..T-1, images to every slot."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        has_images = pixels_BNXYC is not None and pixels_BNXYC.shape[1] > 0
        features_BPD = self.image_features(pixels_BNXYC, image_mask_BN) if has_images else None
        return self.llm(self.embed_and_merge(tokens_BT, features_BPD, feature_index_BT), positions_BT, segment_ids_BT)

    def __call__(self, tokens_BT: jax.Array, *others: jax.Array | None) -> jax.Array:
        """Return float32 logits [B, T, V] of the arguments of `hidden`."""
        return self.llm.logits(self.hidden(tokens_BT, *others))


def build(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """Return the model without weights: its graph definition and float32 ShapeDtypeStructs as a plain dict."""
    graphdef, state = _traced(config)
    return graphdef, nnx.to_pure_dict(state, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))


# A run asks for the shapes five times; a trace takes 0.07 s.
@functools.cache
def _traced(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(0))))


def for_answers(params: Params) -> Params:
    """Return a dense model's parameters as infer/ takes them: blocks one by one, kernels [out, in]."""
    return params | {"llm": unstacked(turned(params["llm"]))}


def unstacked_model(config: ModelConfig, params: Params) -> Llava:
    """Return the model of parameters after `for_answers`, or of one with adapters after `layers.unstacked`."""
    return nnx.merge(_unstacked_graph(config), params)


@functools.cache
def _unstacked_graph(config: ModelConfig) -> nnx.GraphDef:
    def make() -> Llava:
        model = Llava(config, rngs=nnx.Rngs(0))
        if config.is_dense:
            for name, linear in linears(model.llm.layers):
                module, layer = name.split("/")
                kind = Int8Linear if config.int8 else TurnedLinear
                setattr(getattr(model.llm.layers, module), layer, kind(linear))
        graphdef, stack = nnx.split(model.llm.layers)
        model.llm.layers = nnx.List([nnx.merge(graphdef, block) for block in blocks_of(stack)])
        return model

    return nnx.split(nnx.eval_shape(make))[0]


def init(config: ModelConfig, seed: int, wanted: Params | None = None) -> Params:
    """Draw float32 parameters: normal(0.02) as LLaMA and CLIP, the projector as torch.nn.Linear.

    With `wanted`, ShapeDtypeStructs in the structure of `split_parts`, what it holds and no other, in its dtypes and at
    its shardings (None: on the first device).
    """

    def make(key: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(Llava(config, rngs=nnx.Rngs(params=key))))
        return params if wanted is None else _chosen(split_parts(params), wanted)

    if wanted == {}:
        return {}
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))(jax.random.key(seed))


def _chosen(params: Params, wanted: Params) -> Params:
    """Return the values of `params` that `wanted` names, in its dtypes."""

    def of(name: str) -> Any:
        like, value = wanted[name], params[name]
        return _chosen(value, like) if isinstance(like, dict) else value.astype(like.dtype)

    return {name: of(name) for name in wanted}


def logical_axes(config: ModelConfig) -> Params:
    """Return the logical axes of every parameter, in the structure of `build`'s dict."""
    flat = {path: tuple(x.get_metadata()["axes"]) for path, x in nnx.to_flat_state(_traced(config)[1])}
    return nnx.traversals.unflatten_mapping(flat)


# ---- the parts of a run ---------------------------------------------------------------------------------------------


def partition(params: Params, trainable: str | re.Pattern) -> tuple[Params, Params]:
    """Return (what learns, what is frozen) of a tree of `split_parts`; `trainable` is found in the path of the former.

    Neither holds an empty dict.
    """
    flat = nnx.traversals.flatten_mapping(params)
    learns = {path for path in flat if re.search(trainable, "/".join(path))}
    halves = [{p: leaf for p, leaf in flat.items() if (p in learns) == wanted} for wanted in (True, False)]
    return nnx.traversals.unflatten_mapping(halves[0]), nnx.traversals.unflatten_mapping(halves[1])


def overlaid(params: Params, over: Params) -> Params:
    """Return the tree with the leaves of `over` in it, in place of those of the same path."""
    shared = params.keys() & over.keys()
    both = {name: overlaid(params[name], over[name]) for name in shared if isinstance(over[name], dict)}
    return params | over | both


# The part of a run that holds the adapters of a part of the model.
ADAPTERS = {"llm": "lora", "vision": "vision_lora"}


def split_parts(params: Params) -> Params:
    """Return the tree of `models.llava.build` with adapters as parts of their own and without their seeds."""
    parts = dict(params)
    for part, name in ADAPTERS.items():
        flat = nnx.traversals.flatten_mapping(params[part])
        lora = {(*path[:-2], path[-1]): leaf for path, leaf in flat.items() if path[-2:-1] == ("adapter",)}
        lora = {path: leaf for path, leaf in lora.items() if path[-1] != "seed"}
        if lora:
            plain = {path: leaf for path, leaf in flat.items() if "adapter" not in path}
            parts |= {part: nnx.traversals.unflatten_mapping(plain), name: nnx.traversals.unflatten_mapping(lora)}
    return parts


def join_parts(params: Params, key: jax.Array | None = None) -> Params:
    """Return the tree that the model takes, from that of `split_parts`; the seeds of dropout are drawn from `key`."""
    joined = {part: tree for part, tree in params.items() if part not in ADAPTERS.values()}
    for index, (part, name) in enumerate(ADAPTERS.items()):
        if name in params:
            # The decoder's come first and draw from the key itself, as in runs from before towers had any.
            own = key if key is None or index == 0 else jax.random.fold_in(key, index)
            joined[part] = _with_adapters(params[part], params[name], own)
    return joined


def _with_adapters(tree: Params, adapters: Params, key: jax.Array | None) -> Params:
    if "a" in adapters:
        seeds = {} if key is None else {"seed": jax.random.bits(key, adapters["a"].shape[:1])}
        return tree | {"adapter": adapters | seeds}
    keys = [None] * len(adapters) if key is None else jax.random.split(key, len(adapters))
    pairs = zip(sorted(adapters), keys, strict=True)
    return tree | {name: _with_adapters(tree[name], adapters[name], subkey) for name, subkey in pairs}
