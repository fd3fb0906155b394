"""`train`: from a config file and its overrides to Settings; absl flags and ConfigDict end here."""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from llava_jax.cli.configs import recipes
from llava_jax.cli.flags import announce
from llava_jax.io import is_bucket
from llava_jax.settings import flatten, nearest, read_settings, settings_from_dict
from llava_jax.types import STOPPED_EXIT_CODE, InputError, Settings

# What running a user's config file can raise, bugs in that file included; each becomes one line.
BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, SyntaxError, TypeError)
CONFIG_ERRORS = (*BUGS, ImportError, OSError, ValueError)

# How a value is read by the type of its key, and what it is called.
PARSERS = {
    int: (flags.IntegerParser(), "a whole number"),
    float: (flags.FloatParser(), "a number"),
    bool: (flags.BooleanParser(), "true or false"),
}


def train_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir",
        required=True,
        help="folder of the run, local or gs://BUCKET/DIR: checkpoints, config.json, metrics.jsonl",
    )
    parser.add_argument_group("config").description = (
        "--config=FILE[:arg]      a config file, or the config.json of a run\n"
        "--config=NAME[:arg]      or a recipe that comes with the package, see llava-jax configs; one is required\n"
        "--config.KEY=VALUE       overrides one key of it, as in --config.train.batch_size=32"
    )


def train(args: argparse.Namespace) -> int:
    began = time.time()
    settings = args.settings()
    from llava_jax.parallel import distributed
    from llava_jax.train import loop, setup, watchdog

    limit = settings.train.watchdog
    with (
        distributed.connected(limit),
        distributed.stop_signal() as should_stop,
        watchdog.watching(limit, began) as watched,
    ):
        setup.keep_compiled()
        if distributed.is_first():
            announce("train", stage=settings.stage, config=" ".join(args.passed), workdir=args.workdir)
        loop.train_watched(settings, args.workdir, watched, should_stop)
    return 0


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Leave with 42 on SIGTERM until another handler is there: while modules are imported, or processes connect."""

    def leave(*_: object) -> None:
        print("stopped by SIGTERM: nothing is to be saved", file=sys.stderr, flush=True)
        os._exit(STOPPED_EXIT_CODE)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def split_config(word: str) -> tuple[str, str, str]:
    """Return (name or path, ":" or "", argument) of a `--config=`; an address in a bucket takes no argument."""
    given = word.removeprefix("--config=")
    return (given, "", "") if is_bucket(given) else given.partition(":")


def find_config(name: str) -> str:
    """Return the file that `--config=` names: one at this path, or else the recipe of this name. Raises InputError."""
    if os.path.isfile(name) or is_bucket(name):
        return name
    known = recipes()
    if name in known:
        return str(known[name])
    near = nearest(pathlib.PurePath(name).stem, tuple(known))
    raise InputError(f"--config: no file {name!r} and no recipe of that name{near} (`llava-jax configs` lists them)")


def load_settings(passed: Sequence[str]) -> Settings:
    """Return the checked settings of a config and its overrides. Raises InputError."""
    return settings_from_dict(load_config(passed).to_dict())


def load_config(passed: Sequence[str]) -> ConfigDict:
    """Return the ConfigDict of `--config=FILE|NAME[:arg]` with the `--config.key=value` overrides."""
    files = [word for word in passed if word.startswith("--config=")]
    if len(files) != 1:
        given = "none" if not files else " and ".join(files)
        raise InputError(f"expected one --config=FILE|NAME[:arg], such as tiny:stage=pretrain; got {given}")
    name, colon, arg = split_config(files[0])
    path = find_config(name)
    if path.endswith(".json") and colon:
        no = "a config.json takes no argument after the colon"
        raise InputError(f"--config={path}:{arg}: {no}; give --config={path}")
    spec = f"{path}{colon}{arg}"
    overrides = [word for word in passed if word.startswith("--config.")]
    config = run_config(spec)
    check_overrides(config, overrides)
    values, argv = flags.FlagValues(), ["train", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, lock_config=True, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, *CONFIG_ERRORS) as error:
        raise InputError(f"config {spec}: {last_line(error)}") from error
    return values.config


def run_config(spec: str) -> ConfigDict:
    """Return the config of a file, which runs here once. Raises InputError for what it raises."""
    if is_bucket(spec) and not spec.endswith(".json"):
        raise InputError(f"--config={spec}: of a bucket only the config.json of a run is read; copy it here")
    if spec.endswith(".json"):
        return ConfigDict(dataclasses.asdict(read_settings(spec)))
    values, argv = flags.FlagValues(), ["train", f"--config={spec}"]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    try:
        with importing_beside(spec.split(":", 1)[0]):
            values(argv)
        config = values.config
    except flags.IllegalFlagValueError as error:
        raise InputError(f"config {spec}: {last_line(error)}") from error
    except CONFIG_ERRORS as error:
        raise InputError(f"config {spec}: {type(error).__name__}: {last_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"config {spec}: get_config() returned {type(config).__name__}, not a ConfigDict")
    return config


@contextlib.contextmanager
def importing_beside(path: str) -> Iterator[None]:
    """Let a config import what lies next to it, as `common` or as `configs.common`, wherever we were started."""
    folder = os.path.dirname(os.path.abspath(path))
    around = os.path.dirname(folder)
    before = list(sys.path)
    # The modules of a package, as those around its recipes where it is installed, must not hide others of their names.
    sys.path[:0] = [folder] if os.path.exists(os.path.join(around, "__init__.py")) else [folder, around]
    try:
        yield
    finally:
        sys.path[:] = before


def check_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Raise InputError for a key that the config does not have, with the nearest name, or a value not of its type."""
    known = dict(flatten(config.to_dict()))
    for word in overrides:
        key, equals, value = word.removeprefix("--config.").partition("=")
        if key not in known:
            raise InputError(f"--config.{key}: no such config key{nearest(key, tuple(known))}")
        if not equals:
            raise InputError(f"--config.{key}: no value; write --config.{key}=VALUE")
        found = known[key]
        if type(found) in PARSERS:
            parser, expected = PARSERS[type(found)]
            try:
                parser.parse(value)
            except (ValueError, TypeError):
                raise InputError(f"--config.{key}={value}: expected {expected}, as in --config.{key}={found}") from None


def last_line(error: BaseException) -> str:
    """Return what an error says, without the traceback that config_flags puts before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
