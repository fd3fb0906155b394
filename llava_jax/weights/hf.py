"""Folders to our parameters: CLIP, LLaMA, LLaVA (Hugging Face's and the original) and projector files, strictly.

Every function takes `lazy`: True leaves the values in the files, as `LazyTensor`, to be read layer by layer.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.data.templates import OWN, TEMPLATES, Template, find_template, render, try_jinja
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.models.llava import build
from llava_jax.settings import CHOICES
from llava_jax.types import ClipConfig, InputError, LazyTensor, LlamaConfig, ModelConfig, Turn
from llava_jax.weights import hf_config, name_table, original, peft
from llava_jax.weights.hf_config import config_value, folder_value, read_images, read_json, special_tokens, with_pixels
from llava_jax.weights.original import HERE, Companions
from llava_jax.weights.processor import LlavaExtras
from llava_jax.weights.source import is_adapter, is_original
from llava_jax.weights.tensors import FLOATS, Tensors, open_file, open_folder

Params = dict[str, Any]

PARTS = ("vision", "projector", "llm")

# Stand-ins for the part that a CLIP or LLaMA folder does not say anything about.
_NO_LLM = LlamaConfig(vocab_size=1, width=1, mlp_width=1, layers=1, heads=1, kv_heads=1, head_dim=2)
_NO_CLIP = ClipConfig(width=1, mlp_width=1, layers=2, heads=1, image_size=1, patch_size=1)


# ---- public -----------------------------------------------------------------------------------------------------


def read_clip(
    folder: str, *, feature_layer: int = -2, dtype: str = "float32", lazy: bool = False
) -> tuple[ClipConfig, Params]:
    """Read config and `vision` parameters (numpy, `dtype`) of a CLIP or SigLIP folder, whole or the vision part.

    Blocks above `feature_layer`, the post-norm, SigLIP's head, the text tower and the projections are left out.
    """
    where = os.path.join(folder, "config.json")
    given = hf_config.read_config(folder, "a Hugging Face CLIP folder (config.json and safetensors)")
    config = hf_config.clip_config(given, where)
    hf_config.check_feature_layer(feature_layer, config, where)
    config = with_pixels(config, folder)
    model = ModelConfig(vision=config, llm=_NO_LLM, feature_layer=feature_layer)
    return config, _read(open_folder(folder), "clip", model, ("vision",), dtype, lazy)["vision"]


def read_llama(folder: str, *, dtype: str = "float32", lazy: bool = False) -> tuple[LlamaConfig, Params]:
    """Read config and `llm` parameters (numpy, `dtype`) of a decoder folder, of a family in families.py."""
    given = hf_config.read_config(folder, "a Hugging Face LLaMA folder (config.json and safetensors)")
    config = hf_config.llama_config(given, os.path.join(folder, "config.json"))
    model = ModelConfig(vision=_NO_CLIP, llm=config)
    return config, _read(open_folder(folder), "llama", model, ("llm",), dtype, lazy)["llm"]


def read_llava(
    folder: str, *, dtype: str | Mapping[str, str] = "float32", lazy: bool = False, companions: Companions = HERE
) -> tuple[ModelConfig, Params, LlavaExtras]:
    """Read config, parameters (numpy, `dtype`) and extras of a Hugging Face or original LLaVA folder.

    `companions` are folders for what an original folder only names. A `dtype` for each part leaves out those that it
    does not name, once they are checked.
    """
    config, extras = read_llava_config(folder, companions)
    return config, _read(*_opened(folder, companions), config, PARTS, dtype, lazy), extras


def read_llava_config(folder: str, companions: Companions = HERE) -> tuple[ModelConfig, LlavaExtras]:
    """Read what `read_llava` says, without the weights."""
    with hf_config.in_form(folder, "config.json or the settings next to it"):
        return _llava_config(folder, companions)


def _llava_config(folder: str, companions: Companions) -> tuple[ModelConfig, LlavaExtras]:
    if is_adapter(folder):
        return read_llava_config(peft.base_of(folder, companions.base), Companions(companions.vision))
    where = os.path.join(folder, "config.json")
    given = hf_config.read_config(folder, "a LlavaForConditionalGeneration folder (config.json and safetensors)")
    if not is_original(given):
        _only_for_originals(folder, companions)
        config = hf_config.with_grids(hf_config.llava_config(given, where), folder)
        config = dataclasses.replace(config, vision=with_pixels(config.vision, folder))
        return config, _extras(given, folder, where)
    found = original.open_original(folder, companions)
    config, extras = original.read_model_config(found), _extras(given, found.tokenizer, where)
    tower = original.tower_source(found)
    return config, dataclasses.replace(
        extras,
        template=original.template(found, extras.template),
        aspect=original.aspect(found),
        vision=tower,
        tuned_tower=tower != found.tower,
    )


def weight_folders(folder: str, companions: Companions = HERE) -> list[str]:
    """Return the folders that a LLaVA folder's weights come from: itself, and those that an original one names."""
    if is_adapter(folder):
        return [folder, *weight_folders(peft.base_of(folder, companions.base), Companions(companions.vision))]
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path) or not is_original(read_json(path)):
        return [folder]
    found = original.open_original(folder, companions)
    return [other for other in (folder, found.tower, found.base) if other]


