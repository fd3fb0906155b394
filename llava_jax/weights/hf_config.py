"""Hugging Face's config.json and our configs, both ways; defaults of the published classes fill what is left out."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llava_jax import io
from llava_jax.types import ClipConfig, InputError, LlamaConfig, ModelConfig, Pixels, RopeConfig
from llava_jax.weights.families import DECODERS, FIXED, FOREIGN, ROPE_KEYS, TOWERS

Json = dict[str, Any]

# Their names of sizes, and ours.
_SIZES = {
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
_CLIP_SIZES = _SIZES | {"image_size": "image_size", "patch_size": "patch_size"}
_LLAMA_SIZES = {"vocab_size": "vocab_size"} | _SIZES
_LLAMA_SIZES |= {"num_key_value_heads": "kv_heads", "head_dim": "head_dim", "max_position_embeddings": "max_positions"}
# What LlavaConfig of transformers falls back to; families.py has the towers' and the decoders'.
_LLAVA_VISION = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
# Rows and columns of LLaVA-NeXT's grids, and what LlavaNextConfig falls back to.
_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_LLAVA_NEXT_PINPOINTS = [[336 * rows, 336 * columns] for rows, columns in _GRIDS]
_PROJECTORS = {"gelu": "mlp2x_gelu", "linear": "linear"}
_WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
# Images for SigLIP, where the folder does not say otherwise.
SIGLIP_PIXELS = Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def read_config(folder: str, expected: str) -> Json:
    """Read config.json of a model folder; `expected` says in words what the folder should have been."""
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; expected {expected}")
    if not os.path.isfile(path):
        raise InputError(f"{folder}: has no config.json; expected {expected}")
    return read_json(path)


# ---- theirs to ours ----


def _int(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {key} is {value!r:.80}; expected a whole number of at least 1")
    return value


def _number(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InputError(f"{where}: {key} is {value!r:.80}; expected a number above 0")
    return float(value)


def _choice(values: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> Any:
    value = values.get(key)
    if not any(value == option and type(value) is type(option) for option in allowed):
        given = f"{key} is {repr(value)[:80]}, which is not supported"
        names = " or ".join("it to be absent" if option is None else repr(option) for option in allowed)
        raise InputError(f"{where}: {given}; expected {names}")
    return value


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Json:
    return {**defaults, **{key: value for key, value in values.items() if value is not None}}


def clip_config(config: Mapping[str, Any], where: str) -> ClipConfig:
    """Return ClipConfig of a CLIP or SigLIP config dict, the whole one or the vision part; `where` starts the errors.

    SigLIP2 of a fixed resolution is published as SigLIP; `siglip2` (NaFlex, any resolution) is refused.
    """
    if config.get("model_type") in _WHOLE:
        config = {"model_type": _WHOLE[config["model_type"]], **(config.get("vision_config") or {})}
    family = _choice(config, "model_type", tuple(TOWERS), where).removesuffix("_vision_model")
    values = _filled(config, TOWERS[config["model_type"]])
    _choice(values, "num_channels", (3,), where)
    sizes: Json = {ours: _int(values, theirs, where) for theirs, ours in _CLIP_SIZES.items()}
    result = ClipConfig(
        **sizes,
        activation=_choice(values, "hidden_act", _ACTIVATIONS, where),
        norm_eps=_number(values, "layer_norm_eps", where),
        family=family,
        pooling_head=family == "siglip" and _choice(values, "vision_use_head", (True, False), where),
        pixels=SIGLIP_PIXELS if family == "siglip" else Pixels(),
    )
    if result.width % result.heads:
        raise InputError(f"{where}: hidden_size {result.width} is not a multiple of {result.heads} attention heads")
    if (result.image_size % result.patch_size and family == "clip") or result.image_size < result.patch_size:
        raise InputError(f"{where}: image_size {result.image_size} is not a multiple of patch {result.patch_size}")
    return result


def _rope(values: Mapping[str, Any], max_positions: int, where: str) -> RopeConfig:
    """Read both spellings: rope_parameters (transformers 5) and rope_theta with rope_scaling (4)."""
    scaling = config_value(values, "rope") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise InputError(f"{where}: rope is {scaling!r:.80}; expected one flat object (no rope per kind of layer)")
    partial = scaling.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InputError(f"{where}: partial_rotary_factor {partial!r:.80} is not supported; expected 1")
    merged = {"rope_theta": values["rope_theta"], **{k: v for k, v in scaling.items() if v is not None}}
    merged["rope_type"] = merged.get("rope_type", merged.get("type", "default"))
    kind = _choice(merged, "rope_type", ("default", "linear", "llama3"), where)
    unknown = sorted(set(merged) - ROPE_KEYS)
    if unknown:
        raise InputError(f"{where}: {', '.join(unknown)} of a {kind} rope is not supported; expected it to be absent")
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
    """Return LlamaConfig of a decoder's config dict (or LLaVA's text_config), of a family in families.py.

    `where` starts the errors; what a family knows and ours does not is refused by name.
    """
    family = _choice(config, "model_type", tuple(DECODERS), where)
    for key, allowed in (FOREIGN | FIXED[family]).items():
        _choice({key: None, **config}, key, allowed, where)
    values = _filled(config, DECODERS[family])
    _choice(values, "hidden_act", ("silu",), where)
    width, heads = _int(values, "hidden_size", where), _int(values, "num_attention_heads", where)
    values = _filled(values, dict(num_key_value_heads=heads, head_dim=width // heads))
    if config.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = heads
    sizes: Json = {ours: _int(values, theirs, where) for theirs, ours in _LLAMA_SIZES.items()}
    if heads % sizes["kv_heads"]:
        raise InputError(f"{where}: {heads} attention heads are not a multiple of {sizes['kv_heads']} key-value heads")
    return LlamaConfig(
        **sizes,
        norm_eps=_number(values, "rms_norm_eps", where),
        rope=_rope(values, sizes["max_positions"], where),
        tied=_choice(values, "tie_word_embeddings", (True, False), where),
        attention_bias=_choice(values, "attention_bias", (True, False), where),
        mlp_bias=_choice(values, "mlp_bias", (True, False), where),
        family=family,
        window=_window(config, family, sizes["layers"], where),
    )


def _window(config: Mapping[str, Any], family: str, layers: int, where: str) -> int:
    """Return how many positions a position sees in every layer, 0 for all.

    A null in the file is a choice here: Mistral's class has a window, later checkpoints of it none. Raises InputError
    for a window in some of the layers.
    """
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        raise InputError(
            f"{where}: layer_types has {sorted(set(kinds))}, which is not supported; expected full_attention"
        )
    if family == "mistral":
        given = {"sliding_window": 4096, **config}
        return 0 if given["sliding_window"] is None else _int(given, "sliding_window", where)
    if config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None:
        first = config.get("max_window_layers", DECODERS["qwen2"]["max_window_layers"])
        if kinds is None and first < layers:
            raise InputError(
                f"{where}: use_sliding_window with max_window_layers {first} of {layers} layers is not supported; "
                "expected false (a window in none of the layers)"
            )
    return 0


def llava_config(config: Mapping[str, Any], where: str, dtype: str = "float32") -> ModelConfig:
    """Return ModelConfig from a LlavaForConditionalGeneration config; `dtype` is the compute dtype ours will run in."""
    _choice(config, "model_type", ("llava", "llava_next"), where)
    _choice(config, "quantization_config", (None,), where)
    neutral = dict(vision_feature_select_strategy="default", multimodal_projector_bias=True)
    values = _filled(config, neutral | dict(projector_hidden_act="gelu"))
    _choice(values, "multimodal_projector_bias", (True,), where)
    activation = _choice(values, "projector_hidden_act", tuple(_PROJECTORS), where)
    # LlavaConfig's own vision defaults count only when vision_config is left out altogether.
    tower = _filled(config.get("vision_config") or _LLAVA_VISION, dict(model_type="clip_vision_model"))
    vision = clip_config(tower, where + " vision_config")
    _choice(values, "vision_feature_select_strategy", (select_strategy(vision),), where)
    text = {"model_type": "llama", **(config.get("text_config") or {})}
    if config_value(config, "tied embeddings"):
        text["tie_word_embeddings"] = True
    image_token, grids = config_value(config, "image token"), ()
    if config["model_type"] == "llava_next":
        _choice({"use_image_newline_parameter": True, **config}, "use_image_newline_parameter", (True,), where)
        given = config.get("image_grid_pinpoints")
        grids = pinpoints(_LLAVA_NEXT_PINPOINTS if given is None else given, vision, where)
    result = ModelConfig(
        vision=vision,
        llm=llama_config(text, where + " text_config"),
        projector=_PROJECTORS[activation],
        feature_layer=feature_layer(config.get("vision_feature_layer"), vision, where),
        image_token_id=32000 if image_token is None else image_token,
        dtype=dtype,
        pinpoints=grids,
    )
    if isinstance(result.image_token_id, bool) or not isinstance(result.image_token_id, int):
        raise InputError(
            f"{where}: the image token (image_token_id or image_token_index) is {image_token!r:.80}; expected an id"
        )
    return result


def default_pinpoints(vision: ClipConfig) -> tuple[tuple[int, int], ...]:
    """Return LLaVA-NeXT's (height, width): two tiles, four or three, for towers of any size."""
    return tuple((rows * vision.image_size, columns * vision.image_size) for rows, columns in _GRIDS)


