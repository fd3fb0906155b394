"""Vision transformers of CLIP (arXiv 2103.00020) and SigLIP (2303.15343), up to the layer that LLaVA reads."""

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.models.attention import attention
from llava_jax.models.layers import LayerNorm, Linear, normal, param, remat_policy, zeros
from llava_jax.parallel.sharding import constrain
from llava_jax.types import ClipConfig, Pixels

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def normalise_batch(pixels_BNXYC: jax.Array, image_mask_BN: jax.Array, pixels: Pixels) -> jax.Array:
    """Return RGB bytes as float32 [B, N, X, Y, C] with the tower's mean and deviation; empty slots are zeros.

    The same as `data.images.normalised` but for the last bit: XLA multiplies where that divides by a constant.
    """
    mean, std = (jnp.array(values, jnp.float32) for values in (pixels.mean, pixels.std))
    scaled_BNXYC = (pixels_BNXYC.astype(jnp.float32) / 255 - mean) / std
    return jnp.where(image_mask_BN[..., None, None, None], scaled_BNXYC, 0.0)


class Attention(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        heads = (config.heads, config.width // config.heads)
        E, into, out = config.width, ("vision_embed",), ("vision_heads", "head_dim")
        self.q = Linear((E,), heads, into, out, bias=True, rngs=rngs)
        self.k = Linear((E,), heads, into, out, bias=True, rngs=rngs)
        self.v = Linear((E,), heads, into, out, bias=True, rngs=rngs)
        self.o = Linear(heads, (E,), out, into, bias=True, rngs=rngs)

    def __call__(self, x_BPE: jax.Array) -> jax.Array:
        return self.o(attention(self.q(x_BPE), self.k(x_BPE), self.v(x_BPE)))


class Mlp(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        E, F = config.width, config.mlp_width
        self.up = Linear((E,), (F,), ("vision_embed",), ("vision_mlp",), bias=True, rngs=rngs)
        self.down = Linear((F,), (E,), ("vision_mlp",), ("vision_embed",), bias=True, rngs=rngs)

    def __call__(self, x_BPE: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x_BPE)))


class Block(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.width, config.norm_eps, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = LayerNorm(config.width, config.norm_eps, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BPE: jax.Array) -> jax.Array:
        x_BPE = x_BPE + self.attn(self.norm1(x_BPE))
        return x_BPE + self.mlp(self.norm2(x_BPE))


class PatchEmbed(nnx.Module):
    """Non-overlapping patches as one matmul: a convolution whose stride is its kernel size.

    Pixels at the right and bottom that fill no patch are left out (384 = 27 * 14 + 6); SigLIP's has a bias.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        shape = (config.patch_size, config.patch_size, 3, config.width)
        self.kernel = param(rngs, normal, shape, ("patch", "patch", "patch", "vision_embed"))
        self.bias = param(rngs, zeros, (config.width,), ("vision_embed",)) if config.family == "siglip" else None

    def __call__(self, pixels_BXYC: jax.Array) -> jax.Array:
        B, X, Y, C = pixels_BXYC.shape
        p = self.kernel.shape[0]
        cropped = pixels_BXYC[:, : X // p * p, : Y // p * p]
        patches = cropped.reshape(B, X // p, p, Y // p, p, C).transpose(0, 1, 3, 2, 4, 5)
        kernel = self.kernel.astype(pixels_BXYC.dtype).reshape(p * p * C, -1)
        y_BPE = patches.reshape(B, (X // p) * (Y // p), p * p * C) @ kernel
        return y_BPE if self.bias is None else y_BPE + self.bias.astype(y_BPE.dtype)


class Clip(nnx.Module):
    """The first `layers` blocks; what comes after the feature layer (last blocks, post-norm) is not held.

    With `learning` above 0 the last so many are the stack `layers`, which learns, and the others the stack `first`:
    nothing differentiates the frozen ones, whose activations are not kept.
    """

    def __init__(self, config: ClipConfig, layers: int, *, rngs: nnx.Rngs, learning: int = 0, remat: str = "none"):
        self.remat = remat
        self.patch = PatchEmbed(config, rngs=rngs)
        self.class_tokens = config.class_tokens
        if config.family == "clip":
            self.class_embedding = param(rngs, normal, (config.width,), ("vision_embed",))
        shape = (config.class_tokens + config.patches, config.width)
        self.position = param(rngs, normal, shape, ("position", "vision_embed"))
        self.pre_norm = LayerNorm(config.width, config.norm_eps, rngs=rngs) if config.family == "clip" else None
        blocks = jax.vmap(lambda r: Block(config, rngs=r))(rngs.split(layers))
        self.first = jax.tree.map(lambda x: x[:-learning], blocks) if learning else None
        self.layers = jax.tree.map(lambda x: x[-learning:], blocks) if learning else blocks

    def hidden(self, pixels_BXYC: jax.Array) -> jax.Array:
        """Return hidden states [B, P, E] after the blocks held; CLIP's has the class token before its patches."""
        x_BPE = self.patch(pixels_BXYC)
        if self.class_tokens:
            cls = jnp.broadcast_to(self.class_embedding.astype(x_BPE.dtype), (x_BPE.shape[0], 1, x_BPE.shape[2]))
            x_BPE = jnp.concatenate([cls, x_BPE], axis=1)
        x_BPE = x_BPE + self.position.astype(x_BPE.dtype)
        if self.pre_norm is not None:
            x_BPE = self.pre_norm(x_BPE)
        x_BPE = constrain(x_BPE, "batch", "position", "activation")

        def body(x_BPE: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return constrain(block(x_BPE), "batch", "position", "activation"), None

        if self.first is not None:
            x_BPE, _ = jax.lax.scan(body, x_BPE, self.first)
        saved = jax.checkpoint(body, policy=remat_policy(self.remat), prevent_cse=False)
        x_BPE, _ = jax.lax.scan(body if self.remat == "none" else saved, x_BPE, self.layers)
        return x_BPE

    def __call__(self, pixels_BXYC: jax.Array) -> jax.Array:
        """Return patch features [B, P, E] of normalised images float[B, X, Y, 3], without the class token."""
        return self.hidden(pixels_BXYC)[:, self.class_tokens :]
