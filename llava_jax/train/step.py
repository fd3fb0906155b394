"""One update: loss and gradients of what learns over the global batch, AdamW, metrics."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llava_jax.models.clip import normalise_batch
from llava_jax.models.layers import stored_as
from llava_jax.models.llava import join_parts, overlaid
from llava_jax.parallel.sharding import MESH_AXES, RULES, batch_sharding, gathered, replicated, scatter_sum, spec_of
from llava_jax.train.optim import Schedule, apply_updates
from llava_jax.types import Batch, Pixels

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What an update changes: updates done (int32), trainable parameters, optimizer slots for them."""

    step: Any
    params: Any
    opt_state: Any


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
    if "vision" in params:
        params = params | {"vision": gathered(params["vision"])}
    model = nnx.merge(config.graphdef, join_parts(overlaid(frozen, params), key))
    hidden_BTD = model.hidden(
        batch.tokens_BT,
        batch.pixels_BNXYC,
        batch.segment_ids_BT if config.packed else None,
        batch.positions_BT,
        batch.feature_index_BT,
        batch.image_mask_BN,
    )
    labels_BT, counted_BT = next_token(batch.tokens_BT, batch.targets_BT, batch.segment_ids_BT)
    targets = counted_BT.sum(dtype=jnp.int32)
    weights_BT, weight = counted_BT.astype(jnp.float32), targets.astype(jnp.float32)
    if config.loss_norm == "rank_mean":
        count_R = counted_BT.reshape(config.ranks, -1).sum(1)
        weights_BT = (weights_BT.reshape(config.ranks, -1) / count_R[:, None]).reshape(weights_BT.shape)
        weight = jnp.float32(config.ranks)
    head_DV = model.llm.head_kernel(hidden_BTD.dtype)
    learns = model.llm.head_name in params.get("llm", {})
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
    """Apply one update; where the loss or the gradient norm is not finite only `step` changes, and nothing else.

    Args:
      state: donated by the jitted step.
      frozen: the parameters that do not learn.
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
    seen = batch._replace(pixels_BNXYC=normalise_batch(batch.pixels_BNXYC, batch.image_mask_BN, pixels))
    loss, grads, targets = loss_and_grads(state.params, frozen, seen, config, key)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = TrainState(state.step + 1, apply_updates(state.params, updates, state.step), opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)._replace(step=new.step)
    tokens = jnp.sum(batch.segment_ids_BT > 0, dtype=jnp.int32)
    metrics = dict(loss=loss, grad_norm=grad_norm, lr=learning_rate(state.step), targets=targets, tokens=tokens)
    return kept, metrics


def batch_ranks(mesh: Mesh) -> int:
    """Return how many shards a batch is cut into: the devices along the mesh's batch axes."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())


def state_shardings(mesh: Mesh, tx: optax.GradientTransformation, params: Params, shardings: Params) -> TrainState:
    """Return the shardings of the state: optimizer slots lie as their parameters, counters on every device."""
    whole, like = replicated(mesh), jax.tree.structure(params)

    def is_slots(part: Any) -> bool:
        return jax.tree.structure(part) == like

    slots = jax.eval_shape(tx.init, params)
    slots = jax.tree.map(lambda part: shardings if is_slots(part) else whole, slots, is_leaf=is_slots)
    return TrainState(whole, shardings, slots)


def make_step(update: Callable, mesh: Mesh, state_at: TrainState, frozen_at: Params) -> jax.stages.Wrapped:
    """Jit a `train_step` whose keywords are bound; `state_at` and `frozen_at` are shardings, the state is donated."""
    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(state_at, frozen_at, batch_sharding(mesh)),
        out_shardings=(state_at, replicated(mesh)),
    )


LOGITS = 2**26  # that a device holds at a time: 256 MiB in float32


