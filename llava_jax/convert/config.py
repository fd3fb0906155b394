"""Hugging Face's config.json and our configs, both ways; defaults of the published classes fill what is left out."""

import json
import os
from collections.abc import Mapping
from typing import Any

from llava_jax.types import ClipConfig, InputError, LlamaConfig, ModelConfig, RopeConfig

Json = dict[str, Any]

# What CLIPVisionConfig, LlamaConfig and LlavaConfig of transformers fall back to.
_CLIP_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
_LLAMA_DEFAULTS = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)
_LLAVA_VISION = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
_PROJECTORS = {"gelu": "mlp2x_gelu", "linear": "linear"}


def read_json(path: str) -> Json:
    """The JSON object in a file; InputError names the file when it is missing, broken or no object."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a Hugging Face JSON file") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); copy it again from where the model came from") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(folder: str, expected: str) -> Json:
    """config.json of a model folder; `expected` says in words what the folder should have been."""
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; expected {expected}")
    if not os.path.isfile(path):
        raise InputError(f"{folder}: has no config.json; expected {expected}")
    return read_json(path)


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of the original LLaVA code, whose keys for pictures no other has."""
    return "mm_vision_tower" in config or "mm_projector_type" in config


# ---- theirs to ours ---------------------------------------------------------------------------------------------


