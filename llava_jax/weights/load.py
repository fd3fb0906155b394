"""Weights of a model from any SRC or of a run's settings: read from files or drawn, and placed on the devices."""

import dataclasses
import glob
import hashlib
import os
from typing import Any

import jax
import numpy as np

from llava_jax.data.templates import TEMPLATES, check_template
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.hub import TOKENIZER_FILES
from llava_jax.models.layers import stored_as
from llava_jax.models.llava import ADAPTERS, build, init, partition, split_parts
from llava_jax.parallel.sharding import place
from llava_jax.settings import RANDOM, lora_targets, nearest, read_settings, tower_path, trainable_pattern
from llava_jax.types import (
    ClipConfig,
    InitSettings,
    InputError,
    LazyTensor,
    LlamaConfig,
    LoraConfig,
    ModelConfig,
    ModelSettings,
    Settings,
)
from llava_jax.weights import hf, hf_config
from llava_jax.weights.adapters import merge_adapters, merge_difference, merge_tower, place_quantised
from llava_jax.weights.hf import default_template, read_llava, stored_dtype
from llava_jax.weights.hf_config import contradictions, read_json
from llava_jax.weights.original import NON_LORA, PROJECTOR, Companions
from llava_jax.weights.processor import LlavaExtras
from llava_jax.weights.source import is_name, is_workdir, load_params, local_folder, parse, run_fingerprint, split
from llava_jax.weights.tensors import weight_files

Params = dict[str, Any]

# ---- the model of a run ----


EMBEDDED_TOKENIZER = os.path.join(os.path.dirname(os.path.dirname(__file__)), "demo", "backbones", "llama")
_CLIP_L = ClipConfig(width=1024, mlp_width=4096, layers=24, heads=16, image_size=224, patch_size=14)
CLIPS = {
    "tiny": ClipConfig(width=32, mlp_width=64, layers=3, heads=2, image_size=32, patch_size=8),
    "clip-l-14": _CLIP_L,
    "clip-l-14-336": dataclasses.replace(_CLIP_L, image_size=336),
}
_VICUNA = LlamaConfig(32000, width=4096, mlp_width=11008, layers=32, heads=32, kv_heads=32, head_dim=128)
LLAMAS = {
    "tiny": LlamaConfig(
        vocab_size=2048, width=64, mlp_width=128, layers=2, heads=4, kv_heads=2, head_dim=16, max_positions=1024
    ),
    "vicuna-7b": dataclasses.replace(_VICUNA, max_positions=4096),
    "vicuna-13b": dataclasses.replace(
        _VICUNA, width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40, max_positions=4096
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model that is not read yet: what it is, and where its weights come from.

    `config` is the plain model and `stage_config` the one that the stage trains, with adapters and a decoder in four
    bits; `tokenizer` and `vision_folder` (None: a random tower) are folders; what lies in no file is drawn from `seed`.
    `tuned_tower`: this run or one before it trains the tower.
    """

    config: ModelConfig
    stage_config: ModelConfig
    tokenizer: str
    vision_folder: str | None
    model: ModelSettings
    init: InitSettings
    seed: int
    tuned_tower: bool


# ---- config ----


def model_spec(settings: Settings) -> ModelSpec:
    """Return config, tokenizer and sources of the run's model, without reading a weight. Raises InputError."""
    if not settings.init.model:
        here = at_hand(settings)
        tokenizer = tokenizer_folder(here.model.llm)
        config = described(here)
        image_token_id = load_tokenizer(tokenizer).image_token_id(config.llm.vocab_size)
        config = dataclasses.replace(config, image_token_id=image_token_id)
        vision_folder = None if here.model.vision.startswith(RANDOM) else here.model.vision
        return _spec(settings, config, tokenizer, vision_folder, False)
    form, folder = parse(settings.init.model, "init.model")
    if form == "run":
        run = model_spec(read_settings(os.path.join(folder, "config.json")))
        return _spec(settings, run.config, run.tokenizer, run.vision_folder, run.tuned_tower)
    config, extras = hf.read_llava_config(folder)
    return _spec(settings, config, extras.tokenizer, extras.vision, extras.tuned_tower)


def at_hand(settings: Settings) -> Settings:
    """Return the settings with folders of this machine where `model.` keys name a model on the Hub, without weights."""
    model = settings.model
    vision, llm = local_folder(model.vision, "model.vision"), local_folder(model.llm, "model.llm")
    return dataclasses.replace(settings, model=dataclasses.replace(model, vision=vision, llm=llm))


def with_template(settings: Settings) -> Settings:
    """Return the settings with the template that an empty `data.template` stands for.

    That is the one of the model the run starts from, else `default_template` of the decoder's tokenizer. Raises
    InputError for a template that is not known.
    """
    name = settings.data.template or _template_before(settings.init.model) or default_template(_tokenizer(settings))
    check_template(name)
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, template=name))