def pinpoints(given: Any, vision: ClipConfig, where: str) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) of an image_grid_pinpoints, whole tiles each."""
    size = vision.image_size
    pairs = isinstance(given, list) and given and all(isinstance(pair, list) and len(pair) == 2 for pair in given)
    if not pairs or not all(isinstance(side, int) and side > 0 and side % size == 0 for pair in given for side in pair):
        raise InputError(
            f"{where}: image_grid_pinpoints is {given!r:.80}; expected a list of [height, width], each a "
            f"multiple of the vision tower's {size} pixels"
        )
    return tuple((height, width) for height, width in given)


def with_grids(config: ModelConfig, folder: str) -> ModelConfig:
    """Return a LLaVA-NeXT with the grids that its folder states, in whichever file; other models as they are."""
    given, path = folder_value(folder, "image grids")
    if not config.pinpoints or given is None:
        return config
    return dataclasses.replace(config, pinpoints=pinpoints(given, config.vision, path))


def select_strategy(vision: ClipConfig) -> str:
    """Return LLaVA's vision_feature_select_strategy that leaves the patches: default drops the class token."""
    return "default" if vision.class_tokens else "full"


def feature_layer(given: Any, vision: ClipConfig, where: str) -> int:
    """Return the feature layer of a config, a number or a list with one; -2 where there is none."""
    layer = given[0] if isinstance(given, list) and len(given) == 1 else -2 if given is None else given
    check_feature_layer(layer, vision, where)
    return layer


