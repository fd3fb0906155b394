"""SRC, how a model is named everywhere: hf:DIR, orbax:DIR, or a DIR that is recognised by the files in it."""

import os

from llava_jax.types import InputError

FORMS = "hf:DIR (Hugging Face LlavaForConditionalGeneration), orbax:DIR (a workdir of train), or such a DIR alone"
_HOLDS = {"orbax": "a workdir of train", "hf": "a config.json without checkpoints/", "": "neither"}


def is_workdir(folder: str) -> bool:
    """Whether a folder is the workdir of a training run, by what lies in it."""
    return os.path.isfile(os.path.join(folder, "config.json")) and os.path.isdir(os.path.join(folder, "checkpoints"))


def split(source: str) -> tuple[str, str]:
    """(form or "", folder) as written, nothing looked up but a folder whose own name has a colon."""
    form, colon, folder = source.partition(":")
    if not colon or os.path.isdir(source) or os.sep in form:
        return "", source
    return form, folder


def parse(source: str, name: str = "model") -> tuple[str, str]:
    """(`hf` or `orbax`, folder) of a SRC that is there; `name` is the flag or key it came from, for the InputError."""
    form, folder = split(source)
    if form not in ("", "hf", "orbax"):
        raise InputError(f"{name}={source}: form {form!r} is not read; expected {FORMS}")
    if not os.path.isdir(folder):
        raise InputError(f"{name}={source}: no folder {folder!r}; expected {FORMS}")
    found = "orbax" if is_workdir(folder) else "hf" if os.path.isfile(os.path.join(folder, "config.json")) else ""
    if not found or form not in ("", found):
        raise InputError(f"{name}={source}: the folder holds {_HOLDS[found]}; expected {FORMS}")
    return found, folder


def absolute(source: str) -> str:
    """The SRC with its folder as an absolute path; an empty one stays empty."""
    form, folder = split(source)
    return f"{form}:{os.path.abspath(folder)}" if form else os.path.abspath(folder) if folder else ""
