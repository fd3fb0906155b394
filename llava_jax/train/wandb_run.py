"""What `metrics.jsonl` gets, in a run of Weights & Biases too; whatever fails there, training continues without it."""

import dataclasses
import importlib.util
import os
import secrets
import sys
from typing import Any

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
        import wandb

        self._errors, self._run = (wandb.Error, OSError), None
        path = os.path.join(here, RUN_ID)
        try:
            if not os.path.exists(path):
                with open(path, "w", encoding="utf-8") as file:
                    file.write(secrets.token_hex(4))
            with open(path, encoding="utf-8") as file:
                run_id = file.read()
            self._run = wandb.init(
                project=settings.train.wandb,
                id=run_id,
                resume="allow",
                name=os.path.basename(workdir.rstrip("/")),
                dir=here,
                config=dataclasses.asdict(settings),
                settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS),
            )
            # Not wandb's own count, which takes no update again that a kill has lost.
            self._run.define_metric("*", step_metric="step")
        except self._errors as error:
            self._failed(error)

    def write(self, row: dict[str, Any]) -> None:
        """Write one line of the metrics."""
        self._try(lambda run: run.log(row))

    def close(self) -> None:
        """End the run; what has not reached the server in FINISH_SECONDS stays on disk, for `wandb sync`."""
        self._try(lambda run: run.finish())

    def _try(self, call: Any) -> None:
        if self._run is not None:
            try:
                call(self._run)
            except self._errors as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._run = None
        print(f"warning: wandb fails ({error}); training continues without", file=sys.stderr, flush=True)
