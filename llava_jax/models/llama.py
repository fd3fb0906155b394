"""LLaMA decoder (arXiv 2302.13971) and its kin, driven by the Hugging Face config: training, prefill and decode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_jax.models.attention import attention
from llava_jax.models.layers import Linear, RMSNorm, normal, param, through_columns, through_rows
from llava_jax.models.rope import angles, rotate
from llava_jax.parallel.ring import in_order, pieces_of
from llava_jax.parallel.sharding import constrain, gathered, tensor_ways
from llava_jax.types import REMAT_NAMES, LlamaConfig


def remat_policy(remat: str) -> Callable[..., bool]:
    """What the backward pass finds of a block: the names in `remat`, joined by '+'; minimal: all of REMAT_NAMES."""
    if remat == "dots":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    names = set() if remat == "full" else set(remat.split("+"))
    if "minimal" in names:
        names = names - {"minimal"} | set(REMAT_NAMES)
    return jax.checkpoint_policies.save_only_these_names(*sorted(names))


class Cache(NamedTuple):
    """Keys and values of every layer, and how many slots of each row are filled."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    length_B: jax.Array


def empty_cache(config: LlamaConfig, batch: int, size: int, dtype: str | jnp.dtype) -> Cache:
    shape = (config.layers, batch, size, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        heads, kv_heads = (config.heads, config.head_dim), (config.kv_heads, config.head_dim)
        inner = dict(bias=config.attention_bias, rngs=rngs)
        self.q = Linear((config.width,), heads, ("embed",), ("heads", "head_dim"), remat_name="q_weight", **inner)
        self.k = Linear((config.width,), kv_heads, ("embed",), ("kv_heads", "head_dim"), remat_name="k_weight", **inner)
        self.v = Linear((config.width,), kv_heads, ("embed",), ("kv_heads", "head_dim"), remat_name="v_weight", **inner)
        outer = dict(bias=config.output_bias, remat_name="o_weight", rngs=rngs)
        self.o = Linear(heads, (config.width,), ("heads", "head_dim"), ("embed",), **outer)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, rngs=rngs)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, rngs=rngs)

    def qkv(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], around: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_BTNH, k_BTKH, v_BTKH = map(in_order, through_columns(x_BTD, (self.q, self.k, self.v), around))
        if hasattr(self, "q_norm"):
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = constrain(rotate(q_BTNH, *rope), "batch", "length", "heads", "head_dim")
        k_BTKH = constrain(rotate(k_BTKH, *rope), "batch", "length", "kv_heads", "head_dim")
        v_BTKH = constrain(v_BTKH, "batch", "length", "kv_heads", "head_dim")
        return checkpoint_name(q_BTNH, "q"), checkpoint_name(k_BTKH, "k"), checkpoint_name(v_BTKH, "v")

    def output(self, out_BTNH: jax.Array, around: bool = False) -> jax.Array:
        return through_rows(pieces_of(out_BTNH) if around else (out_BTNH,), self.o, around)


