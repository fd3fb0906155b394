"""The model of a run from its settings: config without weights first, then every part read or drawn and placed."""

import dataclasses
import glob
import hashlib
import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from llava_jax.convert import config as hf_config
from llava_jax.convert import hf
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.models.llava import Llava, build
from llava_jax.settings import STAGES, nearest, read_settings
from llava_jax.train import checkpoint
from llava_jax.types import ClipConfig, InputError, LlamaConfig, ModelConfig, Settings

Params = dict[str, Any]

RANDOM = "random:"
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
class Plan:
    """A model that is not read yet: config, tokenizer folder, the folder its vision tower comes from (None: random)."""

    config: ModelConfig
    tokenizer: str
    vision_folder: str | None


# ---- config -----------------------------------------------------------------------------------------------------


def plan_model(settings: Settings) -> Plan:
    """Config, tokenizer and sources of the run's model, without reading a weight. Raises InputError."""
    if settings.init.model:
        source = model_source(settings.init.model)
        if is_workdir(source):
            plan = plan_model(read_settings(os.path.join(source, "config.json")))
        else:
            config, extras = hf.read_llava_config(source)
            plan = Plan(config, extras.tokenizer, source)
        config = dataclasses.replace(plan.config, dtype=settings.train.dtype, remat=settings.train.remat)
        return dataclasses.replace(plan, config=config)
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
    return Plan(config, tokenizer, None if settings.model.vision.startswith(RANDOM) else settings.model.vision)


def vision_config(spec: str) -> ClipConfig:
    """ClipConfig of `model.vision`: a CLIP folder, `random:NAME` or `random:FILE.json`."""
    given, where = _config_json("model.vision", spec, CLIPS)
    return CLIPS[spec.removeprefix(RANDOM)] if given is None else hf_config.clip_config(given, where)


def llm_config(spec: str) -> LlamaConfig:
    """LlamaConfig of `model.llm`: a LLaMA folder, `random:NAME` or `random:FILE.json`."""
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
        return hf_config.read_json(name), name
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


# ---- weights ----------------------------------------------------------------------------------------------------


def read_params(settings: Settings, plan: Plan, dtypes: dict[str, str], at: Params) -> Params:
    """The parts named in `dtypes` (vision, projector, llm), each in its dtype, placed at the shardings `at`."""
    specs = {"vision": settings.model.vision, "llm": settings.model.llm, "projector": RANDOM}
    whole = _read_whole(settings.init.model) if settings.init.model else {}
    read: Params = {}
    for part, dtype in dtypes.items():
        if part == "projector" and settings.init.projector:
            found = read_projector(settings.init.projector, plan.config)
        elif part in whole:
            found = whole.pop(part)
        elif specs[part].startswith(RANDOM):
            continue
        elif part == "vision":
            found = hf.read_clip(specs[part], feature_layer=plan.config.feature_layer, dtype=dtype)[1]
        else:
            found = hf.read_llama(specs[part], dtype=dtype)[1]
        kind = jax.numpy.dtype(dtype)
        read[part] = jax.tree.map(lambda x, to, kind=kind: jax.device_put(x.astype(kind), to), found, at[part])
    drawn = {part: dtype for part, dtype in dtypes.items() if part not in read}
    return read | random_params(plan.config, settings.seed, drawn, {part: at[part] for part in drawn})


def _read_whole(source: str) -> Params:
    folder = model_source(source)
    return load_trained(folder)[1] if is_workdir(folder) else hf.read_llava(folder)[1]


def random_params(config: ModelConfig, seed: int, dtypes: dict[str, str], at: Params) -> Params:
    """The parts named in `dtypes` of `models.llava.init(config, seed)`, drawn where they lie; no other is computed."""

    def make(key: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(Llava(config, rngs=nnx.Rngs(params=key))))
        return {p: jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params[p]) for p, dtype in dtypes.items()}

    return jax.jit(make, out_shardings=at)(jax.random.key(seed)) if dtypes else {}


