"""`python -m tests.installed [--demo]`: wheel and sdist built, installed, and used in an empty folder.

The new environments borrow the dependencies of the running one, so that nothing is downloaded.
"""

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import venv

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent


def run(*words: str | os.PathLike[str], cwd: pathlib.Path, echo: bool = True) -> str:
    """What a command prints; ends this program when it fails."""
    if echo:
        print("  $", pathlib.Path(words[0]).name, *words[1:], flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"JAX_PLATFORMS": "cpu", "LLAVA_JAX_CACHE": str(cwd / "cache")}
    done = subprocess.run(words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}:\n{done.stdout}")
    return done.stdout


def install(package: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A new environment with `package` in it; the folder of its programs."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python"]
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run(*pip, "install", *options, package, cwd=folder, echo=False)
    where = run(folder / "bin" / "python", "-c", "import llava_jax; print(llava_jax.__file__)", cwd=folder, echo=False)
    assert pathlib.Path(where.strip()).is_relative_to(site), f"{where.strip()}: not what was just installed"
    return folder / "bin"


def make_rows(folder: pathlib.Path) -> None:
    """Four images and a row of stage 2 about each."""
    (folder / "images").mkdir()
    rows = []
    for number in range(4):
        Image.fromarray(np.full((40, 30, 3), 60 * number, np.uint8)).save(folder / "images" / f"{number}.png")
        turns = [("human", "<image>\nHow bright is it?"), ("gpt", f"It is {number} of four.")]
        conversation = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def use(programs: pathlib.Path, folder: pathlib.Path) -> None:
    """The commands of a first day, in a folder that holds nothing of ours."""
    command = programs / "llava-jax"
    make_rows(folder)
    # A folder that many have: it must not stand for the recipes.
    (folder / "configs").mkdir()
    assert "llava_v1_5" in run(command, "configs", cwd=folder)
    run(command, "configs", "--copy=llava_v1_5", "--to=mine", cwd=folder)
    assert "pretrain" in run(programs / "python", "mine/llava_v1_5.py", cwd=folder)
    config = ["--config=tiny:stage=finetune", "--config.data.annotations=rows.json", "--config.data.images=images"]
    run(command, "prepare", "verify", *config, cwd=folder)
    run(command, "train", *config, "--config.train.steps=2", "--config.train.batch_size=2", "--workdir=run", cwd=folder)
    run(programs / "python", "-m", "llava_jax", "convert", "--from=run", "--to=hf:exported", cwd=folder)
    asked = ["--model=exported", "--image=images/0.png", "--prompt=How bright is it?", "--max_new_tokens=4"]
    run(command, "generate", *asked, cwd=folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name).resolve()
        run(sys.executable, "-m", "hatchling", "build", "--directory", top / "dist", cwd=ROOT, echo=False)
        packages = sorted((top / "dist").iterdir())
        assert [path.suffix for path in packages] == [".whl", ".gz"], packages
        for package in packages:
            print(package.name, flush=True)
            programs = install(package, top / f"environment{package.suffix}")
            folder = top / f"empty{package.suffix}"
            folder.mkdir()
            use(programs, folder)
            if "--demo" in sys.argv[1:]:
                print(run(programs / "llava-jax", "demo", cwd=folder))
    print("both packages work where they are installed")


if __name__ == "__main__":
    main()
