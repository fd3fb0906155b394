"""SRC, how a model is named everywhere: hf:DIR, llava:DIR, orbax:DIR, or a DIR recognised by the files in it."""

import os
from collections.abc import Mapping
from typing import Any

from llava_jax.types import InputError
from llava_jax.weights.hf_facts import read_json

FORMS = (
    "hf:DIR (Hugging Face LlavaForConditionalGeneration), llava:DIR (original LLaVA), orbax:DIR (a workdir of train, "
    "or what convert wrote so), peft:DIR (adapters, with --base), or such a DIR alone"
)
_HOLDS = {
    "run": "a workdir of train",
    "orbax": "a whole model as orbax",
    "llava": "a config.json of the original LLaVA",
    "peft": "adapters of peft",
    "hf": "a config.json without checkpoints/ or weights/",
    "": "none of them",
}


# The folder with our parameters in a model that we wrote as orbax, and the file that says what adapters are.
WEIGHTS = "weights"
ADAPTER_CONFIG = "adapter_config.json"


def is_workdir(folder: str) -> bool:
    """Return whether a folder is the workdir of a training run, by what lies in it."""
    return os.path.isfile(os.path.join(folder, "config.json")) and os.path.isdir(os.path.join(folder, "checkpoints"))


def is_converted(folder: str) -> bool:
    """Return whether a folder is a whole model that we wrote as orbax, by what lies in it."""
    return os.path.isfile(os.path.join(folder, WEIGHTS, "_METADATA"))


def is_adapter(folder: str) -> bool:
    """Return whether a folder holds adapters of peft and no model, by what lies in it."""
    has = [os.path.isfile(os.path.join(folder, name)) for name in (ADAPTER_CONFIG, "config.json")]
    return has == [True, False]


def is_original(config: Mapping[str, Any]) -> bool:
    """Return whether config.json is that of the original LLaVA code, whose keys for images no other has."""
    return "mm_vision_tower" in config or "mm_projector_type" in config


def split(source: str) -> tuple[str, str]:
    """(form or "", folder) as written, nothing looked up but a folder whose own name has a colon."""
    form, colon, folder = source.partition(":")
    if not colon or os.path.isdir(source) or os.sep in form:
        return "", source
    return form, folder


def parse(source: str, name: str = "model") -> tuple[str, str]:
    """(kind, folder) of a SRC that is there; `name` is its flag or key, for errors.

    The kind is `run` (a workdir of train), `orbax` (a whole model that we wrote so), `peft`, `hf` or `llava`.
    """
    form, folder = split(source)
    if form not in ("", "hf", "llava", "orbax", "peft"):
        raise InputError(f"{name}={source}: form {form!r} is not read; expected {FORMS}")
    if not os.path.isdir(folder):
        raise InputError(f"{name}={source}: no folder {folder!r}; expected {FORMS}")
    config = os.path.join(folder, "config.json")
    if is_workdir(folder):
        found = "run"
    elif is_converted(folder) and os.path.isfile(config):
        found = "orbax"
    elif os.path.isfile(config):
        found = "llava" if is_original(read_json(config)) else "hf"
    else:
        found = "peft" if is_adapter(folder) else ""
    if not found or form not in ("", "orbax" if found == "run" else found):
        raise InputError(f"{name}={source}: the folder holds {_HOLDS[found]}; expected {FORMS}")
    return found, folder


def absolute(source: str) -> str:
    """The SRC with its folder as an absolute path; an empty one stays empty."""
    form, folder = split(source)
    return f"{form}:{os.path.abspath(folder)}" if form else os.path.abspath(folder) if folder else ""
