"""Attention for the vision tower, training, prefill and decode, and the choice of the kernel that computes it.

`xla` runs everywhere and takes every argument; `splash` (jax's Pallas kernel) is for TPUs and `cudnn` for NVIDIA GPUs:
neither holds the scores [N, T, S] of a row in memory. (cuDNN takes segments only as a bias [B, 1, T, T], which is in
memory with its gradient; packed rows on a GPU pay for that. It has not been run: no GPU was at hand.)
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from llava_jax.parallel.sharding import spec_of
from llava_jax.types import InputError, RopeConfig

# The name for remat of the kernel's result and sums: where they are kept, the backward pass need not run it again.
RESIDUALS = "attention"
LANES = 128  # of a TPU's vector unit: splash's blocks must be multiples of it


def choose(requested: str, *, platform: str, dtype: str, length: int, head_dim: int, window: int = 0) -> str:
    """Return the implementation for causal attention over rows of `length`: splash, cudnn or xla.

    `auto` takes the kernel of the platform ('tpu', 'gpu', 'cpu') where it can run and xla elsewhere. Raises an
    InputError with the reason when a kernel requested by name cannot run.
    """
    reasons = {
        "splash": _first(
            (platform != "tpu", f"needs a TPU, the devices are {platform}"),
            (length % LANES != 0, f"needs rows of a multiple of {LANES} tokens, got {length}"),
            (head_dim % 64 != 0, f"needs heads of a multiple of 64, got {head_dim}"),
        ),
        "cudnn": _first(
            (platform != "gpu", f"needs an NVIDIA GPU, the devices are {platform}"),
            (dtype != "bfloat16", f"needs train.dtype=bfloat16, got {dtype}"),
            (head_dim % 8 != 0 or head_dim > 128, f"needs heads of a multiple of 8 up to 128, got {head_dim}"),
            (0 < window < length, f"does no sliding window, this decoder's is {window} and rows have {length} tokens"),
        ),
        "xla": "",
    }
    if requested == "auto":
        return next(name for name, reason in reasons.items() if not reason)
    if reasons[requested]:
        raise InputError(f"train.attention={requested}: {reasons[requested]}; take auto or xla")
    return requested


def _first(*checks: tuple[bool, str]) -> str:
    return next((reason for fails, reason in checks if fails), "")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    segment_ids_BT: jax.Array | None = None,
    implementation: str = "xla",
    block: int = 512,
    window: int = 0,
) -> jax.Array:
    """Compute scaled dot-product attention with grouped key/value heads; the softmax runs in float32.

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries, keys and values; N is a multiple of K.
      causal: whether a position sees only itself and those before it.
      segment_ids_BT: int32; a position sees only its own segment (T == S).
      implementation: what `choose` returns.
      block: the tile of splash along T.
      window: how many positions a position sees, itself the last of them (Mistral, arXiv 2310.06825); 0 is no limit.
        Causal only, not cudnn.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    window = window if window < q_BTNH.shape[1] else 0
    if implementation != "xla" and not causal:
        raise ValueError(f"{implementation} does causal attention")
    if implementation == "splash":
        return _splash(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, block, window)
    if implementation == "xla" and causal:
        return checkpoint_name(_in_blocks(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window), RESIDUALS)
    if window:
        raise ValueError(f"{implementation} does no window, or not in this call")
    mask = None
    if segment_ids_BT is not None:
        mask = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=causal, implementation=implementation
    )
    return checkpoint_name(out_BTNH, RESIDUALS)


