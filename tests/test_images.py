"""Images: bit-equal to the published preprocessing, and every bad file named."""

import base64
import io
import pathlib
import struct
import zlib

import jax
import numpy as np
import pytest
import transformers.image_utils
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_jax.data.images import (
    FORMATS,
    MAX_SIDE,
    background,
    check_image,
    decode,
    image_size,
    load_image,
    load_tiles,
    normalised,
    preprocess,
    thumbnail,
)
from llava_jax.data.tiles import Tiling
from llava_jax.infer.conversation import Conversation
from llava_jax.infer.generate import question_message
from llava_jax.models import clip
from llava_jax.types import InputError, Pixels, Sampling

SMALL = Tiling(16, 2, ((16, 32), (32, 16)))
IMAGES = pathlib.Path(__file__).parent / "data" / "images"
SHAPES = [
    (640, 480),
    (480, 640),
    (427, 640),
    (375, 500),
    (101, 100),
    (100, 101),
    (48, 48),
    (1, 1),
    (7, 901),
    (901, 7),
    (1333, 1999),
]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def published(image: Image.Image, size: int, aspect: str) -> np.ndarray:
    sizes = dict(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = LlavaImageProcessorPil(do_pad=True, **sizes) if aspect == "pad" else CLIPImageProcessorPil(**sizes)
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("size", [48, 224, 336])
def test_bit_equal_to_the_published_processor(size, aspect):
    for shape in SHAPES:
        ours = preprocess(noise(*shape), size, aspect)
        theirs = published(noise(*shape), size, aspect)
        assert ours.dtype == theirs.dtype == np.float32
        assert ours.shape == (size, size, 3)
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{shape}")


@pytest.mark.parametrize("number, resample", [(3, "bicubic"), (2, "bilinear")])
def test_siglip_images_are_bit_equal_to_its_processor(number, resample):
    """The whole image to the square, bicubic (SigLIP) or bilinear (SigLIP2), mean and deviation 0.5."""
    half = (0.5, 0.5, 0.5)
    for shape in SHAPES[:6]:
        processor = SiglipImageProcessorPil(size=dict(height=48, width=48), resample=number)
        theirs = processor(noise(*shape), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        ours = preprocess(noise(*shape), 48, "squash", Pixels(half, half, resample))
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{shape}")
    assert background(Pixels(half, half)) == (127, 127, 127)


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("name", ["wide.jpg", "tall.png", "square.webp", "odd.bmp"])
def test_files_are_bit_equal_too(name, aspect):
    theirs = published(Image.open(IMAGES / name).convert("RGB"), 48, aspect)
    np.testing.assert_array_equal(preprocess(decode(str(IMAGES / name)), 48, aspect), theirs)


@pytest.mark.parametrize("pixels", [Pixels(), Pixels((0.5,) * 3, (0.5,) * 3)])
def test_the_step_normalises_every_byte_as_the_processor_does(pixels):
    """Each byte in each channel, in a slot that is shown and in one that is not, compiled as in the step."""
    bytes_BNXYC = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (1, 2, 16, 16, 3))
    seen = jax.jit(clip.normalise_batch, static_argnums=2)(bytes_BNXYC, np.array([[True, False]]), pixels)
    np.testing.assert_allclose(seen[0, 0], normalised(bytes_BNXYC[0, 0], pixels), rtol=0, atol=5e-7)
    assert not np.any(seen[0, 1])


@pytest.mark.parametrize("form", ["AVIF", "TIFF", "JPEG2000", "PPM"])
def test_formats_that_downloads_hide_under_another_name_are_read(form, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(noise(40, 30), form))
    whole = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(str(path))), whole)
    assert image_size(str(path)) == (40, 30)


