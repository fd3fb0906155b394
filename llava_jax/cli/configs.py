"""The recipes that come with the package: `--config=NAME` finds them anywhere, `configs` lists and copies."""

import argparse
import ast
import os
import pathlib

from llava_jax.settings import nearest
from llava_jax.types import InputError

PACKAGE = pathlib.Path(__file__).parent.parent
COMMON = "common.py"


def recipes() -> dict[str, pathlib.Path]:
    """Return the file of each recipe by its name: in the package where it is installed, next to it in a checkout."""
    installed = PACKAGE / "configs"
    folder = installed if installed.is_dir() else PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.name not in ("__init__.py", COMMON)}


def configs_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--copy", metavar="NAME", help="copy this recipe, and the common.py that it imports")
    parser.add_argument("--to", metavar="DIR", help="folder to copy into (the current one); made when it is not there")


def configs(args: argparse.Namespace) -> int:
    if args.copy is not None:
        copy_recipe(args.copy, args.to or ".")
    elif args.to is not None:
        raise InputError(f"--to={args.to}: nothing to copy; add --copy=NAME, one of {', '.join(recipes())}")
    else:
        for name, path in recipes().items():
            summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"  {name:<14}{summary.partition(chr(10))[0]}")
        print("\ntrain one with --config=NAME:ARGUMENTS; copy one to change it with llava-jax configs --copy=NAME")
    return 0


def copy_recipe(name: str, folder: str) -> None:
    """Copy a recipe and common.py; leave a common.py that is the same already. Raises InputError."""
    known = recipes()
    if name not in known:
        raise InputError(f"--copy={name}: no such recipe{nearest(name, tuple(known))}")
    contents = {path.name: path.read_bytes() for path in (known[name], known[name].parent / COMMON)}
    target = pathlib.Path(folder)
    if (target / COMMON).is_file() and (target / COMMON).read_bytes() == contents[COMMON]:
        del contents[COMMON]
    for file in contents:
        if os.path.lexists(target / file):
            raise InputError(f"{target / file}: is there already; copy into another folder with --to=DIR")
    target.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (target / file).write_bytes(content)
        print(target / file)