def stored_dtype(folder: str, companions: Companions = HERE) -> str:
    """Return the dtype a folder's config.json names, as we compute: float32 or bfloat16, which float16 becomes."""
    if is_adapter(folder):
        return stored_dtype(peft.base_of(folder, companions.base))
    given = hf_config.read_config(folder, "a LlavaForConditionalGeneration folder")
    stored = config_value(given, "dtype")
    return "bfloat16" if stored in ("float16", "bfloat16") else "float32"


def read_projector(path: str, config: ModelConfig) -> Params:
    """Read the float32 `projector` of a .safetensors or .bin file in any usual spelling, checked against `config`.

    A file without `image_newline` gives none, also for a LLaVA-NeXT: stage 1 sees whole images and trains none.
    """
    if not path.endswith((".safetensors", ".bin")):
        raise InputError(f"{path}: expected a .safetensors or .bin projector file, or the workdir of a pretrain run")
    tensors = open_file(path)
    if not any(name_table.canonical(name, "projector") == name_table.NEWLINE for name in tensors.names()):
        config = dataclasses.replace(config, pinpoints=())
    return _read(tensors, "projector", config, ("projector",), "float32")["projector"]


# ---- reading ----------------------------------------------------------------------------------------------------


def _opened(folder: str, companions: Companions) -> tuple[Tensors, str]:
    """Return (tensors of a LLaVA folder, the kind of their names)."""
    if is_adapter(folder):
        tensors, kind = _opened(peft.base_of(folder, companions.base), Companions(companions.vision))
        return peft.merged(folder, tensors, kind), kind
    if is_original(hf_config.read_config(folder, "a LLaVA folder")):
        return original.open_tensors(original.open_original(folder, companions)), "original"
    return open_folder(folder), "llava"


def _only_for_originals(folder: str, companions: Companions) -> None:
    for flag, given in (("--vision", companions.vision), ("--base", companions.base)):
        if given:
            raise InputError(
                f"{flag}={given}: {folder} holds its whole model; the flag is for original LLaVA folders and adapters"
            )


def _read(
    tensors: Tensors,
    kind: str,
    config: ModelConfig,
    parts: tuple[str, ...],
    dtype: str | Mapping[str, str],
    lazy: bool = False,
) -> Params:
    """Return the named parts of the model from `tensors`. Raises one InputError, which lists every difference."""
    dtypes = dict.fromkeys(parts, dtype) if isinstance(dtype, str) else dtype
    _, abstract = build(config)
    wanted = {path: leaf.shape for path, leaf in name_table.flatten(abstract).items() if path.split("/")[0] in parts}
    names: dict[str, str] = {}
    problems = []
    for name in tensors.names():
        canonical = name_table.canonical(name, kind)
        if canonical in names:
            problems.append(f"{names[canonical]} and {name} are the same tensor")
        names[canonical] = name
    expected = _expected(wanted)
    problems += _differences(tensors, kind, config, names, expected)
    if problems:
        raise InputError(f"{tensors.where}: the weights do not fit the config: {'; '.join(problems)}")
    flat: dict[str, LazyTensor] = {}
    for path, shape in wanted.items():
        part = path.split("/")[0]
        if part not in dtypes:
            continue
        row = name_table.ROWS[path]
        one_shape = shape[1:] if row.stacked else shape

        def one(layer: int, row: name_table.Row = row, shape: tuple[int, ...] = one_shape) -> np.ndarray:
            return name_table.to_ours(row, tensors[names[row.hf.format(layer)]].get(), shape)

        flat[path] = LazyTensor(shape, np.dtype(jnp.dtype(dtypes[part])), row.stacked, one)
    tree = name_table.unflatten(flat)
    return tree if lazy else jax.tree.map(np.asarray, tree)


