"""Weights of a model from any SRC or of a run's settings: read from files or drawn, and placed on the devices."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from llava_jax.models.layers import stored_as
from llava_jax.models.llava import Llava, build
from llava_jax.models.llava import split_parts as split_adapters
from llava_jax.parallel.placement import place
from llava_jax.settings import RANDOM, read_settings
from llava_jax.types import InputError, ModelConfig, Settings
from llava_jax.weights import hf, runs
from llava_jax.weights.adapters import merge_adapters, merge_difference, place_quantised
from llava_jax.weights.fingerprints import check_unchanged, frozen_sources, model_inputs
from llava_jax.weights.hf import Beside, LlavaExtras, read_llava, stored_dtype
from llava_jax.weights.hf_facts import contradictions
from llava_jax.weights.original import OTHERS, PROJECTOR
from llava_jax.weights.source import is_workdir, parse
from llava_jax.weights.spec import ModelSpec, adapted, float_dtype, model_spec

Params = dict[str, Any]

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
    if step is not None and form != "run":
        raise InputError(f"--step={step}: {folder} is no workdir of train, whose checkpoints have steps; leave it out")
    if form == "run":
        if vision or base:
            raise InputError(f"--vision and --base are for original LLaVA folders; {folder} is a workdir of train")
        spec, params, settings = load_trained(folder, step, dtype=dtype or None, check_merge=check_merge)
        config, rules = spec.config, settings.data
        dtype = dtype or config.dtype
        extras = LlavaExtras(
            rules.template,
            rules.aspect,
            rules.image_position,
            spec.tokenizer,
            vision=spec.vision_folder or "",
            exif=rules.exif,
        )
    else:
        beside = Beside(vision, base)
        dtype = dtype or stored_dtype(folder, beside)
        config, params, extras = read_llava(folder, dtype=dtype, lazy=True, beside=beside)
        for line in [line for each in hf.weight_folders(folder, beside) for line in contradictions(each)]:
            print(f"warning: {line}")
    return dataclasses.replace(config, dtype=dtype), params, extras


def read_params(settings: Settings, spec: ModelSpec, dtypes: dict[str, str], at: Params) -> Params:
    """The parts named in `dtypes` (vision, projector, llm, lora), each in its dtype, placed at the shardings `at`."""
    config = adapted(settings, spec.config)
    dtypes = {part: float_dtype(dtype) for part, dtype in dtypes.items()}
    read = read_files(settings, spec, dtypes)
    for part in read:
        quantised = part == "llm" and config.nf4
        read[part] = place_quantised(config, read[part], at[part]) if quantised else place(read[part], at[part])
    drawn = {part: dtype for part, dtype in dtypes.items() if part not in read}
    return read | random_params(config, settings.seed, drawn, {part: at[part] for part in drawn})


def read_files(settings: Settings, spec: ModelSpec, dtypes: dict[str, str]) -> Params:
    """Those parts of `dtypes` that lie in files, in their dtype, as `LazyTensor` or numpy; the others are drawn."""
    read = _read_sources(settings, spec, dtypes)
    if spec.config.pinpoints and "image_newline" not in read.get("projector", {"image_newline": None}):
        # The source is no LLaVA-NeXT yet.
        D = spec.config.llm.width
        drawn = np.random.default_rng(settings.seed).normal(0, D**-0.5, D)
        read["projector"] |= _cast({"image_newline": drawn}, dtypes["projector"])
    return read


def _read_sources(settings: Settings, spec: ModelSpec, dtypes: dict[str, str]) -> Params:
    read: Params = {}
    if "projector" in dtypes and settings.init.projector:
        read["projector"] = _cast(read_projector(settings.init.projector, spec.config), dtypes["projector"])
    left = {part: dtype for part, dtype in dtypes.items() if part not in read}
    if settings.init.model:
        form, folder = parse(settings.init.model, "init.model")
        whole = _read_run(folder, left)[1] if form == "run" else hf.read_llava_parts(folder, left, lazy=True)
        return read | whole
    if "vision" in left and not settings.model.vision.startswith(RANDOM):
        layer = spec.config.feature_layer
        found = hf.read_clip(settings.model.vision, feature_layer=layer, dtype=left["vision"], lazy=True)
        read["vision"] = found[1]
    if "llm" in left and not settings.model.llm.startswith(RANDOM):
        read["llm"] = hf.read_llama(settings.model.llm, dtype=left["llm"], lazy=True)[1]
    return read


def _cast(tree: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: np.asarray(x, jax.numpy.dtype(dtype)), tree)


def random_params(config: ModelConfig, seed: int, dtypes: dict[str, str], at: Params | None) -> Params:
    """The parts named in `dtypes` of `models.llava.init(config, seed)`, drawn where they lie; no other is computed.

    `at` holds their shardings; None leaves them on the first device.
    """

    def make(key: jax.Array) -> Params:
        params = split_adapters(nnx.to_pure_dict(nnx.state(Llava(config, rngs=nnx.Rngs(params=key)))))
        return {part: stored_as(params[part], dtype) for part, dtype in dtypes.items()}

    return jax.jit(make, out_shardings=at)(jax.random.key(seed)) if dtypes else {}


def read_projector(source: str, config: ModelConfig) -> Params:
    """Projector (float32 numpy) of a .safetensors or .bin file or of a run's workdir, checked against the config."""
    if not os.path.exists(source):
        raise InputError(
            f"init.projector={source}: not found, expected a .safetensors or .bin file or a pretrain workdir"
        )
    if not os.path.isdir(source):
        return hf.read_projector(source, config)
    if not is_workdir(source):
        files = [os.path.join(source, name) for name in (PROJECTOR, OTHERS)]
        file = next((path for path in files if os.path.isfile(path)), None)
        if file is None:
            raise InputError(
                f"init.projector={source}: holds neither checkpoints nor {PROJECTOR} nor {OTHERS}; expected the "
                "workdir or output folder of a pretrain run, or a .safetensors or .bin file"
            )
        return hf.read_projector(file, config)
    found = runs.load_params(source, part="projector")[1]["projector"]
    if "image_newline" not in found:
        config = dataclasses.replace(config, pinpoints=())
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (found, build(config)[1]["projector"])]
    if shapes[0] != shapes[1]:
        raise InputError(f"init.projector={source}: holds {shapes[0]}, this model needs {shapes[1]}")
    return found


