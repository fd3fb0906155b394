"""One update: loss and gradients of the stage's partition over the global batch, AdamW, metrics."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llava_jax.models.clip import normalised
from llava_jax.models.lora import join
from llava_jax.models.nf4 import stored_as
from llava_jax.parallel.sharding import RULES, batch_sharding, replicated
from llava_jax.settings import STAGES
from llava_jax.train.loss import next_token, weighted_nll
from llava_jax.train.optim import Schedule, apply_updates
from llava_jax.types import Batch, Pixels

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What an update changes: updates done (int32), trainable parameters, optimizer slots for them."""

    step: Any
    params: Any
    opt_state: Any


def partition(params: Params, stage: str) -> tuple[Params, Params]:
    """(trainable, frozen): the top keys of the stage, and the others. KeyError when a key of the stage is absent."""
    trainable = {key: params[key] for key in STAGES[stage]}
    return trainable, {key: value for key, value in params.items() if key not in trainable}


def loss_terms(
    params: Params,
    frozen: Params,
    batch: Batch,
    key: jax.Array | None,
    *,
    graphdef: nnx.GraphDef,
    dtype: str,
    packed: bool,
    loss_norm: str,
    ranks: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(numerator, (denominator, targets)) of the loss of one micro-batch; the loss is the ratio of their sums.

    global_token: summed nll over the number of targets. rank_mean, the original's: mean over ranks of each rank's own
    mean, where a rank is one of `ranks` runs of neighbouring rows. Without targets the ratio is 0/0: not finite.

    Weights enter the computation in `dtype` before anything gathers them, so that what travels between devices, their
    gradients included, has that dtype. Rows of one conversation (not `packed`) need no segments: their padding comes
    last, where causal attention hides it. `key` is what the adapters' dropout draws from, None where there is none.
    """
    # Copied here, not where they are used: inside the scan over layers the float32 weights would be gathered.
    params, frozen = stored_as((params, frozen), dtype)
    model = nnx.merge(graphdef, join({**frozen, **params}, key))
    segment_ids_BT = batch.segment_ids_BT if packed else None
    hidden_BTD = model.hidden(
        batch.tokens_BT, batch.pixels_BNXYC, segment_ids_BT, batch.positions_BT, batch.feature_index_BT
    )
    labels_BT, counted_BT = next_token(batch.tokens_BT, batch.targets_BT, batch.segment_ids_BT)
    targets = counted_BT.sum(dtype=jnp.int32)
    weights_BT, weight = counted_BT.astype(jnp.float32), targets.astype(jnp.float32)
    if loss_norm == "rank_mean":
        count_R = counted_BT.reshape(ranks, -1).sum(1)
        weights_BT = (weights_BT.reshape(ranks, -1) / count_R[:, None]).reshape(weights_BT.shape)
        weight = jnp.float32(ranks)
    head_DV = model.llm.head_kernel(hidden_BTD.dtype)
    learns = "llm" in params
    return weighted_nll(hidden_BTD, head_DV, labels_BT, weights_BT, learns), (weight, targets)


def micro_batches(batch: Batch, accumulate: int, ranks: int) -> Batch:
    """Every array [B, ...] as [accumulate, B/accumulate, ...], each rank's rows staying on that rank.

    A batch is `ranks` shards of neighbouring rows, a shard is `accumulate` runs: micro-batch a takes run a of each.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(ranks, accumulate, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(accumulate, -1, *x.shape[3:])

    return jax.tree.map(split, batch)


def loss_and_grads(
    params: Params,
    frozen: Params,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    accumulate: int,
    ranks: int,
    **how: Any,
) -> tuple[jax.Array, Params, jax.Array]:
    """(loss, gradients, targets) of the whole batch; numerators and denominators are summed and divided once.

    Images are normalised already (`train_step` does it), `key` is what the adapters' dropout draws from.
    """
    grad_fn = jax.value_and_grad(partial(loss_terms, ranks=ranks, **how), has_aux=True)
    if accumulate == 1:
        (total, (weight, targets)), grads = grad_fn(params, frozen, batch, key)
    else:

        def add(sums: Any, part: tuple[Batch, jax.Array | None]) -> tuple[Any, None]:
            (total, (weight, targets)), grads = grad_fn(params, frozen, *part)
            # Otherwise libtpu moves the sum over the devices out of the loop, and fails at it (0.0.42).
            grads = jax.lax.optimization_barrier(grads)
            return jax.tree.map(lambda old, new: old + new, sums, (total, weight, targets, grads)), None

        # Sums of bfloat16 gradients are kept in float32: many small terms.
        empty = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        zeros = (jnp.float32(0), jnp.float32(0), jnp.int32(0), empty)
        parts = micro_batches(batch, accumulate, ranks), None if key is None else jax.random.split(key, accumulate)
        (total, weight, targets, grads), _ = jax.lax.scan(add, zeros, parts)
    return total / weight, jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads), targets


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    *,
    tx: optax.GradientTransformation,
    learning_rate: Schedule,
    pixels: Pixels,
    dropout_seed: int | None = None,
    **how: Any,
) -> tuple[TrainState, Metrics]:
    """One update. When the loss or the gradient norm is not finite the state comes back as it was, bit for bit.

    Metrics: loss, grad_norm (before clipping), lr, targets (supervised tokens), tokens (all but padding). `pixels` says
    how the batch's images are normalised, `how` is what `loss_and_grads` is told next to the arrays. Dropout draws
    from the seed and the update's number alone, so that a run that resumes from a checkpoint draws what it would have
    drawn.
    """
    key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
    seen_BNXYC = normalised(batch.pixels_BNXYC, batch.image_mask_BN, pixels)
    seen = batch._replace(pixels_BNXYC=seen_BNXYC, image_mask_BN=None)
    loss, grads, targets = loss_and_grads(state.params, frozen, seen, key, **how)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = TrainState(state.step + 1, apply_updates(state.params, updates, state.step), opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    tokens = jnp.sum(batch.segment_ids_BT > 0, dtype=jnp.int32)
    metrics = dict(loss=loss, grad_norm=grad_norm, lr=learning_rate(state.step), targets=targets, tokens=tokens)
    return kept, metrics


def batch_ranks(mesh: Mesh) -> int:
    """Shards a batch is cut into: the devices along the mesh's batch axes."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def state_shardings(mesh: Mesh, tx: optax.GradientTransformation, params: Params, shardings: Params) -> TrainState:
    """Shardings of the state: optimizer slots lie as their parameters, counters on every device."""
    whole, like = replicated(mesh), jax.tree.structure(params)

    def is_slots(part: Any) -> bool:
        return jax.tree.structure(part) == like

    slots = jax.eval_shape(tx.init, params)
    slots = jax.tree.map(lambda part: shardings if is_slots(part) else whole, slots, is_leaf=is_slots)
    return TrainState(whole, shardings, slots)


def make_step(mesh: Mesh, state_at: TrainState, frozen_at: Params, **how: Any) -> Callable:
    """The jitted `train_step`, state donated; `how` are its keyword arguments except `ranks`."""
    whole = replicated(mesh)
    return jax.jit(
        partial(train_step, ranks=batch_ranks(mesh), **how),
        donate_argnums=0,
        in_shardings=(state_at, frozen_at, batch_sharding(mesh)),
        out_shardings=(state_at, whole),
    )
