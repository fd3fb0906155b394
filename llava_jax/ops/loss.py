"""Next-token loss over the supervised tokens; sums and counts stay apart until the last division."""

import jax
import jax.numpy as jnp


def masked_nll_rows(logits_BTV: jax.Array, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per row: summed negative log-likelihood (float32[B]) of the targets and their number (int32[B]).

    Token t is predicted from the logits at t-1 (the causal shift of the Hugging Face loss), in float32. A target
    outside the vocabulary cannot occur: image slots and padding are never targets.
    """
    labels = jnp.where(targets_BT[:, 1:], tokens_BT[:, 1:], 0)
    logits = logits_BTV[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = jnp.where(targets_BT[:, 1:], jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
    return nll.sum(-1), targets_BT[:, 1:].sum(-1, dtype=jnp.int32)


def masked_nll(logits_BTV: jax.Array, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of `masked_nll_rows` over the batch: (float32[], int32[])."""
    nll_B, count_B = masked_nll_rows(logits_BTV, tokens_BT, targets_BT)
    return nll_B.sum(), count_B.sum()
