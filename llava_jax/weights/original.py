"""The original LLaVA code's folders: config.json with mm_ keys, decoder and projector in it, a tower that it names.

Also its LoRA folders: an adapter, the projector in non_lora_trainables.bin, and a base that they name; read as the
model they make, merged. Facts: haotian-liu/LLaVA model/builder.py and train/train.py.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llava_jax.data.templates import IM_START_END, TEMPLATES
from llava_jax.data.tokenize import ORIGINAL_DECODERS, load_tokenizer
from llava_jax.types import ClipConfig, InputError, ModelConfig
from llava_jax.weights import hf_config, name_table
from llava_jax.weights.hf_facts import read_json
from llava_jax.weights.processor import TOKENIZER_FILES, with_pixels
from llava_jax.weights.tensors import FLOATS, File, Tensors, open_file, open_folder

Json = dict[str, Any]

ADAPTER = "adapter_config.json"
OTHERS = "non_lora_trainables.bin"
# What of an image's key in config.json we do, as data.aspect.
ASPECTS = {"pad": "pad", "square": "crop", None: "crop", "anyres": "anyres"}


@dataclasses.dataclass(frozen=True)
class Beside:
    """Folders that the user gives in place of those a folder only names: its vision tower, the base of its adapter."""

    vision: str = ""
    base: str = ""


HERE = Beside()


@dataclasses.dataclass(frozen=True)
class Original:
    """A folder of the original layout, nothing of its weights read.

    `tower` is the CLIP folder, `base` the one an adapter belongs to (empty where it is no adapter), `tokenizer` the
    folder that holds it.
    """

    folder: str
    given: Json
    tower: str
    base: str
    tokenizer: str

    @property
    def where(self) -> str:
        return os.path.join(self.folder, "config.json")


def open_original(folder: str, beside: Beside) -> Original:
    """The folder with the folders next to it; InputError where one is not at hand."""
    given = hf_config.read_config(folder, "an original LLaVA folder")
    base = _base(folder, beside.base)
    has_tokenizer = any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES)
    return Original(
        folder, given, _tower(folder, given, beside.vision), base, folder if has_tokenizer or not base else base
    )


def _found(path: str, folder: str) -> str:
    """A path as it is written, or below the folder; empty when it is neither."""
    below = os.path.join(folder, path)
    return next((found for found in (below, path) if os.path.isfile(os.path.join(found, "config.json"))), "")


def _tower(folder: str, given: Mapping[str, Any], override: str) -> str:
    named = given.get("mm_vision_tower")
    if override and not os.path.isfile(os.path.join(override, "config.json")):
        raise InputError(f"--vision={override}: has no config.json; expected the CLIP folder of {folder}")
    found = override or (_found(named, folder) if isinstance(named, str) else "")
    if not found:
        raise InputError(
            f"{folder}: its vision tower {named!r} (mm_vision_tower) is no folder here; download it and name it: "
            "llava-jax convert --from=… --vision=DIR --to=hf:DIR"
        )
    return found


def _base(folder: str, override: str) -> str:
    """The folder an adapter belongs to, empty for a folder without adapter."""
    if not os.path.isfile(os.path.join(folder, ADAPTER)):
        if override:
            raise InputError(f"--base={override}: {folder} holds no {ADAPTER} and needs no base")
        return ""
    named = read_json(os.path.join(folder, ADAPTER)).get("base_model_name_or_path")
    if override and not os.path.isfile(os.path.join(override, "config.json")):
        raise InputError(f"--base={override}: has no config.json; expected the model that the adapter {folder} is for")
    found = override or (_found(named, folder) if isinstance(named, str) and named else "")
    if not found:
        raise InputError(
            f"{folder}: the base of its adapter, {named!r}, is no folder here; download it and name the folder: "
            "llava-jax convert --from=… --base=DIR --to=hf:DIR"
        )
    return found


# ---- config -----------------------------------------------------------------------------------------------------


def read_model_config(original: Original) -> ModelConfig:
    """ModelConfig of the folder; what we do not do is refused by name."""
    given, where = original.given, original.where
    _one_of(given, "model_type", tuple(ORIGINAL_DECODERS), where)
    _one_of(given, "mm_vision_select_feature", ("patch", None), where)
    _one_of(given, "image_aspect_ratio", tuple(ASPECTS), where)
    tiled = aspect(original) == "anyres"
    _one_of(given, "mm_patch_merge_type", ("spatial_unpad",) if tiled else ("flat", None), where)
    _one_of(given, "mm_resampler_type", (None,), where)
    _one_of(given, "s2", (None, False), where)
    projector = _one_of(given, "mm_projector_type", ("linear", "mlp2x_gelu", None), where)
    tower = os.path.join(original.tower, "config.json")
    vision = hf_config.clip_config(read_json(tower), tower)
    if given.get("mm_hidden_size") not in (None, vision.width):
        raise InputError(
            f"{where}: mm_hidden_size is {given['mm_hidden_size']} and the tower {original.tower} {vision.width} wide; "
            "expected the tower of this model"
        )
    vision = with_pixels(vision, original.tower)
    layer = hf_config.feature_layer(given.get("mm_vision_select_layer"), vision, where)
    llm = hf_config.llama_config({**given, "model_type": ORIGINAL_DECODERS[given["model_type"]]}, where)
    return ModelConfig(
        vision=vision,
        llm=llm,
        projector=projector or "linear",
        feature_layer=layer,
        image_token_id=load_tokenizer(original.tokenizer).image_token_id(llm.vocab_size),
        pinpoints=_pinpoints(given, vision, where) if tiled else (),
    )


def _pinpoints(given: Mapping[str, Any], vision: ClipConfig, where: str) -> tuple[tuple[int, int], ...]:
    """The grids of tiles as (height, width); the original has them as [width, height]."""
    pairs = given.get("image_grid_pinpoints")
    turned = [pair[::-1] if isinstance(pair, list) else pair for pair in pairs] if isinstance(pairs, list) else pairs
    return hf_config.pinpoints(turned, vision, where)


def aspect(original: Original) -> str:
    """`pad`, `crop` or `anyres`."""
    return ASPECTS[original.given.get("image_aspect_ratio")]


def template(original: Original, name: str) -> str:
    """The template of that name, with images between `<im_start>` and `<im_end>` where the folder says so."""
    if not original.given.get("mm_use_im_start_end") or TEMPLATES[name].image_tags == IM_START_END:
        return name
    tagged = f"{name}_im_start_end"
    lost = [tag for tag in IM_START_END if load_tokenizer(original.tokenizer).special_id(tag) is None]
    if tagged not in TEMPLATES or lost:
        raise InputError(
            f"{original.where}: mm_use_im_start_end is true, which is not supported with template {name} and a "
            f"tokenizer without {' and '.join(lost) or 'others'}; expected the tokenizer saved with the model"
        )
    return tagged


def _one_of(given: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> Any:
    if given.get(key) not in allowed:
        names = ", ".join(repr(value) for value in allowed if value is not None) or "none"
        raise InputError(f"{where}: {key} is {given.get(key)!r}, which is not supported; expected {names}")
    return given.get(key)


# ---- weights ----------------------------------------------------------------------------------------------------


def open_tensors(original: Original) -> Tensors:
    """All tensors of the model, in the names of the original and, where the tower's are not inside, of CLIP."""
    tensors = _adapted(original) if original.base else open_folder(original.folder)
    if _holds_tower(tensors):
        return tensors
    return dataclasses.replace(open_folder(original.tower).joined(tensors), where=tensors.where)