def _in_blocks(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None, window: int
) -> jax.Array:
    """Compute causal attention one chunk of queries at a time, without the keys that none of the chunk sees.

    The backward pass computes the scores again. At most 16 chunks, because each one is unrolled into the program.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    block = max(LANES, -(-T // 16))
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    attend = jax.checkpoint(functools.partial(_attend, window=window), prevent_cse=False)
    chunks = []
    for first in range(0, T, block):
        last = min(first + block, T)
        keys = slice(max(0, first - window + 1) if window else 0, last)
        ids = (None, None) if segment_ids_BT is None else (segment_ids_BT[:, first:last], segment_ids_BT[:, keys])
        chunks.append(attend(q_BKGTH[:, :, :, first:last], k_BKTH[:, :, keys], v_BKTH[:, :, keys], *ids))
    return jnp.concatenate(chunks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend(
    q_BKGQH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    ids_BQ: jax.Array | None,
    ids_BS: jax.Array | None,
    *,
    window: int,
) -> jax.Array:
    """Let the last Q of S positions attend to all that are not after them; G query heads share a key head."""
    Q, S = q_BKGQH.shape[3], k_BKSH.shape[2]
    distance = jnp.arange(S - Q, S)[:, None] - jnp.arange(S)
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    if ids_BQ is not None and ids_BS is not None:
        seen = seen & (ids_BQ[:, None, None, :, None] == ids_BS[:, None, None, None, :])
    return _weighted(q_BKGQH, k_BKSH, v_BKSH, seen)


def attend_to_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """Let T positions a row attend to the cache slots that `seen_BTS` says each sees; return [B, T, N, H]."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    out_BKGTH = _weighted(q_BKGTH, k_BKSH, v_BKSH, seen_BTS[:, None, None])
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _weighted(q_BKGQH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen: jax.Array) -> jax.Array:
    """Return the mean of the values that are `seen` (broadcast to [B, K, G, Q, S]), weighted by the softmax."""
    scores = jnp.einsum("BKGQH,BKSH->BKGQS", q_BKGQH, k_BKSH, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGQS,BKSH->BKGQH", weights, v_BKSH)


def _splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None, block: int, window: int
) -> jax.Array:
    """Run the kernel on each device's own rows and heads: the compiler cannot split a Pallas call by itself."""
    heads = spec_of(("batch", "length", "heads", "head_dim"), 4)
    kv_heads = spec_of(("batch", "length", "kv_heads", "head_dim"), 4)
    segments = None if segment_ids_BT is None else spec_of(("batch", "length"), 2)
    local = functools.partial(_splash_local, block=block, window=window)
    if not jax.sharding.get_abstract_mesh().empty:
        # check_vma: the kernel does not say along which mesh axes its results vary.
        specs = (heads, kv_heads, kv_heads, segments)
        local = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
    return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _splash_local(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None, block: int, window: int
) -> jax.Array:
    _, T, N, H = q_BTNH.shape
    block = max(size for size in range(LANES, min(block, T) + 1, LANES) if T % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    shape, masks = (T, T), splash_attention_mask
    mask = masks.LocalMask(shape, (window - 1, 0), offset=0) if window else masks.CausalMask(shape)
    kernel = splash_attention_kernel.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        residual_checkpoint_name=RESIDUALS,
    )
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH))
    if segment_ids_BT is None:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH)
    else:
        ids = splash_attention_kernel.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, ids)
    return out_BNTH.swapaxes(1, 2).astype(q_BTNH.dtype)


# ---- rotary positions ----


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the rotation per position, float32[H/2]; `linear` slows all of them, `llama3` only the slow ones.

    The llama3 rule is the one published with Llama 3.1 (transformers `rope_type` llama3).
    """
    inverse = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.kind == "linear":
        inverse = inverse / config.factor
    elif config.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low = config.original_max_positions / config.low_freq_factor
        high = config.original_max_positions / config.high_freq_factor
        mix = (config.original_max_positions / wavelength - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        between = (1 - mix) * inverse / config.factor + mix * inverse
        inverse = np.where(wavelength > low, inverse / config.factor, np.where(wavelength < high, inverse, between))
    elif config.kind != "default":
        raise ValueError(f"unknown rope kind {config.kind!r}")
    return inverse.astype(np.float32)


def angles(positions_BT: jax.Array | np.ndarray, config: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Return float32 cosines and sines [B, T, 1, H/2]."""
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config, head_dim)
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


def rotate(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Rotate the pairs (x[i], x[i + H/2]) in the dtype of x."""
    cos, sin = cos_BT1H.astype(x_BTNH.dtype), sin_BT1H.astype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
