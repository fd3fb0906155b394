"""What a start finds out about its rows, kept: a restart need not tokenise, or plan, again what has not changed."""

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np

from llava_jax.data.anyres import Tiling
from llava_jax.data.packing import BatchPlan, BatchShape, plan_batches
from llava_jax.data.pipeline import Checked, check_records, summarise
from llava_jax.data.records import Rows
from llava_jax.data.sources import KEPT_ROWS, code, keep, key_of, recall
from llava_jax.data.tokenize import TextTokenizer
from llava_jax.types import DataSettings

# Settings that say where a row stands or who reads it, not what it becomes.
ORDER = ("annotations", "shuffle", "group_by", "pack", "pack_length", "pack_images", "workers")


def check_once(
    records: Rows,
    settings: DataSettings,
    tokenizer: TextTokenizer,
    *,
    patches: int,
    tiling: Tiling | None = None,
) -> Checked:
    """`check_records`, or what it found before in the same rows with the same tokenizer and settings.

    A result without a problem is kept for data sets of KEPT_ROWS rows or more. Whether the pictures are there is looked
    up each time; where one is gone, every row is checked again, so that the rows are named. With `tiling` nothing is
    kept: how many tokens a row has then depends on the sizes of its pictures, which may change in their files.
    """
    model = dict(patches=patches, tiling=tiling)
    if len(records) < KEPT_ROWS or tiling is not None:
        return dataclasses.replace(check_records(records, settings, tokenizer, **model), pictures=frozenset())
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ORDER}
    name = key_of("check", code(), records.fingerprint, tokenizer.fingerprint, patches, facts)
    kept = recall(name)
    if kept is not None:
        pictures = kept["pictures"].tobytes().decode().split("\0") if kept["pictures"].size else []
        if all(os.path.isfile(os.path.join(settings.images, picture)) for picture in pictures):
            return summarise(kept["counts"], (), frozenset())
    checked = check_records(records, settings, tokenizer, **model)
    if not checked.problems:
        pictures = "\0".join(sorted(checked.pictures)).encode()
        keep(name, {"counts": checked.counts_AF, "pictures": np.frombuffer(pictures, np.uint8)})
    return dataclasses.replace(checked, pictures=frozenset())


def plan_once(records: Rows, checked: Checked, settings: DataSettings, **sizes: Any) -> BatchPlan:
    """`plan_batches` of these rows, or the plan that was made of the same before, which a long run keeps."""
    lengths_A, slots_A, words_A = checked.lengths_A, checked.slots_A, checked.words_A
    facts = {name: getattr(settings, name) for name in ORDER if name not in ("annotations", "workers")}
    rows = hashlib.sha256(b"|".join(array.tobytes() for array in (lengths_A, slots_A, words_A))).hexdigest()
    name = key_of("plan", code(), rows, settings.max_length, facts, sizes, records.mixture)
    long = sizes["steps"] * sizes["batch_size"] >= KEPT_ROWS
    kept = recall(name) if long else None
    if kept is not None:
        rows_, length, images, filled, pictures, most = kept["shape"].tolist()
        shape = BatchShape(int(rows_), int(length), int(images), filled, pictures)
        return BatchPlan(shape, kept["order"], kept["rows"], int(most))
    how = dict(slots_A=slots_A, words_A=words_A, mixture=records.mixture)
    plan = plan_batches(records, lengths_A, settings, **sizes, **how)
    if long:
        shape = np.array([*dataclasses.astuple(plan.shape), plan.most], np.float64)
        keep(name, {"shape": shape, "order": plan.order_UC, "rows": plan.rows_UC})
    return plan