def _int(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {key} is {value!r}; expected a whole number of at least 1")
    return value


def _number(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InputError(f"{where}: {key} is {value!r}; expected a number above 0")
    return float(value)


def _choice(values: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> Any:
    value = values.get(key)
    if not any(value == option and type(value) is type(option) for option in allowed):
        names = ", ".join(repr(option) for option in allowed)
        raise InputError(f"{where}: {key} is {value!r}, which is not supported; expected one of {names}")
    return value


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Json:
    return {**defaults, **{key: value for key, value in values.items() if value is not None}}


def clip_config(config: Mapping[str, Any], where: str) -> ClipConfig:
    """ClipConfig from a CLIPConfig (vision_config inside) or CLIPVisionConfig dict; `where` starts the errors."""
    if config.get("model_type") == "clip":
        config = {"model_type": "clip_vision_model", **(config.get("vision_config") or {})}
    _choice(config, "model_type", ("clip_vision_model",), where)
    values = _filled(config, _CLIP_DEFAULTS)
    _choice(values, "num_channels", (3,), where)
    result = ClipConfig(
        width=_int(values, "hidden_size", where),
        mlp_width=_int(values, "intermediate_size", where),
        layers=_int(values, "num_hidden_layers", where),
        heads=_int(values, "num_attention_heads", where),
        image_size=_int(values, "image_size", where),
        patch_size=_int(values, "patch_size", where),
        activation=_choice(values, "hidden_act", ("quick_gelu", "gelu"), where),
        norm_eps=_number(values, "layer_norm_eps", where),
    )
    if result.width % result.heads:
        raise InputError(f"{where}: hidden_size {result.width} is not a multiple of {result.heads} attention heads")
    if result.image_size % result.patch_size:
        raise InputError(f"{where}: image_size {result.image_size} is not a multiple of patch {result.patch_size}")
    return result


def _rope(values: Mapping[str, Any], max_positions: int, where: str) -> RopeConfig:
    """Both spellings: rope_parameters (transformers 5) and rope_theta with rope_scaling (4)."""
    rope = values.get("rope_parameters") or {}
    scaling = rope or values.get("rope_scaling") or {}
    for key, given in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise InputError(f"{where}: {key} is {given!r}; expected one flat object (no rope per kind of layer)")
    partial = scaling.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InputError(f"{where}: partial_rotary_factor {partial!r} is not supported; expected 1")
    merged = {"rope_theta": values["rope_theta"], **{k: v for k, v in scaling.items() if v is not None}}
    merged["rope_type"] = merged.get("rope_type", merged.get("type", "default"))
    kind = _choice(merged, "rope_type", ("default", "linear", "llama3"), where)
    theta = _number(merged, "rope_theta", where)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = _number(merged, "factor", where)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    merged.setdefault("original_max_position_embeddings", max_positions)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=_number(merged, "low_freq_factor", where),
        high_freq_factor=_number(merged, "high_freq_factor", where),
        original_max_positions=_int(merged, "original_max_position_embeddings", where),
    )


def llama_config(config: Mapping[str, Any], where: str) -> LlamaConfig:
    """LlamaConfig from a LlamaForCausalLM config (or LLaVA's text_config); `where` starts the errors."""
    _choice(config, "model_type", ("llama",), where)
    values = _filled(config, _LLAMA_DEFAULTS)
    _choice(values, "hidden_act", ("silu",), where)
    width, heads = _int(values, "hidden_size", where), _int(values, "num_attention_heads", where)
    values = _filled(values, dict(num_key_value_heads=heads, head_dim=width // heads))
    kv_heads, max_positions = _int(values, "num_key_value_heads", where), _int(values, "max_position_embeddings", where)
    if heads % kv_heads:
        raise InputError(f"{where}: {heads} attention heads are not a multiple of {kv_heads} key-value heads")
    return LlamaConfig(
        vocab_size=_int(values, "vocab_size", where),
        width=width,
        mlp_width=_int(values, "intermediate_size", where),
        layers=_int(values, "num_hidden_layers", where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_int(values, "head_dim", where),
        max_positions=max_positions,
        norm_eps=_number(values, "rms_norm_eps", where),
        rope=_rope(values, max_positions, where),
        tied=_choice(values, "tie_word_embeddings", (True, False), where),
        attention_bias=_choice(values, "attention_bias", (True, False), where),
        mlp_bias=_choice(values, "mlp_bias", (True, False), where),
    )


def llava_config(config: Mapping[str, Any], where: str, dtype: str = "float32") -> ModelConfig:
    """ModelConfig from a LlavaForConditionalGeneration config; `dtype` is the compute dtype ours will run in."""
    _choice(config, "model_type", ("llava",), where)
    values = _filled(
        config,
        dict(
            image_token_index=config.get("image_token_id", 32000),
            projector_hidden_act="gelu",
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
            multimodal_projector_bias=True,
        ),
    )
    _choice(values, "vision_feature_select_strategy", ("default",), where)
    _choice(values, "multimodal_projector_bias", (True,), where)
    activation = _choice(values, "projector_hidden_act", tuple(_PROJECTORS), where)
    vision = clip_config(_filled(config.get("vision_config") or {}, _vision_defaults(config)), where + " vision_config")
    text = _filled(config.get("text_config") or {}, dict(model_type="llama"))
    if config.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    result = ModelConfig(
        vision=vision,
        llm=llama_config(text, where + " text_config"),
        projector=_PROJECTORS[activation],
        feature_layer=values["vision_feature_layer"],
        image_token_id=values["image_token_index"],
        dtype=dtype,
    )
    check_feature_layer(result.feature_layer, vision, where)
    if isinstance(result.image_token_id, bool) or not isinstance(result.image_token_id, int):
        raise InputError(f"{where}: image_token_index is {result.image_token_id!r}; expected a token id")
    return result


def _vision_defaults(config: Mapping[str, Any]) -> Json:
    """LlavaConfig's own vision defaults count only when vision_config is left out altogether."""
    return dict(model_type="clip_vision_model") if config.get("vision_config") else _LLAVA_VISION


def check_feature_layer(layer: Any, vision: ClipConfig, where: str) -> None:
    """The feature layer is one index into the layers+1 hidden states, past the embeddings."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(f"{where}: vision feature layer is {layer!r}; expected one whole number such as -2")
    held = layer + vision.layers + 1 if layer < 0 else layer
    if not 1 <= held <= vision.layers:
        raise InputError(f"{where}: vision feature layer {layer} is outside the {vision.layers} layers of the tower")


# ---- ours to theirs ---------------------------------------------------------------------------------------------


def clip_json(config: ClipConfig) -> Json:
    """CLIPVisionConfig's JSON."""
    return dict(
        model_type="clip_vision_model",
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_channels=3,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        layer_norm_eps=config.norm_eps,
    )


def llama_json(config: LlamaConfig) -> Json:
    """LlamaConfig's JSON with both rope spellings, so that 4.x and 5.x rotate by the same angles."""
    rope = config.rope
    scaling: Json = {} if rope.kind == "default" else dict(rope_type=rope.kind, factor=rope.factor)
    if rope.kind == "llama3":
        scaling |= dict(
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position_embeddings=rope.original_max_positions,
        )
    return dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        hidden_act="silu",
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_theta=rope.theta,
        rope_scaling=scaling or None,
        rope_parameters=dict(rope_type=rope.kind, rope_theta=rope.theta) | scaling,
        tie_word_embeddings=config.tied,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def llava_json(config: ModelConfig, *, dtype: str, pad_id: int, bos_id: int | None, eos_id: int | list[int]) -> Json:
    """LlavaForConditionalGeneration's JSON, readable by transformers 4.46 and 5 and by servers."""
    tokens = dict(pad_token_id=pad_id, bos_token_id=bos_id, eos_token_id=eos_id)
    dtypes = dict(dtype=dtype, torch_dtype=dtype)
    return dict(
        architectures=["LlavaForConditionalGeneration"],
        model_type="llava",
        ignore_index=-100,
        image_token_index=config.image_token_id,
        image_seq_length=config.vision.patches,
        projector_hidden_act={ours: theirs for theirs, ours in _PROJECTORS.items()}[config.projector],
        multimodal_projector_bias=True,
        vision_feature_layer=config.feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=config.llm.tied,
        vocab_size=config.llm.vocab_size,
        vision_config=clip_json(config.vision) | dtypes,
        text_config=llama_json(config.llm) | tokens | dtypes,
        **tokens,
        **dtypes,
    )
