"""Images: decode with care, then the published preprocessing of CLIP and SigLIP (numpy and PIL only).

The pixels are bit-equal to transformers' processors (PIL backend). Aspect `crop` is `CLIPImageProcessor`: shortest side
to `size` with a truncated long side, centre crop, / 255, normalise. Aspect `pad` first centres the image on a square
of the mean colour, as LLaVA-1.5's second stage does. Aspect `squash` is `SiglipImageProcessor`: the whole image to
the square, whatever its shape. As in the original, transparency is dropped, and an animation is its first frame.

`exif` is apply (an image is turned upright as its EXIF orientation says, as transformers' `load_image` does) or ignore
(the pixels as they are stored, as in the original; a TIFF, which Pillow turns by itself, is upright in both).
"""

import base64
import contextlib
import functools
import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image

from llava_jax.io import is_bucket, opened
from llava_jax.types import ImageBytes, InputError, Pixels

if TYPE_CHECKING:
    from llava_jax.data.tiles import Tiling

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "PPM")
# What else is found under the name of an image, by the place and bytes that tell it.
NOT_READ = (
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypavi", "a damaged AVIF"),
    (4, b"ftyp", "a video"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML or SVG"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a git-lfs pointer"),
)
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
MAX_PIXELS = 64_000_000
MAX_SIDE = 32_768
MAX_ASPECT = 200
DAMAGED = "image {name}: truncated or damaged ({reason}); replace the file"
TOO_LARGE = f"image {{name}}: more than {MAX_PIXELS // 10**6} megapixels; scale it down"

# EXIF orientation -> what turns the image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
CLIP = Pixels()
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# Pixels widened to the padded square at one time (a tall image would otherwise need side x side of memory).
STRIP_PIXELS = 4_000_000

# What Pillow's decoders raise on damaged files.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, RuntimeError, struct.error, zlib.error)


@functools.cache
def _normalised_bytes(pixels: Pixels) -> np.ndarray:
    """Return float32[3, 256], each byte of each channel rescaled and normalised, in the processor's op order."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(pixels.mean, np.float32), np.array(pixels.std, np.float32)
    return (scaled[None, :] - mean[:, None]) / std[:, None]


def load_image(
    source: str | bytes | Image.Image, size: int, aspect: str, pixels: Pixels = CLIP, exif: str = "apply"
) -> np.ndarray:
    """Return uint8[size, size, 3], the square that the tower sees of an image (path, content of a file, or in memory).

    `aspect` is pad, crop or squash. Raises InputError as `decode` does.
    """
    image, resample = decode(source, exif=exif), _RESAMPLE[pixels.resample]
    if aspect == "pad":
        return np.asarray(_pad(image, size, resample, background(pixels)))
    if aspect == "crop":
        return np.asarray(_crop(image, size, resample))
    if aspect == "squash":
        return np.asarray(image.resize((size, size), resample))
    raise InputError(f'aspect "{aspect}" is not known; expected pad, crop or squash')


def image_size(source: str | bytes | Image.Image, exif: str = "apply") -> tuple[int, int]:
    """Return the (width, height) that `decode` would give, for a file from its header alone.

    Raises InputError where `decode` would, as far as the header shows it.
    """

    def size(image: Image.Image, _: str) -> tuple[int, int]:
        width, height = image.size
        return (height, width) if exif == "apply" and _orientation(image) in SIDEWAYS else (width, height)

    return _opened(source, "", size)


def check_image(path: str | bytes) -> None:
    """Decode the whole image at `path`, or in these bytes. Raises InputError with path and reason where that fails."""
    decode(path)


def decode(source: str | bytes | Image.Image, name: str = "", exif: str = "apply") -> Image.Image:
    """Return the RGB image of a file (a path), of its content (bytes) or of an image in memory.

    An image in memory may not be read yet; `name` stands for the source in messages. Raises InputError for a file that
    is missing, empty, truncated, damaged, in no format of FORMATS, above MAX_PIXELS or MAX_SIDE, or with one side more
    than MAX_ASPECT times the other. The limits are checked on the header, before any pixel is decoded.
    """
    return _opened(source, name, lambda image, name: _to_rgb(image, name, exif))


def shrunk(source: str | bytes | Image.Image, side: int) -> Image.Image:
    """Return a copy of an image, made to fit a square of `side`. Raises InputError."""
    image = decode(source).copy()  # an image in memory stays as it is
    image.thumbnail((side, side))
    return image


def thumbnail(source: str | bytes | Image.Image, side: int, kind: str = "png") -> str:
    """Return an image, made to fit a square of `side`, as the base64 of a file of that kind. Raises InputError."""
    file = io.BytesIO()
    shrunk(source, side).save(file, kind, quality=80)
    return base64.b64encode(file.getvalue()).decode()


def _opened(source: str | bytes | Image.Image, name: str, use: Callable[[Image.Image, str], Result]) -> Result:
    """Return what `use` makes of the image, its header checked, and of its name for messages (`name`, or its own)."""
    if isinstance(source, Image.Image):
        return _in_memory(source, name or str(getattr(source, "filename", "")) or "in memory", use)
    if isinstance(source, bytes):
        name = name or (source.name if isinstance(source, ImageBytes) else "") or "that came with its row"
        return _read(io.BytesIO(source), name, use)
    name = name or source
    if not is_bucket(source) and os.path.exists(source) and not os.path.isfile(source):
        raise InputError(f"image {name}: cannot be read (no regular file); check the path")  # a pipe would wait
    try:
        with opened(source) as file:
            return _read(file, name, use)
    except FileNotFoundError:
        raise InputError(f"image {name}: no such file; check the path, or data.images") from None
    except (OSError, ValueError) as error:
        raise InputError(f"image {name}: cannot be read ({error}); expected a file, check the path") from None


def _read(file: BinaryIO, name: str, use: Callable[[Image.Image, str], Result]) -> Result:
    head = file.read(32)
    if not head:
        raise InputError(f"image {name}: the file is empty; replace it")
    try:
        return use(_open(file, name), name)
    except Image.UnidentifiedImageError:
        expected = f"expected {', '.join(FORMATS)}"
        for place, mark, kind in NOT_READ:
            if head[place:].lower().startswith(mark.lower()):
                raise InputError(f"image {name}: is {kind}; {expected}; convert or replace the file") from None
        problem = f"not an image, or damaged where it begins; {expected}; replace the file"
        raise InputError(f"image {name}: {problem}") from None
    except BROKEN as error:
        damaged = InputError(DAMAGED.format(name=name, reason=error))
    if head.startswith(PNG):
        with contextlib.suppress(*BROKEN):
            return use(_open(_without_text(file), name), name)
    raise damaged


def _in_memory(image: Image.Image, name: str, use: Callable[[Image.Image, str], Result]) -> Result:
    _check_shape(image, name)
    try:
        image.load()  # a PNG may say its orientation after its pixels, and would be of another size when used again
        return use(image, name)
    except BROKEN as error:
        raise InputError(DAMAGED.format(name=name, reason=error)) from None


def _open(file: BinaryIO, name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise InputError(TOO_LARGE.format(name=name)) from None
    _check_shape(image, name)
    return image


def _without_text(file: BinaryIO) -> BinaryIO:
    """Return the PNG without its texts and colour profile: no pixel needs them, and Pillow refuses long ones."""
    file.seek(len(PNG))
    content, kept, start = file.read(), [PNG], 0
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 8 + length + 4
        if kind not in PNG_TEXT:
            kept.append(content[start:end])
        start = end
    return io.BytesIO(b"".join(kept))


def _check_shape(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(TOO_LARGE.format(name=name))
    if max(width, height) > MAX_SIDE:
        raise InputError(f"image {name}: {width}x{height} is longer than {MAX_SIDE} pixels; scale it down")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"image {name}: {width}x{height} is thinner than {MAX_ASPECT}:1; crop it")


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 (upright) where it says none that can be read, or Pillow turns the image."""
    if image.format == "TIFF":
        return 1
    try:
        # The base class's: that of a PNG decodes the whole image to look behind its pixels.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except BROKEN:
        return 1


