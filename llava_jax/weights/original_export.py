"""Our parameters to a folder of the original LLaVA code's layout, and the projector alone to a file."""

import contextlib
import dataclasses
import os
from typing import Any

from llava_jax.data.templates import IM_START_END, TEMPLATES, Template
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.hub import TOWER
from llava_jax.types import InputError, ModelConfig
from llava_jax.weights import hf_config, name_table, original
from llava_jax.weights.hf_config import write_json
from llava_jax.weights.hf_export import all_pieces, finished_folder, parameter_pieces, with_vocabulary
from llava_jax.weights.processor import (
    LlavaExtras,
    image_settings,
    own_rows,
    round_up,
    same_pieces,
    write_original_tokenizer,
)
from llava_jax.weights.tensors import check_written, enough_room, save_checked, write_shards

Params = dict[str, Any]

# Our decoder's model_type -> (model_type, architecture) of the original code around it.
ARCHITECTURES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
# data.aspect -> image_aspect_ratio.
ASPECT_KEYS = {"pad": "pad", "crop": "square", "anyres": "anyres"}


def write_original(
    folder: str,
    config: ModelConfig,
    params: Params,
    extras: LlavaExtras,
    *,
    dtype: str = "float32",
    tower_name: str = "",
    pad_vocab: int = 0,
    force: bool = False,
    card: str = "",
) -> ModelConfig:
    """Write the folder as `hf_export.write_llava` does, and return the config as exported.

    Decoder and projector lie in model.safetensors (or shards), the tower in a folder inside; one that was trained lies
    in both, as in v1.6, where `unfreeze_mm_vision_tower` makes the original read it from there. Rows that an export to
    Hugging Face added to the vocabulary are left out again. A LLaVA-NeXT is written as v1.6 is. `tower_name` is what
    config.json names the tower by; the folder inside by default. `pad_vocab` is as in `write_llava`, where 0 leaves the
    rows the decoder came with. `force` writes also where the tokenizer then gives other ids. `card` is the text of
    README.md, none where it is empty. Raises InputError when `folder` is already there.
    """
    if config.vision.family != "clip" or extras.aspect not in ASPECT_KEYS:
        raise InputError(
            f"{folder}: the original's layout knows CLIP towers and images {', '.join(ASPECT_KEYS)}, not "
            f"{config.vision.family} and {extras.aspect}; write hf:DIR"
        )
    rows = own_rows(extras.tokenizer, config.llm.vocab_size)
    if pad_vocab:
        rows = round_up(load_tokenizer(extras.tokenizer).size, pad_vocab)
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=rows))
    with finished_folder(folder, card) as partial:
        write_original_tokenizer(partial, extras)
        tower = os.path.join(partial, TOWER)
        os.mkdir(tower)
        _write_tower_configs(tower, config, dtype)
        _write_configs(partial, config, extras, dtype, tower_name)
        params = with_vocabulary(params, config.llm.vocab_size)
        pieces = sum(all_pieces(config, params, extras.vision, dtype), start=[])
        seen = [
            dataclasses.replace(piece, name=piece.name.removeprefix("vision_tower."))
            for piece in pieces
            if piece.name.startswith(name_table.VISION)
        ]
        named = ((piece, original_name(piece.name, config.projector, extras.tuned_tower)) for piece in pieces)
        rest = [dataclasses.replace(piece, name=name) for piece, name in named if name]
        for where, part in ((tower, seen), (partial, rest)):
            write_shards(where, part)
            check_written(where, part)
        read = original.read_model_config(original.open_original(partial, original.Companions(vision=tower)))
        kept = dict(dtype=config.dtype, remat=config.remat, image_token_id=config.image_token_id)
        if dataclasses.replace(read, **kept) != config:
            raise ValueError(f"config read back as {read}, wrote {config}")
        if not same_pieces(partial, extras):
            problem = (
                f"read next to the original's config.json, the tokenizer of {extras.tokenizer} gives other ids; copy "
                "that of the decoder it came from"
            )
            if not force:
                raise InputError(f"{problem}, or write it all the same with --force")
            print(f"export: warning: {problem}")
    return config