def tower_source(original: Original) -> str:
    """The folder that holds the tower's weights, those that LLaVA does not run included."""
    for folder in (original.folder, original.base):
        if folder and not os.path.isfile(os.path.join(folder, ADAPTER)) and _holds_tower(open_folder(folder)):
            return folder
    return original.tower


def _holds_tower(tensors: Tensors) -> bool:
    return any(name_table.canonical(name, "original").startswith(name_table.VISION) for name in tensors.names())


@dataclasses.dataclass(frozen=True)
class _Merged(File):
    """Weights of a base with their low-rank updates added, in float32; tensor -> (A [r, in], B [out, r])."""

    base: Tensors
    adapter: Tensors
    pairs: Mapping[str, tuple[str, str]]
    scale: float

    def keys(self) -> list[str]:
        return list(self.pairs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> str:
        return "F32"

    def get(self, name: str) -> np.ndarray:
        a, b = (self.adapter.get(part).astype(np.float32) for part in self.pairs[name])
        return self.base.get(name).astype(np.float32) + np.float32(self.scale) * (b @ a)


def _adapted(original: Original) -> Tensors:
    """The base's tensors, with the adapter's updates added and the other trained tensors in their place."""
    folder = original.folder
    scale = _scale(folder)
    paths = [os.path.join(folder, name) for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((path for path in paths if os.path.isfile(path)), paths[0])
    adapter, base = open_file(path), open_folder(original.base)
    pairs = _pairs(adapter, base)
    merged = _Merged(base, adapter, pairs, scale)
    tensors = base.joined(Tensors(folder, dict.fromkeys(pairs, merged)))
    others = os.path.join(folder, OTHERS)
    if not os.path.isfile(others):
        return dataclasses.replace(tensors, where=f"{folder} (no {OTHERS}: the projector is the base's)")
    trained = open_file(others)
    spelled = {name_table.canonical(name, "original"): name for name in tensors.names()}
    # PeftModel's own prefix and its model's go; a tensor of the base is replaced under the base's spelling.
    renamed = {name.removeprefix("base_model."): name for name in trained.names()}
    if any(name.startswith("model.model.") for name in renamed):
        renamed = {name.removeprefix("model."): old for name, old in renamed.items()}
    placed = {
        spelled.get(name_table.canonical(name, "original"), name): _As(trained, old) for name, old in renamed.items()
    }
    return dataclasses.replace(tensors.joined(Tensors(others, placed)), where=folder)


@dataclasses.dataclass(frozen=True)
class _As(File):
    """One tensor, under whatever name it is asked for."""

    tensors: Tensors
    name: str

    def keys(self) -> list[str]:
        return [self.name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self.name)

    def dtype(self, name: str) -> str:
        return self.tensors.dtype(self.name)

    def get(self, name: str) -> np.ndarray:
        return self.tensors.get(self.name)


def _scale(folder: str) -> float:
    """What B A is multiplied by; InputError for the kinds of adapter that are more than W + scale · B A."""
    where = os.path.join(folder, ADAPTER)
    given = read_json(where)
    _one_of(given, "peft_type", ("LORA",), where)
    _one_of(given, "bias", ("none", None), where)
    # Others (pissa, olora, corda …) change the base's own weights.
    _one_of(given, "init_lora_weights", (True, False, None, "gaussian"), where)
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        if given.get(key):
            raise InputError(f"{where}: {key} is {given[key]!r}, which is not supported; expected it unset")
    rank, alpha = given.get("r"), given.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        raise InputError(f"{where}: r is {rank!r}, lora_alpha {alpha!r}; expected numbers, r above 0")
    return alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)


def _pairs(adapter: Tensors, base: Tensors) -> dict[str, tuple[str, str]]:
    """Tensor of the base -> names of its A and B; InputError lists every one that fits nothing."""
    spelled = {name_table.canonical(name, "original"): name for name in base.names()}
    halves: dict[str, dict[str, str]] = {}
    problems = []
    for name in adapter.names():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        target = spelled.get(name_table.canonical(match[1] + ".weight", "original")) if match else None
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
        a, b = (adapter.shape(half[letter]) for letter in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != base.shape(target):
            yield f"{half['B']} {list(b)} times {half['A']} {list(a)} is not {target} {list(base.shape(target))}"
        for name in half.values():
            if adapter.dtype(name) not in FLOATS:
                yield f"{name} is {adapter.dtype(name)}"
