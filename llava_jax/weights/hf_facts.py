"""Facts that a Hugging Face folder can state in several places, and the place that counts: the one transformers takes.

Whoever reads such a fact asks this table, so that a folder means the same here and there.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from llava_jax.io import LFS_POINTER, is_lfs_pointer
from llava_jax.types import InputError

# Fact -> places, "FILE" or "FILE key.key"; the first one that says something counts (null, false and {} do not).
PLACES: dict[str, tuple[str, ...]] = {
    "weights": ("model.safetensors", "model.safetensors.index.json"),
    "weights where there are no safetensors": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    "dtype": ("config.json dtype", "config.json torch_dtype"),
    "rope": (
        "config.json text_config.rope_scaling",
        "config.json text_config.rope_parameters",
        "config.json rope_scaling",
        "config.json rope_parameters",
    ),
    "tied embeddings": ("config.json tie_word_embeddings", "config.json text_config.tie_word_embeddings"),
    "image token": ("config.json image_token_id", "config.json image_token_index"),
    "end of an answer": (
        "generation_config.json eos_token_id",
        "config.json eos_token_id",
        "config.json text_config.eos_token_id",
    ),
    "image settings": ("processor_config.json image_processor", "preprocessor_config.json"),
    "image grids": (
        "config.json image_grid_pinpoints",
        "processor_config.json image_processor.image_grid_pinpoints",
        "preprocessor_config.json image_grid_pinpoints",
    ),
    "patch size": ("config.json vision_config.patch_size", "processor_config.json patch_size"),
    "image features": (
        "config.json vision_feature_select_strategy",
        "processor_config.json vision_feature_select_strategy",
    ),
    "chat template": (
        "processor_config.json chat_template",
        "chat_template.json chat_template",
        "chat_template.jinja",
        "tokenizer_config.json chat_template",
    ),
    "added tokens": (
        "tokenizer_config.json added_tokens_decoder",
        "tokenizer.json added_tokens",
        "added_tokens.json",
    ),
    "special tokens": ("special_tokens_map.json", "tokenizer_config.json"),
    "special tokens next to added_tokens_decoder": ("tokenizer_config.json", "special_tokens_map.json"),
}
IMAGE_KEYS = (
    "do_resize",
    "do_center_crop",
    "do_pad",
    "do_rescale",
    "do_normalize",
    "size",
    "crop_size",
    "resample",
    "rescale_factor",
    "image_mean",
    "image_std",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def config_value(config: Mapping[str, Any], fact: str) -> Any:
    """Return what a config (or text_config) dict says about a fact whose places are keys of config.json, or None."""
    keys = [place.partition(" ")[2].removeprefix("text_config.") for place in PLACES[fact]]
    return next((config[key] for key in keys if _says(config.get(key))), None)


def folder_value(folder: str, fact: str) -> tuple[Any, str]:
    """Return (what the folder says about a fact, path of the file that says it); (None, "") where none does."""
    for place, value in _stated(folder, fact):
        if _says(value):
            return value, os.path.join(folder, place.partition(" ")[0])
    return None, ""


def special_tokens(folder: str) -> dict[str, str]:
    """Return the bos, eos, unk and pad token that the tokenizer's own files name, as text."""
    found: dict[str, str] = {}
    for _, tokens in _stated(folder, _special_fact(folder)):
        found = tokens | found
    return found


def contradictions(folder: str) -> list[str]:
    """Return one line for each fact that two places of the folder state differently, with the place that counts."""
    unused = {"special tokens", "special tokens next to added_tokens_decoder"} - {_special_fact(folder)}
    lines = []
    for fact in PLACES.keys() - unused:
        stated = [(place, _comparable(fact, value)) for place, value in _stated(folder, fact)]
        taken, said = next((each for each in stated if _says(each[1])), ("", None))
        others = ((place, _difference(said, value)) for place, value in stated if taken)
        place, difference = next((each for each in others if each[1]), ("", None))
        if difference:
            lines.append(f"{folder}: {fact}: {taken} says {difference[0]} and {place} {difference[1]}; {taken} counts")
    return sorted(lines)


def read_json(path: str) -> dict[str, Any]:
    """Return the JSON object in a file, with or without a byte order mark.

    InputError names the file when it is missing, a git-lfs pointer, broken or no object.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a Hugging Face JSON file") from error
    except ValueError as error:
        why = LFS_POINTER if is_lfs_pointer(path) else f"is not JSON ({error}); copy it again from where it came from"
        raise InputError(f"{path}: {why}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _says(value: Any) -> bool:
    return value is not None and value is not False and value != {} and value != ""


def _special_fact(folder: str) -> str:
    """With added_tokens_decoder, transformers 5 reads tokenizer_config.json alone; without, the older file first."""
    path = os.path.join(folder, "tokenizer_config.json")
    decoder = os.path.isfile(path) and "added_tokens_decoder" in read_json(path)
    return "special tokens next to added_tokens_decoder" if decoder else "special tokens"


def _stated(folder: str, fact: str) -> list[tuple[str, Any]]:
    """The places that hold the fact, in the table's order, with what they hold."""
    found = []
    for place in PLACES[fact]:
        name, _, keys = place.partition(" ")
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        if fact.startswith("weights"):
            value = name
        elif name.endswith(".jinja"):
            with open(path, encoding="utf-8") as file:
                value = file.read()
        else:
            value = read_json(path)
            for key in filter(None, keys.split(".")):
                value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append((place, _special(value) if fact.startswith("special tokens") else value))
    return found


def _special(config: Any) -> dict[str, str]:
    given = {key: config[key] for key in SPECIAL_TOKENS if config.get(key)}
    return {key: token["content"] if isinstance(token, dict) else token for key, token in given.items()}


# ---- what contradicts what ---------------------------------------------------------------------------------------


def _comparable(fact: str, value: Any) -> Any:
    """A statement in the spelling that all places of its fact are brought to."""
    if fact == "end of an answer":
        return set(value) if isinstance(value, list) else {value}
    if fact == "rope" and isinstance(value, dict):
        return {"rope_type" if key == "type" else key: each for key, each in value.items()}
    if fact == "image settings":
        return {key: _sides(value[key]) if "size" in key else value[key] for key in IMAGE_KEYS if key in value}
    if fact == "chat template" and isinstance(value, list):  # several under names, as tokenizers with tools have them
        return next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    if fact == "added tokens":
        return _added(value)
    return value


def _sides(size: Any) -> Any:
    """A size by the names of its sides; older files give the shortest as a number."""
    return {"shortest_edge": size, "height": size, "width": size} if isinstance(size, int) else size


def _added(value: Any) -> dict[str, dict[str, Any]]:
    """{text: its id and flags} of any of the three files that list added tokens."""
    if isinstance(value, list):
        return {token["content"]: token for token in value}
    if all(isinstance(each, int) for each in value.values()):
        return {text: {"id": number} for text, number in value.items()}
    return {token["content"]: token | {"id": int(number)} for number, token in value.items()}


def _difference(one: Any, other: Any) -> tuple[str, str] | None:
    """What the one says and what the other, where they exclude each other; of two lists of ends one may hold more."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() & other.keys()):
            found = _difference(one[key], other[key])
            if found:
                return f"{key} {found[0]}", f"{key} {found[1]}"
        return None
    if isinstance(one, set) and isinstance(other, set) and (one <= other or other <= one):
        return None
    return None if one == other else (repr(one)[:60], repr(other)[:60])