def long_text(place: str) -> bytes:
    """A whole PNG whose text or colour profile unpacks to more than Pillow takes."""
    text, image = PngInfo(), noise(40, 30)
    if place == "profile":
        return encoded(image, "PNG", icc_profile=bytes(2 << 20))
    if place == "zTXt":
        text.add_text("workflow", "x" * (2 << 20), zip=True)
    if place == "iTXt":
        text.add_itxt("workflow", "é" * (2 << 20), zip=True)
    if place == "together":
        for key in range(66):
            text.add_text(f"part {key}", "x" * (1 << 20), zip=True)
    if place == "after the pixels":
        text.add(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2 << 20)), after_idat=True)
    return encoded(image, "PNG", pnginfo=text)


@pytest.mark.parametrize("place", ["zTXt", "iTXt", "profile", "together", "after the pixels"])
def test_a_whole_png_with_a_long_text_is_read(place, tmp_path):
    content = long_text(place)
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(noise(40, 30)))
    assert image_size(content) == (40, 30)
    with pytest.raises(InputError, match="truncated or damaged"):
        decode(content[:-1500] if place == "after the pixels" else content[:-600])


def test_an_image_in_memory_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(noise(64, 64), "JPEG")[:900])
    with Image.open(path) as opened, pytest.raises(InputError, match=f"image {path}: truncated or damaged"):
        preprocess(opened, 48, "pad")
    opened = Image.open(io.BytesIO(encoded(noise(64, 64), "PNG")[:3000]))
    with pytest.raises(InputError, match="image in memory: truncated or damaged"):
        load_tiles(opened, 16, "", SMALL)


def test_pad_centres_on_the_mean_colour_with_the_odd_row_below():
    white = Image.new("RGB", (8, 5), (255, 255, 255))
    rows = preprocess(white, 8, "pad")[:, 0, 0]
    assert [bool(row > 1) for row in rows] == [False] + [True] * 5 + [False] * 2
    assert background(Pixels()) == (122, 116, 104)


def test_strips_of_a_tall_image_join_without_a_seam(monkeypatch):
    whole = preprocess(noise(60, 200), 48, "pad")
    monkeypatch.setattr("llava_jax.data.images.STRIP_PIXELS", 1400)
    np.testing.assert_array_equal(preprocess(noise(60, 200), 48, "pad"), whole)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes_convert_as_the_original(mode):
    form = "TIFF" if mode == "CMYK" else "PNG"
    image = Image.open(io.BytesIO(encoded(noise(20, 14).convert(mode), form)))
    np.testing.assert_array_equal(preprocess(image, 48, "crop"), preprocess(image.convert("RGB"), 48, "crop"))


def test_transparency_is_dropped_not_blended():
    clear = Image.new("RGBA", (6, 6), (200, 10, 30, 0))
    assert decode(encoded(clear, "PNG")).getpixel((0, 0)) == (200, 10, 30)


