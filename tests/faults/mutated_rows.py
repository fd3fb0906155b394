"""Damaged images and rows: what the reader of each of 10,000 makes of them, and of those that are known to do harm.

`python -m tests.faults.mutated_rows [COUNT]` prints a line a kind and each case that goes wrong, and exits with 1 where
one ended in anything but an image or row that can be trained or one line that says why not, took ten seconds, or the
process grew beyond 2 GB.
"""

import io
import json
import pathlib
import random
import re
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from llava_jax.data.images import check_image, load_image
from llava_jax.data.records import Rejected, load_records
from llava_jax.data.tokenize import TextTokenizer, encode_record, load_tokenizer
from llava_jax.data.validate import check_records
from llava_jax.types import UNPACKED, DataSettings, InputError
from tests.faults.mutations import MEMORY, alarm, limit_memory, mutated, peak_memory
from tests.make_tokenizers import trained_llama

SECONDS, SIZE, PATCHES, IMAGE_ID, LENGTH = 10, 28, 4, 99_999, 4096

# ---- images ----------------------------------------------------------------------------------------------------------


def saved(image: Image.Image, form: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 17)) -> Image.Image:
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8), mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, rows: bytes = b"") -> bytes:
    """Return a grey PNG that says to be of this size; its rows are all black unless they are given."""
    rows = rows or bytes((width + 1) * height)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(noise(), "JPEG", exif=exif)


def known_images() -> Iterator[tuple[str, bytes, bool]]:
    """Yield (name, content, whether it is an image that can be trained)."""
    jpeg = saved(noise(), "JPEG")
    frames = [noise()] * 3
    yield from ((f"JPEG without {n} bytes", jpeg[:-n], False) for n in (2, 100, len(jpeg) // 2, len(jpeg) - 10))
    yield from (
        (name, content, False) for name, content in (("empty", b""), ("zeros", bytes(500)), ("one byte", b"\xff"))
    )
    yield from (
        (f"text {text[:8]!r}", text, False) for text in (b"<!DOCTYPE html><html>", b"<svg/>", b"%PDF-1.7", b"PK\3\4")
    )
    yield from (
        (f"text {text[:8]!r}", text, False)
        for text in (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"8BPS\0\1", b"version https://git-lfs")
    )
    yield "random bytes", random.Random(0).randbytes(5000), False
    yield from ((f"mode {mode}", saved(noise(mode), "TIFF"), True) for mode in ("CMYK", "L", "RGBA"))
    yield from (
        (f"PNG of mode {mode}", saved(noise().convert(mode), "PNG"), True) for mode in ("1", "L", "LA", "P", "RGBA")
    )
    yield "P with transparency", saved(noise().convert("P"), "PNG", transparency=3), True
    yield "16 bit", saved(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"), True
    yield "float", saved(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), False
    yield from (
        (f"animated {form}", saved(frames[0], form, save_all=True, append_images=frames), True)
        for form in ("GIF", "WEBP", "PNG")
    )
    yield from ((f"orientation {n}", turned(n), True) for n in range(9))
    yield from ((f"{form}", saved(noise(), form), True) for form in ("BMP", "PPM", "JPEG2000", "AVIF"))
    yield from ((f"1x1 {form}", saved(noise(size=(1, 1)), form), True) for form in ("PNG", "JPEG", "GIF"))
    yield from (
        (f"{w}x{h}", png(w, h), ok)
        for w, h, ok in ((200, 1, True), (201, 1, False), (1, 10_000, False), (10_000, 1, False))
    )
    yield from ((f"{w}x{h}", png(w, h), False) for w, h in ((65_500, 1), (32_769, 200)))
    yield from (
        (f"says {w}x{h}", png(w, h, rows=b"\0" * 99), False)
        for w, h in ((12_000, 12_000), (8001, 8001), (2**31 - 1, 9), (0, 5), (5, 0), (7000, 7000))
    )
    yield "zTXt bomb", png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7), 9))), True
    yield "iCCP bomb", png(9, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7), 9))), True
    yield "deflate bomb", png(9, 9, rows=bytes(10**7)), True


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return an image file with some of its bytes changed, taken out, doubled or cut off; headers suffer most."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(min(len(found), rng.choice((40, 200, len(found)))))
        how = rng.randrange(6)
        if how < 3:
            found[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif how == 3:
            found[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1)))
        elif how == 4 and len(found) > 40:
            del found[at : at + rng.randrange(1, 20)]
        else:
            found[at:at] = found[at : at + rng.randrange(1, 50)]
    return bytes(found[: rng.randrange(1, len(found))] if rng.random() < 0.15 else found)