def _to_rgb(image: Image.Image, name: str, exif: str) -> Image.Image:
    """Return the image in mode RGB; 16-bit grey is scaled to 8 bit (Pillow's own conversion clips it)."""
    turn = TURNS.get(_orientation(image)) if exif == "apply" else None
    image.load()
    if image.mode == "F":
        raise InputError(f"image {name}: floating-point pixels have no known range; convert it to 8 bit")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(f"image {name}: integer pixels outside 0..65535; convert it to 8 bit")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def preprocess(image: Image.Image, size: int, aspect: str, pixels: Pixels = CLIP) -> np.ndarray:
    """Return float32[size, size, 3], the normalised pixels of an image in memory; `aspect` is pad, crop or squash."""
    return normalised(load_image(image, size, aspect, pixels), pixels)


def normalised(bytes_XYC: np.ndarray, pixels: Pixels = CLIP) -> np.ndarray:
    """Return float32[..., 3], the RGB bytes uint8[..., 3] normalised with the tower's mean and deviation."""
    table = _normalised_bytes(pixels)
    return np.stack([table[channel].take(bytes_XYC[..., channel]) for channel in range(3)], axis=-1)


def background(pixels: Pixels) -> tuple[int, ...]:
    """Return the mean colour as bytes: what surrounds an image that is padded to a square."""
    return tuple(int(255 * mean) for mean in pixels.mean)


def _crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize the shortest side to `size`, then cut out the centre."""
    short, long = min(image.size), int(size * max(image.size) / min(image.size))
    width, height = (size if side == short else long for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int, resample: Image.Resampling, colour: tuple[int, ...]) -> Image.Image:
    """Return the image centred on a square of `colour`, resized to `size`; the full square is never made.

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
    """Return a run of the `size` places that `side` is resized to, with all that see anything of [start, stop).

    Both ends fall on whole places of the source, so that the filters in between are those of the whole.
    """
    unit = size // math.gcd(side, size)
    reach = 1 + 2 * max(1, math.ceil(side / size))  # of bicubic; bilinear's is shorter
    low = max(0, (start - reach) * size // side // unit * unit)
    return low, min(size, -(-(stop + reach) * size // side // unit) * unit)


def load_tiles(
    source: str | bytes | Image.Image,
    size: int,
    aspect: str,
    tiles: "Tiling | None",
    pixels: Pixels = CLIP,
    exif: str = "apply",
) -> np.ndarray:
    """Return uint8[n, size, size, 3] of an image: its tiles (data/tiles.py), or the one square that `aspect` makes."""
    if tiles is None:
        return load_image(source, size, aspect, pixels, exif)[None]
    return tiles.cut(decode(source, exif=exif))
