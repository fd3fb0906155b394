"""One update: loss and gradients of the stage's partition over the global batch, AdamW, metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llava_jax.ops.loss import masked_nll_rows
from llava_jax.settings import STAGES
from llava_jax.sharding import batch_sharding, replicated
from llava_jax.train.optim import Schedule
from llava_jax.types import Batch

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What an update changes: updates done (int32), trainable parameters (float32), optimizer slots for them."""

    step: Any
    params: Any
    opt_state: Any


def partition(params: Params, stage: str) -> tuple[Params, Params]:
    """(trainable, frozen): the top keys of the stage, and the others. KeyError when a key of the stage is absent."""
    trainable = {key: params[key] for key in STAGES[stage]}
    return trainable, {key: value for key, value in params.items() if key not in trainable}


def loss_terms(
    params: Params, frozen: Params, batch: Batch, *, graphdef: nnx.GraphDef, loss_norm: str, ranks: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(numerator, (denominator, targets)) of the loss of one micro-batch; the loss is the ratio of their sums.

    global_token: summed nll over the number of targets. rank_mean, the original's: mean over ranks of each rank's own
    mean, where a rank is one of `ranks` runs of neighbouring rows. Without targets the ratio is 0/0: not finite.
    """
    model = nnx.merge(graphdef, {**frozen, **params})
    logits_BTV = model(batch.tokens_BT, batch.pixels_BNXYC, batch.segment_ids_BT, batch.positions_BT)
    nll_B, count_B = masked_nll_rows(logits_BTV, batch.tokens_BT, batch.targets_BT)
    targets = count_B.sum()
    if loss_norm == "global_token":
        return nll_B.sum(), (targets.astype(jnp.float32), targets)
    means_R = nll_B.reshape(ranks, -1).sum(1) / count_B.reshape(ranks, -1).sum(1)
    return means_R.sum(), (jnp.float32(ranks), targets)


def micro_batches(batch: Batch, accumulate: int, ranks: int) -> Batch:
    """Every array [B, ...] as [accumulate, B/accumulate, ...], each rank's rows staying on that rank.

    A batch is `ranks` shards of neighbouring rows, a shard is `accumulate` runs: micro-batch a takes run a of each.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(ranks, accumulate, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(accumulate, -1, *x.shape[3:])

    return jax.tree.map(split, batch)


def loss_and_grads(
    params: Params, frozen: Params, batch: Batch, *, accumulate: int, ranks: int, **how: Any
) -> tuple[jax.Array, Params, jax.Array]:
    """(loss, gradients, targets) of the whole batch; numerators and denominators are summed and divided once."""
    grad_fn = jax.value_and_grad(partial(loss_terms, ranks=ranks, **how), has_aux=True)
    if accumulate == 1:
        (total, (weight, targets)), grads = grad_fn(params, frozen, batch)
    else:

        def add(sums: Any, micro: Batch) -> tuple[Any, None]:
            (total, (weight, targets)), grads = grad_fn(params, frozen, micro)
            return jax.tree.map(jnp.add, sums, (total, weight, targets, grads)), None

        zeros = (jnp.float32(0), jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, params))
        (total, weight, targets, grads), _ = jax.lax.scan(add, zeros, micro_batches(batch, accumulate, ranks))
    return total / weight, jax.tree.map(lambda g: g / weight, grads), targets


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    learning_rate: Schedule,
    accumulate: int,
    loss_norm: str,
    ranks: int,
) -> tuple[TrainState, Metrics]:
    """One update. When the loss or the gradient norm is not finite the state comes back as it was, bit for bit.

    Metrics: loss, grad_norm (before clipping), lr, targets (supervised tokens), tokens (all but padding).
    """
    loss, grads, targets = loss_and_grads(
        state.params, frozen, batch, graphdef=graphdef, accumulate=accumulate, loss_norm=loss_norm, ranks=ranks
    )
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    tokens = jnp.sum(batch.segment_ids_BT > 0, dtype=jnp.int32)
    metrics = dict(loss=loss, grad_norm=grad_norm, lr=learning_rate(state.step), targets=targets, tokens=tokens)
    return kept, metrics


def batch_ranks(mesh: Mesh) -> int:
    """Shards a batch is cut into: the devices along the mesh's batch axes."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def state_shardings(mesh: Mesh, tx: optax.GradientTransformation, params: Params, shardings: Params) -> TrainState:
    """Shardings of the state: optimizer slots lie as their parameters, counters on every device."""
    whole = replicated(mesh)
    slots = jax.eval_shape(tx.init, params)
    slots = optax.tree_map_params(tx, lambda _, where: where, slots, shardings, transform_non_params=lambda _: whole)
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
