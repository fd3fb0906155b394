"""Several conversations in a row: each is computed as if it were alone, and none has any influence on another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.models import llava
from llava_jax.settings import STAGES
from llava_jax.train.step import LossConfig, loss_and_grads
from llava_jax.types import Batch, ClipConfig, LlamaConfig, ModelConfig

CONFIG = ModelConfig(
    vision=ClipConfig(width=32, mlp_width=64, layers=3, heads=4, image_size=16, patch_size=8),
    llm=LlamaConfig(vocab_size=64, width=32, mlp_width=64, layers=2, heads=4, kv_heads=2, head_dim=8),
    image_token_id=64,
)
GRAPHDEF, _ = llava.build(CONFIG)
PARAMS = llava.init(CONFIG, 0)
# t: text, T: supervised text, i: one of the 4 tokens of an image
ROWS = ("tTiiiit", "iiiitTTt", "ttTTT", "tiiiiTiiiitT")


def conversation(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, images) of one of ROWS."""
    rng, row = np.random.default_rng(index), ROWS[index]
    tokens = np.where([c == "i" for c in row], CONFIG.image_token_id, rng.integers(1, 60, len(row)))
    return tokens, np.array([c == "T" for c in row]), rng.normal(size=(row.count("i") // 4, 16, 16, 3))


def batch(rows: list[list[int]], length: int, images: int, changed: int | None = None) -> Batch:
    """These conversations in these rows; every token and pixel of `changed` is another."""
    B = len(rows)
    tokens, targets = np.zeros((B, length), np.int32), np.zeros((B, length), bool)
    segments, positions = np.zeros((B, length), np.int32), np.zeros((B, length), np.int32)
    pixels = np.zeros((B, images, 16, 16, 3), np.float32)
    for b, row in enumerate(rows):
        start = slot = 0
        for number, index in enumerate(row, 1):
            ids, wanted, shown = conversation(index)
            if index == changed:
                ids, shown = np.where(ids == CONFIG.image_token_id, ids, 63 - ids), shown + 1
            end = start + len(ids)
            tokens[b, start:end], targets[b, start:end] = ids, wanted
            segments[b, start:end], positions[b, start:end] = number, np.arange(len(ids))
            pixels[b, slot : slot + len(shown)] = shown
            start, slot = end, slot + len(shown)
    return Batch(*map(jnp.asarray, (tokens, targets, segments, positions, pixels)), image_mask_BN=None)


PACKED = [[1, 0, 3], [2]]


def loss(data: Batch, packed: bool):
    trainable, frozen = llava.partition(PARAMS, STAGES["finetune"])
    config = LossConfig(GRAPHDEF, dtype="float32", packed=packed, loss_norm="global_token", ranks=1)
    return jax.jit(lambda t, f, d: loss_and_grads(t, f, d, config))(trainable, frozen, data)


@pytest.mark.parametrize("index", range(4))
def test_each_conversation_has_the_loss_and_gradient_it_has_alone(index):
    together, alone = batch(PACKED, 32, 4), batch([[index]], 16, 2)
    row = next(b for b, row in enumerate(PACKED) if index in row)
    mine = np.zeros((2, 32), bool)
    mine[row] = np.asarray(together.segment_ids_BT[row]) == PACKED[row].index(index) + 1
    got = loss(together._replace(targets_BT=together.targets_BT & mine), packed=True)
    want = loss(alone, packed=False)
    assert int(got[2]) == int(want[2]) == ROWS[index].count("T") > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_a_neighbour_has_no_influence_at_all():
    model = nnx.merge(GRAPHDEF, PARAMS)

    @jax.jit
    def hidden(data: Batch) -> jax.Array:
        return model.hidden(data.tokens_BT, data.pixels_BNXYC, data.segment_ids_BT, data.positions_BT)

    before, after = (np.asarray(hidden(batch(PACKED, 32, 4, changed=changed))) for changed in (None, 0))
    mine = np.asarray(batch(PACKED, 32, 4).segment_ids_BT) == 2
    mine[1] = False
    assert (before[mine] != after[mine]).all(-1).any()
    np.testing.assert_array_equal(before[~mine], after[~mine])


def test_the_first_token_of_a_neighbour_is_not_a_target():
    """It would be predicted from the conversation before it; alone, nothing predicts it either."""
    together = batch([[1, 2]], 16, 1)
    first = together._replace(targets_BT=together.targets_BT.at[0, len(ROWS[1])].set(True))
    assert int(loss(first, packed=True)[2]) == int(loss(together, packed=True)[2])


def test_image_slots_no_row_uses_do_no_work_and_change_nothing():
    """A slot that is empty in every row is skipped at run time; a data set without images has no tower at all."""
    few, many = batch(PACKED, 32, 4), batch(PACKED, 32, 6)
    got = loss(few, packed=True), loss(many, packed=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), *got)
    text = batch([[2]], 16, 0)
    model = nnx.merge(GRAPHDEF, PARAMS)
    works = [jax.jit(model.hidden).lower(d.tokens_BT, d.pixels_BNXYC).as_text() for d in (text, batch([[2]], 16, 1))]
    assert [work.count("stablehlo.while") for work in works] == [1, 3]  # decoder; with slots, tower and their loop
    got = loss(text, packed=False), loss(batch([[2]], 16, 1), packed=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *got)
