"""What `metrics.jsonl` gets, in a run of Weights & Biases too; whatever fails there, training continues without it."""

import dataclasses
import importlib.util
import os
import secrets
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from llava_jax.io import is_bucket, replacing
from llava_jax.types import InputError, Settings

RUN_ID = "wandb_id"  # the file that names the run, so that a resume continues it
FINISH_SECONDS = 60.0


def check_installed(project: str) -> None:
    """Raise InputError where there is no wandb to write with."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError(f'train.wandb={project} needs wandb: pip install "llava-jax[wandb]", or leave it empty')


class WandbRun:
    """The run of a workdir in `train.wandb`, a project; after the first failure, which is said, it takes nothing."""

    def __init__(self, settings: Settings, workdir: str, here: str):
        """Open the run; `here` is where the files of `workdir` are written."""
        self._run: Any = None
        self._works = True
        self._try(lambda: self._open(settings, workdir, here))

    def _open(self, settings: Settings, workdir: str, here: str) -> None:
        import wandb

        folder = here
        if is_bucket(workdir):  # to which all of `here` is copied, again and again
            folder = tempfile.mkdtemp(prefix="wandb-")
            print(f"the files of wandb are in {folder}", flush=True)
        self._run = wandb.init(
            project=settings.train.wandb,
            id=_run_id(os.path.join(here, RUN_ID)),
            resume="allow",
            name=os.path.basename(workdir.rstrip("/")),
            dir=folder,
            config=dataclasses.asdict(settings),
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS),
        )
        # Not wandb's own count, which takes no update again that a kill has lost.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, Any]) -> None:
        """Write one line of the metrics."""
        self._try(lambda: self._run.log(row))

    def close(self) -> None:
        """End the run; what has not reached the server in FINISH_SECONDS stays on disk, for `wandb sync`."""
        self._try(lambda: self._run.finish())

    def _try(self, call: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            call()
        # wandb's own errors have no class in common, and none of them is worth a training.
        except Exception as error:  # noqa: BLE001
            self._works = False
            print(f"warning: wandb fails ({error}); training continues without", file=sys.stderr, flush=True)


def _run_id(path: str) -> str:
    """Return the id in a file, which gets one where it is absent or empty."""
    found = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            found = file.read().strip()
    if not found:
        found = secrets.token_hex(4)
        with replacing(path) as file:
            file.write(found)
    return found
