"""Stand-ins for the commands of Google and Slurm that record how the launch scripts call them."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
DATA = ROOT / "tests/data/launch"
RECORDED = ("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "tar")
# Arguments that a shell on the way would change.
NASTY = [
    "--config.optim.groups=llm=1e-5",
    '--config.a=it\'s "two words"',
    "--config.b=$HOME `id` $(id) $$ a\\b",
    "* ;&",
]
V5E = {"ZONE": "z", "TOPOLOGY": "v5e:2x4", "POLL": "0"}


class Stage:
    """A folder with stand-ins that the scripts find first on PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        for name in RECORDED:
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {DATA}/stand_in.py {name} "$@"\n')
            path.chmod(0o755)
        self.answer({})

    def answer(self, answers: dict[str, list]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))
        (self.folder / "calls").write_text("")

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "STAND_IN": str(self.folder), "LC_ALL": "C.UTF-8"} | more

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess:
        environment = self.environment(**more)
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def sent(self) -> list[str]:
        """The commands that went to workers through ssh."""
        words = [word for call in self.calls() for word in call]
        return [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
