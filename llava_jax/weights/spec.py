"""The model of a run from its settings: config without weights first, then every part read or drawn and placed."""

import dataclasses
import os
from typing import Any

from llava_jax.data.tokenize import load_tokenizer
from llava_jax.settings import RANDOM, lora_targets, nearest, read_settings
from llava_jax.types import ClipConfig, InputError, LlamaConfig, LoraConfig, ModelConfig, Settings
from llava_jax.weights import hf, hf_config
from llava_jax.weights.hf_facts import contradictions, read_json
from llava_jax.weights.source import parse

Params = dict[str, Any]

EMBEDDED_TOKENIZER = os.path.join(os.path.dirname(os.path.dirname(__file__)), "demo", "backbones", "llama")
CLIPS = {
    "tiny": ClipConfig(width=32, mlp_width=64, layers=3, heads=2, image_size=32, patch_size=8),
    "clip-l-14": ClipConfig(width=1024, mlp_width=4096, layers=24, heads=16, image_size=224, patch_size=14),
    "clip-l-14-336": ClipConfig(width=1024, mlp_width=4096, layers=24, heads=16, image_size=336, patch_size=14),
}
LLAMAS = {
    "tiny": LlamaConfig(
        vocab_size=2048, width=64, mlp_width=128, layers=2, heads=4, kv_heads=2, head_dim=16, max_positions=1024
    ),
    "vicuna-7b": LlamaConfig(
        vocab_size=32000,
        width=4096,
        mlp_width=11008,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        max_positions=4096,
    ),
    "vicuna-13b": LlamaConfig(
        vocab_size=32000,
        width=5120,
        mlp_width=13824,
        layers=40,
        heads=40,
        kv_heads=40,
        head_dim=128,
        max_positions=4096,
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model that is not read yet: config, tokenizer folder, the folder its vision tower comes from (None: random)."""

    config: ModelConfig
    tokenizer: str
    vision_folder: str | None


# ---- config -----------------------------------------------------------------------------------------------------


def model_spec(settings: Settings) -> ModelSpec:
    """Config, tokenizer and sources of the run's model, without reading a weight. Raises InputError."""
    if settings.init.model:
        form, folder = parse(settings.init.model, "init.model")
        if form == "run":
            spec = model_spec(read_settings(os.path.join(folder, "config.json")))
        else:
            config, extras = hf.read_llava_config(folder)
            spec = ModelSpec(config, extras.tokenizer, extras.vision)
        config = dataclasses.replace(spec.config, dtype=settings.train.dtype, remat=settings.train.remat)
        return dataclasses.replace(spec, config=_with_aspect(settings, config))
    vision, llm = vision_config(settings.model.vision), llm_config(settings.model.llm)
    hf_config.check_feature_layer(settings.model.feature_layer, vision, "model.feature_layer")
    tokenizer = tokenizer_folder(settings.model.llm)
    config = ModelConfig(
        vision=vision,
        llm=llm,
        projector=settings.model.projector,
        feature_layer=settings.model.feature_layer,
        image_token_id=load_tokenizer(tokenizer).image_token_id(llm.vocab_size),
        dtype=settings.train.dtype,
        remat=settings.train.remat,
    )
    config = _with_aspect(settings, config)
    return ModelSpec(config, tokenizer, None if settings.model.vision.startswith(RANDOM) else settings.model.vision)


def _with_aspect(settings: Settings, config: ModelConfig) -> ModelConfig:
    """The config as `data.aspect` asks for it: anyres makes any LLaVA a LLaVA-NeXT, and nothing undoes that."""
    if settings.data.aspect != "anyres" and config.pinpoints:
        raise InputError(
            f"data.aspect={settings.data.aspect}: init.model={settings.init.model} is a LLaVA-NeXT, whose images are "
            "cut into tiles: expected data.aspect=anyres"
        )
    if settings.data.aspect == "anyres" and not config.pinpoints:
        return dataclasses.replace(config, pinpoints=hf_config.default_pinpoints(config.vision))
    return config


def vision_config(spec: str) -> ClipConfig:
    """ClipConfig of `model.vision`: a CLIP or SigLIP folder, `random:NAME` or `random:FILE.json`."""
    given, where = _config_json("model.vision", spec, CLIPS)
    config = CLIPS[spec.removeprefix(RANDOM)] if given is None else hf_config.clip_config(given, where)
    return config if spec.startswith(RANDOM) else hf.with_pixels(config, spec)


def llm_config(spec: str) -> LlamaConfig:
    """LlamaConfig of `model.llm`: a decoder's folder, `random:NAME` or `random:FILE.json`."""
    given, where = _config_json("model.llm", spec, LLAMAS)
    return LLAMAS[spec.removeprefix(RANDOM)] if given is None else hf_config.llama_config(given, where)


def _config_json(key: str, spec: str, named: dict) -> tuple[dict | None, str]:
    name = spec.removeprefix(RANDOM)
    if not spec:
        raise InputError(f"{key} is empty: expected a Hugging Face folder, random:NAME or random:FILE.json")
    if not spec.startswith(RANDOM):
        kind = "a Hugging Face CLIP folder" if key == "model.vision" else "a Hugging Face LLaMA folder"
        return hf_config.read_config(spec, f"{kind} ({key})"), os.path.join(spec, "config.json")
    if name.endswith(".json"):
        return read_json(name), name
    if name not in named:
        raise InputError(f"{key}={spec}: no size of that name{nearest(name, tuple(named))} (or random:FILE.json)")
    return None, spec


def tokenizer_folder(spec: str) -> str:
    """The folder with the tokenizer of `model.llm`: the folder itself, or the one FILE.json lies in.

    A named size takes the small tokenizer that comes with the package: random weights know no words anyway.
    """
    if not spec.startswith(RANDOM):
        return spec
    name = spec.removeprefix(RANDOM)
    return (os.path.dirname(name) or ".") if name.endswith(".json") else EMBEDDED_TOKENIZER


def origins(settings: Settings, spec: ModelSpec) -> str:
    """Say where each part comes from, what of the config that leaves unread, and what the folders contradict."""
    folders = dict.fromkeys(folder for folder in (spec.vision_folder, spec.tokenizer) if folder)
    warnings = [f"warning: {line}" for folder in folders for line in contradictions(folder)]
    init, config = settings.init, spec.config
    if not init.model:
        projector = init.projector or f"random ({config.projector})"
        line = f"vision {settings.model.vision}, decoder {settings.model.llm}, projector {projector}"
        return "\n".join([line, *warnings])
    unread = [
        f"model.{name}={given} is not read, it has {held}"
        for name, given, held in (
            ("projector", settings.model.projector, config.projector),
            ("feature_layer", settings.model.feature_layer, config.feature_layer),
        )
        if given != held
    ]
    projector = f"projector {init.projector} (init.projector)" if init.projector else f"projector {init.model}"
    line = f"vision {init.model}, decoder {init.model}, {projector}; init.model decides the model"
    return "\n".join(["; ".join([line, *unread]), *warnings])


def adapted(settings: Settings, config: ModelConfig) -> ModelConfig:
    """The config with what the stage adds to the model: the adapters of `lora`, a decoder in four bits."""
    if settings.stage != "lora":
        return config
    given = settings.lora
    lora = LoraConfig(given.rank, given.alpha, given.dropout, lora_targets(given.targets))
    return dataclasses.replace(config, lora=lora, nf4=settings.train.frozen_dtype == "nf4")


def float_dtype(dtype: str) -> str:
    """What `train.frozen_dtype` makes of weights that are not in four bits."""
    return "bfloat16" if dtype == "nf4" else dtype
