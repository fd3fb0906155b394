"""Next-token loss over the supervised tokens, from hidden states, without ever holding all logits of a batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.parallel.sharding import MESH_AXES, RULES, scatter_sum, spec_of

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


def masked_nll_rows(logits_BTV: jax.Array, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each row's summed nll (float32[B]) and number of targets (int32[B]) by the definition, from all logits.

    For rows of one conversation; a target never lies outside the vocabulary: image slots and padding are no targets.
    """
    labels = jnp.where(targets_BT[:, 1:], tokens_BT[:, 1:], 0)
    logits = logits_BTV[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = jnp.where(targets_BT[:, 1:], jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
    return nll.sum(-1), targets_BT[:, 1:].sum(-1, dtype=jnp.int32)