def check_feature_layer(layer: Any, vision: ClipConfig, where: str) -> None:
    """Raise InputError unless `layer` is one index into the layers+1 hidden states, past the embeddings."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(f"{where}: vision feature layer is {layer!r:.80}; expected one whole number such as -2")
    held = layer + vision.layers + 1 if layer < 0 else layer
    if not 1 <= held <= vision.layers:
        raise InputError(f"{where}: vision feature layer {layer} is outside the {vision.layers} layers of the tower")


# ---- ours to theirs ----


def clip_json(config: ClipConfig) -> Json:
    """Return CLIPVisionConfig's or SiglipVisionConfig's JSON."""
    head = dict(vision_use_head=config.pooling_head) if config.family == "siglip" else {}
    return dict(
        model_type=config.family + "_vision_model",
        **{theirs: getattr(config, ours) for theirs, ours in _CLIP_SIZES.items()},
        num_channels=3,
        hidden_act=config.activation,
        layer_norm_eps=config.norm_eps,
        **head,
    )


def llama_json(config: LlamaConfig) -> Json:
    """Return the decoder's JSON with both rope spellings, so that 4.x and 5.x rotate by the same angles."""
    rope = config.rope
    scaling: Json = {} if rope.kind == "default" else dict(rope_type=rope.kind, factor=rope.factor)
    if rope.kind == "llama3":
        scaling |= dict(
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position_embeddings=rope.original_max_positions,
        )
    more: Json = dict(attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    if config.family == "mistral":
        more = dict(sliding_window=config.window or None)
    elif config.family != "llama":
        more = dict(use_sliding_window=False, sliding_window=None, max_window_layers=config.layers)
        more |= dict(attention_bias=config.attention_bias) if config.family == "qwen3" else {}
    return dict(
        model_type=config.family,
        architectures=[f"{config.family.capitalize()}ForCausalLM"],
        **{theirs: getattr(config, ours) for theirs, ours in _LLAMA_SIZES.items()},
        hidden_act="silu",
        rms_norm_eps=config.norm_eps,
        rope_theta=rope.theta,
        rope_scaling=scaling or None,
        rope_parameters=dict(rope_type=rope.kind, rope_theta=rope.theta) | scaling,
        tie_word_embeddings=config.tied,
        **more,
    )


def llava_json(config: ModelConfig, *, dtype: str, pad_id: int, bos_id: int | None, eos_id: int | list[int]) -> Json:
    """Return LlavaForConditionalGeneration's JSON, or LlavaNext's where the config has pinpoints.

    Readable by transformers 4.46 and 5 and by servers.
    """
    tokens = dict(pad_token_id=pad_id, bos_token_id=bos_id, eos_token_id=eos_id)
    dtypes = dict(dtype=dtype, torch_dtype=dtype)
    kind: Json = dict(architectures=["LlavaForConditionalGeneration"], model_type="llava")
    if config.pinpoints:
        kind = dict(
            architectures=["LlavaNextForConditionalGeneration"],
            model_type="llava_next",
            image_grid_pinpoints=[list(pinpoint) for pinpoint in config.pinpoints],
            use_image_newline_parameter=True,
        )
    return dict(
        **kind,
        ignore_index=-100,
        image_token_index=config.image_token_id,
        image_token_id=config.image_token_id,
        image_seq_length=config.vision.patches,
        projector_hidden_act={ours: theirs for theirs, ours in _PROJECTORS.items()}[config.projector],
        multimodal_projector_bias=True,
        vision_feature_layer=config.feature_layer,
        vision_feature_select_strategy=select_strategy(config.vision),
        tie_word_embeddings=config.llm.tied,
        vocab_size=config.llm.vocab_size,
        vision_config=clip_json(config.vision) | dtypes,
        text_config=llama_json(config.llm) | tokens | dtypes,
        **tokens,
        **dtypes,
    )


# ---- facts that a folder states twice ----


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
    with in_form(folder, "special tokens"):
        for _, tokens in _stated(folder, _special_fact(folder)):
            found = tokens | found
    return found


def contradictions(folder: str) -> list[str]:
    """Return one line for each fact that two places of the folder state differently, with the place that counts."""
    unused = {"special tokens", "special tokens next to added_tokens_decoder"} - {_special_fact(folder)}
    lines = []
    for fact in PLACES.keys() - unused:
        with in_form(folder, fact):
            stated = [(place, _comparable(fact, value)) for place, value in _stated(folder, fact)]
            taken, said = next((each for each in stated if _says(each[1])), ("", None))
            others = ((place, _difference(said, value)) for place, value in stated if taken)
            place, difference = next((each for each in others if each[1]), ("", None))
        if difference:
            lines.append(f"{folder}: {fact}: {taken} says {difference[0]} and {place} {difference[1]}; {taken} counts")
    return sorted(lines)


def read_json(path: str) -> dict[str, Any]:
    """Return the JSON object in a file, with or without a byte order mark.

    Raises InputError, which names the file, when it is missing, a git-lfs pointer, broken or no object.
    """
    if os.path.isfile(path):
        io.check_small(path)
    value = io.read_json(path, "a Hugging Face JSON file: copy it again from where it came from")
    with io.opened(path) as file:
        if io.LONE.search(file.read()):  # or the text of an escape
            io.check_unicode(json.dumps(value, ensure_ascii=False), path, fix="copy it again")
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(folder: str, name: str, value: Mapping[str, Any]) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)