def judge_image(content: bytes, aspect: str) -> tuple[str, bool]:
    """Return (what is wrong with what becomes of it, whether it is an image)."""
    try:
        with alarm(SECONDS):
            square = load_image(content, SIZE, aspect)
    except InputError as error:
        return ("" if is_line(str(error)) else f"told {error!r}"), False
    except BaseException as error:  # noqa: BLE001, a traceback is what is looked for
        return f"{type(error).__name__}: {error}", False
    return ("" if square.shape == (SIZE, SIZE, 3) and square.dtype == np.uint8 else f"{square.shape}"), True


def is_line(text: str) -> bool:
    return bool(text.strip()) and "\n" not in text and len(text) < 5000


def images(count: int) -> int:
    wrong = []
    for name, content, is_good in known_images():
        problem, found = judge_image(content, "pad")
        if problem or found != is_good:
            wrong.append(f"{name}: {problem or ('taken' if found else 'refused')}")
    told("known images", wrong, sum(1 for _ in known_images()))
    grid = noise(size=(48, 32))
    originals = [saved(grid, form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")]
    originals += [saved(grid, "JPEG", progressive=True), saved(grid, "TIFF", compression="tiff_lzw"), turned(6)]
    originals += [saved(grid.convert(mode), "PNG") for mode in ("P", "LA", "1")]
    more, good = [], 0
    for number in range(count):
        rng = random.Random(f"image {number}")
        problem, found = judge_image(damaged(rng.choice(originals), rng), rng.choice(("pad", "crop", "squash")))
        more += [f"image {number}: {problem}"] if problem else []
        good += found
    told(f"damaged images ({good} still images)", more, count)
    return len(wrong) + len(more)


def told(what: str, wrong: list[str], count: int) -> None:
    for line in wrong:
        print(line)
    print(f"{what}: {count}, {len(wrong)} wrong", flush=True)


# ---- rows ------------------------------------------------------------------------------------------------------------


def row(*turns: Any, **keys: Any) -> dict[str, Any]:
    said = [{"from": who, "value": text} if isinstance(who, str) else who for who, text in turns]
    return {"id": "a", "conversations": said, **keys}


ASKED, SAID = ("human", "<image>\nWhat is this?"), ("gpt", "A cat.")
PLAIN = ("human", "What is it?")
KNOWN: tuple[tuple[Any, str], ...] = (
    (row(ASKED, SAID, image="a.png"), ""),
    (row(PLAIN, SAID), ""),
    (row(("human", "<image><image>"), SAID, image="a.png"), "2 <image> .* 1 image"),
    (row(PLAIN, SAID, image="a.png"), "0 <image> .* 1 image"),
    (row(ASKED, SAID), "1 <image> .* 0 images"),
    (row(ASKED, ("gpt", "<image>"), image="a.png"), "inside an answer"),
    (row(), "empty conversation"),
    (row(("human", None), SAID), "expected text"),
    ({"id": "a", "conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "missing value"),
    (row(("robot", "x"), SAID), "unknown role"),
    (row(SAID, PLAIN, SAID), ""),
    (row(PLAIN, SAID, PLAIN), ""),
    (row(PLAIN, PLAIN, SAID), "."),
    (row(PLAIN, SAID, SAID), "."),
    (row(PLAIN, ("gpt", "")), "empty answer"),
    (row(("human", ""), SAID), "empty question"),
    (row(PLAIN), "."),
    (row(("human", "é 中文 😀 \u200f\u05d0 \ufeff \0"), SAID), ""),
    (row(("human", "\ud800"), SAID), "lone surrogate"),
    (row(PLAIN, ("gpt", "\udfff")), "lone surrogate"),
    (row(("human", "</s> <s> [INST] ASSISTANT: ### <|im_end|>"), ("gpt", "</s><s> USER: </s>")), ""),
    (row(("human", "word " * 20_000), SAID), "."),
    (row(PLAIN, ("gpt", "word " * 20_000)), ""),
    *(
        (row(ASKED, SAID, image=path), "images folder|address")
        for path in ("/etc/passwd", "../a.png", "C:\\a.png", "http://x/a.png")
    ),
    *(
        (row(ASKED, SAID, image=path), ".")
        for path in ("none.png", "", ".", "a.png/b", "x" * 5000, "a\0.png", 5, ["a.png"] * 2, {})
    ),
    *(
        (value, ".")
        for value in (None, 5, "x", [], {}, [[]], True, {"conversations": {}}, {"id": {}, "conversations": []})
    ),
)
BASES: tuple[dict[str, Any], ...] = (
    row(ASKED, SAID, PLAIN, ("gpt", "Yes, it is </s> a cat."), image="a.png"),
    row(
        ("system", "Be brief."),
        ("human", "<image> or <image>?"),
        ({"from": "gpt", "value": "Both.", "weight": 1}, ""),
        images=["a.png", "b.jpg"],
    ),
    row(("user", "Hello 😀"), ("assistant", "Hi."), system="You help."),
    {
        "id": 3,
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
    },
)


def line_of(number: int) -> bytes:
    """Return a line of JSON with a mutated row; of some of them bytes are damaged as well."""
    rng = random.Random(f"row {number}")
    value: Any = rng.choice(BASES)
    for _ in range(rng.choice((0, 1, 1, 2))):
        value = mutated(value, rng)
    line = bytearray(json.dumps(value).encode())
    if rng.random() < 0.1:
        for _ in range(rng.randrange(1, 6)):
            line[rng.randrange(len(line))] = rng.choice(b'{}[]",:\\ux0 9\x00\x7f')
    return bytes(line).replace(b"\n", b" ")


def judge_rows(path: pathlib.Path, folder: pathlib.Path, tokenizer: TextTokenizer) -> tuple[list[str], list[str]]:
    """Return (what is wrong, the reason of each row that is rejected, "" of the others)."""
    settings = DataSettings(str(path), str(folder), "v1", "front", "pad", LENGTH, shuffle=False, **UNPACKED)
    wrong = []
    with alarm(120):
        records = load_records(str(path))
        checked = check_records(records, settings, tokenizer, patches=PATCHES, look=check_image)
    reasons = [""] * len(records)
    for rejected in checked.rejected:
        reasons[rejected.row] = rejected.reason
        if not is_line(str(rejected)):
            wrong.append(f"row {rejected.row}: told {str(rejected)[:200]!r}")
    for number, reason in enumerate(reasons):
        entry = records.entry(number)
        if reason:
            continue
        if isinstance(entry, Rejected):
            wrong.append(f"row {number}: taken and rejected")
            continue
        tokens, targets = encode_record(entry, settings, tokenizer, IMAGE_ID, PATCHES)
        answers = sum(turn.speaker == "gpt" for turn in entry.turns[entry.turns[0].speaker == "gpt" :])
        ends = np.count_nonzero(tokens == tokenizer.eos_id)
        figures = checked.figures_A[number]
        if len(tokens) != figures["tokens"] or not targets.any() or targets[tokens == IMAGE_ID].any():
            wrong.append(f"row {number}: {len(tokens)} tokens for {figures['tokens']}, or no targets")
        elif not figures["cut"] and (np.sum(tokens == IMAGE_ID) != PATCHES * len(entry.images) or ends != answers):
            wrong.append(f"row {number}: {ends} ends for {answers} answers, or another number of images")
    return wrong, reasons


def rows(count: int, workspace: pathlib.Path) -> int:
    trained_llama(workspace / "llm", legacy=True)
    tokenizer = load_tokenizer(str(workspace / "llm"))
    folder, path = workspace / "images", workspace / "rows.jsonl"
    folder.mkdir()
    noise().save(folder / "a.png")
    noise().save(folder / "b.jpg")
    path.write_bytes(b"\n".join(json.dumps(value).encode() for value, _ in KNOWN))
    wrong, reasons = judge_rows(path, folder, tokenizer)
    for (value, expected), reason in zip(KNOWN, reasons, strict=True):
        if bool(reason) != bool(expected) or not re.search(expected, reason):
            wrong.append(f"{json.dumps(value)[:100]}: {reason[:200]!r}, expected {expected!r}")
    told("known rows", wrong, len(KNOWN))
    path.write_bytes(b"\n".join(map(line_of, range(count))))
    more, reasons = judge_rows(path, folder, tokenizer)
    told(f"mutated rows ({reasons.count('')} still rows)", more, count)
    return len(wrong) + len(more) + (len(reasons) != count)


def main(count: int) -> int:
    warnings.simplefilter("ignore")  # Pillow's
    before = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        limit_memory()
        wrong = images(count * 6 // 10) + rows(count - count * 6 // 10, pathlib.Path(name))
    print(f"{wrong} wrong in {time.monotonic() - before:.0f} s; {peak_memory() / 2**30:.2f} GiB at most")
    return int(wrong > 0 or peak_memory() > MEMORY)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 10_000))