class Mlp(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        inner = dict(in_axes=("embed",), out_axes=("mlp",), bias=config.mlp_bias, rngs=rngs)
        self.gate = Linear((config.width,), (config.mlp_width,), remat_name="gate_weight", **inner)
        self.up = Linear((config.width,), (config.mlp_width,), remat_name="up_weight", **inner)
        outer = dict(bias=config.mlp_bias, remat_name="down_weight", rngs=rngs)
        self.down = Linear((config.mlp_width,), (config.width,), ("mlp",), ("embed",), **outer)

    def __call__(self, x_BTD: jax.Array, around: bool = False) -> jax.Array:
        def hidden(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
            return jax.nn.silu(checkpoint_name(gate_BTF, "gate")) * checkpoint_name(up_BTF, "up")

        pieces = tuple(map(hidden, *through_columns(x_BTD, (self.gate, self.up), around)))
        return through_rows(pieces, self.down, around)


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids_BT: jax.Array | None, **how: Any
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Full-length pass; also returns this layer's keys and values [B, T, K, H] (rotated).

        `how` is what ops.attention is told beside the arrays: implementation, block, window.
        """
        around = self.goes_around(x_BTD.shape[1])
        lies = ("batch", "split_length" if around else "length", "activation")
        x_BTD = constrain(x_BTD, *lies)
        q, k, v = self.attn.qkv(self.attn_norm(x_BTD), rope, around)
        out_BTNH = attention(q, k, v, causal=True, segment_ids_BT=segment_ids_BT, **how)
        x_BTD = checkpoint_name(x_BTD + self.attn.output(out_BTNH, around), "middle")
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD), around)
        return constrain(x_BTD, *lies), (k, v)

    def goes_around(self, length: int) -> bool:
        """Whether rows of `length` are split along T over the tensor axis and go round it (ops.ring).

        Adapters take whole rows: a decoder that has them gathers and sums instead.
        """
        layers = (*vars(self.attn).values(), *vars(self.mlp).values())
        adapted = any(hasattr(layer, "adapter") for layer in layers)
        return tensor_ways() > 1 and length % tensor_ways() == 0 and not adapted

    def decode(
        self, x_B1D: jax.Array, rope: tuple[jax.Array, jax.Array], cache: Cache, layer: jax.Array, seen_BS: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """One token a row: writes its key and value at slot length_B of `layer` and attends to the slots it sees."""
        q, k, v = self.attn.qkv(self.attn_norm(x_B1D), rope)
        rows = jnp.arange(x_B1D.shape[0])
        k_LBSKH = cache.k_LBSKH.at[layer, rows, cache.length_B].set(k[:, 0])
        v_LBSKH = cache.v_LBSKH.at[layer, rows, cache.length_B].set(v[:, 0])
        x_B1D = x_B1D + self.attn.output(attention(q, k_LBSKH[layer], v_LBSKH[layer], key_mask_BS=seen_BS))
        return x_B1D + self.mlp(self.mlp_norm(x_B1D)), Cache(k_LBSKH, v_LBSKH, cache.length_B)


class Embed(nnx.Module):
    def __init__(self, config: LlamaConfig, dtype: str, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.table = param(rngs, normal, (config.vocab_size, config.width), ("vocab", "embed"))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Embeddings [B, T, D] in the compute dtype; an id outside the table (an image slot) reads row 0."""
        inside = (tokens_BT >= 0) & (tokens_BT < self.table.shape[0])
        # Without the pin the compiler lays the batch out as the table, and never finds back.
        table_VD = gathered(self.table.astype(self.dtype), "vocab", "embed")
        x_BTD = jnp.take(table_VD, jnp.where(inside, tokens_BT, 0), axis=0)
        return constrain(x_BTD, "batch", "length", "activation")


class Llama(nnx.Module):
    """Decoder over embeddings, so that image features can stand where tokens stand."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
        attention: str = "xla",
        attention_block: int = 512,
    ):
        self.config, self.remat = config, remat
        self.attention, self.attention_block = attention, attention_block
        self.embed = Embed(config, dtype, rngs=rngs)
        self.layers = jax.vmap(lambda r: Block(config, rngs=r))(rngs.split(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        if not config.tied:
            self.head = Linear((config.width,), (config.vocab_size,), ("embed",), ("vocab",), rngs=rngs)

    def head_kernel(self, dtype: jnp.dtype) -> jax.Array:
        """[D, V] whole along D, so that a loop over positions does not gather it again."""
        kernel_DV = self.embed.table.astype(dtype).T if self.config.tied else self.head.kernel.astype(dtype)
        return gathered(kernel_DV, "embed", "vocab")

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Vocabulary logits [B, T, V] in float32 of hidden states that went through the last norm."""
        logits_BTV = hidden_BTD @ self.head_kernel(hidden_BTD.dtype)
        return constrain(logits_BTV, "batch", "length", "vocab").astype(jnp.float32)

    def _forward(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, keep_kv: bool
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Hidden states after the last norm, and the keys and values of all layers [L, B, T, K, H] if they are kept."""
        rope = angles(positions_BT, self.config.rope, self.config.head_dim)
        how = dict(implementation=self.attention, block=self.attention_block, window=self.config.window)

        def body(x_BTD: jax.Array, block: Block):
            x_BTD, kv = block(x_BTD, rope, segment_ids_BT, **how)
            return x_BTD, kv if keep_kv else None

        if self.remat != "none":
            # prevent_cse: a scan's body is not merged with its recomputation anyway.
            body = jax.checkpoint(body, policy=remat_policy(self.remat), prevent_cse=False)
        x_BTD, kv = jax.lax.scan(body, x_BTD, self.layers)
        return self.norm(x_BTD), kv

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, T, D] after the last norm; attention is causal within each segment."""
        return self._forward(x_BTD, positions_BT, segment_ids_BT, keep_kv=False)[0]

    def prefill(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """As `__call__` for right-padded rows (segment 0 is padding), and the filled cache."""
        hidden_BTD, (k_LBTKH, v_LBTKH) = self._forward(x_BTD, positions_BT, segment_ids_BT, keep_kv=True)
        length_B = (segment_ids_BT > 0).sum(-1, dtype=jnp.int32)
        k_LBSKH, v_LBSKH = (
            jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0,) * 5)
            for old, new in ((cache.k_LBSKH, k_LBTKH), (cache.v_LBSKH, v_LBTKH))
        )
        return hidden_BTD, Cache(k_LBSKH, v_LBSKH, length_B)

    def decode(self, x_B1D: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One more token a row at position length_B: hidden [B, 1, D] and the cache with length_B + 1."""
        rope = angles(cache.length_B[:, None], self.config.rope, self.config.head_dim)
        slots = jnp.arange(cache.k_LBSKH.shape[2])
        seen_BS = slots <= cache.length_B[:, None]
        if self.config.window:
            seen_BS &= slots > cache.length_B[:, None] - self.config.window

        def body(carry: tuple[jax.Array, Cache], layer: tuple[Block, jax.Array]):
            block, index = layer
            return block.decode(carry[0], rope, carry[1], index, seen_BS), None

        (x_B1D, cache), _ = jax.lax.scan(body, (x_B1D, cache), (self.layers, jnp.arange(self.config.layers)))
        return self.norm(x_B1D), cache._replace(length_B=cache.length_B + 1)