def _expected(wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return {canonical name: their shape} of every tensor the wanted parameters are made of."""
    expected = {}
    for path, shape in wanted.items():
        row = name_table.ROWS[path]
        layers = range(shape[0]) if row.stacked else (0,)
        one = name_table.hf_shape(row, shape[1:] if row.stacked else shape)
        expected |= {row.hf.format(layer): one for layer in layers}
    return expected


def _differences(
    tensors: Tensors,
    kind: str,
    config: ModelConfig,
    names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
) -> list[str]:
    missing = [name for name in expected if name not in names]
    unexpected, shapes, dtypes, problems = [], [], [], []
    for canonical, name in names.items():
        if canonical not in expected:
            if not name_table.unused(canonical, kind, config.vision_layers):
                reason = _surplus(tensors, config, names, canonical)
                if reason is None:
                    continue
                unexpected.append(name) if reason == "" else problems.append(reason)
        elif tensors[name].shape != expected[canonical]:
            shapes.append(f"{name} is {list(tensors[name].shape)}, expected {list(expected[canonical])}")
        elif tensors[name].dtype not in FLOATS:
            dtypes.append(f"{name} is {tensors[name].dtype}, expected one of {', '.join(sorted(FLOATS))}")
    if missing:
        problems.append("missing " + ", ".join(_grouped(missing)))
    if unexpected:
        problems.append("unexpected " + ", ".join(_grouped(unexpected)))
    return problems + shapes + dtypes


def _surplus(tensors: Tensors, config: ModelConfig, names: Mapping[str, str], canonical: str) -> str | None:
    """Return why a tensor that has no row may not be there: None when it may, "" when it is simply unknown."""
    embedding = names.get(name_table.LLM + "embed_tokens.weight")
    if canonical == name_table.HEAD and config.llm.tied and embedding is not None:
        same = np.array_equal(tensors[names[canonical]].get(), tensors[embedding].get())
        return None if same else f"{names[canonical]} differs from the embeddings although the config ties them"
    if canonical.startswith(name_table.PROJECTOR + "linear_2.") and config.projector == "linear":
        tensor = tensors[names[canonical]].get()
        same = np.array_equal(tensor, np.eye(config.llm.width) if tensor.ndim == 2 else np.zeros(config.llm.width))
        return None if same else f"{names[canonical]} is not the identity although the projector is linear"
    return ""


def _grouped(names: list[str]) -> list[str]:
    """Return the names with the layers of a stack folded: layers.{0,1,2}.mlp… instead of one entry each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.search(r"(?<=layers\.)\d+(?=\.)", name)
        key = name if match is None else name[: match.start()] + "\0" + name[match.end() :]
        groups.setdefault(key, []).extend([] if match is None else [match[0]])
    return [
        key.replace("\0", found[0] if len(found) == 1 else "{" + ",".join(found) + "}" if found else "")
        for key, found in groups.items()
    ]


def _extras(given: Mapping[str, Any], folder: str, where: str) -> LlavaExtras:
    """Read our key in config.json; a foreign folder has none and says it in its chat template and image settings.

    Where it does not, it gets LLaVA-1.5's template and CLIP's cropping. A foreign folder's images are turned upright as
    EXIF says; ours without `exif` is of a time when none was.
    """
    mine = given.get("llava_jax", {})
    ours = {key: value for key, value in mine.items() if key not in ("vocab_size", "tuned_tower")}
    tuned_tower = mine.get("tuned_tower", False)
    if not isinstance(tuned_tower, bool):
        raise InputError(f"{where}: llava_jax.tuned_tower is {tuned_tower!r:.80}; expected true or false")
    tiled = given["model_type"] == "llava_next"
    if is_original(given):
        tiled = given.get("image_aspect_ratio") == "anyres"
    allowed = {key: CHOICES[f"data.{key}"] for key in ("image_position", "exif")} | dict(template=(*TEMPLATES, OWN))
    allowed["aspect"] = tuple(aspect for aspect in CHOICES["data.aspect"] if (aspect == "anyres") == tiled)
    for key, value in ours.items():
        if value not in allowed.get(key, ()):
            raise InputError(
                f"{where}: llava_jax.{key} is {value!r:.80}; expected one of {', '.join(allowed.get(key, ()))}"
            )
    template = None if "template" in ours else recognised_template(folder)
    aspect = read_images(folder)
    said = {"aspect": "anyres" if tiled else aspect, "exif": "ignore" if ours else "apply"}
    said |= ({"template": template} if template else {}) | ours
    assumed = "template" not in said
    return LlavaExtras(**said, tokenizer=folder, template_assumed=assumed, vision=folder, tuned_tower=tuned_tower)


# ---- chat templates, recognised -------------------------------------------------------------------------------------

VICUNA = ("v1", "llava_v1")
_PROBE = (Turn("human", "<image>\nWhat is this?"), Turn("gpt", "A cat."), Turn("human", "Why?"))


def recognised_template(folder: str) -> str | None:
    """Return the first of our templates that the folder's chat template renders as, None without such one."""
    tokens, source = _chat_template(folder)
    if source is None:
        return None
    given = _rendered(source, tokens)
    for name, template in TEMPLATES.items():
        if not template.caption_only and _ours(template, tokens) in given:
            return name
    return None


def chat_template_note(folder: str, name: str) -> str | None:
    """Return a line when the tokenizer's chat template in `folder` writes prompts otherwise than `name` does.

    No error: a LLaVA learns the template it is trained with, and v1 on another base is common. None where both write
    the same, the folder brings no chat template, or `name` is for captions, which know no turns.
    """
    if name == OWN:
        return None
    template = find_template(name)
    tokens, source = _chat_template(folder)
    if source is None or template.caption_only:
        return None
    ours, given = _ours(template, tokens), _rendered(source, tokens)
    if ours in given:
        return None
    if not given:
        return f"template {name}: the chat template of {folder} does not render a question and cannot be compared"
    theirs = min(given, key=len)
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
    shown = [text[max(at - 10, 0) : at + 30] for text in (ours, theirs)]
    same = recognised_template(folder)
    take = f"; data.template={same} writes as it does" if same else ""
    return f"template {name} writes {shown[0]!r} where the chat template of {folder} writes {shown[1]!r}{take}"


def default_template(folder: str) -> str:
    """Return the template for a tokenizer where none is asked for: its own, if it has one that is not Vicuna's."""
    if load_tokenizer(folder).chat is None or recognised_template(folder) in VICUNA:
        return VICUNA[0]
    return OWN


def _ours(template: Template, tokens: dict[str, str]) -> str:
    """Return the probe as our template writes it."""
    spans = render(_PROBE, template, open_turn=True)
    spelled = {"<s>": tokens["bos_token"] or "<s>", "</s>": tokens["eos_token"] or "</s>"}
    return "".join(spelled.get(span.text, span.text) if span.special else span.text for span in spans)


def _chat_template(folder: str) -> tuple[dict[str, str], str | None]:
    """Return (bos_token and eos_token, Jinja text or None) of a folder."""
    named = special_tokens(folder)
    tokens = {key: named.get(key, "") for key in ("bos_token", "eos_token")}
    source, _ = folder_value(folder, "chat template")
    if isinstance(source, list):  # several under names, as tokenizers with tools have them
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    return tokens, source if isinstance(source, str) else None


def _rendered(source: str, tokens: dict[str, str]) -> set[str]:
    """Return the probe as the chat template writes it, content as text and as parts, with and without its own BOS."""
    names = {"human": "user", "gpt": "assistant"}
    renderings = []
    for as_parts in (False, True):
        messages = []
        for turn in _PROBE:
            text = turn.text.removeprefix("<image>\n")
            parts = [{"type": "image"}] * (text != turn.text) + [{"type": "text", "text": text}]
            messages.append({"role": names[turn.speaker], "content": parts if as_parts else turn.text})
        renderings.append({"messages": messages, "add_generation_prompt": True, **tokens})
    bos, found = tokens["bos_token"], set()
    for text in try_jinja(source, renderings):
        if text is not None:
            found |= {text, text.removeprefix(bos), text.removeprefix(bos).lstrip(" ")}
    return found
