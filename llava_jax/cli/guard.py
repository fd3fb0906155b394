"""What is checked before any command runs: no output is an input or another output, and no path is a bucket."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from llava_jax.cli.configs import find_config
from llava_jax.cli.train import load_settings
from llava_jax.data.sources import split_sources
from llava_jax.settings import RANDOM
from llava_jax.types import InputError

# gs://…, with the form of a model or without.
ADDRESS = re.compile(r"(?:(?:hf|llava|orbax|projector|peft):)?[A-Za-z][A-Za-z0-9+.-]+://.*", re.DOTALL)
# The only input that is read from wherever etils.epath reaches.
FROM_ANYWHERE = "annotations"


class Named(NamedTuple):
    """A path and the flag or config key that names it."""

    flag: str
    path: str

    def __str__(self) -> str:
        return f"{self.flag}={self.path}"


def named(args: argparse.Namespace, flags: Sequence[str]) -> list[Named]:
    """The paths of those flags that are given, the several of `--annotations` apart."""
    found = []
    for flag in flags:
        path = getattr(args, flag)
        parts = split_sources(path) if path and flag == FROM_ANYWHERE else ()
        found += [Named(f"--{flag}", source.path) for source in parts]
        found += [Named(f"--{flag}", path)] if path and not parts else []
    return found


def check_paths(inputs: Sequence[Named], outputs: Sequence[Named], passed: Sequence[str]) -> None:
    """Raise InputError for a bucket, and for a file to be written that the command also reads, or writes twice.

    Links are followed, and files that have two names are known by either. Of a folder that is read every file counts
    that is not JSON Lines; what an output folder may hold is the command's own business.

    Args:
        inputs, outputs: files and folders that are read and written.
        passed: the `--config` words, whose config file and folders are inputs as well.
    """
    for path in (*inputs, *outputs):
        if ADDRESS.fullmatch(path.path) and path.flag != f"--{FROM_ANYWHERE}":
            raise InputError(f"{path}: buckets are not read or written; give a folder of this machine")
    files = [output for output in outputs if not os.path.isdir(output.path)]
    read = [*inputs, *(_files_of_run(passed) if files else ())]
    for index, output in enumerate(files):
        for other in [*read, *files[:index]]:
            if _same(output.path, other.path):
                raise InputError(f"{output}: names another file of this command, too ({other}); give another name")


def _files_of_run(passed: Sequence[str]) -> list[Named]:
    """The config file and what it names."""
    if not passed:
        return []
    settings = load_settings(passed)
    spec = next(word for word in passed if word.startswith("--config=")).removeprefix("--config=")
    model, init, data = settings.model, settings.init, settings.data
    named = {
        "--config": find_config(spec.partition(":")[0]),
        "model.vision": model.vision.removeprefix(RANDOM),
        "model.llm": model.llm.removeprefix(RANDOM),
        "init.model": init.model.rpartition(":")[2],
        "init.projector": init.projector,
        "data.images": data.images,
    }
    annotations = [Named("data.annotations", source.path) for source in split_sources(data.annotations)]
    return [Named(flag, path) for flag, path in named.items() if path] + annotations


def _same(path: str, other: str) -> bool:
    """Whether writing `path` changes the file `other`, or a file of that folder."""
    real = os.path.realpath(path)
    if os.path.isdir(other):
        inside = real.startswith(os.path.realpath(other) + os.sep)
        return inside and os.path.isfile(path) and not real.endswith(".jsonl")
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return real == os.path.realpath(other)
