"""Plans of batches: every conversation once an epoch, batch_size of them an update, one shape, almost no padding."""

import dataclasses
import pathlib

import numpy as np
import pytest

from llava_jax.cli.train import load_settings
from llava_jax.data.packing import BatchPlan, deal, pack_update, plan_batches
from llava_jax.data.records import load_records
from llava_jax.data.rows import count_words
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.data.validate import check_records
from llava_jax.demo import files
from llava_jax.types import UNPACKED, DataSettings, InputError, Record, Turn
from llava_jax.weights.load import EMBEDDED_TOKENIZER

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = DataSettings("rows.json", "", "v1", "front", "pad", 2048, True, **{**UNPACKED, "pack": True})


def instruction_lengths(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, images) of a stand-in for LLaVA-1.5's instruction data.

    94 % of the rows have an image of 576 tokens and a text of median 240 (log-normal, sigma 0.6, clipped to 16..1400);
    the others a text of median 800 (sigma 0.6, clipped to 16..2048).
    """
    rng = np.random.default_rng(seed)
    with_image = rng.random(count) < 0.94
    beside = np.clip(rng.lognormal(np.log(240), 0.6, count), 16, 1400) + 576
    alone = np.clip(rng.lognormal(np.log(800), 0.6, count), 16, 2048)
    return np.where(with_image, beside, alone).astype(np.int32), with_image.astype(np.int64)


def make_plan(lengths, images, batch_size=16, row_multiple=1, steps=20, seed=0, **changes) -> BatchPlan:
    settings = dataclasses.replace(SETTINGS, **changes)
    lengths, images = np.asarray(lengths, np.int32), np.asarray(images)
    sizes = dict(batch_size=batch_size, row_multiple=row_multiple, steps=steps, seed=seed)
    return plan_batches([None] * len(lengths), lengths, settings, slots_A=images, **sizes)


def assert_sound(plan: BatchPlan, lengths: np.ndarray, images: np.ndarray, batch_size: int, row_multiple: int) -> None:
    """Every update has batch_size conversations, every row keeps to the shape, and the figures are true."""
    shape = plan.shape
    assert plan.order_UC.shape == plan.rows_UC.shape == (plan.steps, batch_size)
    assert shape.rows % row_multiple == 0
    assert plan.rows_UC.min() >= 0 and plan.rows_UC.max() < shape.rows
    most = 0
    for order, rows in zip(plan.order_UC, plan.rows_UC, strict=True):
        assert np.bincount(rows, lengths[order], shape.rows).max() <= shape.length
        assert np.bincount(rows, images[order], shape.rows).max() <= shape.images
        most = max(most, np.bincount(rows).max())
    assert plan.max_per_row == most
    slots = plan.steps * shape.rows * shape.length
    assert shape.filled == pytest.approx(lengths[plan.order_UC].sum() / slots)


# ---- real tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size, row_multiple, filled",
    # 64 rows of 2048, the longest conversation, are 131,072 tokens for the 110,900 of 128 conversations: 84.6 %.
    [(128, 8, 0.95), (128, 32, 0.95), (256, 8, 0.95), (256, 64, 0.95), (128, 64, 0.84)],
)
def test_instruction_data_leaves_little_padding(batch_size, row_multiple, filled):
    lengths, images = instruction_lengths(30_000)
    steps = -(-30_000 // batch_size)
    plan = make_plan(lengths, images, batch_size, row_multiple, steps)
    assert plan.shape.filled >= filled, plan.shape
    assert plan.shape.length % 128 == 0
    assert_sound(plan, lengths, images, batch_size, row_multiple)
    assert sorted(plan.order_UC.ravel()[:30_000]) == list(range(30_000))


def test_dealing_gives_every_update_much_the_same():
    lengths, images = instruction_lengths(10_000)
    order = deal(lengths, images, np.array([40, *[128] * 77, 104]), np.random.default_rng(0))
    assert sorted(order) == list(range(10_000))
    whole = order[40:-104].reshape(77, 128)
    tokens, counts = lengths[whole].sum(1), images[whole].sum(1)
    assert np.ptp(tokens) < 0.03 * tokens.mean() and np.ptp(counts) <= 2
    # At random the updates differ by several times that.
    assert np.ptp(lengths[: 77 * 128].reshape(77, 128).sum(1)) > 3 * np.ptp(tokens)
    for part in (order[:40], order[-104:]):
        assert lengths[part].mean() == pytest.approx(lengths.mean(), rel=0.05)


# ---- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, batch_size", [(100, 16), (96, 16), (5, 16), (16, 16), (33, 32)])
def test_every_epoch_has_every_conversation_once(count, batch_size):
    lengths, images = instruction_lengths(count)
    plan = make_plan(lengths, images, batch_size, steps=20)
    assert_sound(plan, lengths, images, batch_size, 1)
    stream = plan.order_UC.ravel()
    epochs = [stream[start : start + count].tolist() for start in range(0, len(stream) - count + 1, count)]
    assert epochs and all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_companions_change_from_epoch_to_epoch():
    lengths, images = instruction_lengths(64)
    plan = make_plan(lengths, images, batch_size=8, steps=16)
    first, second = ({frozenset(update.tolist()) for update in half} for half in plan.order_UC.reshape(2, 8, 8))
    assert not first & second


def test_without_shuffle_the_order_is_the_file():
    lengths, images = instruction_lengths(30)
    plan = make_plan(lengths, images, batch_size=8, steps=5, shuffle=False)
    assert plan.order_UC.ravel().tolist() == [*range(30), *range(10)]
    assert_sound(plan, lengths, images, 8, 1)


def test_the_order_is_the_seeds_whatever_the_devices_the_shape_and_the_steps():
    lengths, images = instruction_lengths(300)
    plan = make_plan(lengths, images)
    for other in (
        make_plan(lengths, images, row_multiple=4),
        make_plan(lengths, images, pack_length=2560),
        make_plan(lengths, images, pack_images=6),
        make_plan(lengths, images, steps=30),
    ):
        np.testing.assert_array_equal(other.order_UC[:20], plan.order_UC)
    again = make_plan(lengths, images)
    assert again.shape == plan.shape
    np.testing.assert_array_equal(again.rows_UC, plan.rows_UC)
    assert make_plan(lengths, images, seed=1).order_UC.tolist() != plan.order_UC.tolist()


def test_members_are_the_conversations_of_a_row():
    lengths, images = instruction_lengths(40)
    plan = make_plan(lengths, images, batch_size=8, steps=5)
    for step in range(5):
        rows = [plan.members(step, row) for row in range(plan.shape.rows)]
        assert sorted(np.concatenate(rows)) == sorted(plan.order_UC[step])
        assert max(map(len, rows)) <= plan.max_per_row


# ---- shape ------------------------------------------------------------------------------------------------------


def test_a_given_length_is_kept_and_rows_are_chosen():
    lengths, images = instruction_lengths(300)
    plan = make_plan(lengths, images, row_multiple=2, pack_length=4000)
    assert plan.shape.length == 4000
    assert_sound(plan, lengths, images, 16, 2)
    # 16 conversations of 866 tokens are 3.5 rows of 4000.
    assert plan.shape.rows == 4


def test_given_images_are_kept():
    lengths, images = np.full(200, 100), np.tile([0, 0, 1, 3], 50)
    free = make_plan(lengths, images)
    narrow = make_plan(lengths, images, pack_images=3)
    assert narrow.shape.images == 3 and free.shape.images >= 3
    assert_sound(narrow, lengths, images, 16, 1)
    # 16 images an update, three a row: six rows at least.
    assert narrow.shape.rows >= 6


def test_text_alone_needs_no_image_slots():
    lengths = instruction_lengths(100)[0]
    assert make_plan(lengths, np.zeros(100, int)).shape.images == 0
    assert make_plan(lengths, np.zeros(100, int), pack_images=4).shape.images == 0


def test_short_rows_are_not_stretched():
    plan = make_plan([7, 9, 11, 5] * 10, [0] * 40, batch_size=4, steps=10)
    assert plan.shape.length < 128 and plan.shape.filled > 0.75


def test_an_update_that_needs_exchanges():
    # Longest first into the emptiest row gives 7 and 5; only 3 + 3 and 2 + 2 + 2 fit six tokens.
    rows = pack_update(np.array([3, 3, 2, 2, 2]), np.zeros(5, int), rows=2, length=6, images=0)
    assert rows.tolist() == [1, 1, 0, 0, 0]
    assert pack_update(np.array([3, 3, 2, 2, 3]), np.zeros(5, int), rows=2, length=6, images=0) is None
    # Room for the tokens and none for the images.
    assert pack_update(np.array([1, 1, 1]), np.array([2, 2, 2]), rows=2, length=9, images=3) is None


def test_what_cannot_fit_is_named():
    lengths, images = [100, 900, 50], [0, 1, 3]
    with pytest.raises(InputError, match=r"data.pack_length=512: row 1 of rows.json has 900 tokens"):
        make_plan(lengths, images, pack_length=512)
    with pytest.raises(InputError, match=r"data.pack_images=2: row 2 of rows.json has 3 images"):
        make_plan(lengths, images, pack_images=2)


# ---- unpacked, and which of the two ------------------------------------------------------------------------------

TURNS = (Turn("human", "a b"), Turn("gpt", "c"))
RECORDS = [Record(f"r{i}", ("a.png",) * (i % 2), (*TURNS, *TURNS[: i % 3 and 1])) for i in range(12)]
LENGTHS = np.arange(10, 22, dtype=np.int32)
PICTURES = np.array([len(record.images) for record in RECORDS])
WORDS = np.array([count_words(record) for record in RECORDS])


def plan_rows(batch_size=4, row_multiple=2, steps=6, seed=0, **changes) -> BatchPlan:
    settings = dataclasses.replace(SETTINGS, **{"pack": False, "max_length": 32} | changes)
    sizes = dict(batch_size=batch_size, row_multiple=row_multiple, steps=steps, seed=seed)
    return plan_batches(RECORDS, LENGTHS, settings, slots_A=PICTURES, words_A=WORDS, **sizes)


def test_unpacked_rows_hold_one_conversation():
    plan = plan_rows()
    assert (plan.shape.rows, plan.shape.length, plan.shape.images, plan.max_per_row) == (4, 32, 1, 1)
    assert plan.shape.filled == pytest.approx(LENGTHS.mean() / 32)
    assert [plan.members(0, row).tolist() for row in range(4)] == plan.order_UC[0, :, None].tolist()
    assert sorted(plan.order_UC.ravel()[:12]) == sorted(plan.order_UC.ravel()[12:]) == list(range(12))


@pytest.mark.parametrize(
    "longest, max_length, length",
    [
        (5, 2048, 16),
        (16, 2048, 16),
        (100, 2048, 112),
        (120, 2048, 128),
        (129, 2048, 256),
        (640, 2048, 640),
        (700, 2048, 768),
        (2048, 2048, 2048),
        (700, 720, 720),
        (60, 62, 62),
    ],
)
def test_unpacked_rows_are_as_long_as_the_longest(longest, max_length, length):
    lengths = np.array([3, longest, 4])
    plan = plan_batches(
        [None] * 3,
        lengths,
        dataclasses.replace(SETTINGS, pack=False, max_length=max_length),
        batch_size=1,
        row_multiple=1,
        steps=3,
        seed=0,
        slots_A=np.zeros(3, int),
    )
    assert plan.shape.length == length and plan.shape.filled == pytest.approx(lengths.mean() / length)


@pytest.mark.parametrize("config", ["llava_v1", "llava_v1_5"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_published_configs_leave_little_padding_as_they_are(config, stage):
    lengths, images = instruction_lengths(30_000)
    settings = load_settings([f"--config={ROOT}/configs/{config}.py:stage={stage}"])
    size = settings.train.batch_size
    sizes = dict(batch_size=size, row_multiple=8, steps=-(-30_000 // size), seed=0)
    plan = plan_batches([None] * 30_000, lengths, settings.data, slots_A=images, **sizes)
    assert plan.shape.filled >= 0.93, plan.shape


def test_the_demos_captions_with_the_tiny_config_leave_little_padding(tmp_path):
    scenes, _ = files.split_scenes(0, 40, 0)
    files.write_caption_rows(f"{tmp_path}/rows.json", files.write_split(str(tmp_path), scenes, 1), 2)
    words = ["--config=tiny:stage=pretrain", f"--config.data.annotations={tmp_path}/rows.json"]
    settings = load_settings([*words, f"--config.data.images={tmp_path}/images"])
    tokenizer = load_tokenizer(EMBEDDED_TOKENIZER)
    checked = check_records(load_records(settings.data.annotations), settings.data, tokenizer, patches=36)
    lengths = np.tile(checked.lengths_A, 30_000 // checked.rows)
    assert len(lengths) == 30_000 and 50 < lengths.mean() < 62
    sizes = dict(batch_size=settings.train.batch_size, row_multiple=1, steps=3750, seed=0)
    plan = plan_batches([None] * 30_000, lengths, settings.data, slots_A=np.ones(30_000, int), **sizes)
    assert plan.shape.filled >= 0.8, plan.shape


def test_grouped_rows_follow_the_original():
    plan = plan_rows(batch_size=2, steps=9, group_by="modality_length")
    assert plan.order_UC.shape == (9, 2)
    kinds = plan.order_UC[:6] % 2
    # Five whole updates of one kind each; the last of either kind stand at the end of the epoch.
    assert (kinds[:4, 0] == kinds[:4, 1]).all()
    assert sorted(plan.order_UC[:6].ravel()) == list(range(12))
    assert plan.order_UC[:6].tolist() != plan_rows(batch_size=2, steps=6).order_UC.tolist()


def test_packing_is_asked_for():
    plan = plan_rows(pack=True)
    assert plan.max_per_row > 1 and plan.shape.rows % 2 == 0 and plan.shape.length < 128


def test_batches_that_do_not_divide_are_named():
    with pytest.raises(InputError, match="train.batch_size=4 is less than 8 device shards"):
        plan_rows(pack=True, row_multiple=8)
    with pytest.raises(InputError, match="train.batch_size=4 does not divide .* multiple of 3"):
        plan_rows(row_multiple=3)