def _template_before(source: str) -> str:
    """Return the template of the model at `init.model`; "" where it names none, or only one for captions."""
    if not source:
        return ""
    form, folder = parse(source, "init.model")
    if form == "run":
        name, assumed = read_settings(os.path.join(folder, "config.json")).data.template, False
    else:
        extras = hf.read_llava_config(folder)[1]
        name, assumed = extras.template, extras.template_assumed
    captions = name in TEMPLATES and TEMPLATES[name].caption_only
    return "" if assumed or captions else name


def _tokenizer(settings: Settings) -> str:
    return model_spec(settings).tokenizer if settings.init.model else tokenizer_folder(at_hand(settings).model.llm)


def described(settings: Settings) -> ModelConfig:
    """Return the config that the `model.` keys, all at hand, describe; its image token is behind the vocabulary."""
    vision, llm = vision_config(settings.model.vision), llm_config(settings.model.llm)
    hf_config.check_feature_layer(settings.model.feature_layer, vision, "model.feature_layer")
    config = ModelConfig(vision, llm, settings.model.projector, settings.model.feature_layer, llm.vocab_size)
    return _for_run(settings, config)


def _spec(
    settings: Settings, config: ModelConfig, tokenizer: str, vision_folder: str | None, tuned_tower: bool
) -> ModelSpec:
    config = _for_run(settings, config)
    stage_config = adapted(settings, config)
    learns = partition(split_parts(build(stage_config)[1]), trainable_pattern(settings))[0]
    tuned_tower |= not {"vision", "vision_lora"}.isdisjoint(learns)
    given = settings.model, settings.init, settings.seed
    return ModelSpec(config, stage_config, tokenizer, vision_folder, *given, tuned_tower)


def _for_run(settings: Settings, config: ModelConfig) -> ModelConfig:
    """Return the config as the run computes it.

    `data.aspect` anyres makes any LLaVA a LLaVA-NeXT, and nothing undoes that.
    """
    config = dataclasses.replace(config, dtype=settings.train.dtype, remat=settings.train.remat)
    if settings.data.aspect != "anyres" and config.pinpoints:
        raise InputError(
            f"data.aspect={settings.data.aspect}: init.model={settings.init.model} is a LLaVA-NeXT, whose images are "
            "cut into tiles: expected data.aspect=anyres"
        )
    if settings.data.aspect == "anyres" and not config.pinpoints:
        return dataclasses.replace(config, pinpoints=hf_config.default_pinpoints(config.vision))
    return config


def vision_config(spec: str) -> ClipConfig:
    """Return ClipConfig of `model.vision`: a CLIP or SigLIP folder, `random:NAME` or `random:FILE.json`."""
    given, where = _config_json("model.vision", spec, CLIPS)
    with hf_config.in_form("model.vision", spec):
        config = CLIPS[spec.removeprefix(RANDOM)] if given is None else hf_config.clip_config(given, where)
        return config if spec.startswith(RANDOM) else hf_config.with_pixels(config, spec)


