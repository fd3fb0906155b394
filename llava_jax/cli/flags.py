"""What every command shares: flags whose complaints are InputErrors, nearest names, the lines said before a start."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from llava_jax.settings import nearest
from llava_jax.types import InputError


class Parser(argparse.ArgumentParser):
    """argparse that raises InputError, and names the nearest flag when one is unknown."""

    def __init__(self, prog: str, summary: str, example: str):
        self.known_flags: list[str] = []
        super().__init__(
            prog=prog,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self.known_flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see `{self.prog} --help`")

    def parse(self, argv: Sequence[str], also_known: Sequence[str] = ()) -> argparse.Namespace:
        """Return the flags of `argv`; `also_known` are flags taken out before, for the nearest name only."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            near = nearest(flag, (*self.known_flags, *also_known))
            raise InputError(f"{self.prog} has no argument {flag!r}{near}; see `{self.prog} --help`")
        return args


def check_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raise InputError for a flag that is given and smaller."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name}={value}: expected {least} or more")


def check_output(flag: str, path: str | None) -> None:
    """Raise InputError for a file that could not be written, before the minutes that its figures take."""
    folder = os.path.dirname(path or "")
    if folder and not os.path.isdir(folder):
        raise InputError(f"{flag}={path}: no folder {folder!r}; make it first")
    if path and os.path.isdir(path):
        raise InputError(f"{flag}={path}: is a folder, expected the name of a file")
    if path and not os.access(path if os.path.exists(path) else folder or ".", os.W_OK):
        raise InputError(f"{flag}={path}: cannot be written; choose a folder that can")


def announce(title: str, **facts: Any) -> None:
    """Print what a command has decided, one aligned line a fact; empty ones are left out."""
    print(title)
    for name, value in facts.items():
        if value is not None and value != "":
            print(f"  {name.replace('_', ' '):<16}{value}")
    print(flush=True)


class Named(NamedTuple):
    """A path and the flag or config key that names it."""

    flag: str
    path: str

    def __str__(self) -> str:
        return f"{self.flag}={self.path}"


@dataclasses.dataclass(frozen=True)
class Command:
    """One command; `run` gets its flags and the arguments that start with `passes`, and returns the exit code.

    `reads` and `writes` are its flags that name a file or folder, and `files` gives (read, written) files that no flag
    names by itself: none of what is written may be read (`check_paths`). `in_buckets` are those of the flags that take
    a folder in a bucket as well.
    """

    summary: str
    example: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    passes: str = ""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    in_buckets: tuple[str, ...] = ()
    files: Callable[[argparse.Namespace], tuple[list[Named], list[Named]]] = lambda args: ([], [])
