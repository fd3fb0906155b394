"""Our parameter paths and Hugging Face's tensor names, once, for both directions.

Names are those of the published `LlavaForConditionalGeneration` folders (transformers 4.x and the hub; what 5.x saves
by default). Other spellings are brought to them by `canonical` before the table is looked at.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: `ours` is its path, `hf` the tensor's name with {} for the layer when ours is stacked.

    in_dims  how our layout becomes theirs: n ≥ 1 means a Linear kernel whose first n axes are inputs (theirs is
             [out, in]), 0 a bias that is one flat vector there, None the same axes on both sides
    perm     their axes in our order, where only the order differs (patch kernel)
    """

    ours: str
    hf: str
    in_dims: int | None = None
    perm: tuple[int, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf


class Stored(NamedTuple):
    """A tensor in a file: shape, safetensors' name of its dtype, and values, read-only and maybe in its pages."""

    shape: tuple[int, ...]
    dtype: str
    get: Callable[[], np.ndarray]


VISION = "vision_tower.vision_model."
BLOCK = VISION + "encoder.layers.{}."
PROJECTOR = "multi_modal_projector."
NEWLINE = "image_newline"
LLM = "language_model.model."
LAYER = LLM + "layers.{}."
HEAD = "language_model.lm_head.weight"


def _linear(ours: str, hf: str, in_dims: int = 1) -> tuple[Row, Row]:
    return Row(ours + "/kernel", hf + ".weight", in_dims), Row(ours + "/bias", hf + ".bias", 0)


def _norm(ours: str, hf: str) -> tuple[Row, Row]:
    return Row(ours + "/scale", hf + ".weight"), Row(ours + "/bias", hf + ".bias")


TABLE: tuple[Row, ...] = (
    Row("vision/patch/kernel", VISION + "embeddings.patch_embedding.weight", perm=(2, 3, 1, 0)),
    Row("vision/patch/bias", VISION + "embeddings.patch_embedding.bias"),
    Row("vision/class_embedding", VISION + "embeddings.class_embedding"),
    Row("vision/position", VISION + "embeddings.position_embedding.weight"),
    *_norm("vision/pre_norm", VISION + "pre_layrnorm"),
    *_norm("vision/layers/norm1", BLOCK + "layer_norm1"),
    *_norm("vision/layers/norm2", BLOCK + "layer_norm2"),
    *_linear("vision/layers/attn/q", BLOCK + "self_attn.q_proj"),
    *_linear("vision/layers/attn/k", BLOCK + "self_attn.k_proj"),
    *_linear("vision/layers/attn/v", BLOCK + "self_attn.v_proj"),
    *_linear("vision/layers/attn/o", BLOCK + "self_attn.out_proj", in_dims=2),
    *_linear("vision/layers/mlp/up", BLOCK + "mlp.fc1"),
    *_linear("vision/layers/mlp/down", BLOCK + "mlp.fc2"),
    *_linear("projector/linear_1", PROJECTOR + "linear_1"),
    *_linear("projector/linear_2", PROJECTOR + "linear_2"),
    Row("projector/image_newline", NEWLINE),
    Row("llm/embed/table", LLM + "embed_tokens.weight"),
    Row("llm/layers/attn_norm/scale", LAYER + "input_layernorm.weight"),
    Row("llm/layers/mlp_norm/scale", LAYER + "post_attention_layernorm.weight"),
    *_linear("llm/layers/attn/q", LAYER + "self_attn.q_proj"),
    *_linear("llm/layers/attn/k", LAYER + "self_attn.k_proj"),
    *_linear("llm/layers/attn/v", LAYER + "self_attn.v_proj"),
    *_linear("llm/layers/attn/o", LAYER + "self_attn.o_proj", in_dims=2),
    Row("llm/layers/attn/q_norm/scale", LAYER + "self_attn.q_norm.weight"),
    Row("llm/layers/attn/k_norm/scale", LAYER + "self_attn.k_norm.weight"),
    *_linear("llm/layers/mlp/gate", LAYER + "mlp.gate_proj"),
    *_linear("llm/layers/mlp/up", LAYER + "mlp.up_proj"),
    *_linear("llm/layers/mlp/down", LAYER + "mlp.down_proj"),
    Row("llm/norm/scale", LLM + "norm.weight"),
    Row("llm/head/kernel", HEAD, 1),
)
ROWS = {row.ours: row for row in TABLE}

# How other folders spell the same tensors; the first pattern that matches is applied, once.
_CLIP = (
    (r"^(?:vision_tower\.)?vision_model\.", VISION),
    (r"^(?=embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.|head\.)", VISION),
)
_LLAMA = (
    (r"^model\.", LLM),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(?=layers\.|embed_tokens\.|norm\.)", LLM),
)
_PROJECTOR = (
    (r"^(?:model\.)?multi_modal_projector\.", PROJECTOR),
    (r"^(?:model\.)?(?:mm_projector\.)?0\.", PROJECTOR + "linear_1."),
    (r"^(?:model\.)?(?:mm_projector\.)?2\.", PROJECTOR + "linear_2."),
    (r"^(?:model\.)?mm_projector\.(?=weight|bias)", PROJECTOR + "linear_1."),
    (r"^(?=linear_[12]\.)", PROJECTOR),
    (r"^model\.(?=image_newline$)", ""),
)
_LLAVA = (
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", VISION),
    (r"^(?:model\.)?multi_modal_projector\.", PROJECTOR),
    (r"^model\.language_model\.", LLM),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=image_newline$)", ""),
)
# The original code's folder, joined by the tensors of the CLIP folder it names.
_ORIGINAL = (
    (r"^(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", VISION),
    (r"^(?:model\.)?mm_projector\.0\.", PROJECTOR + "linear_1."),
    (r"^(?:model\.)?mm_projector\.2\.", PROJECTOR + "linear_2."),
    (r"^(?:model\.)?mm_projector\.(?=weight|bias)", PROJECTOR + "linear_1."),
    (r"^model\.image_newline$", "image_newline"),
    *_CLIP,
    *_LLAMA,
)
ALIASES = {"clip": _CLIP, "llama": _LLAMA, "projector": _PROJECTOR, "llava": _LLAVA, "original": _ORIGINAL}

