"""Images in the terminals that show them: the protocols of Kitty and of iTerm2, which others speak, too, and Sixel."""

import base64
import io
import itertools
import os
import re
import select
import termios
import tty
from collections.abc import Mapping
from typing import TextIO

import numpy as np
from PIL import Image

from llava_jax.data.images import thumbnail

SIDE = 320  # pixels
CHUNK = 4096  # what Kitty takes at once, in characters
COLOURS = 256  # registers of a Sixel image
REPLY_SECONDS = 0.5  # a terminal at the other end of a slow line


def inline_image(path: str, output: TextIO, environment: Mapping[str, str] = os.environ) -> str:
    """Return what shows an image in the terminal behind `output`; "" where that is none, or one that shows none.

    Raises InputError for a file that is no image.
    """
    kind = _protocol(environment, output) if output.isatty() else ""
    if not kind:
        return ""
    content = thumbnail(path, SIDE)
    if kind == "sixel":
        return _sixel(Image.open(io.BytesIO(base64.b64decode(content)))) + "\n"
    if kind == "iterm":
        return f"\x1b]1337;File=inline=1;preserveAspectRatio=1:{content}\x07\n"
    chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
    heads = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    shown = (f"\x1b_G{head}m={m};{chunk}\x1b\\" for head, m, chunk in zip(heads, more, chunks, strict=True))
    return "".join(shown) + "\n"


def _protocol(environment: Mapping[str, str], output: TextIO) -> str:
    program = environment.get("TERM_PROGRAM", "") or environment.get("LC_TERMINAL", "")
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM", "") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "iTerm2", "WezTerm"):
        return "iterm"
    return "sixel" if environment.get("TERM", "dumb") != "dumb" and "4" in _attributes(output) else ""


def _attributes(output: TextIO) -> list[str]:
    """Return what a terminal says it can do (primary device attributes of xterm's control sequences); 4 is Sixel."""
    terminal, reply = os.open(os.ttyname(output.fileno()), os.O_RDWR | os.O_NOCTTY), b""
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSANOW)
        # What was typed ahead would be taken for the reply, and lost.
        if not select.select([terminal], [], [], 0)[0]:
            os.write(terminal, b"\x1b[c")
            while not reply.endswith(b"c") and select.select([terminal], [], [], REPLY_SECONDS)[0]:
                reply += os.read(terminal, 64)
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
        os.close(terminal)
    found = re.search(rb"\x1b\[\?([\d;]+)c", reply)
    return found[1].decode().split(";") if found else []


def _sixel(image: Image.Image) -> str:
    """Return an image as Sixel (DEC's programmer reference of the VT330/VT340, chapter 14).

    Each band of six rows is drawn once for each of its colours; a character is a column of the band.
    """
    reduced = image.convert("RGB").quantize(COLOURS)
    palette, index_YX = np.array(reduced.getpalette()).reshape(-1, 3), np.asarray(reduced)
    drawn = [f'\x1bP0;1q"1;1;{reduced.width};{reduced.height}']
    drawn += [f"#{i};2;{r};{g};{b}" for i, (r, g, b) in enumerate(np.rint(palette / 2.55).astype(int))]  # percent
    for top in range(0, reduced.height, 6):
        band_YX = index_YX[top : top + 6]
        for colour in np.unique(band_YX):
            bits_X = ((band_YX == colour) << np.arange(len(band_YX))[:, None]).sum(0).tolist()
            runs = (f"!{len(list(run))}{chr(63 + bits)}" for bits, run in itertools.groupby(bits_X))
            drawn.append(f"#{colour}{''.join(runs)}$")
        drawn.append("-")
    return "".join(drawn) + "\x1b\\"
