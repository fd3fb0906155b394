"""Images in the terminals that show them: the protocols of Kitty and of iTerm2, which others speak, too."""

import os
from collections.abc import Mapping
from typing import TextIO

from llava_jax.data.images import thumbnail

SIDE = 320  # pixels
CHUNK = 4096  # what Kitty takes at once, in characters


def inline_image(path: str, output: TextIO, environment: Mapping[str, str] = os.environ) -> str:
    """Return what shows an image in the terminal behind `output`; "" where that is none, or one that shows none.

    Raises InputError for a file that is no image.
    """
    kind = _protocol(environment) if output.isatty() else ""
    if not kind:
        return ""
    content = thumbnail(path, SIDE)
    if kind == "iterm":
        return f"\x1b]1337;File=inline=1;preserveAspectRatio=1:{content}\x07\n"
    chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
    heads = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    shown = (f"\x1b_G{head}m={m};{chunk}\x1b\\" for head, m, chunk in zip(heads, more, chunks, strict=True))
    return "".join(shown) + "\n"


def _protocol(environment: Mapping[str, str]) -> str:
    program = environment.get("TERM_PROGRAM", "") or environment.get("LC_TERMINAL", "")
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM", "") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    return "iterm" if program in ("iTerm.app", "iTerm2", "WezTerm") else ""