def llm_config(spec: str) -> LlamaConfig:
    """Return LlamaConfig of `model.llm`: a decoder's folder, `random:NAME` or `random:FILE.json`."""
    given, where = _config_json("model.llm", spec, LLAMAS)
    with hf_config.in_form("model.llm", spec):
        return LLAMAS[spec.removeprefix(RANDOM)] if given is None else hf_config.llama_config(given, where)


def _config_json(key: str, spec: str, named: dict) -> tuple[dict | None, str]:
    name = spec.removeprefix(RANDOM)
    if not spec:
        raise InputError(f"{key} is empty: expected a Hugging Face folder or its name, random:NAME or random:FILE.json")
    if not spec.startswith(RANDOM):
        kind = "a Hugging Face CLIP folder" if key == "model.vision" else "a Hugging Face LLaMA folder"
        return hf_config.read_config(spec, f"{kind} ({key})"), os.path.join(spec, "config.json")
    if name.endswith(".json"):
        return read_json(name), name
    if name not in named:
        raise InputError(f"{key}={spec}: no size of that name{nearest(name, tuple(named))} (or random:FILE.json)")
    return None, spec


def tokenizer_folder(spec: str) -> str:
    """Return the folder with the tokenizer of `model.llm`: the folder itself, or the one FILE.json lies in.

    A named size takes the small tokenizer that comes with the package: random weights know no words anyway.
    """
    if not spec.startswith(RANDOM):
        return spec
    name = spec.removeprefix(RANDOM)
    return (os.path.dirname(name) or ".") if name.endswith(".json") else EMBEDDED_TOKENIZER


def origins(spec: ModelSpec) -> str:
    """Say where each part comes from, what of the config that leaves unread, and what the folders contradict."""
    folders = dict.fromkeys(folder for folder in (spec.vision_folder, spec.tokenizer) if folder)
    warnings = [f"warning: {line}" for folder in folders for line in contradictions(folder)]
    init, model, config = spec.init, spec.model, spec.config
    if not init.model:
        projector = init.projector or f"random ({config.projector})"
        line = f"vision {model.vision}, decoder {model.llm}, projector {projector}"
        return "\n".join([line, *warnings])
    unread = [
        f"model.{name}={given} is not read, it has {held}"
        for name, given, held in (
            ("projector", model.projector, config.projector),
            ("feature_layer", model.feature_layer, config.feature_layer),
        )
        if given != held
    ]
    projector = f"projector {init.projector} (init.projector)" if init.projector else f"projector {init.model}"
    line = f"vision {init.model}, decoder {init.model}, {projector}; init.model decides the model"
    return "\n".join(["; ".join([line, *unread]), *warnings])


def adapted(settings: Settings, config: ModelConfig) -> ModelConfig:
    """Return the config with what the stage adds to the model: the adapters of `lora`, a decoder in four bits.

    Also with the tower's last blocks as a stack of their own where only they learn; raises InputError when the tower
    has no others.
    """
    blocks = settings.train.vision_blocks
    if blocks and blocks >= config.vision_layers:
        raise InputError(
            f"train.vision_blocks={blocks}: the tower runs {config.vision_layers} blocks, expected fewer; for all of "
            "them set it to 0 and name vision/layers in train.trainable"
        )
    config = dataclasses.replace(config, learning_blocks=blocks)
    if settings.stage != "lora":
        return config
    given = settings.lora
    tower = lora_targets(given.vision_targets, "vision") if given.vision_targets else ()
    decoder = lora_targets(given.targets, "llm")
    lora = LoraConfig(given.rank, given.alpha, given.dropout, decoder, vision_targets=tower)
    return dataclasses.replace(config, lora=lora, nf4=settings.train.frozen_dtype == "nf4")


