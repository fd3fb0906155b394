"""The README holds: its map is the tree, and its commands, flags, make targets, config keys and links exist."""

import dataclasses
import pathlib
import re
import shlex
import typing

import pytest
from ml_collections import ConfigDict

from llava_jax.cli import main, train
from llava_jax.cli.flags import Parser
from llava_jax.types import Settings

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAPPED = ("llava_jax", "configs", "launch", "docs", "tests")


def blocks(text: str) -> list[str]:
    """The fenced code blocks."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def read_map(block: str) -> dict[str, str]:
    """path -> comment of a map whose lines are 'name   comment', indented by two for each folder around it."""
    entries: dict[str, str] = {}
    around: list[str] = []
    for line in block.splitlines():
        name, _, comment = line.strip().partition(" ")
        around = around[: (len(line) - len(line.lstrip())) // 2] + [name]
        entries["".join(around)] = comment.strip()
    return entries


THE_MAP = next(read_map(block) for block in blocks(README) if "llava_jax/\n" in block or "llava_jax/ " in block)


def covered(path: str) -> bool:
    """Whether the map has the file, or a folder around it whose content it does not list."""
    folders = [path[: index + 1] for index, letter in enumerate(path) if letter == "/"]
    whole = [folder for folder in folders if not any(other != folder and other.startswith(folder) for other in THE_MAP)]
    return path in THE_MAP or any(folder in THE_MAP for folder in whole)


def test_every_file_is_in_the_map():
    files = [path.relative_to(ROOT).as_posix() for top in MAPPED for path in (ROOT / top).rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path and not path.endswith("/__init__.py")]
    assert [path for path in sorted(files) if not covered(path)] == []


def test_every_line_of_the_map_is_there_and_says_what_it_is():
    assert [path for path in THE_MAP if not (ROOT / path).exists()] == []
    assert [path for path, comment in THE_MAP.items() if not comment and not path.endswith("/")] == []


def command_lines() -> list[str]:
    """Every call of our command in a code block, continued lines joined."""
    lines = [line for block in blocks(README) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(llava-jax|python -m llava_jax) ", line)]


@pytest.mark.parametrize("line", command_lines())
def test_command_parses(line):
    words = shlex.split(line.replace("python -m llava_jax", "llava-jax"), comments=True)[1:]
    name, rest = main.split_name(words)
    command = main.COMMANDS[name]
    parser = Parser(f"llava-jax {name}", command.summary, command.example)
    command.add_flags(parser)
    passed, ours = main.split_passed(rest, command.passes) if command.passes else ([], rest)
    parser.parse(ours)
    if passed:
        assert isinstance(train.load_config(passed), ConfigDict)


def test_commands_are_all_named():
    named = re.findall(r"^\| `([a-z_ ]+)` \|", README.split("## Commands")[1].split("## ")[0], re.MULTILINE)
    assert named == list(main.COMMANDS)
    assert {main.split_name(shlex.split(line)[1:])[0] for line in command_lines()} <= set(main.COMMANDS)


def test_make_targets_exist():
    made = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"make (\w+)", "\n".join(blocks(README)) + " ".join(re.findall(r"`(make \w+)`", README))))
    assert {"demo", "test"} <= named <= made


def keys(kind: type, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, inner in typing.get_type_hints(kind).items():
        found += keys(inner, f"{prefix}{name}.") if dataclasses.is_dataclass(inner) else [f"{prefix}{name}"]
    return found


def test_config_keys_are_all_described():
    table = README.split("## Config keys")[1].split("## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    described = [key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)]
    assert described == keys(Settings)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []
