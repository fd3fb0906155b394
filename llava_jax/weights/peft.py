"""peft's folders: adapter_config.json and adapter_model.safetensors, read merged into their base, and written of a run.

What was trained whole (the projector) lies among the adapters, as peft's modules_to_save.
"""

import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llava_jax.models.llava import build
from llava_jax.types import InputError, ModelConfig
from llava_jax.weights import name_table
from llava_jax.weights.hf_config import read_json, write_json
from llava_jax.weights.hf_export import finished_folder, identity, parameter_pieces
from llava_jax.weights.name_table import Stored
from llava_jax.weights.source import ADAPTER_CONFIG
from llava_jax.weights.tensors import FLOATS, Tensors, open_file, save_checked

Params = dict[str, Any]

ADAPTER = "adapter_model.safetensors"
LOW_RANK = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# LlavaForConditionalGeneration of transformers 5 in memory, where peft looks; the names in files are older.
LLM = "model.language_model."
TOWER = "model.vision_tower.encoder."
PROJECTOR = "model.multi_modal_projector."


# ---- read -------------------------------------------------------------------------------------------------------


def found(path: Any, folder: str) -> str:
    """Return a model's path below the folder, or as it is written; empty when it is neither, or no path."""
    paths = (os.path.join(folder, path), path) if isinstance(path, str) and path else ()
    return next((each for each in paths if os.path.isfile(os.path.join(each, "config.json"))), "")


def base_of(folder: str, override: str = "") -> str:
    """Return the folder that the adapters belong to: `override`, or the one they name. Raises InputError."""
    named = read_json(os.path.join(folder, ADAPTER_CONFIG)).get("base_model_name_or_path")
    if override and not os.path.isfile(os.path.join(override, "config.json")):
        raise InputError(f"--base={override}: has no config.json; expected the model that the adapter {folder} is for")
    base = override or found(named, folder)
    if not base:
        raise InputError(
            f"{folder}: the base of its adapter, {named!r}, is no folder here; name it: "
            "--base=DIR, or --base=OWNER/NAME on the Hub (for a run: llava-jax convert --from=… --base=DIR --to=hf:DIR)"
        )
    return base


def merged(folder: str, base: Tensors, kind: str) -> Tensors:
    """Return the base's tensors (names of `kind`) with the folder's adapters added and its whole tensors in place."""
    scale = _scale(folder)
    paths = [os.path.join(folder, name) for name in (ADAPTER, "adapter_model.bin")]
    adapter = open_file(next((path for path in paths if os.path.isfile(path)), paths[0]))
    pairs = _pairs(adapter, base, kind)

    def get(target: str) -> np.ndarray:
        a, b = (adapter[part].get().astype(np.float32) for part in pairs[target])
        return base[target].get().astype(np.float32) + np.float32(scale) * (b @ a)

    updated = {name: Stored(base[name].shape, "F32", functools.partial(get, name)) for name in pairs}
    whole = {name: found for name, found in adapter.stored.items() if not LOW_RANK.fullmatch(name)}
    return placed(base.joined(updated, folder), whole, kind)


def placed(base: Tensors, trained: Mapping[str, Stored], kind: str) -> Tensors:
    """Return the base's tensors with those of `trained` in their place, under the base's spelling."""
    spelled = {name_table.canonical(name, kind): name for name in base.names()}
    names = {name: spelled.get(name_table.canonical(name, kind), name_table.without_peft(name)) for name in trained}
    return base.joined({names[name]: found for name, found in trained.items()}, base.where)


def _scale(folder: str) -> float:
    """Return what B A is multiplied by. Raises InputError for the adapters that are more than W + scale · B A."""
    where = os.path.join(folder, ADAPTER_CONFIG)
    given = read_json(where)
    # Others of the last one (pissa, olora, corda …) change the base's own weights.
    only = dict(peft_type=("LORA",), bias=("none", None), init_lora_weights=(True, False, None, "gaussian"))
    for key, allowed in only.items():
        if given.get(key) not in allowed:
            raise InputError(f"{where}: {key} is {given.get(key)!r}, which is not supported; expected {allowed[0]!r}")
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias"):
        if given.get(key):
            raise InputError(f"{where}: {key} is {given[key]!r}, which is not supported; expected it unset")
    rank, alpha = given.get("r"), given.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        raise InputError(f"{where}: r is {rank!r}, lora_alpha {alpha!r}; expected numbers, r above 0")
    return alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)


def _pairs(adapter: Tensors, base: Tensors, kind: str) -> dict[str, tuple[str, str]]:
    """Return {tensor of the base: names of its A and B}. Raises InputError, which lists every one that fits nothing."""
    spelled = {name_table.canonical(name, kind): name for name in base.names()}
    halves: dict[str, dict[str, str]] = {}
    problems = []
    for name in adapter.names():
        match = LOW_RANK.fullmatch(name)
        if match is None:
            continue
        target = spelled.get(name_table.canonical(match[1] + ".weight", kind))
        if target is None:
            problems.append(f"{name} belongs to no weight of the base")
        else:
            halves.setdefault(target, {})[match[2]] = name
    problems += _misfits(adapter, base, halves)
    if problems:
        raise InputError(f"{adapter.where}: does not fit the base {base.where}: {'; '.join(problems)}")
    return {target: (half["A"], half["B"]) for target, half in halves.items()}


