"""The command `serve` as a process, for scripts that look at it from outside; the standard library alone."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple


class Served(NamedTuple):
    url: str
    pid: int


@contextlib.contextmanager
def served(python: str, model: str, *flags: str, key: str = "") -> Iterator[Served]:
    """Yield a server of `model` at a free port, on the CPU; it must end well."""
    command = [python, "-m", "llava_jax", "serve", f"--model={model}", "--port=0", *flags]
    environment = os.environ | {"LLAVA_JAX_API_KEY": key, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        found = next((found for line in process.stdout if (found := re.search(r"http://\S+", line))), None)
        assert found is not None, f"no server; exit code {process.wait()}"
        yield Served(found[0], process.pid)
    finally:
        process.terminate()
        assert process.wait(40) == 0, "SIGTERM ends it with exit code 0"