def read_projector(source: str, config: ModelConfig) -> Params:
    """Projector (float32 numpy) of a .safetensors file or of the workdir of a run, checked against the config."""
    if not os.path.exists(source):
        raise InputError(f"init.projector={source}: not found, expected a .safetensors file or a pretrain workdir")
    if not os.path.isdir(source):
        return hf.read_projector(source, config)
    if not is_workdir(source):
        raise InputError(f"init.projector={source}: no checkpoints in it, expected the workdir of a pretrain run")
    found = checkpoint.load_params(source)[1]["projector"]
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (found, build(config)[1]["projector"])]
    if shapes[0] != shapes[1]:
        raise InputError(f"init.projector={source}: holds {shapes[0]}, this model needs {shapes[1]}")
    return found


def load_trained(workdir: str, step: int | None = None, dtype: str = "float32") -> tuple[Plan, Params, Settings]:
    """(plan, whole model as numpy, settings) of a run.

    Trained parts come from its newest (or given) checkpoint, frozen ones from their source, which must still be what
    the run saw: InputError otherwise.
    """
    if not is_workdir(workdir):
        raise InputError(f"{workdir}: no training run in it, expected config.json and checkpoints/ of `train`")
    settings = read_settings(os.path.join(workdir, "config.json"))
    plan = plan_model(settings)
    _, trained, meta = checkpoint.load_params(workdir, step)
    check_sources(workdir, meta, settings)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, abstract = build(plan.config)
    at = jax.tree.map(lambda _: here, abstract)
    frozen = read_params(settings, plan, {part: dtype for part in abstract if part not in trained}, at)
    params = {**jax.tree.map(np.asarray, frozen), **jax.tree.map(lambda x: x.astype(jax.numpy.dtype(dtype)), trained)}
    return plan, params, settings


# ---- sources ----------------------------------------------------------------------------------------------------


def model_source(source: str) -> str:
    """The folder of a SRC: `hf:DIR`, `orbax:DIR`, or a bare DIR."""
    kind, _, folder = source.rpartition(":")
    if kind not in ("", "hf", "orbax"):
        raise InputError(f"init.model={source}: form {kind!r} is not known, expected hf:DIR, orbax:DIR or a bare DIR")
    if not os.path.isdir(folder):
        raise InputError(f"init.model={source}: no such folder, expected a model folder or the workdir of a run")
    return folder


def is_workdir(folder: str) -> bool:
    """Whether a folder is the workdir of a training run, by what lies in it."""
    return os.path.isfile(os.path.join(folder, "config.json")) and os.path.isdir(os.path.join(folder, "checkpoints"))


def frozen_sources(settings: Settings) -> dict[str, dict[str, str]]:
    """Where each frozen part comes from, with a fingerprint of the folder: kept in every checkpoint."""
    given = {"vision": settings.model.vision, "llm": settings.model.llm, "projector": settings.init.projector}
    sources = {}
    for part in given:
        if part not in STAGES[settings.stage]:
            source = settings.init.model or given[part]
            sources[part] = {"source": source, "fingerprint": fingerprint(source.rpartition(":")[2])}
    return sources


def check_sources(workdir: str, meta: dict, settings: Settings) -> None:
    """InputError when a frozen part is no longer what the checkpoint was trained on."""
    for part, now in frozen_sources(settings).items():
        if now != meta["frozen"][part]:
            raise InputError(
                f"{workdir}: the frozen {part} in {now['source']} is not the one this run was trained with "
                f"(fingerprint {now['fingerprint']}, was {meta['frozen'][part]['fingerprint']}): put it back"
            )


def fingerprint(folder: str) -> str:
    """Hash of names, sizes and the first and last megabyte of the weight files in a folder; '' when there are none."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))) if folder else []
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = os.path.getsize(path)
        digest.update(f"{os.path.basename(path)} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest() if paths else ""