def _misfits(adapter: Tensors, base: Tensors, halves: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    for target, half in halves.items():
        if set(half) != {"A", "B"}:
            yield f"{', '.join(half.values())} has no counterpart"
            continue
        a, b = (adapter[half[letter]].shape for letter in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != base[target].shape:
            yield f"{half['B']} {list(b)} times {half['A']} {list(a)} is not {target} {list(base[target].shape)}"
        for name in half.values():
            if adapter[name].dtype not in FLOATS:
                yield f"{name} is {adapter[name].dtype}"


# ---- written ------------------------------------------------------------------------------------------------------


def write_peft(folder: str, config: ModelConfig, trained: Params, base: str, card: str = "") -> None:
    """Write the folder that `peft.PeftModel.from_pretrained(model, folder)` loads onto our exported LLaVA.

    `trained` is what a run with the adapters of `config.lora` trained; `base` names the model they belong to ("" where
    it is not one folder), `card` is the text of README.md. The projector goes along as peft's modules_to_save. Raises
    InputError when `folder` is there, or for what is neither an adapter nor a whole projector; a LLaVA-NeXT's
    `image_newline` lies in no module.
    """
    projector = trained.get("projector", {})
    lost = [f"weights of {part}" for part in trained if part not in ("lora", "vision_lora", "projector")]
    lost += ["image_newline"] if config.pinpoints and projector else []
    is_whole = jax.tree.structure(projector) == jax.tree.structure(build(config)[1]["projector"])
    lost += ["a part of the projector"] if projector and not is_whole else []
    if lost:
        raise InputError(
            f"--to=peft:{folder}: the run trained {lost[0]}, which peft's format has no place for; write the merged "
            "model, --to=hf:DIR"
        )
    assert config.lora is not None
    tensors = _adapters(config.lora.targets, "llm", trained["lora"])
    if "vision_lora" in trained:
        first = config.vision_layers - (config.learning_blocks or config.vision_layers)
        tensors |= _adapters(config.lora.vision_targets, "vision", trained["vision_lora"], first)
    if projector:
        tensors |= _projector(config, projector)
    with finished_folder(folder, card) as partial:
        whole = ["multi_modal_projector"] if projector else None
        write_json(partial, ADAPTER_CONFIG, adapter_json(config, base, whole))
        save_checked(os.path.join(partial, ADAPTER), dict(sorted(tensors.items())))


def adapter_json(config: ModelConfig, base: str, whole: list[str] | None) -> dict[str, Any]:
    """Return peft's LoraConfig, with the modules saved as a `whole`.

    Modules are a pattern: their last names alone would match those of the other tower, and of blocks that never run.
    """
    lora = config.lora
    assert lora is not None
    modules = rf".*language_model.*\.({_alternatives('llm', lora.targets)})"
    if lora.vision_targets:
        blocks = range(config.vision_layers)[-config.learning_blocks :]
        numbers = "|".join(str(block) for block in blocks)
        modules += rf"|.*vision_tower.*\.({numbers})\.({_alternatives('vision', lora.vision_targets)})"
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base or None,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        target_modules=modules,
        modules_to_save=whole,
    )


def _module(part: str, target: str) -> str:
    """Return '{}.self_attn.q_proj', with {} for the layer, of 'attn/q' in `part`."""
    return name_table.ROWS[f"{part}/layers/{target}/kernel"].hf.partition(".layers.")[2].removesuffix(".weight")


def _alternatives(part: str, targets: tuple[str, ...]) -> str:
    return "|".join(sorted(_module(part, target).partition(".")[2].replace(".", r"\.") for target in targets))


def _adapters(targets: tuple[str, ...], part: str, params: Params, first: int = 0) -> dict[str, np.ndarray]:
    """Return the tensors of a part's adapters, which are those of the blocks from `first` on."""
    found, prefix = {}, {"llm": LLM, "vision": TOWER}[part]
    for target in targets:
        module, layer = target.split("/")
        a, b = (np.asarray(params["layers"][module][layer][leaf], np.float32) for leaf in ("a", "b"))
        rank = b.shape[1]
        for index in range(len(a)):
            name = f"base_model.model.{prefix}layers.{_module(part, target).format(first + index)}"
            found[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[index].reshape(-1, rank).T)
            found[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[index].reshape(rank, -1).T)
    return found


def _projector(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    pieces = [*parameter_pieces({"projector": params}, "float32"), *identity(config, "float32")]
    names = (piece.name.removeprefix(name_table.PROJECTOR) for piece in pieces)
    return {f"base_model.model.{PROJECTOR}{name}": piece.array() for name, piece in zip(names, pieces, strict=True)}