@contextlib.contextmanager
def in_form(where: str, what: str) -> Iterator[None]:
    """Raise InputError in place of what reading JSON raises that has a list for an object, or the like."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {what}: in a form that is not read ({error!r:.200}); copy it again") from error


def _says(value: Any) -> bool:
    return value is not None and value is not False and value != {} and value != ""


def _special_fact(folder: str) -> str:
    """Return the name under which PLACES lists the folder's special tokens.

    With added_tokens_decoder, transformers 5 reads tokenizer_config.json alone; without, the older file first.
    """
    path = os.path.join(folder, "tokenizer_config.json")
    decoder = os.path.isfile(path) and "added_tokens_decoder" in read_json(path)
    return "special tokens next to added_tokens_decoder" if decoder else "special tokens"


def _stated(folder: str, fact: str) -> list[tuple[str, Any]]:
    """Return the places that hold the fact, in the table's order, with what they hold."""
    found = []
    for place in PLACES[fact]:
        name, _, keys = place.partition(" ")
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        if fact.startswith("weights"):
            value = name
        elif name.endswith(".jinja"):
            io.check_small(path)
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


# ---- what contradicts what ----


def _comparable(fact: str, value: Any) -> Any:
    """Return a statement in the spelling that all places of its fact are brought to."""
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
    """Return a size by the names of its sides; older files give the shortest as a number."""
    return {"shortest_edge": size, "height": size, "width": size} if isinstance(size, int) else size


