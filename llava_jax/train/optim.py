"""AdamW as torch.optim.AdamW computes it, learning-rate groups by parameter path, schedules as transformers'."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llava_jax.models.layers import is_codes, weights_in
from llava_jax.settings import parse_groups
from llava_jax.types import InputError, OptimSettings

Schedule = Callable[[Any], jax.Array]  # of the number of updates before
# 'llm/layers/attn/q/kernel' for a key path of jax.
leaf_path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def warmup_steps(settings: OptimSettings, steps: int) -> int:
    """Return ceil(ratio * steps) in double precision, as transformers' TrainingArguments.get_warmup_steps."""
    return math.ceil(steps * settings.warmup_ratio)


def make_schedule(settings: OptimSettings, steps: int) -> Schedule:
    """Return the factor on the learning rate (float32 scalar) as a function of the update, counted from 0.

    Linear from 0 during the warmup (so update 0 changes nothing when there is one), then constant, linear or cosine to
    0 at `steps`: the formulas of transformers' get_{cosine,linear,constant}_schedule_with_warmup.
    """
    warmup = warmup_steps(settings, steps)

    def factor(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = (step - warmup) / max(1, steps - warmup)
        decay = {
            "constant": jnp.ones_like(step),
            "linear": jnp.maximum(0.0, 1.0 - progress),
            "cosine": jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(math.pi * progress))),
        }[settings.schedule]
        return jnp.where(step < warmup, step / max(1, warmup), decay)

    return factor


def learning_rates(settings: OptimSettings, params: Any) -> Any:
    """Return the peak learning rate of every parameter: that of the first group that matches its path, else `lr`.

    Raises InputError for a group that matches no parameter: it would silently train with another rate than asked for.
    """
    groups = parse_groups(settings.groups)
    unused = {pattern.pattern for pattern, _ in groups}

    def rate(path: tuple, _: Any) -> float:
        for pattern, lr in groups:
            if pattern.search(leaf_path(path)):
                unused.discard(pattern.pattern)
                return lr
        return settings.lr

    rates = jax.tree_util.tree_map_with_path(rate, params)
    if unused:
        raise InputError(
            f"optim.groups: {min(unused)!r} decides no trainable parameter, expected a pattern that finds one in a "
            f"path such as {leaf_path(jax.tree_util.tree_leaves_with_path(params)[0][0])!r}"
        )
    return rates


def decay_mask(params: Any) -> Any:
    """Return True where weight decay applies: everything except biases and norm scales, as transformers' Trainer."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Return torch.nn.utils.clip_grad_norm_: gradients times min(1, max_norm / (norm + 1e-6))."""

    def clip(updates: Any, params: Any = None) -> Any:
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clip)


def round_to(x: jax.Array, dtype: str | jnp.dtype, seed: jax.Array) -> jax.Array:
    """Cast float32 `x` to `dtype`; bfloat16 rounds up or down at random, so that the expected value is unchanged.

    To the nearest, a change of less than half a unit of bfloat16 (0.2 to 0.4 %) would be lost in each update: the
    second moment would never decay, and weights would stand still at small rates. The draw is a hash of the index and
    the `seed` (the update's number): the same in every run, and a few integer operations.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    noise = jnp.uint32(seed) * jnp.uint32(0x9E3779B9)
    for dim in range(x.ndim):
        noise = (noise ^ jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)) * jnp.uint32(0x85EBCA6B)
        noise = noise ^ (noise >> 15)
    noise = (noise * jnp.uint32(0xC2B2AE35)) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def apply_updates(params: Any, updates: Any, seed: jax.Array) -> Any:
    """Return the parameters with float32 updates added, each in its own dtype by `round_to`."""
    return jax.tree.map(lambda p, u: round_to(p.astype(jnp.float32) + u, p.dtype, seed), params, updates)


def scale_by_adam(b1: float, b2: float, eps: float, dtype: str) -> optax.GradientTransformation:
    """Return optax.scale_by_adam with both moments stored in `dtype` by `round_to`; the arithmetic is float32."""

    def init(params: Any) -> optax.ScaleByAdamState:
        moments = [jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params) for _ in range(2)]
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), *moments)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        mu = jax.tree.map(lambda m, g: (1 - b1) * g + b1 * m.astype(jnp.float32), state.mu, grads)
        nu = jax.tree.map(lambda v, g: (1 - b2) * (g * g) + b2 * v.astype(jnp.float32), state.nu, grads)
        count: Any = optax.safe_increment(state.count)
        mu_scale, nu_scale = (1 / (1 - beta ** count.astype(jnp.float32)) for beta in (b1, b2))
        updates = jax.tree.map(lambda m, v: m * mu_scale / (jnp.sqrt(v * nu_scale) + eps), mu, nu)
        moments = [jax.tree.map(lambda x: round_to(x, dtype, count), tree) for tree in (mu, nu)]
        return updates, optax.ScaleByAdamState(count, *moments)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    settings: OptimSettings, steps: int, params: Any, moment_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Return AdamW with decoupled decay for the trainable `params` (arrays or shapes), over `steps` updates.

    p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + decay * p), with lr the parameter's own rate times the schedule.
    """
    rates = learning_rates(settings, params)
    schedule = make_schedule(settings, steps)
    parts = [
        scale_by_adam(settings.b1, settings.b2, settings.eps, moment_dtype),
        optax.add_decayed_weights(settings.weight_decay, decay_mask(params)),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: u * rate, updates, rates)),
        optax.scale_by_schedule(lambda count: -schedule(count)),
    ]
    if settings.clip_norm > 0:
        parts.insert(0, clip_by_norm(settings.clip_norm))
    return optax.chain(*parts)


def describe(settings: OptimSettings, trainable: Any, frozen: Any) -> str:
    """Return a table of what trains and how: part, state, parameters, dtype, peak lr, decay; a row a combination."""
    rates, decayed = jax.tree.leaves(learning_rates(settings, trainable)), jax.tree.leaves(decay_mask(trainable))
    rows = collections.Counter()

    def count(path: tuple, state: str, leaf: Any, rate: str, decay: str) -> None:
        dtype = "nf4" if is_codes(leaf) else str(leaf.dtype)
        rows[path[0].key, state, dtype, rate, decay] += weights_in(path, leaf)

    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    for (path, leaf), rate, is_decayed in zip(leaves, rates, decayed, strict=True):
        count(path, "trainable", leaf, f"{rate:g}", f"{settings.weight_decay:g}" if is_decayed else "0")
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        count(path, "frozen", leaf, "-", "-")

    head = ("part", "state", "parameters", "dtype", "lr", "decay")
    body = [(part, state, f"{n:,}", *rest) for (part, state, *rest), n in sorted(rows.items())]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *body]]
    return "\n".join(line.rstrip() for line in lines)
