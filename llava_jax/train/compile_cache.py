"""Compile the step once, with the options asked for, and keep compiled programs for the next start."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax

from llava_jax.parallel.chips import GIB, chip_of
from llava_jax.parallel.chips import compiler_options as tuned_options
from llava_jax.train.build_step import Run
from llava_jax.types import InputError

COMPILED_FOLDER = os.path.join("~", ".cache", "llava_jax", "compiled")


def keep_compiled() -> str:
    """Turn on the cache of compiled programs and return its folder ('' for none); call it before the first program.

    JAX_COMPILATION_CACHE_DIR names the folder. Without it a GPU or TPU has one under the home folder and a CPU none:
    its programs compile in seconds, and may not run on another processor. Several CPU devices never use it: with
    programs that are read back (jax 0.10.2) they run the collectives in different orders, and abort.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(COMPILED_FOLDER))
    return jax.config.jax_compilation_cache_dir or ""


def compiler_options(spec: str, device_kind: str) -> dict[str, str | bool]:
    """Return the XLA options of `train.compiler_options`, as jax takes them, for devices of that kind."""
    if spec in ("none", ""):
        return {}
    if spec == "tuned":
        return {**tuned_options(chip_of(device_kind))}
    options: dict[str, str | bool] = {}
    for item in spec.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals and value):
            raise InputError(f"train.compiler_options={spec}: {item!r} is not option=value; or give none, or tuned")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def compile_lowered(lowered: jax.stages.Lowered, spec: str, device_kind: str) -> jax.stages.Compiled:
    """Compile with the options of `train.compiler_options`; raise InputError for one that the compiler refuses."""
    options = compiler_options(spec, device_kind)
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        kind, _, rest = str(error).partition(":")
        if options and kind in ("INVALID_ARGUMENT", "FAILED_PRECONDITION"):
            reason = rest.splitlines()[0].strip().rstrip(":")
            raise InputError(
                f"train.compiler_options={spec}: the compiler for {device_kind} says {reason!r}; correct the option or "
                "leave it out"
            ) from error
        raise


def compile_step(run: Run, state: Any, frozen: Any, batch: Any, spec: str) -> tuple[Callable, float, str]:
    """Return (the compiled step, the seconds it took, a line about them and about its memory)."""
    start = time.monotonic()
    try:
        step = compile_lowered(run.step.lower(state, frozen, batch), spec, run.mesh.devices.flat[0].device_kind)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the step does not fit: {str(error).splitlines()[0]}; `llava-jax compile` with the same config says by "
            "how much, and what to change"
        ) from error
    seconds = time.monotonic() - start
    line = f"compiled in {seconds:.1f} s"
    memory = step.memory_analysis()
    if memory is not None:
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        line += f", {total / GIB:.2f} GiB a device ({memory.temp_size_in_bytes / GIB:.2f} of them temporary)"
    return step, seconds, line