def load_trained(
    workdir: str, step: int | None = None, dtype: str | None = None, check_merge: bool = False
) -> tuple[ModelSpec, Params, Settings]:
    """(spec, whole model as numpy or `LazyTensor`, settings) of a run; `dtype` is by default the one it computes in.

    Trained parts come from its newest (or given) checkpoint, frozen ones from their source, which must still be what
    the run saw: InputError otherwise. `check_merge` compares logits before and after adapters are merged.
    """
    if not is_workdir(workdir):
        raise InputError(f"{workdir}: no training run in it, expected config.json and checkpoints/ of `train`")
    settings = read_settings(os.path.join(workdir, "config.json"))
    spec, params = _read_run(workdir, dict.fromkeys(hf.PARTS, dtype or settings.train.dtype), step, check_merge)
    return spec, params, settings


def load_adapters(workdir: str, step: int | None = None) -> tuple[ModelConfig, Params]:
    """(config with adapters, the parts `lora` and `projector` as numpy) of a lora run's newest or given checkpoint."""
    settings = read_settings(os.path.join(workdir, "config.json"))
    if settings.stage != "lora":
        raise InputError(f"{workdir}: is a run of stage {settings.stage}, which has no adapters; expected stage=lora")
    return adapted(settings, model_spec(settings).config), runs.load_params(workdir, step)[1]


def _say_difference(workdir: str, difference: float, dtype: str) -> None:
    print(f"adapters merged into {dtype}: logits of a probe differ by {difference:.1e} of the largest one")
    if difference > MERGED_ALIKE[dtype]:
        raise InputError(
            f"{workdir}: the merged model's logits differ by {difference:.1e} from those of the adapters, at most "
            f"{MERGED_ALIKE[dtype]} is rounding: train with another --config.train.dtype, or take peft:DIR"
        )


def _read_run(
    workdir: str, dtypes: dict[str, str], step: int | None = None, check_merge: bool = False
) -> tuple[ModelSpec, Params]:
    """(spec, the parts named in `dtypes` as numpy or `LazyTensor`) of a run, adapters merged."""
    settings = read_settings(os.path.join(workdir, "config.json"))
    spec = model_spec(settings)
    _, trained, meta = runs.load_params(workdir, step)
    check_unchanged(workdir, meta, {"frozen": frozen_sources(settings), "inputs": model_inputs(spec)})
    params = {part: _cast(trained[part], dtype) for part, dtype in dtypes.items() if part in trained}
    frozen = {part: dtype for part, dtype in dtypes.items() if part not in trained}
    if "lora" in trained and "llm" in frozen:
        frozen["llm"] = float_dtype(settings.train.frozen_dtype)  # as the adapters saw it
    params |= read_files(settings, spec, frozen)
    drawn = {part: dtype for part, dtype in frozen.items() if part not in params}
    params |= jax.tree.map(np.asarray, random_params(spec.config, settings.seed, drawn, None))
    if "lora" in trained and "llm" in frozen:
        config = adapted(settings, spec.config)
        llm = jax.tree.map(np.asarray, params["llm"])
        merge = merge_adapters(config, llm, trained["lora"], dtypes["llm"])
        if check_merge:
            _say_difference(workdir, merge_difference(config, llm, trained["lora"], merge), dtypes["llm"])
        params["llm"] = merge
    return spec, params
