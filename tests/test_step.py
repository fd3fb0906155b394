"""The update on a toy model: what changes, how losses add up, and that a bad batch changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llava_jax.data.images import normalised
from llava_jax.models.llava import partition
from llava_jax.parallel.sharding import make_mesh, replicated
from llava_jax.settings import STAGES
from llava_jax.train import step as S
from llava_jax.types import Batch, MeshSettings, Pixels

V, D, B, T = 7, 5, 4, 6


class Part(nnx.Module):
    def __init__(self, *shape: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape))


class Words(Part):
    head_name = "kernel"

    def head_kernel(self, dtype):
        return self.kernel[...].astype(dtype).T


class Toy(nnx.Module):
    """Logits from the token before, with an image's mean mixed in: all that the step asks of a model."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.vision, self.projector, self.llm = Part(3, D, rngs=rngs), Part(D, D, rngs=rngs), Words(V, D, rngs=rngs)

    def hidden(self, tokens_BT, pixels_BNXYC, segment_ids_BT, positions_BT, feature_index_BT, image_mask_BN):
        assert segment_ids_BT is None and feature_index_BT is None
        seen_BD = pixels_BNXYC.mean((1, 2, 3)) @ self.vision.kernel.astype(jnp.float32) @ self.projector.kernel
        return self.llm.kernel[...][tokens_BT] + seen_BD[:, None]


GRAPHDEF, ABSTRACT = nnx.split(Toy(rngs=nnx.Rngs(0)))
PARAMS = nnx.to_pure_dict(ABSTRACT)


def make_batch(counts=(5, 1, 2, 3)) -> Batch:
    """Rows with these numbers of targets, the last positions of each."""
    rng = np.random.default_rng(0)
    targets = np.arange(T)[None] >= T - np.asarray(counts)[:, None]
    return Batch(
        tokens_BT=jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        targets_BT=jnp.asarray(targets),
        segment_ids_BT=jnp.ones((B, T), jnp.int32),
        positions_BT=jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1)),
        pixels_BNXYC=jnp.asarray(rng.integers(0, 256, (B, 1, 2, 2, 3)), jnp.uint8),
        image_mask_BN=jnp.ones((B, 1), bool),
    )


def rates(step):
    return 0.5 - 0.25 * step


def update(stage="finetune", batch=None, params=None, count=1, **how):
    """(parameters before and after as numpy, metrics, the jitted step) of `count` updates with plain SGD."""
    mesh = make_mesh(MeshSettings(1, 1, 1), jax.devices()[:1])
    params = jax.tree.map(jnp.array, PARAMS if params is None else params)
    before = jax.tree.map(np.array, params)
    trainable, frozen = partition(params, STAGES[stage])
    tx = optax.chain(optax.trace(0.9), optax.scale(-0.1))
    at, frozen_at = jax.tree.map(lambda _: replicated(mesh), (trainable, frozen))
    loss = dict(dtype="float32", packed=False, accumulate=1, loss_norm="global_token", ranks=1) | how
    how = dict(config=S.LossConfig(GRAPHDEF, **loss), tx=tx, learning_rate=rates, pixels=Pixels())
    state_at = S.state_shardings(mesh, tx, trainable, at)
    jitted = S.make_step(functools.partial(S.train_step, **how), mesh, state_at, frozen_at)
    state = jax.device_put(S.TrainState(jnp.int32(0), trainable, tx.init(trainable)), state_at)
    for _ in range(count):
        state, metrics = jitted(state, frozen, make_batch() if batch is None else batch)
    after = jax.tree.map(np.array, {**frozen, **state.params})
    return before, after, jax.device_get(metrics), jitted, state


