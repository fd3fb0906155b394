"""AdamW against the algorithm of the paper in double precision, schedules and groups against hand-made values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.train import optim as O
from llava_jax.types import InputError, OptimSettings

BASE = OptimSettings(
    lr=1e-2,
    groups="",
    schedule="constant",
    warmup_ratio=0.0,
    weight_decay=0.0,
    clip_norm=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
)


def test_moments_are_kept_in_the_dtype_asked_for():
    """In bfloat16 they hold 8 bits of what float32 holds; the arithmetic and the update stay float32."""
    params, gradients = {"w": jnp.linspace(-1, 1, 64)}, {"w": jnp.linspace(0.1, 2, 64)}
    plain, low = (O.scale_by_adam(0.9, 0.999, 1e-8, dtype) for dtype in ("float32", "bfloat16"))
    wanted, want_state = plain.update(gradients, plain.init(params))
    got, state = low.update(gradients, low.init(params))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("bfloat16")}
    assert got["w"].dtype == jnp.float32
    np.testing.assert_array_equal(got["w"], wanted["w"])
    np.testing.assert_allclose(state.mu["w"].astype("float32"), want_state.mu["w"], rtol=2**-7)


def test_moments_in_bfloat16_rise_and_decay():
    """At b2 = 0.999 an update changes the second moment by less than bfloat16 holds: to the nearest, it would stand."""
    tx = O.scale_by_adam(0.9, 0.999, 1e-8, "bfloat16")

    def updates(state, size, count):
        step = jax.jit(lambda _, state: tx.update({"w": jnp.full(256, size)}, state)[1])
        return jax.lax.fori_loop(0, count, step, state)

    risen = updates(tx.init({"w": jnp.zeros(256)}), 1.0, 3000)
    fallen = updates(risen, 0.1, 3000)
    for state, want in ((risen, 1 - 0.999**3000), (fallen, (1 - 0.999**3000) * 0.999**3000 + 0.01 * (1 - 0.999**3000))):
        np.testing.assert_allclose(state.nu["w"].astype("float32").mean(), want, rtol=0.05)


def test_weights_in_bfloat16_take_updates_smaller_than_they_hold():
    weights = {"w": jnp.full((64, 64), 0.5, jnp.bfloat16), "b": jnp.full(3, 0.5)}
    updates = {"w": jnp.full((64, 64), 2e-5), "b": jnp.full(3, 2e-5)}
    moved = jax.lax.fori_loop(0, 1000, lambda n, w: O.apply_updates(w, updates, n), weights)
    np.testing.assert_allclose(moved["w"].astype("float32").mean(), 0.52, rtol=2e-3)
    np.testing.assert_allclose(moved["b"], 0.52, rtol=1e-4)
    again = O.apply_updates(weights, updates, 7)
    np.testing.assert_array_equal(again["w"], O.apply_updates(weights, updates, 7)["w"])
    assert not np.isfinite(O.round_to(jnp.array([jnp.nan, jnp.inf]), "bfloat16", 0).astype("float32")).any()


def settings(**changes) -> OptimSettings:
    return dataclasses.replace(BASE, **changes)


def params() -> dict:
    rng = np.random.default_rng(0)
    return {
        "projector": {"linear_1": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}},
        "llm": {"norm": {"scale": rng.normal(size=4)}, "head": {"kernel": rng.normal(size=(4, 5))}},
    }


def adamw(p, gradients, lrs, s: OptimSettings, decay: bool):
    """Algorithm 2 of Loshchilov & Hutter (arXiv 1711.05101) with the decay decoupled and scaled by lr, float64."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        m = s.b1 * m + (1 - s.b1) * g
        v = s.b2 * v + (1 - s.b2) * g * g
        m_hat, v_hat = m / (1 - s.b1**t), v / (1 - s.b2**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + s.eps) + (s.weight_decay * p if decay else 0))
    return p


def run(s: OptimSettings, start: dict, gradients: list) -> dict:
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    tx = O.make_optimizer(s, len(gradients), p)
    slots = tx.init(p)
    for g in gradients:
        updates, slots = tx.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g), slots, p)
        p = optax.apply_updates(p, updates)
    return p


