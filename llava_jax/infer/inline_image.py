"""Images in the terminals that show them: the protocols of Kitty and of iTerm2, which others speak, too, and Sixel."""

import itertools
import os
import re
import select
import termios
import time
import tty
from collections.abc import Mapping
from typing import TextIO

import numpy as np
from PIL import Image

from llava_jax.data.images import shrunk, thumbnail

SIDE = 320  # pixels
CHUNK = 4096  # what Kitty takes at once, in characters
COLOURS = 256  # registers of a Sixel image
REPLY_SECONDS = 2.0  # of a terminal at the other end of a slow line; nearly every one replies
# A terminal's class, and what it can do.
ATTRIBUTES = re.compile(rb"\x1b\[\?\d+;?([\d;]*)c")


def image_protocol(input: TextIO, output: TextIO, environment: Mapping[str, str] = os.environ) -> str:
    """Return how the terminal behind `output` shows images: kitty, iterm, sixel, or "" where it does not, or is none.

    A terminal that its environment does not name is asked, unless something was typed ahead, which would be lost.
    """
    if not output.isatty():
        return ""
    program = environment.get("TERM_PROGRAM", "") or environment.get("LC_TERMINAL", "")
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM", "") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "iTerm2", "WezTerm"):
        return "iterm"
    is_asked = input.isatty() and environment.get("TERM", "dumb") != "dumb"
    return "sixel" if is_asked and b"4" in _attributes(input, output) else ""


def _attributes(input: TextIO, output: TextIO) -> list[bytes]:
    """Return what a terminal says it can do (primary device attributes of xterm's control sequences); 4 is Sixel."""
    terminal, reply, found, end = input.fileno(), b"", None, time.monotonic() + REPLY_SECONDS
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSANOW)
        if select.select([terminal], [], [], 0)[0]:
            return []
        output.write("\x1b[c")
        output.flush()
        while not found and select.select([terminal], [], [], max(0, end - time.monotonic()))[0]:
            more = os.read(terminal, 64)
            if not more:  # hung up
                break
            reply += more
            found = ATTRIBUTES.search(reply)
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
    return found[1].split(b";") if found else []


def inline_image(path: str, protocol: str) -> str:
    """Return what shows an image in a terminal of that protocol (of `image_protocol`).

    Raises InputError for a file that is no image.
    """
    if not protocol:
        return ""
    if protocol == "sixel":
        return _sixel(shrunk(path, SIDE)) + "\n"
    content = thumbnail(path, SIDE)
    if protocol == "iterm":
        return f"\x1b]1337;File=inline=1;preserveAspectRatio=1:{content}\x07\n"
    chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
    heads = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    shown = (f"\x1b_G{head}m={m};{chunk}\x1b\\" for head, m, chunk in zip(heads, more, chunks, strict=True))
    return "".join(shown) + "\n"


def _sixel(image: Image.Image) -> str:
    """Return an image as Sixel (DEC's programmer reference of the VT330/VT340, chapter 14).

    Each band of six rows is drawn once for each of its colours; a character is a column of the band.
    """
    reduced = image.convert("RGB").quantize(COLOURS)
    palette, index_YX = np.array(reduced.getpalette()).reshape(-1, 3), np.asarray(reduced)
    percent = np.rint(palette / 2.55).astype(int)
    colours = "".join(f"#{number};2;{r};{g};{b}" for number, (r, g, b) in enumerate(percent))
    bands = [_band(index_YX[top : top + 6]) for top in range(0, reduced.height, 6)]
    return f'\x1bP0;1q"1;1;{reduced.width};{reduced.height}{colours}{"-".join(bands)}\x1b\\'


def _band(index_YX: np.ndarray) -> str:
    drawn = []
    for colour in np.unique(index_YX):
        bits_X = ((index_YX == colour) << np.arange(len(index_YX))[:, None]).sum(0).tolist()
        runs = ((chr(63 + bits), len(list(run))) for bits, run in itertools.groupby(bits_X))
        columns = "".join(column * count if count < 4 else f"!{count}{column}" for column, count in runs)
        drawn.append(f"#{colour}{columns}")
    return "$".join(drawn)