def write_projector(path: str, config: ModelConfig, params: Params, dtype: str) -> None:
    """Write the projector alone to a .safetensors file, under the names of the original's mm_projector.bin."""
    if not path.endswith(".safetensors"):
        raise InputError(f"--to=projector:{path}: expected the name of a .safetensors file")
    if os.path.exists(path):
        raise InputError(f"--to=projector:{path}: is already there; choose another name or remove it")
    pieces = parameter_pieces({"projector": params["projector"]}, dtype)
    partial = f"{path.removesuffix('.safetensors')}.{os.getpid()}.tmp.safetensors"
    try:
        with enough_room(path):
            save_checked(partial, {original_name(piece.name, config.projector): piece.array() for piece in pieces})
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def original_name(name: str, projector: str, tuned_tower: bool = False) -> str:
    """Return the original's name of a hub tensor; empty for what its own file does not hold."""
    if name.startswith(name_table.VISION):
        return f"model.vision_tower.{name}" if tuned_tower else ""
    if name.startswith(name_table.PROJECTOR) and projector == "linear":
        return name.replace(name_table.PROJECTOR + "linear_1.", "model.mm_projector.") if "linear_1." in name else ""
    for ours, theirs in (
        (name_table.PROJECTOR + "linear_1.", "model.mm_projector.0."),
        (name_table.PROJECTOR + "linear_2.", "model.mm_projector.2."),
        (name_table.LLM, "model."),
        ("language_model.lm_head.", "lm_head."),
        ("image_newline", "model.image_newline"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name} has no name in the original")


# ---- configs ----------------------------------------------------------------------------------------------------


def _write_tower_configs(folder: str, config: ModelConfig, dtype: str) -> None:
    described = dict(dtype=dtype, torch_dtype=dtype, architectures=["CLIPVisionModel"])
    # llama.cpp's converter wants both: the first, which no LLaVA uses, is what CLIPVisionConfig falls back to.
    read_elsewhere = dict(projection_dim=512, vision_feature_layer=config.feature_layer)
    write_json(folder, "config.json", hf_config.clip_json(config.vision) | described | read_elsewhere)
    images = dict(image_processor_type="CLIPImageProcessor") | image_settings(config.vision, "crop")
    write_json(folder, "preprocessor_config.json", images)


def _write_configs(folder: str, config: ModelConfig, extras: LlavaExtras, dtype: str, tower_name: str) -> None:
    tokenizer = load_tokenizer(extras.tokenizer)
    described = hf_config.llama_json(config.llm)
    if described["model_type"] not in ARCHITECTURES:
        raise InputError(
            f"--to=llava: the original code has no LLaVA around a {described['model_type']} decoder; expected one of "
            f"{', '.join(ARCHITECTURES)}; write hf:DIR instead"
        )
    kind, architecture = ARCHITECTURES[described["model_type"]]
    tokens = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    described |= dict(
        model_type=kind,
        architectures=[architecture],
        dtype=dtype,
        torch_dtype=dtype,
        use_cache=True,
        mm_vision_tower=tower_name or TOWER,
        mm_hidden_size=config.vision.width,
        mm_projector_type=config.projector,
        mm_vision_select_layer=config.feature_layer,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="spatial_unpad" if config.pinpoints else "flat",
        image_grid_pinpoints=[[width, height] for height, width in config.pinpoints] or None,
        mm_use_im_start_end=TEMPLATES.get(extras.template, Template()).image_tags == IM_START_END,
        mm_use_im_patch_token=False,
        use_mm_proj=True,
        image_aspect_ratio=ASPECT_KEYS[extras.aspect],
        tokenizer_padding_side="right",
        tokenizer_model_max_length=config.llm.max_positions,
        llava_jax=extras.rules,
    )
    if extras.tuned_tower:
        described |= dict(unfreeze_mm_vision_tower=True)
    write_json(folder, "config.json", described | tokens)
    write_json(folder, "generation_config.json", tokens)
