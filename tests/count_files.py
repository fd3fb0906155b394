"""Files of the package that a command enters: how many a reader has to open to follow it.

`python -m tests.count_files train|generate|convert` plays the command on tiny inputs and prints each file in which a
function was called, with the number of functions; what runs while a module is imported does not count.
"""

import collections
import inspect
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Callable
from types import FrameType

import llava_jax
from llava_jax.cli.main import main
from llava_jax.settings import write_settings
from tests.tiny_run import make_inputs, make_settings

PACKAGE = os.path.dirname(llava_jax.__file__) + os.sep


def entered(run: Callable[[], object]) -> dict[str, set[str]]:
    """Return {file: names of its functions that were called} of what `run` does, in all threads."""
    found: dict[str, set[str]] = collections.defaultdict(set)

    def call(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and code.co_flags & inspect.CO_OPTIMIZED and not _imports(frame):
            found[code.co_filename.removeprefix(PACKAGE)].add(code.co_qualname)

    threading.settrace(call)
    sys.settrace(call)
    try:
        run()
    finally:
        sys.settrace(None)
        threading.settrace(None)
    return dict(found)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module of the package is being imported."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


def command(name: str, folder: pathlib.Path) -> list[str]:
    """Return the words of the command, its inputs made."""
    make_inputs(folder)
    settings = make_settings(folder, "finetune")
    if name == "train":
        write_settings(str(folder / "config.json"), settings)
        return ["train", f"--config={folder}/config.json", f"--workdir={folder}/run"]
    if name == "convert":
        return ["convert", f"--from=hf:{folder}/llava", f"--to=hf:{folder}/out"]
    question = [f"--image={folder}/images/0.png", "--prompt=Why?", "--max_new_tokens=4"]
    return ["generate", f"--model=hf:{folder}/llava", *question]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as given:
        words = command(sys.argv[1], pathlib.Path(given))
        functions = entered(lambda: main(words))
    for file, names in sorted(functions.items()):
        print(f"{len(names):4d} {file}")
    print(f"{sys.argv[1]} enters {len(functions)} files, {sum(map(len, functions.values()))} functions")