def random_gradients(steps: int, scale: float = 1.0) -> list:
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda x: scale * rng.normal(size=x.shape), params()) for _ in range(steps)]


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adamw_follows_the_paper(eps):
    s = settings(weight_decay=0.1, eps=eps, groups="projector=1e-3,llm/head=3e-3", schedule="linear", warmup_ratio=0.3)
    gradients = random_gradients(10)
    got = run(s, params(), gradients)
    factors = [0, 1 / 3, 2 / 3] + [(10 - t) / 7 for t in range(3, 10)]
    for path, start in jax.tree_util.tree_leaves_with_path(params()):
        name = O.leaf_path(path)
        peak = 1e-3 if name.startswith("projector") else 3e-3 if "head" in name else s.lr
        series = [{O.leaf_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(g)}[name] for g in gradients]
        want = adamw(start, series, [peak * f for f in factors], s, decay=name.endswith("kernel"))
        found = {O.leaf_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(got)}[name]
        # Ten roundings of a float32 parameter of size 2 are worth 1.2e-6; the steps are 1e-3 and more.
        np.testing.assert_allclose(found - start, want - start, rtol=1e-3, atol=1.2e-6, err_msg=name)


def test_clipping_is_torchs():
    g = params()
    norm = math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(g)))
    clipped, _ = O.clip_by_norm(0.5).update(jax.tree.map(jnp.asarray, g), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b * 0.5 / (norm + 1e-6), rtol=1e-6), clipped, g)
    small = jax.tree.map(lambda x: jnp.asarray(x) * 1e-3, g)
    untouched, _ = O.clip_by_norm(0.5).update(small, None)
    jax.tree.map(np.testing.assert_array_equal, untouched, small)


def test_clip_norm_0_is_off():
    """Adam forgets the scale of gradients, so clipping shows only where their scale changes between steps."""
    gradients = [*random_gradients(1, 1.0), *random_gradients(2, 100.0)]
    off, on = run(settings(), params(), gradients), run(settings(clip_norm=1.0), params(), gradients)
    for path, start in jax.tree_util.tree_leaves_with_path(params()):
        name = O.leaf_path(path)
        pick = [{O.leaf_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(g)}[name] for g in gradients]
        want = adamw(start, pick, [1e-2] * 3, settings(), decay=False)
        found = [{O.leaf_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(t)}[name] for t in (off, on)]
        np.testing.assert_allclose(found[0], want, rtol=1e-5, atol=1e-6)
        assert not np.allclose(found[1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))]),
    ],
)
def test_schedules(schedule, expected):
    factor = O.make_schedule(settings(schedule=schedule, warmup_ratio=0.3), 6)  # ceil(1.8) = 2 steps of warmup
    np.testing.assert_allclose([factor(t) for t in range(6)], expected, atol=1e-6)


def test_without_warmup_the_first_rate_is_the_peak_and_the_cosine_ends_at_0():
    factor = O.make_schedule(settings(schedule="cosine"), 5)
    assert factor(0) == 1.0 and factor(5) == 0.0


@pytest.mark.parametrize("steps, warmup", [(2181, 66), (1200, 36), (1, 1)])
def test_warmup_is_rounded_up(steps, warmup):
    assert O.warmup_steps(settings(warmup_ratio=0.03), steps) == warmup


def test_group_that_finds_nothing_is_refused():
    with pytest.raises(InputError, match="optim.groups: 'vision'"):
        O.make_optimizer(settings(groups="vision=1e-3"), 4, params())
    with pytest.raises(InputError, match="optim.groups: 'projector/linear_1'"):  # hidden by the first one
        O.make_optimizer(settings(groups="projector=1e-3,projector/linear_1=1e-4"), 4, params())


def test_describe_counts_every_parameter():
    trainable = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"llm": params()["llm"]})
    frozen = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), {"projector": params()["projector"]})
    table = [line.split() for line in O.describe(settings(weight_decay=0.1), trainable, frozen).splitlines()]
    assert table == [
        ["part", "state", "parameters", "dtype", "lr", "decay"],
        ["llm", "trainable", "4", "float32", "0.01", "0"],
        ["llm", "trainable", "20", "float32", "0.01", "0.1"],
        ["projector", "frozen", "16", "bfloat16", "-", "-"],
    ]
