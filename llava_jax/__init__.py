"""LLaVA in JAX: `llava_jax.load(source)` gives a model that answers; `llava-jax --help` lists the commands."""

from typing import Any

from llava_jax.types import InputError, Sampling

__all__ = ["InputError", "Llava", "Sampling", "load"]


def __getattr__(name: str) -> Any:
    # Only when it is asked for: what reads rows, makes data sets or scores answers has no use for jax.
    if name in ("Llava", "load"):
        from llava_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
