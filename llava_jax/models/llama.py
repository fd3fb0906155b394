"""LLaMA decoder (arXiv 2302.13971) and its kin, driven by the Hugging Face config."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_jax.models.attention import angles, attention, rotate
from llava_jax.models.layers import Embed, Linear, RMSNorm, remat_policy
from llava_jax.parallel.sharding import constrain, unshard
from llava_jax.types import LlamaConfig

# cosines and sines [B, T, H / 2]; keys and values [B, T, K, H]
Rope = tuple[jax.Array, jax.Array]
KeysValues = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: LlamaConfig, implementation: str, block: int, *, rngs: nnx.Rngs):
        D, H = config.width, config.head_dim
        heads, kv_heads = (config.heads, H), (config.kv_heads, H)
        bias, out_bias = config.attention_bias, config.output_bias
        self.implementation, self.block, self.window, self.head_dim = implementation, block, config.window, H
        self.q = Linear((D,), heads, ("embed",), ("heads", "head_dim"), bias=bias, name="q", rngs=rngs)
        self.k = Linear((D,), kv_heads, ("embed",), ("kv_heads", "head_dim"), bias=bias, name="k", rngs=rngs)
        self.v = Linear((D,), kv_heads, ("embed",), ("kv_heads", "head_dim"), bias=bias, name="v", rngs=rngs)
        self.o = Linear(heads, (D,), ("heads", "head_dim"), ("embed",), bias=out_bias, name="o", rngs=rngs)
        self.q_norm = RMSNorm(H, config.norm_eps, rngs=rngs) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.norm_eps, rngs=rngs) if config.qk_norm else None

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the products with the kernels of queries, keys and values, as `heads` takes them."""
        return self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)

    def heads(self, projected: tuple[jax.Array, jax.Array, jax.Array], rope: Rope) -> tuple[jax.Array, ...]:
        """Return queries [B, T, N, H], keys and values [B, T, K, H]; queries and keys rotated."""
        q_BTNH, k_BTKH, v_BTKH = (x.reshape(*x.shape[:2], -1, self.head_dim) for x in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = constrain(rotate(q_BTNH, *rope), "batch", "length", "heads", "head_dim")
        k_BTKH = constrain(rotate(k_BTKH, *rope), "batch", "length", "kv_heads", "head_dim")
        v_BTKH = constrain(v_BTKH, "batch", "length", "kv_heads", "head_dim")
        return checkpoint_name(q_BTNH, "q"), checkpoint_name(k_BTKH, "k"), checkpoint_name(v_BTKH, "v")

    def __call__(self, x_BTD: jax.Array, rope: Rope, segment_ids_BT: jax.Array | None) -> tuple[jax.Array, KeysValues]:
        """Attend within each segment; return [B, T, D] and this layer's keys and values."""
        q, k, v = self.heads(self.project(x_BTD), rope)
        out_BTNH = attention(
            q,
            k,
            v,
            causal=True,
            segment_ids_BT=segment_ids_BT,
            implementation=self.implementation,
            block=self.block,
            window=self.window,
        )
        return self.o(out_BTNH), (k, v)


class Mlp(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, F, bias = config.width, config.mlp_width, config.mlp_bias
        self.gate = Linear((D,), (F,), ("embed",), ("mlp",), bias=bias, name="gate", rngs=rngs)
        self.up = Linear((D,), (F,), ("embed",), ("mlp",), bias=bias, name="up", rngs=rngs)
        self.down = Linear((F,), (D,), ("mlp",), ("embed",), bias=bias, name="down", rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = checkpoint_name(self.gate(x_BTD), "gate")
        up_BTF = checkpoint_name(self.up(x_BTD), "up")
        return self.down(jax.nn.silu(gate_BTF) * up_BTF)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: LlamaConfig, implementation: str, block: int, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.attn = Attention(config, implementation, block, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, rope: Rope, segment_ids_BT: jax.Array | None) -> tuple[jax.Array, KeysValues]:
        """Run the block over whole rows; return [B, T, D] and this layer's keys and values."""
        x_BTD, kv = self.attend(x_BTD, rope, segment_ids_BT)
        return self.feed_forward(x_BTD), kv

    def attend(self, x_BTD: jax.Array, rope: Rope, segment_ids_BT: jax.Array | None) -> tuple[jax.Array, KeysValues]:
        """Run the first half, in which tokens see each other; return [B, T, D] and this layer's keys and values."""
        x_BTD = constrain(x_BTD, "batch", "length", "activation")
        attended_BTD, kv = self.attn(self.attn_norm(x_BTD), rope, segment_ids_BT)
        return checkpoint_name(x_BTD + attended_BTD, "residual"), kv

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        """Run the second half, each token by itself."""
        return constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD)), "batch", "length", "activation")


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
        self.embed = Embed(config.vocab_size, config.width, dtype, rngs=rngs)
        blocks = jax.vmap(lambda r: Block(config, attention, attention_block, rngs=r))
        # A stack, over which a pass loops; a list in `llava.unstacked_model`.
        self.layers: Any = blocks(rngs.split(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        if not config.tied:
            self.head = Linear((config.width,), (config.vocab_size,), ("embed",), ("vocab",), rngs=rngs)

    @property
    def head_name(self) -> str:
        """Return which of the parameters `head_kernel` reads."""
        return "embed" if self.config.tied else "head"

    def head_kernel(self, dtype: jnp.dtype) -> jax.Array:
        """Return the head [D, V], gathered along D, so that a loop over positions does not gather it again."""
        kernel_DV = self.embed.table.astype(dtype).T if self.config.tied else self.head.kernel.astype(dtype)
        return unshard(kernel_DV, "embed", "vocab")

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Return vocabulary logits [B, T, V] in float32 of hidden states that went through the last norm.

        Of a model for answers, whose head is [V, D], `infer.passes.logits` does.
        """
        logits_BTV = hidden_BTD @ self.head_kernel(hidden_BTD.dtype)
        return constrain(logits_BTV, "batch", "length", "vocab").astype(jnp.float32)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Return hidden states [B, T, D] after the last norm; attention is causal within each segment."""
        rope = angles(positions_BT, self.config.rope, self.config.head_dim)

        def body(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return block(x_BTD, rope, segment_ids_BT)[0], None

        # prevent_cse: a scan's body is not merged with its recomputation anyway.
        saved = jax.checkpoint(body, policy=remat_policy(self.remat), prevent_cse=False)
        x_BTD, _ = jax.lax.scan(body if self.remat == "none" else saved, x_BTD, self.layers)
        return self.norm(x_BTD)