def _added(value: Any) -> dict[str, dict[str, Any]]:
    """Return {text: its id and flags} of any of the three files that list added tokens."""
    if isinstance(value, list):
        return {token["content"]: token for token in value}
    if all(isinstance(each, int) for each in value.values()):
        return {text: {"id": number} for text, number in value.items()}
    return {token["content"]: token | {"id": int(number)} for number, token in value.items()}


def _difference(one: Any, other: Any) -> tuple[str, str] | None:
    """Return what each says where the two exclude each other; of two lists of ends one may hold more."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() & other.keys()):
            found = _difference(one[key], other[key])
            if found:
                return f"{key} {found[0]}", f"{key} {found[1]}"
        return None
    if isinstance(one, set) and isinstance(other, set) and (one <= other or other <= one):
        return None
    return None if one == other else (repr(one)[:60], repr(other)[:60])


# ---- image settings ----

# PIL's numbers, as image processors write them.
RESAMPLE = {"bilinear": 2, "bicubic": 3}


def read_images(folder: str) -> str:
    """Return `pad`, `crop` or `squash`, as the folder's image settings say (crop where there are none)."""
    given = folder_value(folder, "image settings")[0] or {}
    squashed = "height" in _by_side(given.get("size")) and not given.get("do_center_crop")
    return "pad" if given.get("do_pad") else "squash" if squashed else "crop"


def _by_side(size: Any) -> Json:
    """Return a size of an image processor by the names of its sides; older ones give the shortest as a number."""
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    return {side: pixels for side, pixels in size.items() if pixels is not None}


def _check_square(given: Json, path: str, size: int) -> None:
    """Raise InputError unless images end as squares of the tower's `size`, and are resized to nothing else before."""
    sides = _by_side(given.get("size"))
    keys = ("size",) if given.get("do_center_crop") is False else ("size", "crop_size")
    for key in keys:
        if {*_by_side(given.get(key)).values()} - {size}:
            raise InputError(
                f"{path}: {key} is {given[key]}, which is not supported; expected {size}, the tower's image_size"
            )
    if given.get("do_center_crop") is False and not given.get("do_pad") and sides and "height" not in sides:
        raise InputError(
            f"{path}: do_center_crop is false and size {given['size']} is no square; expected height and width, or true"
        )


def with_pixels(vision: ClipConfig, folder: str) -> ClipConfig:
    """Return the tower with the folder's normalisation and resizing. Raises InputError for what ours cannot do."""
    said, path = folder_value(folder, "image settings")
    given = said or {}
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(key) is False:
            raise InputError(f"{path}: {key} is false, which is not supported; expected true")
    if not np.isclose(given.get("rescale_factor") or 1 / 255, 1 / 255, rtol=1e-6, atol=0):
        raise InputError(f"{path}: rescale_factor is {given['rescale_factor']}, not supported; expected 1/255")
    _check_square(given, path, vision.image_size)
    values: dict[str, Any] = {}
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        numbers = given.get(key)
        if numbers is not None:
            if not isinstance(numbers, list) or len(numbers) != 3 or {*map(type, numbers)} - {int, float}:
                raise InputError(f"{path}: {key} is {numbers!r:.80}; expected three numbers")
            if not all(0 <= number <= 1 for number in numbers) or (name == "std" and 0 in numbers):
                raise InputError(f"{path}: {key} is {numbers!r:.80}; expected shares of the brightest value")
            values[name] = tuple(float(number) for number in numbers)
    if given.get("resample") is not None:
        known = {number: name for name, number in RESAMPLE.items()}
        if given["resample"] not in known:
            raise InputError(f"{path}: resample is {given['resample']}, not supported; expected one of {sorted(known)}")
        values["resample"] = known[given["resample"]]
    return dataclasses.replace(vision, pixels=vision.pixels._replace(**values))
