"""The check before the run, kept: a restart need not tokenise again what has not changed."""

import dataclasses
import os

import numpy as np

from llava_jax.data.pipeline import Checked, check_records, summarise
from llava_jax.data.records import Rows
from llava_jax.data.sources import KEPT_ROWS, keep, key_of, recall
from llava_jax.data.tokenize import TextTokenizer
from llava_jax.types import DataSettings

# Settings that say where a row stands or who reads it, not what it becomes.
ORDER = ("annotations", "shuffle", "group_by", "pack", "pack_length", "pack_images", "workers")
# Counts up when the check, or the way a row becomes tokens, changes.
VERSION = 1


def check_once(
    records: Rows, settings: DataSettings, tokenizer: TextTokenizer, *, image_token_id: int, patches: int
) -> Checked:
    """`check_records`, or what it found before in the same rows with the same tokenizer and settings.

    A result without a problem is kept for data sets of KEPT_ROWS rows or more. Whether the pictures are there is looked
    up each time; where one is gone, every row is checked again, so that the rows are named.
    """
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ORDER}
    name = key_of("check", VERSION, records.fingerprint, tokenizer.fingerprint, image_token_id, patches, facts)
    kept = recall(name) if len(records) >= KEPT_ROWS else None
    if kept is not None:
        pictures = kept["pictures"].tobytes().decode().split("\0") if kept["pictures"].size else []
        if all(os.path.isfile(os.path.join(settings.images, picture)) for picture in pictures):
            return summarise(kept["counts"], (), frozenset())
    checked = check_records(records, settings, tokenizer, image_token_id=image_token_id, patches=patches)
    if len(records) >= KEPT_ROWS and not checked.problems:
        pictures = "\0".join(sorted(checked.pictures)).encode()
        keep(name, {"counts": checked.counts_AF, "pictures": np.frombuffer(pictures, np.uint8)})
    return dataclasses.replace(checked, pictures=frozenset())