def float_dtype(dtype: str) -> str:
    """Return what `train.frozen_dtype` makes of weights that are not in four bits."""
    return "bfloat16" if dtype == "nf4" else dtype


# ---- weights ----

# Largest difference of logits, over the largest logit, that merging adapters may make by rounding.
MERGED_ALIKE = {"float32": 1e-4, "bfloat16": 0.1}


def read_model(
    source: str,
    name: str,
    *,
    dtype: str = "",
    vision: str = "",
    base: str = "",
    step: int | None = None,
    check_merge: bool = False,
) -> tuple[ModelConfig, Params, LlavaExtras]:
    """Read the config, all parameters (numpy or LazyTensor) and extras of a SRC; `name` is its flag or key.

    A run comes in the dtype it computes in, a folder in the one it is stored in (float16 as bfloat16), unless `dtype`
    says another. `vision` and `base` are folders for what an original LLaVA folder only names; `step` (of a run) and
    `check_merge` are `load_trained`'s.
    """
    form, folder = parse(source, name)
    if is_name(split(source)[1]):
        print(f"{source}: commit {os.path.basename(folder)} of the Hub", flush=True)
    if step is not None and form != "run":
        raise InputError(f"--step={step}: {folder} is no workdir of train, whose checkpoints have steps; leave it out")
    if form == "run":
        if vision or base:
            raise InputError(f"--vision and --base are for original LLaVA folders; {folder} is a workdir of train")
        spec, params, settings = load_trained(folder, step, dtype=dtype or None, check_merge=check_merge)
        config, rules = spec.config, settings.data
        dtype = dtype or config.dtype
        tower = spec.vision_folder or ""
        if spec.tuned_tower and is_name(settings.model.vision):  # an export takes the blocks that do not run from there
            tower = local_folder(settings.model.vision, "model.vision", "weights")
        extras = LlavaExtras(
            rules.template,
            rules.aspect,
            rules.image_position,
            spec.tokenizer,
            vision=tower,
            exif=rules.exif,
            tuned_tower=spec.tuned_tower,
        )
    else:
        companions = Companions(local_folder(vision, "--vision", "weights"), local_folder(base, "--base", "weights"))
        hf.read_llava_config(folder, companions)  # what cannot be read is said before its weights are fetched
        folder = parse(source, name, "weights")[1]
        dtype = dtype or stored_dtype(folder, companions)
        config, params, extras = read_llava(folder, dtype=dtype, lazy=True, companions=companions)
        for line in [line for each in hf.weight_folders(folder, companions) for line in contradictions(each)]:
            print(f"warning: {line}")
    return dataclasses.replace(config, dtype=dtype), params, extras


def read_params(spec: ModelSpec, wanted: Params) -> Params:
    """Return the parameters of `wanted`, ShapeDtypeStructs with shardings in the structure of `split_parts`."""
    config = spec.stage_config
    read = read_files(spec, {part: _widest(tree) for part, tree in wanted.items()})
    for part in read:
        at = jax.tree.map(lambda x: x.sharding, wanted[part])
        quantised = part == "llm" and config.nf4
        read[part] = place_quantised(config, read[part], at) if quantised else place(cut(read[part], wanted[part]), at)
    return read | init(config, spec.seed, {part: tree for part, tree in wanted.items() if part not in read})


def _widest(tree: Params) -> str:
    """Return the dtype that every floating leaf of a part can be cast from."""
    return "float32" if any(leaf.dtype == np.float32 for leaf in jax.tree.leaves(tree)) else "bfloat16"


