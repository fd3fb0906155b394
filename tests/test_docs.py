"""README and docs hold: commands, flags, config keys, make targets, folders and links are real."""

import dataclasses
import json
import pathlib
import re
import shlex
import typing

import pytest

from docs import generate
from llava_jax.cli import main as cli
from llava_jax.cli.flags import Parser
from llava_jax.cli.train import load_settings
from llava_jax.types import Settings

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def blocks(text: str) -> list[str]:
    """The fenced code blocks."""
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def command_lines(path: pathlib.Path) -> list[str]:
    """Every call of our command in a page's code blocks or a notebook's cells, continued lines joined."""
    text = path.read_text(encoding="utf-8")
    found = ["".join(cell["source"]) for cell in json.loads(text)["cells"]] if path.suffix == ".ipynb" else blocks(text)
    lines = [line for block in found for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(llava-jax|python -m llava_jax) ", line)]


def keys(kind: type, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, inner in typing.get_type_hints(kind).items():
        found += keys(inner, f"{prefix}{name}.") if dataclasses.is_dataclass(inner) else [f"{prefix}{name}"]
    return found


@pytest.mark.parametrize("page", generate.PAGES)
def test_the_reference_is_what_the_code_says(page):
    assert (ROOT / page).read_text(encoding="utf-8") == generate.PAGES[page](), "run python -m docs.generate"


def test_the_reference_describes_every_key_and_command():
    config, commands, _ = ((ROOT / page).read_text(encoding="utf-8") for page in generate.PAGES)
    assert re.findall(r"^### `([\w.]+)`\n\n\S", config, re.MULTILINE) == keys(Settings)
    assert re.findall(r"^## ([\w ]+)$", commands, re.MULTILINE) == list(cli.COMMANDS)


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, id=f"{path.name}:{line[:60]}") for path in PAGES + NOTEBOOKS for line in command_lines(path)],
)
def test_command_parses(line):
    """Flags are known; the config with its overrides gives settings that pass every check."""
    words = shlex.split(line.replace("python -m llava_jax", "llava-jax"), comments=True)[1:]
    name, rest = cli.split_name(words)
    command = cli.COMMANDS[name]
    parser = Parser(f"llava-jax {name}", command.summary, command.example)
    command.add_flags(parser)
    passed, ours = cli.split_passed(rest, command.passes) if command.passes else ([], rest)
    parser.parse(ours)
    if passed:
        load_settings(passed)


def test_config_keys_in_the_text_exist():
    known = set(keys(Settings))
    named = {
        (path.name, key)
        for path in PAGES
        for key in re.findall(
            r"`(?:--config\.)?(?!model\.safetensors)((?:model|init|data|optim|lora|train|mesh)\.[a-z0-9_]+)",
            path.read_text(encoding="utf-8"),
        )
    }
    assert [(page, key) for page, key in sorted(named) if key not in known] == []


TOPS = "|".join(path.name for path in [*ROOT.iterdir(), *(ROOT / "llava_jax").iterdir()] if path.is_dir())
A_FILE = re.compile(rf"`((?:{TOPS})/[\w./]+\.(?:py|sh|sbatch|yaml))`")


def files_in(line: str) -> list[pathlib.Path]:
    """The files that a line of a page names, from the top or from the package."""
    return [ROOT / file if (ROOT / file).exists() else ROOT / "llava_jax" / file for file in A_FILE.findall(line)]


def test_what_the_text_says_of_files():
    """Files exist, and a name behind a file's stands in one that its line names. Notes tell of code that is gone."""
    lines = [
        (page.name, line)
        for page in PAGES
        if "notes" not in page.parts
        for line in page.read_text(encoding="utf-8").splitlines()
        if A_FILE.search(line)
    ]
    assert lines
    assert [(page, file) for page, line in lines for file in files_in(line) if not file.exists()] == []
    assert [
        (page, name)
        for page, line in lines
        for name in re.findall(r"`([A-Za-z_]\w+)`", line[A_FILE.search(line).end() :])
        if not any(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for file in files_in(line))
    ] == []


def test_make_targets_exist():
    made = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    named = set(re.findall(r"^make (\w+)", "\n".join(blocks(text)), re.MULTILINE)) | set(
        re.findall(r"`make (\w+)`", text)
    )
    assert {"demo", "test", "docs"} <= named <= made


def test_the_tree_of_the_readme():
    """Every folder of the package and at the top is in the README's tree, and nothing else is."""
    tree = next(block for block in blocks(README) if "llava_jax/\n" in block)
    found, top = [], ""
    for line in tree.splitlines():
        name = line.strip().split()[0]
        top = top if line.startswith(" ") else name
        found.append(top + name if line.startswith(" ") else name)
    inside = [path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "llava_jax").glob("*/__init__.py")]
    assert sorted(found) == sorted(["configs/", "docs/", "examples/", "launch/", "llava_jax/", "tests/", *inside])


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_every_page_is_two_clicks_from_the_readme():
    def linked(path: pathlib.Path) -> set[pathlib.Path]:
        links = re.findall(r"\]\(([^)\s#]+)", path.read_text(encoding="utf-8"))
        return {(path.parent / link).resolve() for link in links if link.endswith(".md") and "://" not in link}

    first = linked(ROOT / "README.md")
    second = set().union(*map(linked, first))
    assert {path.resolve() for path in PAGES[1:]} <= first | second