def next_token(tokens_BT: jax.Array, targets_BT: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (labels_BT int32, counted_BT bool): what each position is to predict, and whether that is supervised.

    Position t predicts token t+1 (the causal shift of the Hugging Face loss). Nothing predicts the first token of a
    segment: the position before it belongs to another segment, or there is none.
    """
    follows = segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]
    counted_BT = jnp.pad(targets_BT[:, 1:] & follows, ((0, 0), (0, 1)))
    labels_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    # Where nothing is predicted the id may lie outside the vocabulary (an image slot).
    return jnp.where(counted_BT, labels_BT, 0), counted_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_nll(
    hidden_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array, head_learns: bool
) -> jax.Array:
    """Return the float32 sum over all positions of weight times negative log-likelihood of the label.

    Differentiable in `hidden_BTD`, and in `head_DV` (gathered along D) where `head_learns`. Each device takes its own
    rows, the positions with a weight first, a chunk of them at a time, and skips chunks without any. The gradient is
    computed together with the loss, so that the logits are computed once.
    """
    return _sharded(hidden_BTD, head_DV, labels_BT, weights_BT, head_learns).loss


class _Parts(NamedTuple):
    """The loss and its gradients; `head_DV` is sharded over D as the parameter is, or None."""

    loss: jax.Array
    hidden_BTD: jax.Array
    head_DV: jax.Array | None


def _forward(hidden_BTD, head_DV, labels_BT, weights_BT, head_learns):
    parts = _sharded(hidden_BTD, head_DV, labels_BT, weights_BT, head_learns)
    return parts.loss, parts


def _backward(head_learns, parts, cotangent):
    def scaled(gradient: jax.Array | None) -> jax.Array | None:
        return None if gradient is None else (gradient * cotangent).astype(gradient.dtype)

    return scaled(parts.hidden_BTD), scaled(parts.head_DV), None, None


weighted_nll.defvjp(_forward, _backward)


def _sharded(
    hidden_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array, head_learns: bool
) -> _Parts:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local(hidden_BTD, head_DV, labels_BT, weights_BT, head_learns=head_learns, on_mesh=False)
    hidden, head = spec_of(("batch", "length", "activation"), 3), spec_of(("activation", "vocab"), 2)
    rows, split_head = spec_of(("batch", "length"), 2), spec_of(("embed", "vocab"), 2)
    local = functools.partial(_local, head_learns=head_learns, on_mesh=True)
    out = _Parts(spec_of((), 0), hidden, split_head if head_learns else None)  # ty: ignore[invalid-argument-type]
    # check_vma: the sums over the mesh below are what makes the results equal on it.
    return jax.shard_map(local, in_specs=(hidden, head, rows, rows), out_specs=out, check_vma=False)(
        hidden_BTD, head_DV, labels_BT, weights_BT
    )


def _local(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    head_learns: bool,
    on_mesh: bool,
) -> _Parts:
    """Compute `_sharded` on one device: its rows, and its shard of the vocabulary."""
    B, T, D = hidden_BTD.shape
    chunk = chunk_length(B * T, head_DV.shape[1])
    labels, weights = labels_BT.reshape(-1), weights_BT.reshape(-1)
    order = jnp.argsort(weights == 0, stable=True)
    pad = -(B * T) % chunk
    hidden = jnp.pad(hidden_BTD.reshape(-1, D)[order], ((0, pad), (0, 0)))
    labels, weights = (jnp.pad(x[order], (0, pad)) for x in (labels, weights))

    # The same for all devices: their control flow must not diverge around the sums over the vocabulary.
    used = -(-jnp.count_nonzero(weights) // chunk)
    if on_mesh:
        used = jax.lax.pmax(used, MESH_AXES)

    def add(sums: tuple, numbered_chunk: tuple) -> tuple[tuple, jax.Array]:
        number, *arrays = numbered_chunk
        skip = lambda sums, hidden, *_: (sums, jnp.zeros_like(hidden))  # noqa: E731
        return jax.lax.cond(number < used, functools.partial(_add_chunk, head_DV, on_mesh), skip, sums, *arrays)

    head_sum = jnp.zeros(head_DV.shape, jnp.float32) if head_learns else None
    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (hidden, labels, weights))
    numbers = jnp.arange(chunks[0].shape[0])
    (loss, head_sum), hidden = jax.lax.scan(add, (jnp.float32(0), head_sum), (numbers, *chunks))
    hidden = hidden.reshape(-1, D)[jnp.argsort(order)].reshape(B, T, D)
    head = None if head_sum is None else head_sum.astype(head_DV.dtype)
    if on_mesh:
        loss = jax.lax.psum(loss, RULES["batch"])
        hidden = jax.lax.psum(hidden, "tensor")
        if head is not None:
            head = scatter_sum(head, 0)
    return _Parts(loss, hidden, head)


def _add_chunk(
    head_DV: jax.Array, on_mesh: bool, sums: tuple, hidden_CD: jax.Array, labels_C: jax.Array, weights_C: jax.Array
) -> tuple[tuple, jax.Array]:
    """Return `sums` (loss, gradient of the head) with these positions added, and their hidden states' gradient."""
    loss, head_sum = sums
    logits_CV = jnp.einsum("CD,DV->CV", hidden_CD, head_DV, preferred_element_type=jnp.float32)
    max_C = logits_CV.max(-1)
    first = 0
    if on_mesh:
        max_C = jax.lax.pmax(max_C, "tensor")
        first = jax.lax.axis_index("tensor") * logits_CV.shape[1]
    is_label_CV = jnp.arange(logits_CV.shape[1]) == (labels_C - first)[:, None]
    shifted_CV = logits_CV - max_C[:, None]
    total_C, chosen_C = jnp.exp(shifted_CV).sum(-1), jnp.where(is_label_CV, shifted_CV, 0).sum(-1)
    if on_mesh:
        total_C, chosen_C = jax.lax.psum((total_C, chosen_C), "tensor")
    loss += jnp.sum(weights_C * (jnp.log(total_C) - chosen_C))
    gradient_CV = weights_C[:, None] * (jnp.exp(shifted_CV) / total_C[:, None] - is_label_CV)
    gradient_CV = gradient_CV.astype(hidden_CD.dtype)
    if head_sum is not None:
        head_sum += jnp.einsum("CD,CV->DV", hidden_CD, gradient_CV, preferred_element_type=jnp.float32)
    return (loss, head_sum), jnp.einsum("CV,DV->CD", gradient_CV, head_DV)


def chunk_length(positions: int, vocab: int) -> int:
    """Return how many positions a chunk has: a quarter of a device's `positions`, as far as LOGITS allows."""
    return max(256, min(positions // 4, LOGITS // vocab) // 256 * 256)