def cut(whole: Params, wanted: Params) -> Params:
    """Return the leaves of `wanted` in its dtypes, from a part (numpy or LazyTensor) with one stack of blocks.

    A tower's `first` blocks are the first ones of its stack, and `layers` the last ones, where they are fewer.
    """

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray | LazyTensor:
        names = [key.key for key in path]
        found: Any = whole
        for name in ["layers", *names[1:]] if names[0] == "first" else names:
            found = found[name]
        start = 0 if names[0] == "first" or not like.shape else found.shape[0] - like.shape[0]
        if not isinstance(found, LazyTensor):
            return np.asarray(found[start:][: like.shape[0]], like.dtype)
        one = (lambda layer: found.one(layer + start)) if found.stacked else found.one
        return LazyTensor(like.shape, np.dtype(like.dtype), found.stacked, one)

    return jax.tree_util.tree_map_with_path(leaf, wanted)


def read_files(spec: ModelSpec, dtypes: dict[str, str]) -> Params:
    """Return those parts of `dtypes` that lie in files, in their dtype, as `LazyTensor` or numpy."""
    read = _read_sources(spec, dtypes)
    if spec.config.pinpoints and "image_newline" not in read.get("projector", {"image_newline": None}):
        # The source is no LLaVA-NeXT yet.
        D = spec.config.llm.width
        drawn = np.random.default_rng(spec.seed).normal(0, D**-0.5, D)
        read["projector"] |= _cast({"image_newline": drawn}, dtypes["projector"])
    return read


def _read_sources(spec: ModelSpec, dtypes: dict[str, str]) -> Params:
    read: Params = {}
    if "projector" in dtypes and spec.init.projector:
        read["projector"] = _cast(read_projector(spec.init.projector, spec.config), dtypes["projector"])
    left = {part: dtype for part, dtype in dtypes.items() if part not in read}
    if spec.init.model:
        form, folder = parse(spec.init.model, "init.model", "weights")
        whole = load_trained(folder, dtype=left)[1] if form == "run" else read_llava(folder, dtype=left, lazy=True)[1]
        return read | whole
    if "vision" in left and not spec.model.vision.startswith(RANDOM):
        layer = spec.config.feature_layer
        tower = local_folder(spec.model.vision, "model.vision", "weights")
        read["vision"] = hf.read_clip(tower, feature_layer=layer, dtype=left["vision"], lazy=True)[1]
    if "llm" in left and not spec.model.llm.startswith(RANDOM):
        decoder = local_folder(spec.model.llm, "model.llm", "weights")
        read["llm"] = hf.read_llama(decoder, dtype=left["llm"], lazy=True)[1]
    return read


def _cast(tree: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: np.asarray(x, jax.numpy.dtype(dtype)), tree)


def read_projector(source: str, config: ModelConfig) -> Params:
    """Read the projector (float32 numpy) of a file, a run or an original folder, checked against the config."""
    source = local_folder(source, "init.projector", "projector")
    is_run = is_workdir(source)
    if not is_run and not os.path.exists(source):
        raise InputError(
            f"init.projector={source}: not found, expected a .safetensors or .bin file or a pretrain workdir"
        )
    if not is_run and not os.path.isdir(source):
        return hf.read_projector(source, config)
    if not is_run:
        files = [os.path.join(source, name) for name in (PROJECTOR, NON_LORA)]
        file = next((path for path in files if os.path.isfile(path)), None)
        if file is None:
            raise InputError(
                f"init.projector={source}: holds neither checkpoints nor {PROJECTOR} nor {NON_LORA}; expected the "
                "workdir or output folder of a pretrain run, or a .safetensors or .bin file"
            )
        return hf.read_projector(file, config)
    trained = load_params(source, part="projector")[1]
    if "projector" not in trained:
        raise InputError(f"init.projector={source}: that run trained none (train.trainable); give it as init.model")
    found = trained["projector"]
    if "image_newline" not in found:
        config = dataclasses.replace(config, pinpoints=())
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (found, build(config)[1]["projector"])]
    if shapes[0] != shapes[1]:
        raise InputError(f"init.projector={source}: holds {shapes[0]}, this model needs {shapes[1]}")
    return found


