"""Write the pages of the reference that repeat what the code says: `python -m docs.generate`.

A key's description is the docstring below its field in `llava_jax/types.py`, its choices and range are those that
`llava_jax/settings.py` checks, its default is that of `configs/common.py`; a flag's is what argparse knows of it.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from configs import common, llava_qwen, llava_v1, llava_v1_5, llava_v1_6, tiny
from llava_jax.cli.flags import Parser
from llava_jax.cli.main import COMMANDS
from llava_jax.settings import CHOICES, RANGES, REMATS, flatten
from llava_jax.types import REMAT_NAMES, WEIGHT_NAMES, Settings
from llava_jax.weights.hf_config import PLACES

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = {
    "llava_v1": (llava_v1.get_config, ("size=7b,stage=pretrain", "size=7b,stage=finetune")),
    "llava_v1_5": (
        llava_v1_5.get_config,
        ("size=7b,stage=pretrain", "size=7b,stage=finetune", "size=7b,stage=lora"),
    ),
    "llava_v1_6": (llava_v1_6.get_config, ("size=7b,stage=pretrain", "size=7b,stage=finetune")),
    "llava_qwen": (
        llava_qwen.get_config,
        ("size=8b,stage=pretrain", "size=8b,stage=mid", "size=8b,stage=finetune"),
    ),
    "tiny": (tiny.get_config, ("stage=pretrain", "stage=mid", "stage=finetune", "stage=lora")),
}
GENERATED = "<!-- Written by `python -m docs.generate` from the code it describes. -->"


def field_docs(cls: type) -> dict[str, str]:
    """The docstring that follows each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        field.target.id: inspect.cleandoc(doc.value.value).replace("\n", " ")
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of all config keys, in the order of the classes."""
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from all_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def allowed(key: str) -> str:
    """What a key accepts beyond its type, in words."""
    if key == "train.remat":
        names = ", ".join(f"`{name}`" for name in (*REMAT_NAMES, *WEIGHT_NAMES))
        return f"{', '.join(f'`{name}`' for name in REMATS)}; or, joined by `+`, any of {names}"
    if key in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[key])
    if key not in RANGES:
        return ""
    low, high, low_in, high_in = RANGES[key]
    least = f"{low} or more" if low_in else f"above {low}"
    return least if high == math.inf else f"{least}, {'at most' if high_in else 'below'} {high}"


def config_page() -> str:
    defaults = dict(flatten(common.default_config().to_dict()))
    lines = [
        "# Config keys",
        GENERATED,
        "",
        "Set a key with `--config.KEY=VALUE`, or in a config file of your own. An unknown key is refused with the "
        "nearest name. What a recipe sets differently is in the [table below](#what-each-recipe-sets).",
        "",
        "## Stage and seed",
        "",
    ]
    lines += settings_section(Settings, "", defaults)
    for name, cls in get_type_hints(Settings).items():
        if dataclasses.is_dataclass(cls):
            lines += [f"## {name}", "", inspect.cleandoc(cls.__doc__).replace("\n", " "), ""]
            lines += settings_section(cls, f"{name}.", defaults)
    return "\n".join([*lines, *recipes_section(defaults)]) + "\n"


def settings_section(cls: type, prefix: str, defaults: dict[str, Any]) -> Iterator[str]:
    docs = field_docs(cls)
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            continue
        key = prefix + name
        facts = [kind.__name__, f"default `{defaults[key]!r}`", allowed(key)]
        yield from (f"### `{key}`", "", docs[name], "", "; ".join(filter(None, facts)), "")


def recipes_section(defaults: dict[str, Any]) -> Iterator[str]:
    yield from ("## What each recipe sets", "", "Keys that differ from their default. Another size differs in two of")
    yield from ("them: its decoder, and the run it starts from.", "")
    for name, (get_config, arguments) in RECIPES.items():
        configs = {argument: dict(flatten(get_config(argument).to_dict())) for argument in arguments}
        keys = [key for key in all_keys(Settings) if any(config[key] != defaults[key] for config in configs.values())]
        yield from (f"### {name}", "", f"| key | {' | '.join(f'`{argument}`' for argument in arguments)} |")
        yield "| --- |" + " --- |" * len(arguments)
        for key in keys:
            yield f"| `{key}` | {' | '.join(f'`{cell(repr(config[key]))}`' for config in configs.values())} |"
        yield ""


def commands_page() -> str:
    lines = [
        "# Commands",
        GENERATED,
        "",
        "`llava-jax COMMAND` and `python -m llava_jax COMMAND` are the same; `--flag=value` and `--flag value` both "
        "work. Exit codes are on [the page about files and exit codes](files.md).",
        "",
        "| command | what it does |",
        "| --- | --- |",
        *(f"| [`{name}`](#{name.replace(' ', '-')}) | {cell(command.summary)} |" for name, command in COMMANDS.items()),
        "",
    ]
    for name, command in COMMANDS.items():
        parser = Parser(f"llava-jax {name}", command.summary, command.example)
        command.add_flags(parser)
        lines += [f"## {name}", "", f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
        lines += ["```", command.example, "```", "", *flags_section(parser)]
    return "\n".join(lines)


def flags_section(parser: argparse.ArgumentParser) -> Iterator[str]:
    # argparse has no public way to list its flags.
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if group.title not in ("options", "positional arguments") and (actions or group.description):
            yield from (f"**{group.title[0].upper()}{group.title[1:]}**", "")
        if group.description:
            yield from ("```text", group.description, "```", "")
        if actions:
            yield from ("| flag | meaning |", "| --- | --- |")
            yield from (f"| `{spelled(action)}` | {meaning(action)} |" for action in actions)
            yield ""


def spelled(action: argparse.Action) -> str:
    """The flag as it is written: `--json=FILE`, `--peer`, `--kind=a|b`, a positional's name."""
    flag = action.option_strings[0] if action.option_strings else action.dest
    if action.nargs == 0 or not action.option_strings:
        return flag
    value = "\\|".join(map(str, action.choices)) if action.choices else (action.metavar or action.dest.upper())
    return f"{flag}={value}"


def meaning(action: argparse.Action) -> str:
    return cell(action.help or "") + (" (required)" if action.required and action.option_strings else "")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def hf_folders_page() -> str:
    lines = [
        "# What counts in a Hugging Face folder",
        GENERATED,
        "",
        "A folder can state a fact in several places. Where they differ, the first place below that says something "
        "counts, as in transformers 5, and a line names the contradiction.",
        "",
        "| fact | places, the first counts |",
        "| --- | --- |",
        *(f"| {fact} | {', '.join(f'`{place}`' for place in places)} |" for fact, places in PLACES.items()),
    ]
    return "\n".join(lines) + "\n"


PAGES = {
    "docs/reference/config.md": config_page,
    "docs/reference/commands.md": commands_page,
    "docs/reference/hf_folders.md": hf_folders_page,
}

if __name__ == "__main__":
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(), encoding="utf-8")
        print(f"wrote {path}")