def test_sixteen_bit_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    levels = np.asarray(decode(encoded(Image.fromarray(ramp), "PNG")))[..., 0].astype(float)
    np.testing.assert_allclose(levels, ramp / 257.0, atol=0.51)
    with pytest.raises(InputError, match="floating-point"):
        preprocess(Image.new("F", (4, 4)), 48, "pad")
    with pytest.raises(InputError, match="0..65535"):
        preprocess(Image.new("I", (4, 4), 70000), 48, "pad")


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    assert decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_transformers_does(form, orientation, tmp_path):
    path = tmp_path / "phone.jpg"
    path.write_bytes(encoded(noise(30, 20), form, exif=turned(orientation)))
    wanted = transformers.image_utils.load_image(str(path))
    with Image.open(path) as lazy:
        for source in (str(path), path.read_bytes(), lazy):
            assert image_size(source) == wanted.size
            np.testing.assert_array_equal(np.asarray(decode(source)), np.asarray(wanted))
    np.testing.assert_array_equal(load_tiles(str(path), 16, "", SMALL), SMALL.cut(wanted))
    np.testing.assert_array_equal(preprocess(Image.open(path), 48, "crop"), preprocess(wanted, 48, "crop"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_can_be_ignored_as_in_the_original(form):
    content = encoded(noise(30, 20), form, exif=turned(6))
    wanted = Image.open(io.BytesIO(content)).convert("RGB")
    for source in (content, Image.open(io.BytesIO(content))):
        assert image_size(source, exif="ignore") == (30, 20)
        np.testing.assert_array_equal(np.asarray(decode(source, exif="ignore")), np.asarray(wanted))
        tiles = load_tiles(source, 16, "", SMALL, exif="ignore")
        np.testing.assert_array_equal(tiles, SMALL.cut(wanted))
        square = load_image(source, 48, "pad", exif="ignore")
        np.testing.assert_array_equal(normalised(square), preprocess(Image.fromarray(np.asarray(wanted)), 48, "pad"))


def test_exif_that_cannot_be_read_turns_nothing():
    content = encoded(noise(30, 20), "JPEG", exif=b"Exif\0\0no such thing")
    assert decode(content).size == image_size(content) == (30, 20)


BAD_CONTENTS = {
    "empty": (b"", "empty"),
    "text": (b"404 not found", "not an image"),
    "noise": (bytes(range(256)) * 4, "not an image"),
    "web page": (b"<!doctype html><title>404</title>", "is a web page; expected JPEG, .*convert or"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC; expected JPEG"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer; expected"),
    "cut jpeg": (encoded(noise(64, 64), "JPEG")[:900], "truncated"),
    "jpeg without its last two bytes": (encoded(noise(64, 64), "JPEG")[:-2], "truncated"),
    "cut png": (encoded(noise(64, 64), "PNG")[:3000], "truncated"),
    "cut gif": (encoded(noise(64, 64), "GIF")[:1200], "truncated"),
    "cut webp": (encoded(noise(64, 64), "WEBP")[:300], "image|damaged"),
    "cut avif": (encoded(noise(64, 64), "AVIF")[:1500], "is a damaged AVIF"),
    "cut tiff": (encoded(noise(64, 64), "TIFF")[:3000], "truncated"),
    "cut jpeg 2000": (encoded(noise(64, 64), "JPEG2000")[:1000], "truncated"),
    "cut header": (encoded(noise(64, 64), "PNG")[:20], "image|damaged"),
    "81 megapixels": (png_header(9000, 9000), "64 megapixels"),
    "900 megapixels": (png_header(30000, 30000), "64 megapixels"),
    "a line": (encoded(Image.new("1", (10000, 1)), "PNG"), "200:1"),
    "a side": (png_header(MAX_SIDE + 1, 1000), "longer than"),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_file_is_named_with_its_reason(case, tmp_path):
    content, reason = BAD_CONTENTS[case]
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        check_image(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="upload 3"):
        decode(content, "upload 3")


def test_a_missing_file_a_folder_and_an_impossible_name(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        check_image(str(tmp_path / "none.jpg"))
    with pytest.raises(InputError, match="cannot be read"):
        check_image(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        check_image("a\0b.jpg")
    with pytest.raises(InputError, match="pad, crop or squash"):
        preprocess(noise(8, 8), 48, "square")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_damaged_files_raise_nothing_but_input_errors():
    random = np.random.default_rng(0)
    refused = 0
    for form in FORMATS:
        whole = encoded(noise(31, 23), form)
        for _ in range(200):
            damaged = bytearray(whole)
            for place in random.integers(0, len(whole), 6):
                damaged[place] = random.integers(0, 256)
            try:
                decode(bytes(damaged))
            except InputError:
                refused += 1
    assert refused > 300


def test_thumbnails_are_upright_and_leave_the_image_alone():
    image, file = noise(64, 16), io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(file, "png", exif=exif)
    shown = [Image.open(io.BytesIO(base64.b64decode(thumbnail(one, 32)))) for one in (file.getvalue(), image)]
    assert [one.size for one in shown] == [(8, 32), (32, 8)] and image.size == (64, 16)


def test_a_conversation_about_bytes_shows_itself():
    file = io.BytesIO()
    noise(8, 8).save(file, "png")
    talk = Conversation(None, "", Sampling())
    talk.messages.append(question_message("What?", [file.getvalue()]))
    assert '<img src="data:image/png;base64,' in talk._repr_html_()