def load_trained(
    workdir: str, step: int | None = None, dtype: str | dict[str, str] | None = None, check_merge: bool = False
) -> tuple[ModelSpec, Params, Settings]:
    """Return (spec, whole model as numpy or `LazyTensor`, settings) of a run, in the dtype it computes in or `dtype`.

    Trained parts come from its newest (or given) checkpoint, frozen ones from their source, which must still be what
    the run saw. A `dtype` for each part leaves out those it does not name. Adapters are merged; `check_merge` compares
    logits before and after. Raises InputError when a frozen part has changed.
    """
    if not is_workdir(workdir):
        raise InputError(f"{workdir}: no training run in it, expected config.json and checkpoints/ of `train`")
    settings = read_settings(os.path.join(workdir, "config.json"))
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(hf.PARTS, dtype or settings.train.dtype)
    spec = model_spec(settings)
    _, trained, meta = load_params(workdir, step)
    check_unchanged(workdir, meta, {"frozen": frozen_sources(settings, spec), "inputs": model_inputs(spec)})
    whole = build(spec.config)[1]
    frozen = {part: dtype for part, dtype in dtypes.items() if not _covers(trained.get(part, {}), whole[part])}
    for part in frozen:
        if ADAPTERS.get(part) in trained:
            frozen[part] = float_dtype(settings.train.frozen_dtype)  # as the adapters saw it
    params = read_files(spec, frozen)
    drawn = {part: stored_as(whole[part], dtype) for part, dtype in frozen.items() if part not in params}
    params |= jax.tree.map(np.asarray, init(spec.config, spec.seed, drawn))
    for part, dtype in dtypes.items():
        if part in trained:
            params[part] = _with_trained(params.get(part, {}), _cast(trained[part], dtype))
    if "vision_lora" in trained and "vision" in dtypes:
        tower = jax.tree.map(np.asarray, params["vision"])
        params["vision"] = merge_tower(spec.stage_config, tower, trained["vision_lora"], dtypes["vision"])
    if "lora" in trained and "llm" in dtypes:
        llm = jax.tree.map(np.asarray, params["llm"])
        merge = merge_adapters(spec.stage_config, llm, trained["lora"], dtypes["llm"])
        if check_merge:
            differs = merge_difference(spec.stage_config, llm, trained["lora"], merge)
            most = MERGED_ALIKE[dtypes["llm"]]
            print(f"adapters merged into {dtypes['llm']}: logits of a probe differ by {differs:.1e} of the largest one")
            if differs > most:
                raise InputError(
                    f"{workdir}: the merged model's logits differ by {differs:.1e} from those of the adapters, at most "
                    f"{most} is rounding: train with another --config.train.dtype, or take peft:DIR"
                )
        params["llm"] = merge
    return spec, params, settings


def _covers(trained: Params, whole: Params) -> bool:
    """Return whether a checkpoint holds all of a part, whose other parameters need then not be read."""
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (trained, whole)]
    return shapes[0] == shapes[1]


def _with_trained(source: Params, trained: Params) -> Params:
    """Put what was trained in its place; a stack that has fewer blocks than the source's is its last ones."""
    part = dict(source)
    for name, value in trained.items():
        if isinstance(value, dict):
            part[name] = _with_trained(source.get(name, {}), value)
        else:
            lack = source[name].shape[0] - value.shape[0] if name in source and value.ndim else 0
            before = [np.asarray(source[name][layer], value.dtype)[None] for layer in range(lack)]
            part[name] = np.concatenate([*before, value]) if before else value
    return part


def load_adapters(workdir: str, step: int | None = None) -> tuple[ModelConfig, Params]:
    """Return (config with adapters, all that was trained as numpy) of a lora run's newest or given step."""
    settings = read_settings(os.path.join(workdir, "config.json"))
    if settings.stage != "lora":
        raise InputError(f"{workdir}: is a run of stage {settings.stage}, which has no adapters; expected stage=lora")
    return model_spec(settings).stage_config, load_params(workdir, step)[1]


