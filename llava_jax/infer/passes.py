"""The decoder's passes that keep keys and values: a prompt's, and those of more tokens after it.

The decoder's blocks are one by one here (`llava.for_answers`), each with its own keys and values: a loop over a stack
copies on a CPU what it reads of both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.attention import angles, attend_to_cache
from llava_jax.models.layers import product
from llava_jax.models.llama import Block, KeysValues, Llama, Rope
from llava_jax.parallel.sharding import constrain, unshard
from llava_jax.types import LlamaConfig


class Cache(NamedTuple):
    """Keys and values [B, K, S, H] of each layer, and how many slots of each row are filled.

    A head's slots are adjacent: the products of a step read them so, and in another order they would first be copied.
    """

    layers: tuple[KeysValues, ...]
    length_B: jax.Array

    @property
    def size(self) -> int:
        """Return how many slots a row has."""
        return self.layers[0][0].shape[2]

    def map(self, change: Callable[[jax.Array], jax.Array], length_B: jax.Array) -> "Cache":
        """Return the cache of rows of `length_B` with changed keys and values."""
        return Cache(jax.tree.map(change, self.layers), length_B)


def empty_cache(config: LlamaConfig, batch: int, size: int, dtype: str | jnp.dtype) -> Cache:
    """Return a cache of `batch` rows without a token and with room for `size`."""
    shape = batch, config.kv_heads, size, config.head_dim
    layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def widened(cache: Cache, size: int) -> Cache:
    """Return the cache with `size` slots a row."""
    more = size - cache.size
    return cache.map(lambda x_BKSH: jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, more), (0, 0))), cache.length_B)


def prefill(
    llm: Llama,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    last_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Run whole rows (segment 0 is padding) as `Llama` does; return hidden states and the cache of T slots.

    With `last_B` int32[B] the hidden states are those of one token a row, [B, 1, D].
    """
    rope, layers = _rope(llm.config, positions_BT, x_BTD.shape[1]), []
    for block in llm.layers:
        x_BTD, (k_BTKH, v_BTKH) = block.attend(x_BTD, rope, segment_ids_BT)
        x_BTD = _feed_forward(llm, block, x_BTD, last_B)
        layers.append((k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)))
    return llm.norm(x_BTD), Cache(tuple(layers), (segment_ids_BT > 0).sum(-1, dtype=jnp.int32))


def extend(llm: Llama, x_BTD: jax.Array, cache: Cache, last_B: jax.Array | None = None) -> tuple[jax.Array, Cache]:
    """Run T more tokens a row at the positions from length_B on; return hidden states and the cache with them.

    Rows of fewer tokens are right-padded: whoever calls says how long they are now. `last_B` is as in `prefill`.
    """
    positions_BT = cache.length_B[:, None] + jnp.arange(x_BTD.shape[1])
    rope = _rope(llm.config, positions_BT, cache.size)
    slots = jnp.arange(cache.size)
    seen_BTS = slots <= positions_BT[:, :, None]
    if llm.config.window:
        seen_BTS &= slots > positions_BT[:, :, None] - llm.config.window
    layers = []
    for block, kept in zip(llm.layers, cache.layers, strict=True):
        x_BTD, kept = _attend(block, x_BTD, rope, kept, positions_BT, seen_BTS)
        x_BTD = _feed_forward(llm, block, x_BTD, last_B)
        layers.append(kept)
    return llm.norm(x_BTD), Cache(tuple(layers), cache.length_B)


def logits(llm: Llama, hidden_BTD: jax.Array) -> jax.Array:
    """Return vocabulary logits [B, T, V] in float32, as `Llama.logits` does."""
    table_VD = llm.embed.table if llm.config.tied else llm.head.kernel
    table_VD = unshard(table_VD.astype(hidden_BTD.dtype), "vocab", "embed")
    logits_MV = product(hidden_BTD.reshape(-1, table_VD.shape[1]), table_VD)
    logits_BTV = logits_MV.reshape(*hidden_BTD.shape[:2], -1)
    return constrain(logits_BTV, "batch", "length", "vocab").astype(jnp.float32)


def _rope(config: LlamaConfig, positions_BT: jax.Array, size: int) -> Rope:
    """Return the angles of positions from a table of `size` (whatever is beyond is padding).

    A CPU would compute them anew for each layer and head.
    """
    cos_1S1H, sin_1S1H = angles(np.arange(size)[None], config.rope, config.head_dim)
    return cos_1S1H[0, positions_BT], sin_1S1H[0, positions_BT]


def _attend(
    block: Block, x_BTD: jax.Array, rope: Rope, kept: KeysValues, positions_BT: jax.Array, seen_BTS: jax.Array
) -> tuple[jax.Array, KeysValues]:
    """Run the first half of a block over T tokens a row: write their keys and values to their slots, attend to what is
    seen."""
    # The barrier keeps the order of heads in memory from spreading to the weights, all of which would be copied.
    projected = jax.lax.optimization_barrier(block.attn.project(block.attn_norm(x_BTD)))
    q, *new = block.attn.heads(projected, rope)
    B, _, K, _ = new[0].shape
    slot = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], positions_BT[:, None]
    k_BKSH, v_BKSH = (old.at[slot].set(x_BTKH.swapaxes(1, 2)) for old, x_BTKH in zip(kept, new, strict=True))
    return x_BTD + block.attn.o(attend_to_cache(q, k_BKSH, v_BKSH, seen_BTS)), (k_BKSH, v_BKSH)


def _feed_forward(llm: Llama, block: Block, x_BTD: jax.Array, last_B: jax.Array | None) -> jax.Array:
    # No other token reads what the last block's MLP makes of one.
    if block is llm.layers[-1] and last_B is not None:
        x_BTD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
    return block.feed_forward(x_BTD)