# Tensors that may be present and are not used: buffers, and what of CLIP and SigLIP lies beyond the image features.
_BEYOND = r"\.position_ids$|\.post_layernorm\.|vision_model\.head\."
_TEXT_TOWER = r"|^text_model\.|^(?:text|visual)_projection\.|^logit_(?:scale|bias)$"
_UNUSED = {
    "clip": _BEYOND + _TEXT_TOWER,
    "llama": r"\.rotary_emb\.inv_freq$",
    "projector": r"$.",
    "llava": _BEYOND + r"|\.rotary_emb\.inv_freq$",
    "original": _BEYOND + _TEXT_TOWER + r"|\.rotary_emb\.inv_freq$",
}


def without_peft(name: str) -> str:
    """Return the name without what peft puts in front of a model's tensors."""
    return re.sub(r"^base_model\.(?:model\.)?|\.modules_to_save\.default(?=\.)", "", name)


def canonical(name: str, kind: str) -> str:
    """Return the table's spelling of a tensor name found in a folder of `kind`, one of ALIASES."""
    name = without_peft(name)
    for pattern, replacement in ALIASES[kind]:
        renamed, hits = re.subn(pattern, replacement, name, count=1)
        if hits:
            return renamed
    return name


def unused(name: str, kind: str, vision_layers: int) -> bool:
    """Return whether a tensor (canonical name) is known and deliberately not held; CLIP blocks ≥ vision_layers are."""
    block = re.match(re.escape(VISION) + r"encoder\.layers\.(\d+)\.", name)
    return bool(re.search(_UNUSED[kind], name)) or (block is not None and int(block[1]) >= vision_layers)


def hf_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return their shape of one layer's tensor, given ours (without the leading L)."""
    if row.perm:
        return tuple(shape[row.perm.index(axis)] for axis in range(len(shape)))
    if row.in_dims is None:
        return shape
    if row.in_dims == 0:
        return (math.prod(shape),)
    return math.prod(shape[row.in_dims :]), math.prod(shape[: row.in_dims])


def to_ours(row: Row, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return their tensor in our layout; `shape` is ours without the leading L."""
    return tensor.transpose(row.perm) if row.perm else tensor.T.reshape(shape) if row.in_dims else tensor.reshape(shape)


def to_hf(row: Row, array: np.ndarray) -> np.ndarray:
    """Return our array (one layer) in their layout, contiguous."""
    if row.perm:
        array = array.transpose(np.argsort(row.perm))
    elif row.in_dims is not None:
        array = array.reshape(math.prod(array.shape[: row.in_dims]), -1).T if row.in_dims else array.reshape(-1)
    return np.ascontiguousarray(array)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a/b": leaf} of a nested dict, in its order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of slash-joined paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree
