"""The input pipeline: right rows, in an order that only the seed decides, from any point on, with any workers; packed
rows hold the same conversations."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from llava_jax.data import pipeline, validate
from llava_jax.data.images import load_image
from llava_jax.data.packing import plan_batches, steps_for
from llava_jax.data.pipeline import BatchIterator, make_pipeline
from llava_jax.data.tokenize import TextTokenizer, encode_record
from llava_jax.data.validate import check_records
from llava_jax.types import UNPACKED, Batch, DataSettings, InputError, Record, Turn

IMAGES = pathlib.Path(__file__).parent / "data" / "images"
PICTURES = ("wide.jpg", "tall.png", "square.webp", "odd.bmp")
SETTINGS = DataSettings("rows.json", str(IMAGES), "v1", "keep", "pad", max_length=320, shuffle=True, **UNPACKED)
IMAGE_ID, PATCHES, SIZE, BATCH, STEPS = 999, 4, 16, 4, 16


def make_record(index: int) -> Record:
    """0, 1 or 2 images, and words that differ from row to row."""
    images = tuple(PICTURES[(index + slot) % 4] for slot in range(index % 3))
    question = "<image>\n" * len(images) + f"question {index}"
    return Record(f"r{index}", images, (Turn("human", question), Turn("gpt", f"answer {index} " * (1 + index % 4))))


RECORDS = [make_record(index) for index in range(11)]


def make_tokenizer() -> TextTokenizer:
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    codec.train_from_iterator(
        [turn.text for record in RECORDS for turn in record.turns],
        tokenizers.trainers.BpeTrainer(
            special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, vocab_size=320, show_progress=False
        ),
    )
    return TextTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=codec, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    )


TOKENIZER = make_tokenizer()


def stream(
    records: list[Record] = RECORDS,
    batch_size: int = BATCH,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    row_multiple: int = 1,
    on_reject: Callable | None = None,
    out: Sequence[int] = (),
    **changes,
) -> BatchIterator:
    settings = dataclasses.replace(SETTINGS, **changes)
    checked = check_records(records, settings, TOKENIZER, patches=PATCHES)
    sizes = dict(batch_size=batch_size, row_multiple=row_multiple, steps=STEPS, seed=seed)
    plan = plan_batches(records, checked.lengths_A, settings, slots_A=checked.slots_A, **sizes)
    plan = plan.without(np.isin(plan.order_UC, out))
    model = dict(image_size=SIZE, patches=PATCHES, image_token_id=IMAGE_ID)
    return make_pipeline(records, settings, TOKENIZER, plan, rows=rows, on_reject=on_reject, **model)


def take(data: BatchIterator, count: int) -> list[Batch]:
    return [next(data) for _ in range(count)]


def check(records: list[Record], **changes) -> validate.Checked:
    settings = dataclasses.replace(SETTINGS, **changes)
    return check_records(records, settings, TOKENIZER, patches=PATCHES)


def arrays(batch: Batch) -> list[np.ndarray]:
    """The fields of a batch of whole images: feature_index_BT is for tiles (test_anyres.py)."""
    assert batch.feature_index_BT is None
    return list(batch[:-1])


def assert_equal(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected)
    for batch, other in zip(ours, expected, strict=True):
        for field, values, others in zip(Batch._fields[:-1], arrays(batch), arrays(other), strict=True):
            assert values.dtype == others.dtype
            np.testing.assert_array_equal(values, others, err_msg=field)


@pytest.fixture(scope="module")
def reference() -> list[Batch]:
    """The first 16 batches of seed 0, almost six epochs."""
    data = stream()
    batches = take(data, 16)
    data.close()
    return batches


@pytest.fixture(scope="module")
def packed() -> list[Batch]:
    """The same with several conversations in a row."""
    data = stream(pack=True)
    batches = take(data, 16)
    data.close()
    return batches


# ---- content ----------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_records(reference):
    batch = reference[0]  # the longest row has between 129 and 256 tokens
    assert batch.tokens_BT.shape == batch.targets_BT.shape == (BATCH, 256)
    assert batch.pixels_BNXYC.shape == (BATCH, 2, SIZE, SIZE, 3)
    kinds = [field.dtype for field in arrays(batch)]
    assert kinds == [np.int32, np.bool_, np.int32, np.int32, np.uint8, np.bool_, np.int64]
    for b, row in enumerate(batch.rows_BM[:, 0]):
        record = RECORDS[row]
        tokens, targets = encode_record(record, SETTINGS, TOKENIZER, IMAGE_ID, PATCHES)
        length = len(tokens)
        assert 0 < length < SETTINGS.max_length and 0 < targets.sum() < length
        assert np.count_nonzero(tokens == IMAGE_ID) == PATCHES * len(record.images)
        np.testing.assert_array_equal(batch.tokens_BT[b, :length], tokens)
        np.testing.assert_array_equal(batch.targets_BT[b, :length], targets)
        assert (batch.tokens_BT[b, length:] == TOKENIZER.pad_id).all() and not batch.targets_BT[b, length:].any()
        np.testing.assert_array_equal(batch.segment_ids_BT[b], np.arange(256) < length)
        np.testing.assert_array_equal(batch.positions_BT[b, :length], np.arange(length))
        for slot, name in enumerate(record.images):
            square = load_image(str(IMAGES / name), SIZE, "pad")
            np.testing.assert_array_equal(batch.pixels_BNXYC[b, slot], square)
        assert not batch.pixels_BNXYC[b, len(record.images) :].any()
        np.testing.assert_array_equal(batch.image_mask_BN[b], np.arange(2) < len(record.images))


def test_packed_rows_hold_what_unpacked_rows_hold(reference, packed):
    alone = {}
    for batch in reference:
        for b, row in enumerate(batch.rows_BM[:, 0].tolist()):
            alone[row] = Batch(*(field[b] for field in arrays(batch)))
    assert len({batch.tokens_BT.shape for batch in packed}) == 1 and packed[0].tokens_BT.shape[0] < BATCH
    together = 0
    for batch in packed:
        assert [field.dtype for field in arrays(batch)] == [field.dtype for field in arrays(reference[0])]
        assert np.count_nonzero(batch.rows_BM >= 0) == BATCH
        for tokens, targets, segments, positions, pixels, shown, rows in zip(*arrays(batch), strict=True):
            members, slot = rows[rows >= 0], 0
            assert (rows[len(members) :] == -1).all()
            assert set(segments) - {0} == set(range(1, len(members) + 1))
            # One conversation after the other, and then padding.
            assert (np.diff(np.where(segments == 0, len(members) + 1, segments)) >= 0).all()
            for segment, row in enumerate(members.tolist(), start=1):
                own, one = segments == segment, alone[row]
                real = one.segment_ids_BT == 1
                np.testing.assert_array_equal(tokens[own], one.tokens_BT[real])
                np.testing.assert_array_equal(targets[own], one.targets_BT[real])
                np.testing.assert_array_equal(positions[own], one.positions_BT[real])
                for image in one.pixels_BNXYC[: len(RECORDS[row].images)]:
                    np.testing.assert_array_equal(pixels[slot], image)
                    slot += 1
            padding = segments == 0
            assert (tokens[padding] == TOKENIZER.pad_id).all()
            assert not targets[padding].any() and not positions[padding].any() and not pixels[slot:].any()
            assert shown[:slot].all() and not shown[slot:].any()
            together += len(members) > 1
    assert together > len(packed)


def test_rows_that_are_left_out_are_padding_in_their_places(reference):
    out, seen = (2, 5), 0
    data = stream(out=out)
    for batch, whole in zip(take(data, 16), reference, strict=True):
        for b, row in enumerate(whole.rows_BM[:, 0].tolist()):
            if row in out:
                seen += 1
                assert batch.rows_BM[b, 0] == -1 and not batch.segment_ids_BT[b].any() and not batch.targets_BT[b].any()
                assert not batch.image_mask_BN[b].any()
            else:
                assert_equal([Batch(*(x[b] for x in arrays(batch)))], [Batch(*(x[b] for x in arrays(whole)))])
    assert seen == sum(np.count_nonzero(batch.rows_BM == row) for batch in reference for row in out) > 4
    data.close()


def test_text_alone_has_no_image_slots():
    for pack in (False, True):
        data = stream([RECORDS[0], RECORDS[3]], batch_size=2, pack=pack)
        assert next(data).pixels_BNXYC.shape[1:] == (0, SIZE, SIZE, 3)


# ---- order ------------------------------------------------------------------------------------------------------


def rows_of(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.rows_BM[:, 0] for batch in batches])


def test_every_epoch_shows_every_row_once_in_a_new_order(reference):
    epochs = rows_of(reference)[:55].reshape(5, 11)
    for epoch in epochs:
        assert sorted(epoch) == list(range(11))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert rows_of(take(stream(seed=1), 3)).tolist() != rows_of(reference[:3]).tolist()


def test_without_shuffle_the_order_is_the_file():
    assert rows_of(take(stream(shuffle=False), 6)).tolist() == [*range(11), *range(11), 0, 1]


def test_workers_change_neither_the_stream_nor_the_state(packed):
    before = set(threading.enumerate())
    data, alone = stream(workers=2, pack=True), stream(pack=True)
    assert_equal(take(data, 16), packed)
    assert data.get_state() == {"batches": 16}
    take(alone, 7)
    data.set_state(json.loads(json.dumps(alone.get_state())))
    assert_equal(take(data, 5), packed[7:12])
    assert any(thread.name.startswith("grain-prefetch") for thread in {*threading.enumerate()} - before)
    data.close()
    alone.close()
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("grain-prefetch") for thread in {*threading.enumerate()} - before):
        assert time.monotonic() < deadline


def test_threads_make_batches_side_by_side(monkeypatch, reference):
    """Each image waits until another thread has come to one as well."""
    meeting, load = threading.Barrier(2, timeout=60), pipeline.load_tiles

    def load_together(*args):
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait()
        return load(*args)

    monkeypatch.setattr(pipeline, "load_tiles", load_together)
    data = stream(workers=2)
    assert_equal(take(data, 3), reference[:3])
    assert not meeting.broken
    meeting.abort()
    data.close()


@pytest.mark.parametrize("pack", [False, True])
def test_hosts_share_each_global_batch(reference, pack):
    alone = reference if not pack else take(stream(pack=True, row_multiple=4), 16)
    hosts = [take(stream(rows=rows, pack=pack, row_multiple=4), 16) for rows in ((0, 1), (2,), (3,))]
    assert [len(host[0].tokens_BT) for host in hosts] == [2, 1, 1]
    for whole, *shares in zip(alone, *hosts, strict=True):
        joined = Batch(*(np.concatenate(fields) for fields in zip(*map(arrays, shares), strict=True)))
        assert_equal([joined], [whole])


def test_the_stream_ends_with_the_run():
    data = stream()
    assert len(list(data)) == STEPS
    data.set_state({"batches": STEPS})
    with pytest.raises(StopIteration):
        next(data)


def test_an_epoch_is_a_whole_number_of_steps():
    assert steps_for(9, 4, 1) == 3
    assert steps_for(9, 4, 1.5) == 5
    assert steps_for(11, 4, 2) == 6
    assert steps_for(12, 4, 0.5) == 2
    assert steps_for(100, 10, 1.1) == 11
    # Three epochs of LLaVA's 157,712 instructions in batches of 32.
    assert steps_for(157_712, 32, 3) == 14_787


# ---- state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used, pack", [(False, False), (True, True)])
def test_any_state_goes_on_exactly(reference, packed, used, pack):
    data, expected = stream(pack=pack), packed if pack else reference
    for delivered in range(13):
        state = json.loads(json.dumps(data.get_state()))
        other = stream(pack=pack)
        if used:
            take(other, 2)
        other.set_state(state)
        assert other.get_state() == state
        assert_equal(take(other, 3), expected[delivered : delivered + 3])
        other.close()
        next(data)


def test_the_state_is_saved_with_orbax(reference, tmp_path):
    data = stream()
    take(data, 5)
    with ocp.CheckpointManager(tmp_path, item_names=("data",)) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(data)))
        manager.wait_until_finished()
        other = stream()
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
    assert_equal(take(other, 4), reference[5:9])


# ---- faults -----------------------------------------------------------------------------------------------------


def test_bad_rows_are_named_before_the_run():
    gone = dataclasses.replace(RECORDS[1], id="gone", images=("none.jpg",))
    twice = dataclasses.replace(RECORDS[1], id="twice", images=("wide.jpg", "tall.png"))
    long = dataclasses.replace(RECORDS[0], id="long", turns=(Turn("human", "x " * 400), Turn("gpt", "yes")))
    rambling = dataclasses.replace(RECORDS[0], turns=(Turn("human", "why"), Turn("gpt", "because " * 400)))
    clean = check(RECORDS)
    assert clean.rejected == () and clean.count("cut") == 0 and clean.rows == 11
    clean.require_clean()
    checked = check([*RECORDS, gone, twice, long, rambling])
    assert [(problem.row, problem.id) for problem in checked.rejected] == [(11, "gone"), (12, "twice"), (13, "long")]
    assert checked.count("cut") == 1 and checked.total("cut") > 0
    assert checked.total("tokens") == clean.total("tokens") + SETTINGS.max_length
    with pytest.raises(InputError, match=r"3 of 15 rows .* row 11 \(id 'gone'\): .*none.jpg: no such file.*1 more"):
        checked.require_clean(shown=2)


def test_counts_are_what_is_trained(reference):
    epoch = Batch(*(np.concatenate(field)[:11] for field in zip(*map(arrays, reference), strict=True)))
    clean = check(RECORDS)
    assert clean.total("tokens") == epoch.segment_ids_BT.sum() and clean.total("targets") == epoch.targets_BT.sum()
    assert clean.lengths_A[epoch.rows_BM[:, 0]].tolist() == epoch.segment_ids_BT.sum(1).tolist()


def test_parts_that_are_checked_together_find_the_same(monkeypatch):
    """A row that cannot be rendered, or that spells a special token, leaves those that are checked with it alone."""
    gone = dataclasses.replace(RECORDS[2], id="gone", images=("none.jpg", "wide.jpg"))
    leaning = dataclasses.replace(RECORDS[0], id="leaning", turns=(Turn("gpt", "yes"),))
    mark = dataclasses.replace(RECORDS[0], id="mark", turns=(Turn("human", "\ufdd0"), Turn("gpt", "yes")))
    records = [*RECORDS[:3], gone, leaning, *RECORDS[3:], mark]
    whole = check(records)
    assert [(bad.row, bad.id) for bad in whole.rejected] == [(3, "gone"), (4, "leaning"), (13, "mark")]
    assert whole.lengths_A[[0, 1, 2, *range(5, 13)]].tolist() == check(RECORDS).lengths_A.tolist()
    assert not whole.lengths_A[[3, 4, 13]].any()
    for together in (1, 2, 5):
        monkeypatch.setattr(validate, "TOGETHER", together)
        parts = check(records)
        assert parts.rejected == whole.rejected and parts.figures_A.tolist() == whole.figures_A.tolist()


def test_no_rows_and_an_unknown_template():
    with pytest.raises(InputError, match="rows.json: no rows"):
        check([])
    with pytest.raises(InputError, match="^unknown template"):
        check(RECORDS, template="v9")


@pytest.mark.parametrize("pack", [False, True])
def test_a_row_that_may_be_missing_is_padding(tmp_path, pack):
    """All other conversations are as ever, and what is missing is told with the batch, also after a resume."""
    for name in PICTURES:
        shutil.copy(IMAGES / name, tmp_path)
    (tmp_path / "wide.jpg").write_bytes(b"")
    told: list[tuple[int, int]] = []
    how = dict(pack=pack, workers=3)
    data = stream(images=str(tmp_path), on_reject=lambda found, batch: told.append((batch, found.row)), **how)
    whole = stream(**how)
    for batch, other in zip(take(data, 6), take(whole, 6), strict=True):
        missing_BM = batch.rows_BM < -1
        np.testing.assert_array_equal(np.where(missing_BM, -2 - batch.rows_BM, batch.rows_BM), other.rows_BM)
        for b, missing_M in enumerate(missing_BM):
            ours, all_ = (x.tokens_BT[b][x.targets_BT[b]].tolist() for x in (batch, other))
            kept = ~np.isin(other.segment_ids_BT[b], 1 + np.flatnonzero(missing_M))
            assert ours == other.tokens_BT[b][other.targets_BT[b] & kept].tolist()
            assert (ours != all_) == missing_M.any()
            assert batch.image_mask_BN[b].sum() == np.any(batch.pixels_BNXYC[b], axis=(1, 2, 3)).sum()
    assert told and {row for _, row in told} == {row for row, r in enumerate(RECORDS) if "wide.jpg" in r.images}
    before = list(told)
    data.set_state({"batches": 3})
    take(data, 3)
    assert told[len(before) :] == [(batch, row) for batch, row in before if batch >= 3]
    data.close()
    whole.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_breaks_during_the_run_is_named(tmp_path, workers):
    for name in PICTURES:
        shutil.copy(IMAGES / name, tmp_path)
    whole = (tmp_path / "wide.jpg").read_bytes()
    (tmp_path / "wide.jpg").write_bytes(whole[:-60])
    data = stream(images=str(tmp_path), workers=workers)
    with pytest.raises(InputError, match=r"row \d+ \(id 'r\d+'\): image .*wide.jpg: truncated") as caught:
        take(data, 3)
    assert "\n" not in str(caught.value)
    data.close()