# ---- fingerprints ----


def frozen_sources(settings: Settings, spec: ModelSpec) -> dict[str, dict[str, str]]:
    """Return where each part comes from of which something is frozen, with a fingerprint of the folder.

    It is kept in every checkpoint.
    """
    frozen = partition(split_parts(build(spec.stage_config)[1]), trainable_pattern(settings))[1]
    given = {"vision": settings.model.vision, "llm": settings.model.llm, "projector": settings.init.projector}
    sources = {}
    for part in given:
        if part in frozen:
            source = settings.init.model or given[part]
            sources[part] = {"source": source, "fingerprint": fingerprint(source)}
    return sources


def model_inputs(spec: ModelSpec) -> dict[str, dict[str, str]]:
    """Return path and hash of what a model depends on next to its weights: kept in every checkpoint."""
    files = [os.path.join(spec.tokenizer, name) for name in TOKENIZER_FILES]
    inputs = file_inputs("the tokenizer", spec.tokenizer, *files)
    inputs |= file_inputs("the decoder's config.json", os.path.join(spec.tokenizer, "config.json"))
    if spec.vision_folder:
        inputs |= file_inputs("the vision tower's config.json", os.path.join(spec.vision_folder, "config.json"))
        settings = os.path.join(spec.vision_folder, "preprocessor_config.json")
        inputs |= file_inputs("the vision tower's image settings", settings)
    for part, tower in (("vision tower", spec.model.vision), ("decoder", spec.model.llm)):
        if not spec.init.model and tower.startswith(RANDOM) and tower_path(tower):
            inputs |= file_inputs(f"the {part}'s config file", tower_path(tower))
    return inputs


def file_inputs(name: str, path: str, *files: str) -> dict[str, dict[str, str]]:
    """Return {name: path and hash of the content of `files` (the path itself by default)}, absent ones too."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files or (path,):
        content = ""
        if os.path.isfile(file):
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{os.path.basename(file)} {content}\n".encode())
    return {name: {"source": path, "fingerprint": digest.hexdigest()}}


def check_unchanged(workdir: str, saved: dict, now: dict) -> None:
    """Raise InputError when a frozen part or another input is no longer what the checkpoint was trained on.

    `saved` and `now` are metas of checkpoints; an input that either does not name is not compared.
    """
    found = {f"the frozen {part}": (was, now["frozen"][part]) for part, was in saved["frozen"].items()}
    inputs = saved.get("inputs", {})
    found |= {name: (inputs[name], given) for name, given in now["inputs"].items() if name in inputs}
    for name, (was, given) in found.items():
        if was["fingerprint"] != given["fingerprint"]:
            raise InputError(
                f"{workdir}: {name} in {given['source']} is not the one this run was trained with (fingerprint "
                f"{given['fingerprint']}, was {was['fingerprint']}): put it back, or choose another workdir"
            )


def fingerprint(source: str) -> str:
    """Return hash of a SRC: of a workdir's newest checkpoint, or of a folder's weights; '' when there are none.

    Of weight files it takes names, sizes and the first and last megabyte. Folders that an original LLaVA folder names
    count as part of it; `random:NAME` names none.
    """
    folder = local_folder(split(tower_path(source))[1], "model", "weights")
    if not folder:
        return ""
    if is_workdir(folder):
        return run_fingerprint(folder)
    paths = [path for other in hf.weight_folders(folder) for path in _weights(other)]
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = os.path.getsize(path)
        digest.update(f"{os.path.basename(path)} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest() if paths else ""


def _weights(folder: str) -> list[str]:
    """Return the weight files of a folder: .safetensors, and others unless the model itself lies in the former."""
    found, own = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))), weight_files(folder)
    if any(path in found for path in own):
        return found
    return found + sorted({*own, *glob.glob(os.path.join(glob.escape(folder), "*.bin"))})