def row_nll(params: dict, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(summed nll, targets) of each row, in numpy and double precision."""
    p = {part: np.asarray(params[part]["kernel"], np.float64) for part in params}
    seen = normalised(np.asarray(batch.pixels_BNXYC)).astype(np.float64).mean((1, 2, 3)) @ p["vision"] @ p["projector"]
    tokens = np.asarray(batch.tokens_BT)
    logits = (p["llm"][tokens] + seen[:, None]) @ p["llm"].T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    mask = np.asarray(batch.targets_BT)[:, 1:]
    return -(picked * mask).sum(1), mask.sum(1)


@pytest.mark.parametrize("stage, moved", [("pretrain", {"projector"}), ("finetune", {"projector", "llm"})])
def test_only_the_stages_partition_moves(stage, moved):
    before, after, _, _, state = update(stage)
    assert set(state.params) == moved
    slots = {path[-2].key for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    assert slots == moved
    for part in before:
        assert (before[part]["kernel"].tobytes() == after[part]["kernel"].tobytes()) == (part not in moved)


def test_metrics_and_global_token_loss():
    _, _, metrics, _, state = update()
    nll, count = row_nll(PARAMS, make_batch())
    np.testing.assert_allclose(metrics["loss"], nll.sum() / count.sum(), rtol=1e-6)
    assert metrics["targets"] == 11 and metrics["tokens"] == B * T and metrics["lr"] == 0.5
    assert int(state.step) == 1


def test_grad_norm_is_that_of_the_gradient():
    _, _, metrics, _, _ = update("pretrain")

    def loss(kernel: np.ndarray) -> float:
        nll, count = row_nll(PARAMS | {"projector": {"kernel": kernel}}, make_batch())
        return nll.sum() / count.sum()

    kernel = np.asarray(PARAMS["projector"]["kernel"], np.float64)
    slopes = []
    for i in np.ndindex(kernel.shape):
        step = np.zeros_like(kernel)
        step[i] = 1e-5
        slopes.append((loss(kernel + step) - loss(kernel - step)) / 2e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(slopes), rtol=1e-4)


@pytest.mark.parametrize("accumulate, ranks", [(2, 1), (4, 1), (2, 2)])
def test_accumulation_changes_nothing(accumulate, ranks):
    _, whole, one, _, _ = update()
    _, parts, many, _, _ = update(accumulate=accumulate, ranks=ranks)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-6)
    assert many["targets"] == one["targets"] and many["tokens"] == one["tokens"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


@pytest.mark.parametrize("accumulate, ranks, rows", [(1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4)])
def test_rank_mean_is_the_mean_of_the_ranks_means(accumulate, ranks, rows):
    """As the original: every run of neighbouring rows that one device sees at once has its own mean."""
    nll, count = row_nll(PARAMS, make_batch())
    means = nll.reshape(-1, rows).sum(1) / count.reshape(-1, rows).sum(1)
    _, _, metrics, _, _ = update(accumulate=accumulate, ranks=ranks, loss_norm="rank_mean")
    np.testing.assert_allclose(metrics["loss"], means.mean(), rtol=1e-6)
    if rows != 4:
        assert abs(means.mean() - nll.sum() / count.sum()) > 1e-3


def test_microbatches_keep_rows_on_their_rank():
    x = jnp.arange(8)
    assert S.microbatches(x, 2, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert S.microbatches(x, 2, 1).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_frozen_weights_may_be_of_another_dtype():
    low = PARAMS | {"vision": jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS["vision"])}
    before, after, _metrics, _, _ = update("pretrain", params=low)
    assert after["vision"]["kernel"].dtype == jnp.bfloat16 and after["projector"]["kernel"].dtype == np.float32
    assert before["vision"]["kernel"].tobytes() == after["vision"]["kernel"].tobytes()


@pytest.mark.parametrize("what", ["no targets", "nan weights", "overflow"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_batch_changes_nothing(what, accumulate):
    batch, params = make_batch(), PARAMS
    if what == "no targets":
        batch = make_batch((0, 0, 0, 0))
    elif what == "nan weights":
        params = PARAMS | {"vision": {"kernel": PARAMS["vision"]["kernel"].at[0, 0].set(jnp.nan)}}
    else:
        params = PARAMS | {"projector": {"kernel": jnp.full((D, D), 1e38)}}
    before, after, metrics, _, state = update(batch=batch, params=params, accumulate=accumulate)
    assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), before, after)
    assert int(state.step) == 1 and all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_rank_without_targets_is_not_finite_either():
    before, after, metrics, _, _ = update(batch=make_batch((0, 0, 2, 3)), ranks=2, loss_norm="rank_mean")
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_one_compile_a_stage(stage):
    assert update(stage, count=3)[3]._cache_size() == 1
