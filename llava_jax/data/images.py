"""Images: decode with care, then the published preprocessing of CLIP and SigLIP (numpy and PIL only).

The pixels are bit-equal to transformers' processors (PIL backend). Aspect `crop` is `CLIPImageProcessor`: shortest side
to `size` with a truncated long side, centre crop, / 255, normalise. Aspect `pad` first centres the image on a square
of the mean colour, as LLaVA-1.5's second stage does. Aspect `squash` is `SiglipImageProcessor`: the whole image to
the square, whatever its shape. As in the original, EXIF orientation is ignored, transparency is dropped, and an
animation is its first frame.
"""

import functools
import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from llava_jax.types import InputError, Pixels

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000
MAX_SIDE = 32_768
MAX_ASPECT = 200

ASPECTS = ("pad", "crop", "squash")
CLIP = Pixels()
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# Pixels widened to the padded square at one time (a tall image would otherwise need side x side of memory).
STRIP_PIXELS = 4_000_000

# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


@functools.cache
def _normalised_bytes(pixels: Pixels) -> np.ndarray:
    """float32[3, 256]: each byte of each channel after rescaling and normalising, in the processor's op order."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(pixels.mean, np.float32), np.array(pixels.std, np.float32)
    return (scaled[None, :] - mean[:, None]) / std[:, None]


def load_image(source: str | bytes | Image.Image, size: int, aspect: str, pixels: Pixels = CLIP) -> np.ndarray:
    """uint8[size, size, 3]: the square that the tower sees of an image (path, content of a file, or in memory).

    `aspect` is pad, crop or squash. InputError as in `decode`.
    """
    image = usable(decode(source) if isinstance(source, str | bytes) else source)
    resample = _RESAMPLE[pixels.resample]
    if aspect not in ASPECTS:
        raise InputError(f'aspect "{aspect}" is not known; expected pad, crop or squash')
    if aspect == "pad":
        square = _pad(image, size, resample, background(pixels))
    elif aspect == "crop":
        square = _crop(image, size, resample)
    else:
        square = image.resize((size, size), resample)
    return np.asarray(square)


def image_size(source: str | bytes) -> tuple[int, int]:
    """(width, height) of an image (path, or content of a file) from its header; InputError as in `decode`, as far as
    that shows it.
    """
    return _opened(source, "", lambda file, name, length: _open(file, name, length).size)


def check_image(path: str | bytes) -> None:
    """Decode the whole image at `path`, or in these bytes; InputError, naming path and reason, where that fails."""
    decode(path)


def decode(source: str | bytes, name: str = "") -> Image.Image:
    """RGB image of a file (a path) or of its content (bytes); `name` stands for the source in messages.

    Raises InputError for a file that is missing, empty, truncated, damaged, in no format of FORMATS, above MAX_PIXELS
    or MAX_SIDE, or with one side more than MAX_ASPECT times the other. The limits are checked on the header, before any
    pixel is decoded.
    """
    return _opened(source, name, _decode_file)


def _opened(source: str | bytes, name: str, read: Callable[[BinaryIO, str, int], Result]) -> Result:
    """What `read` makes of the file, its name for messages (`name`, or the source's own) and its length."""
    if isinstance(source, bytes):
        return read(io.BytesIO(source), name or "image", len(source))
    name = name or source
    try:
        with open(source, "rb") as file:
            return read(file, name, os.path.getsize(source))
    except FileNotFoundError:
        raise InputError(f"image {name}: no such file; check the path, or data.images") from None
    except (OSError, ValueError) as error:
        raise InputError(f"image {name}: cannot be read ({error}); check the file") from None


def _open(file: BinaryIO, name: str, length: int) -> Image.Image:
    """The image with its header read and checked."""
    if length == 0:
        raise InputError(f"image {name}: the file is empty; replace it")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise InputError(_too_large(name)) from None
    except Image.UnidentifiedImageError:
        raise InputError(f"image {name}: not an image; expected {', '.join(FORMATS)}") from None
    except DECODE_ERRORS as error:
        raise InputError(f"image {name}: damaged header ({error}); replace the file") from None
    _check_shape(image, name)
    return image


def _decode_file(file: BinaryIO, name: str, length: int) -> Image.Image:
    image = _open(file, name, length)
    try:
        image.load()
        return to_rgb(image, name)
    except DECODE_ERRORS as error:
        raise InputError(f"image {name}: truncated or damaged ({error}); replace the file") from None


def _too_large(name: str) -> str:
    return f"image {name}: more than {MAX_PIXELS // 10**6} megapixels; scale it down"


def _check_shape(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(_too_large(name))
    if max(width, height) > MAX_SIDE:
        raise InputError(f"image {name}: {width}x{height} is longer than {MAX_SIDE} pixels; scale it down")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"image {name}: {width}x{height} is thinner than {MAX_ASPECT}:1; crop it")


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """The image in mode RGB; 16-bit grey is scaled to 8 bit (Pillow's own conversion clips it)."""
    if image.mode == "F":
        raise InputError(f"image {name}: floating-point pixels have no known range; convert it to 8 bit")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(f"image {name}: integer pixels outside 0..65535; convert it to 8 bit")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def preprocess(image: Image.Image, size: int, aspect: str, pixels: Pixels = CLIP) -> np.ndarray:
    """float32[size, size, 3], normalised, of an image in memory; `aspect` is pad, crop or squash."""
    return normalised(load_image(image, size, aspect, pixels), pixels)


def usable(image: Image.Image) -> Image.Image:
    """An image in memory in mode RGB; InputError for sides and pixels as in `decode`."""
    _check_shape(image, "image")
    return to_rgb(image)


def normalised(bytes_XYC: np.ndarray, pixels: Pixels = CLIP) -> np.ndarray:
    """float32[..., 3] of RGB bytes uint8[..., 3], with the tower's mean and deviation."""
    table = _normalised_bytes(pixels)
    return np.stack([table[channel].take(bytes_XYC[..., channel]) for channel in range(3)], axis=-1)


def background(pixels: Pixels) -> tuple[int, ...]:
    """The mean colour as bytes: what surrounds an image that is padded to a square."""
    return tuple(int(255 * mean) for mean in pixels.mean)


def _crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Shortest side to `size`, then the centre."""
    short, long = min(image.size), int(size * max(image.size) / min(image.size))
    width, height = (size if side == short else long for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int, resample: Image.Resampling, colour: tuple[int, ...]) -> Image.Image:
    """The image centred on a square of `colour`, resized to `size`; the full square is never made.

    Pillow resizes rows first and columns then, rounding to 8 bit between; doing the two one after the other gives the
    same bytes, skips what only sees background, and needs no more than STRIP_PIXELS of the square at a time.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    columns = Image.new("RGB", (size, side), colour)
    low, high = _seen(left, left + width, side, size)
    rows = max(1, STRIP_PIXELS // side)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        strip = image if stop - start == height else image.crop((0, start, width, stop))
        if width < side:
            strip, narrow = Image.new("RGB", (side, stop - start), colour), strip
            strip.paste(narrow, (left, 0))
        box = (low * side // size, 0, high * side // size, stop - start)
        columns.paste(strip.resize((high - low, stop - start), resample, box), (low, top + start))
    square = Image.new("RGB", (size, size), colour)
    low, high = _seen(top, top + height, side, size)
    box = (0, low * side // size, size, high * side // size)
    square.paste(columns.resize((size, high - low), resample, box), (0, low))
    return square


def _seen(start: int, stop: int, side: int, size: int) -> tuple[int, int]:
    """Of `size` places that `side` is resized to, a run that holds all which see anything of [start, stop).

    Both ends fall on whole places of the source, so that the filters in between are those of the whole.
    """
    unit = size // math.gcd(side, size)
    reach = 1 + 2 * max(1, math.ceil(side / size))  # of bicubic; bilinear's is shorter
    low = max(0, (start - reach) * size // side // unit * unit)
    return low, min(size, -(-(stop + reach) * size // side // unit) * unit)
