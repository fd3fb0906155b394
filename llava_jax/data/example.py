"""One record as training sees it: conversation -> text -> ids and targets -> image ids in place.

The pipeline trains on `encode_record`; `prepare verify` reports through the same functions, so what it shows is what is
trained.
"""

import os
from collections.abc import Sequence

import numpy as np

from llava_jax.data.images import image_size
from llava_jax.data.templates import find_template, render
from llava_jax.data.tokenize import TextTokenizer, encode_all, expand
from llava_jax.types import DataSettings, Encoded, InputError, Record


def encode_turns(record: Record, settings: DataSettings, tokenizer: TextTokenizer) -> Encoded:
    """The record's ids and targets at full length, each image once as IMAGE_MARK.

    Raises InputError when the template cannot hold the turns, or when marks and images differ in number (one mark more
    or less would show an image to the wrong words).
    """
    (encoded,) = encode_turns_together([record], settings, tokenizer)
    return encoded


def encode_turns_together(records: Sequence[Record], settings: DataSettings, tokenizer: TextTokenizer) -> list[Encoded]:
    """`encode_turns` of several records, which takes less time; InputError when that of any of them raises it."""
    template = find_template(settings.template)
    rendered = [render(record.turns, template, image_position=settings.image_position) for record in records]
    encoded = encode_all(rendered, tokenizer)
    for record, found in zip(records, encoded, strict=True):
        if found.images != len(record.images):
            raise InputError(
                f"{found.images} <image> placeholders for {len(record.images)} images; make them the same number"
            )
    return encoded


def encode_record(
    record: Record,
    settings: DataSettings,
    tokenizer: TextTokenizer,
    image_token_id: int,
    patches: int | Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[t] and targets bool[t] of one training row, t <= settings.max_length, without padding.

    Raises InputError as `encode_turns` does, and when max_length leaves no target or cuts into an image.
    """
    encoded = encode_turns(record, settings, tokenizer)
    return expand(encoded.tokens, encoded.targets, image_token_id, patches, settings.max_length)


def image_sizes(record: Record, settings: DataSettings) -> list[tuple[int, int]]:
    """(width, height) of the record's images, from their headers."""
    return [image_size(path, settings.exif) for path in image_paths(record, settings)]


def image_paths(record: Record, settings: DataSettings) -> list[str | bytes]:
    """Where the record's images lie, in placeholder order; an image that came with its row is given itself."""
    return [image if isinstance(image, bytes) else os.path.join(settings.images, image) for image in record.images]


def require_file(image: str | bytes) -> None:
    """Raise InputError where an image file does not exist (nothing is decoded)."""
    if isinstance(image, str) and not os.path.isfile(image):
        raise InputError(f"image {image}: no such file; check the path, or data.images")
