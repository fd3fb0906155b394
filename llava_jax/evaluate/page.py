"""The frame of our self-contained HTML pages: one style sheet for light and dark screens and narrow ones."""

import html
import importlib.resources


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Return a page; `style` and `script` are names of files of this package that it has besides."""
    sheet = _file("page.css") + (_file(style) if style else "")
    code = f"\n<script>\n{_file(script)}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{sheet}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>{code}\n</body>\n</html>\n"
    )


def section(title: str, content: str, note: str) -> str:
    """Return a section with its heading and the sentence below it, all three of them HTML."""
    return f"<section>\n<h2>{title}</h2>\n<p>{note}</p>\n{content}\n</section>"


def _file(name: str) -> str:
    return importlib.resources.files("llava_jax.evaluate").joinpath(name).read_text(encoding="utf-8")
