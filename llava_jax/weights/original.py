"""The original LLaVA code's folders: config.json with mm_ keys, decoder and projector in it, a tower that it names.

Also its LoRA folders: an adapter, the projector in non_lora_trainables.bin, and a base that they name; read as the
model they make, merged. Facts: haotian-liu/LLaVA model/builder.py and train/train.py.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from llava_jax.data.templates import IM_START_END, TEMPLATES, Template
from llava_jax.data.tokenize import ORIGINAL_DECODERS, load_tokenizer
from llava_jax.hub import TOKENIZER_FILES
from llava_jax.types import InputError, ModelConfig
from llava_jax.weights import hf_config, name_table, peft
from llava_jax.weights.hf_config import read_json, with_pixels
from llava_jax.weights.source import ADAPTER_CONFIG
from llava_jax.weights.tensors import Tensors, open_file, open_folder, weight_files

Json = dict[str, Any]

# The projector alone, as stage 1 saves it, and what a LoRA run trains next to its adapter.
PROJECTOR = "mm_projector.bin"
NON_LORA = "non_lora_trainables.bin"
# What of an image's key in config.json we do, as data.aspect.
ASPECTS = {"pad": "pad", "square": "crop", None: "crop", "anyres": "anyres"}


@dataclasses.dataclass(frozen=True)
class Companions:
    """Folders that the user gives in place of those a folder only names: its vision tower, the base of its adapter."""

    vision: str = ""
    base: str = ""


HERE = Companions()


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


def open_original(folder: str, companions: Companions) -> Original:
    """Open the folder with the folders next to it; raise InputError where one is not at hand."""
    given = hf_config.read_config(folder, "an original LLaVA folder")
    base = _base(folder, given, companions.base)
    has_tokenizer = any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES)
    return Original(
        folder, given, _tower(folder, given, companions.vision), base, folder if has_tokenizer or not base else base
    )


def _tower(folder: str, given: Mapping[str, Any], override: str) -> str:
    named = given.get("mm_vision_tower")
    if override and not os.path.isfile(os.path.join(override, "config.json")):
        raise InputError(f"--vision={override}: has no config.json; expected the CLIP folder of {folder}")
    found = override or peft.found(named, folder)
    if not found:
        raise InputError(
            f"{folder}: its vision tower {named!r:.80} (mm_vision_tower) is no folder here; name it: "
            "llava-jax convert --from=… --vision=DIR --to=hf:DIR (or --vision=OWNER/NAME on the Hub)"
        )
    return found


def _base(folder: str, given: Mapping[str, Any], override: str) -> str:
    """Return the folder that an adapter or a projector alone belongs to, empty where the folder holds its decoder."""
    if os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        return peft.base_of(folder, override)
    if weight_files(folder) or not os.path.isfile(os.path.join(folder, PROJECTOR)):
        if override:
            raise InputError(f"--base={override}: {folder} holds its decoder and needs no base")
        return ""
    named = given.get("_name_or_path")
    found = override or peft.found(named, folder)
    if not os.path.isfile(os.path.join(found, "config.json")):
        raise InputError(
            f"{folder}: holds a projector alone ({PROJECTOR}); name the decoder that it was trained with, --base=DIR "
            f"(a folder with config.json), or start a run from it, --config.init.projector={folder}"
        )
    return found


# ---- config -----------------------------------------------------------------------------------------------------


def read_model_config(original: Original) -> ModelConfig:
    """Return ModelConfig of the folder; what we do not do is refused by name."""
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
    # The original has grids as [width, height].
    grids = given.get("image_grid_pinpoints")
    turned = [pair[::-1] if isinstance(pair, list) else pair for pair in grids] if isinstance(grids, list) else grids
    return ModelConfig(
        vision=vision,
        llm=llm,
        projector=projector or "linear",
        feature_layer=layer,
        image_token_id=load_tokenizer(original.tokenizer).image_token_id(llm.vocab_size),
        pinpoints=hf_config.pinpoints(turned, vision, where) if tiled else (),
    )


def aspect(original: Original) -> str:
    """Return `pad`, `crop` or `anyres`."""
    return ASPECTS[original.given.get("image_aspect_ratio")]


def template(original: Original, name: str) -> str:
    """Return the template of that name, with images between `<im_start>` and `<im_end>` where the folder says so."""
    if not original.given.get("mm_use_im_start_end") or TEMPLATES.get(name, Template()).image_tags == IM_START_END:
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
        raise InputError(f"{where}: {key} is {given.get(key)!r:.80}, which is not supported; expected {names}")
    return given.get(key)


# ---- weights ----------------------------------------------------------------------------------------------------


def open_tensors(original: Original) -> Tensors:
    """Open all tensors of the model, in the original's names and, where the tower's are not inside, CLIP's."""
    tensors = _with_base(original) if original.base else open_folder(original.folder)
    if _holds_tower(tensors):
        return tensors
    return open_folder(original.tower).joined(tensors.stored, tensors.where)


def tower_source(original: Original) -> str:
    """Return the folder that holds the tower's weights, those that LLaVA does not run included."""
    for folder in (original.folder, original.base):
        if folder and weight_files(folder) and _holds_tower(open_folder(folder)):
            return folder
    return original.tower


def _holds_tower(tensors: Tensors) -> bool:
    return any(name_table.canonical(name, "original").startswith(name_table.VISION) for name in tensors.names())


def _with_base(original: Original) -> Tensors:
    """Return the base's tensors with an adapter's updates added, and the other trained tensors in their place."""
    folder, tensors = original.folder, open_folder(original.base)
    others = os.path.join(folder, NON_LORA)
    if not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        others = os.path.join(folder, PROJECTOR)
    else:
        tensors = peft.merged(folder, tensors, "original")
        if not os.path.isfile(others):
            return dataclasses.replace(tensors, where=f"{folder} (no {NON_LORA}: the projector is the base's)")
    return dataclasses.replace(peft.placed(tensors, open_file(others).stored, "original"), where=folder)
