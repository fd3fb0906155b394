"""One update: loss and gradients of the stage's partition over the global batch, AdamW, metrics."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llava_jax.models.clip import normalised
from llava_jax.models.layers import stored_as
from llava_jax.models.llava import join_parts
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


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the loss of a batch is computed.

    Attributes:
      graphdef: the model, without parameters.
      dtype: of the computation.
      packed: whether a row holds several conversations, which must not see each other.
      loss_norm: global_token divides the summed nll by the number of targets; rank_mean, the original's, is the mean
        over ranks of each rank's own mean.
      ranks: shards of neighbouring rows that a batch is cut into (`batch_ranks`).
      accumulate: microbatches a batch is computed in.
    """

    graphdef: nnx.GraphDef
    dtype: str
    packed: bool
    loss_norm: str
    ranks: int
    accumulate: int = 1


def loss_terms(
    params: Params, frozen: Params, batch: Batch, key: jax.Array | None, config: LossConfig
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return (numerator, (denominator, targets)) of one microbatch; the loss is the ratio of their sums.

    Without targets the ratio is 0/0: not finite. `key` is what the adapters' dropout draws from, None where there is
    none.

    Weights enter the computation in `config.dtype` before anything gathers them, so that what travels between devices,
    their gradients included, has that dtype. Rows of one conversation need no segments: their padding comes last,
    where causal attention hides it.
    """
    # Cast here, not where they are used: inside the scan over layers the float32 weights would be gathered.
    params, frozen = stored_as((params, frozen), config.dtype)
    model = nnx.merge(config.graphdef, join_parts({**frozen, **params}, key))
    hidden_BTD = model.hidden(
        batch.tokens_BT,
        batch.pixels_BNXYC,
        batch.segment_ids_BT if config.packed else None,
        batch.positions_BT,
        batch.feature_index_BT,
    )
    labels_BT, counted_BT = next_token(batch.tokens_BT, batch.targets_BT, batch.segment_ids_BT)
    targets = counted_BT.sum(dtype=jnp.int32)
    weights_BT, weight = counted_BT.astype(jnp.float32), targets.astype(jnp.float32)
    if config.loss_norm == "rank_mean":
        count_R = counted_BT.reshape(config.ranks, -1).sum(1)
        weights_BT = (weights_BT.reshape(config.ranks, -1) / count_R[:, None]).reshape(weights_BT.shape)
        weight = jnp.float32(config.ranks)
    head_DV = model.llm.head_kernel(hidden_BTD.dtype)
    learns = "llm" in params
    return weighted_nll(hidden_BTD, head_DV, labels_BT, weights_BT, learns), (weight, targets)


def microbatches(batch: Batch, accumulate: int, ranks: int) -> Batch:
    """Reshape every array [B, ...] to [accumulate, B/accumulate, ...], each rank's rows staying on that rank.

    A batch is `ranks` shards of neighbouring rows, a shard is `accumulate` runs: microbatch a takes run a of each.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(ranks, accumulate, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(accumulate, -1, *x.shape[3:])

    return jax.tree.map(split, batch)


def loss_and_grads(
    params: Params, frozen: Params, batch: Batch, config: LossConfig, key: jax.Array | None = None
) -> tuple[jax.Array, Params, jax.Array]:
    """Return (loss, gradients, targets) of the whole batch; numerators and denominators are summed and divided once.

    The batch's images are normalised already (`train_step` does it); `key` is what the adapters' dropout draws from.
    """
    grad_fn = jax.value_and_grad(loss_terms, has_aux=True)
    if config.accumulate == 1:
        (total, (weight, targets)), grads = grad_fn(params, frozen, batch, key, config)
    else:

        def add(sums: Any, part: tuple[Batch, jax.Array | None]) -> tuple[Any, None]:
            (total, (weight, targets)), grads = grad_fn(params, frozen, *part, config)
            # Otherwise libtpu moves the sum over the devices out of the loop, and fails at it (0.0.42).
            grads = jax.lax.optimization_barrier(grads)
            return jax.tree.map(lambda old, new: old + new, sums, (total, weight, targets, grads)), None

        # Sums of bfloat16 gradients are kept in float32: many small terms.
        empty = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        zeros = (jnp.float32(0), jnp.float32(0), jnp.int32(0), empty)
        keys = None if key is None else jax.random.split(key, config.accumulate)
        parts = microbatches(batch, config.accumulate, config.ranks), keys
        (total, weight, targets, grads), _ = jax.lax.scan(add, zeros, parts)
    return total / weight, jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads), targets


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    *,
    config: LossConfig,
    tx: optax.GradientTransformation,
    learning_rate: Schedule,
    pixels: Pixels,
    dropout_seed: int | None = None,
) -> tuple[TrainState, Metrics]:
    """Apply one update; where the loss or the gradient norm is not finite the state comes back as it was, bit for bit.

    Args:
      state: donated by the jitted step.
      frozen: the parts that do not learn.
      batch: one global batch.
      config: how its loss is computed.
      tx: the optimizer.
      learning_rate: of an update, for the metrics.
      pixels: how the batch's images are normalised.
      dropout_seed: dropout draws from it and the update's number alone, so that a resumed run draws what it would have
        drawn; None without dropout.

    Returns:
      The new state, and metrics: loss, grad_norm (before clipping), lr, targets (supervised tokens), tokens (all but
      padding).
    """
    key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
    seen_BNXYC = normalised(batch.pixels_BNXYC, batch.image_mask_BN, pixels)
    seen = batch._replace(pixels_BNXYC=seen_BNXYC, image_mask_BN=None)
    loss, grads, targets = loss_and_grads(state.params, frozen, seen, config, key)
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
    return math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())


def state_shardings(mesh: Mesh, tx: optax.GradientTransformation, params: Params, shardings: Params) -> TrainState:
    """Shardings of the state: optimizer slots lie as their parameters, counters on every device."""
    whole, like = replicated(mesh), jax.tree.structure(params)

    def is_slots(part: Any) -> bool:
        return jax.tree.structure(part) == like

    slots = jax.eval_shape(tx.init, params)
    slots = jax.tree.map(lambda part: shardings if is_slots(part) else whole, slots, is_leaf=is_slots)
    return TrainState(whole, shardings, slots)


def make_step(
    mesh: Mesh,
    state_at: TrainState,
    frozen_at: Params,
    *,
    config: LossConfig,
    tx: optax.GradientTransformation,
    learning_rate: Schedule,
    pixels: Pixels,
    dropout_seed: int | None = None,
) -> jax.stages.Wrapped:
    """Return the jitted `train_step` of these arguments; `state_at` and `frozen_at` are shardings, state is donated."""
    step = partial(
        train_step, config=config, tx=tx, learning_rate=learning_rate, pixels=pixels, dropout_seed=dropout_seed
    )
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_at, frozen_at, batch_sharding(mesh)),
        out_shardings=(state_at, replicated(mesh)),
    )
