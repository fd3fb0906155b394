"""`convert`: a model from one checkpoint form into another, and the card that an export carries.

The card, README.md, says what the model is, what it was made from and how, and how it is loaded. It repeats what the
run or the folder says that the model comes from; what is not known is left out.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.data.sources import HUB, TFDS, is_dataset, split_sources
from llava_jax.data.templates import check_template
from llava_jax.data.tokenize import check_vocabulary, load_tokenizer
from llava_jax.hub import TOWER
from llava_jax.io import absolute_path, exists, opened
from llava_jax.settings import DTYPES, RANDOM, differences, flatten, read_settings
from llava_jax.types import InputError, LazyTensor, ModelConfig, Settings
from llava_jax.weights.hf import chat_template_note
from llava_jax.weights.hf_config import llama_json
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.load import Params, load_adapters, read_model
from llava_jax.weights.name_table import flatten as flatten_tree
from llava_jax.weights.original_export import write_original, write_projector
from llava_jax.weights.peft import write_peft
from llava_jax.weights.processor import LlavaExtras
from llava_jax.weights.source import (
    UNREADABLE,
    checkpoint_meta,
    earlier_configs,
    first_line,
    is_name,
    is_workdir,
    local_folder,
    parse,
    pinned,
    repository,
    split,
    steps_on_disk,
)

TARGETS = "hf:DIR, llava:DIR, orbax:DIR, projector:FILE.safetensors, or peft:DIR for the adapters of a lora run"
KINDS = ("hf", "llava", "orbax", "projector", "peft")


def convert(
    source: str,
    target: str,
    *,
    dtype: str = "",
    template: str = "",
    vision: str = "",
    base: str = "",
    mm_vision_tower: str = "",
    step: int | None = None,
    pad_vocab: int = 0,
    force: bool = False,
    name: str = "",
) -> None:
    """Write the model at `source` to `target`. Raises InputError for forms that are not known and broken folders.

    A run is written in the dtype it computes in, a folder in the dtype it is stored in (float16 as bfloat16), unless
    `dtype` says another. `template` replaces the one the source names. `vision` and `base` are folders for what an
    original LLaVA folder only names; `mm_vision_tower` is what a written one names its tower by. `step` is that of a
    run's checkpoint, the newest by default. `pad_vocab` gives the vocabulary as many rows as the tokenizer has ids, up
    to the next multiple of it. `force` writes also where the export's tokenizer gives other ids than the model was
    trained on, and where parameters are not finite. `name` is what the model card says that the model is loaded by, the
    folder by default.
    """
    source, vision, base = pinned(source, "--from"), pinned(vision, "--vision"), pinned(base, "--base")
    folder = parse(source, "--from")[1]
    kind, destination = _parse_target(target, folder)
    _check_options(kind, dtype, template, mm_vision_tower, pad_vocab)
    if kind == "peft":
        if dtype or template or vision or base:
            raise InputError(
                "--dtype, --template, --vision and --base do not go with --to=peft:DIR: adapters stay as trained"
            )
        convert_adapters(source, destination, step, name, force)
        return
    config, params, rules = read_model(
        source, "--from", dtype=dtype, vision=vision, base=base, step=step, check_merge=True
    )
    if kind == "projector":
        params = {"projector": params["projector"]}
    _check_finite(source, params, force)
    if kind == "projector":
        write_projector(destination, config, params, config.dtype)
        print(f"wrote {target}: {config.dtype}, {config.projector}; read back and compared")
        return
    if template:
        rules = dataclasses.replace(rules, template=template, template_assumed=False)
    check_vocabulary(load_tokenizer(rules.tokenizer), config, rules.tokenizer)
    note = chat_template_note(rules.tokenizer, rules.template)
    if rules.template_assumed:
        note = (
            f"{folder}: names no template and its chat template is none of ours; {rules.template} is assumed "
            "(--template=NAME says another)"
        )
    if note:
        print(note)
    made = made_from(source, "--from", step, {"vision tower": vision, "base": base})
    card = model_card(kind, name or os.path.basename(os.path.abspath(destination)), config, made, rules)
    if kind == "llava":
        exported = write_original(
            destination,
            config,
            params,
            rules,
            dtype=config.dtype,
            tower_name=mm_vision_tower,
            pad_vocab=pad_vocab,
            force=force,
            card=card,
        )
        print(
            f"mm_vision_tower is {mm_vision_tower or TOWER!r}; the original code looks for it from where it is "
            "started: give --mm_vision_tower=NAME for a published tower or another path"
        )
    else:
        weights = "orbax" if kind == "orbax" else "safetensors"
        exported = write_llava(
            destination,
            config,
            params,
            rules,
            dtype=config.dtype,
            weights=weights,
            pad_vocab=pad_vocab,
            force=force,
            card=card,
        )
    before, after = config.llm.vocab_size, exported.llm.vocab_size
    if after != before:
        change = f"{'for' if after > before else 'without those for'} <image> and padding"
        if pad_vocab:
            change = f"a multiple of {pad_vocab} for the tokenizer's ids (--pad_vocab)"
        print(f"vocabulary: {before} -> {after} rows, {change}")
    print(f"wrote {target}: {config.dtype}, template {rules.template}, images {rules.aspect}; read back and compared")


def _check_finite(source: str, params: Params, force: bool) -> None:
    """Raise InputError naming the first parameter that holds what is no number, and how many there are."""
    broken = [path for path, leaf in flatten_tree(params).items() if not _is_finite(leaf)]
    if broken and not force:
        raise InputError(
            f"--from={source}: {broken[0]} and {len(broken) - 1} other parameters hold NaN or infinite values; take an "
            "earlier checkpoint (--step), or give --force to write them as they are"
        )


def _is_finite(leaf: np.ndarray | LazyTensor) -> bool:
    """Return whether all values are numbers, reading a stack layer by layer."""
    is_stack = leaf.stacked if isinstance(leaf, LazyTensor) else leaf.ndim > 1
    layers = (leaf[n] for n in range(leaf.shape[0])) if is_stack else (np.asarray(leaf),)
    return all(bool(np.isfinite(layer).all()) for layer in layers)


def _parse_target(target: str, folder: str) -> tuple[str, str]:
    """Return kind and path of `--to`, which may not be `folder`, the source. Raises InputError."""
    kind, _, destination = target.partition(":")
    if kind not in KINDS or not destination:
        raise InputError(f"--to={target}: cannot be written; expected {TARGETS}")
    if absolute_path(folder) == os.path.abspath(destination):
        raise InputError(f"--to={target}: is the source; choose another folder")
    return kind, destination


def _check_options(kind: str, dtype: str, template: str, mm_vision_tower: str, pad_vocab: int) -> None:
    """Raise InputError for options that are unknown, or do not go with an export of `kind`."""
    if dtype and dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if template:
        check_template(template)
    if mm_vision_tower and kind != "llava":
        raise InputError(f"--mm_vision_tower={mm_vision_tower}: goes with --to=llava:DIR, which names a tower")
    if pad_vocab < 0 or (pad_vocab and kind in ("projector", "peft")):
        raise InputError(f"--pad_vocab={pad_vocab}: expected 1 or more rows, and --to=hf:DIR, llava:DIR or orbax:DIR")


def convert_adapters(
    source: str, destination: str, step: int | None = None, name: str = "", force: bool = False
) -> None:
    """Write the adapters and the projector of a lora run as peft loads them. Raises InputError for another source."""
    form, folder = parse(source, "--from")
    if form != "run":
        raise InputError(f"{folder}: is a whole model; --to=peft:DIR takes the adapters of a run with stage=lora")
    config, trained = load_adapters(folder, step)
    _check_finite(source, trained, force)
    assert config.lora is not None
    start = read_settings(os.path.join(folder, "config.json")).init.model
    start_form = parse(start, "init.model")[0] if start else ""
    base = split(start)[1] if start_form == "hf" else ""
    if is_name(base):
        base = repository(base)[0]
    name = name or os.path.basename(os.path.abspath(destination))
    onto = os.path.basename(base) if os.path.isabs(base) else base
    card = model_card("peft", name, config, made_from(source, "--from", step), base=onto)
    write_peft(destination, config, trained, base, card)
    targets = len(config.lora.targets) + len(config.lora.vision_targets)
    also = ", and the projector" if "projector" in trained else ""
    print(
        f"wrote peft:{destination}: rank {config.lora.rank}, alpha {config.lora.alpha:g}, {targets} layers a "
        f"block{also}; load it onto {base or 'the export of what the run started from'}"
    )


# ---- the card ----


# From this line on a card is the same in every form of a model: it goes along where an export is converted.
MADE = "## How it was made"
# Of a source's card, what holds for the same model in another form.
KEPT = ("base_model", "datasets", "language", "license", "license_name", "license_link")
LICENCE = ("license", "license_name", "license_link")
# Keys of a run that make up its recipe, next to `stage`; `lora.` in that stage alone.
RECIPE = (
    *("data.template", "data.aspect", "data.image_position", "data.exif", "data.max_length", "data.pack"),
    *("optim.lr", "optim.groups", "optim.schedule", "optim.warmup_ratio", "optim.weight_decay", "optim.clip_norm"),
    *("optim.b1", "optim.b2", "optim.eps", "train.batch_size", "train.steps", "train.epochs", "train.loss_norm"),
    *("train.dtype", "train.frozen_dtype", "seed"),
)
LOAD_HF = """```python
from transformers import AutoProcessor, {kind}

processor = AutoProcessor.from_pretrained("{name}")
model = {kind}.from_pretrained("{name}")
```"""
LOAD_PEFT = """```python
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{name}")
```"""
LOAD_ORIGINAL = "The original LLaVA code loads the folder with `--model-path {name}`."
LOAD_OURS = """```
llava-jax generate --model={name}{base} --image=cat.jpg --prompt="What is this?"
```"""


@dataclasses.dataclass(frozen=True)
class Made:
    """Where a model comes from: what of that is for the card's front matter, and the text that begins with MADE."""

    metadata: dict[str, Any]
    text: str


def model_card(
    kind: str, name: str, config: ModelConfig, made: Made, extras: LlavaExtras | None = None, base: str = ""
) -> str:
    """Return the text of README.md.

    Args:
        kind: the form of the export: hf, llava, orbax, peft.
        name: what it is loaded by, a folder or a name on the Hub.
        config: the model as it is written.
        made: where it comes from.
        extras: its template and image settings; None for adapters.
        base: what adapters are loaded onto, where that is one model.
    """
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        base_model=made.metadata.get("base_model"),
        datasets=made.metadata.get("datasets"),
        language=made.metadata.get("language"),
        library_name={"hf": "transformers", "peft": "peft"}.get(kind),
        license=made.metadata.get("license"),
        license_name=made.metadata.get("license_name"),
        license_link=made.metadata.get("license_link"),
        pipeline_tag="image-text-to-text",
        tags=["llava", "llava-jax", *(["lora"] if kind == "peft" else [])],
    )
    named = base or "BASE"
    theirs = {
        "hf": LOAD_HF.format(name=name, kind=f"Llava{'Next' if config.pinpoints else ''}ForConditionalGeneration"),
        "llava": LOAD_ORIGINAL.format(name=name),
        "peft": LOAD_PEFT.format(name=name, base=named),
    }
    ours = LOAD_OURS.format(name=name, base=f" --base={named}" if kind == "peft" else "")
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {os.path.basename(name)}",
        _about(kind, config, extras),
        "## How to load it",
        *([theirs[kind]] if kind in theirs else []),
        ours,
        made.text,
    ]
    return "\n\n".join(parts) + "\n"


def _about(kind: str, config: ModelConfig, extras: LlavaExtras | None) -> str:
    """Return what its config says of the model, in two sentences."""
    vision, llm = config.vision, config.llm
    what = "LoRA adapters and the projector of a LLaVA" if kind == "peft" else "A LLaVA"
    tower, decoder = {"clip": "CLIP", "siglip": "SigLIP"}[vision.family], llama_json(llm)["model_type"]
    line = (
        f"{what}: {tower} vision tower ({vision.layers} layers, width {vision.width}, {vision.image_size} px), "
        f"projector {config.projector}, {decoder} decoder ({llm.layers} layers, width {llm.width})"
    )
    if extras is None:
        return f"{line}."
    assumed = " (assumed)" if extras.template_assumed else ""
    return f"{line}, {config.dtype}. Conversation template `{extras.template}`{assumed}, images `{extras.aspect}`."


# ---- the card of a folder ----


def made_from(source: str, name: str, step: int | None = None, companions: dict[str, str] | None = None) -> Made:
    """Return where the model at a SRC comes from, `name` being its flag; `step` is that of a run's checkpoint.

    `companions` are folders or names on the Hub, by what they are, that an original LLaVA folder was read with.
    """
    kind, folder = parse(source, name)
    if kind == "run":
        return _of_run(folder, step)
    metadata, body = read_card(folder)
    metadata = {key: metadata[key] for key in KEPT if metadata.get(key)}
    given = {"model": split(source)[1], **(companions or {})}
    bases = [repository(each)[0] for each in given.values() if is_name(each)]
    if bases:
        metadata["base_model"] = bases
    if MADE in body:
        return Made(metadata, body[body.index(MADE) :].strip())
    lines = [f"- {what}: {_named(each)}" for what, each in given.items() if each]
    return Made(metadata, "\n".join([MADE, "", "Converted by llava-jax from", "", *lines]))


def read_card(folder: str) -> tuple[dict[str, Any], str]:
    """Return (front matter, whole text) of a folder's README.md, ({}, "") where it has none."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return {}, ""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read()
    try:
        return metadata_load(path) or {}, text
    except (ValueError, YAMLError) as error:
        print(f"{path}: its front matter cannot be read and does not go along ({first_line(error)})")
        return {}, text


def _named(source: str) -> str:
    """Return a name on the Hub with its revision, or a folder's last name: where it lay is no one else's business."""
    if not is_name(source):
        return f"`{os.path.basename(os.path.abspath(source))}`"
    repo, revision = repository(source)
    return f"[{repo}](https://huggingface.co/{repo})" + (f" at `{revision}`" if revision else "")


# ---- the card of a run ----


def _of_run(workdir: str, step: int | None) -> Made:
    stages = list(_stages(workdir, step))
    bases = list(dict.fromkeys(base for _, _, settings in stages for base in _bases(settings)))
    licences = [_licence(base) for base in bases]
    metadata: dict[str, Any] = {}
    if named := [repository(base)[0] for base in bases if is_name(base)]:
        metadata["base_model"] = named
    if licences and all(licence and licence == licences[0] for licence in licences):
        metadata |= licences[0]
    said = [f", licence {licence['license']}" if licence else "" for licence in licences]
    lines = [f"- {_named(base)}{licence}" for base, licence in zip(bases, said, strict=True)]
    texts = ["\n".join(["Base models:", "", *lines]) if lines else "Base models: none, from random weights."]
    texts += [_stage_text(*stage) for stage in stages]
    return Made(metadata, "\n\n".join([MADE, "Trained by llava-jax.", *texts]))


def _stages(workdir: str, step: int | None) -> Iterator[tuple[str, int, Settings]]:
    """Yield (workdir, updates done, settings) of the runs that led to this one, the first one first."""
    settings = read_settings(os.path.join(workdir, "config.json"))
    for earlier in (split(settings.init.model)[1], settings.init.projector):
        if is_workdir(earlier):
            yield from _stages(earlier, None)
    yield workdir, max(steps_on_disk(workdir), default=0) if step is None else step, settings


def _bases(settings: Settings) -> Iterator[str]:
    """Yield the folders or names of the models that a run started from and that no run of ours made."""
    model, whole = settings.model, split(settings.init.model)[1]
    for source in [whole] if whole else [model.vision, model.llm]:
        if not source.startswith(RANDOM) and not is_workdir(source):
            yield source


def _licence(base: str) -> dict[str, str]:
    """Return what the card of a base model says of its licence; nothing where it is not at hand any more."""
    try:
        metadata, _ = read_card(local_folder(base, "the base model"))
    except InputError:
        return {}
    return {key: metadata[key] for key in LICENCE if metadata.get(key)} if metadata.get("license") else {}


def _stage_text(workdir: str, step: int, settings: Settings) -> str:
    """Return data, recipe and the last figures of one run."""
    values = dict(flatten(dataclasses.asdict(settings)))
    keys = [key for key in values if key in RECIPE or (key.startswith("lora.") and settings.stage == "lora")]
    rows, logged = _rows(workdir, step), _logged(workdir, step)
    lines = [f"### Stage `{settings.stage}`, {step:,} update{'s' * (step != 1)}", ""]
    lines += [f"Data: {_data(settings.data.annotations)}{f', {rows:,} rows' if rows else ''}.", ""]
    projector = settings.init.projector
    if projector and not is_workdir(projector):
        lines += [f"Projector at the start: {_named(projector)}.", ""]
    lines += ["```", *(f"{key}: {values[key]}" for key in keys if values[key] != ""), "```"]
    for until, before in _earlier(workdir, step):
        changed = [f"{key} {old}" for key, (old, _) in differences(before, settings).items() if key in keys]
        lines += ["", f"Until update {until:,}: {', '.join(changed)}."] if changed else []
    if logged:
        figures = f"loss {logged['loss']:.4g}, gradient norm {logged['grad_norm']:.4g}"
        lines += ["", f"Logged last, at update {logged['step'] + 1:,}: {figures}."]
    return "\n".join(lines)


def _earlier(workdir: str, step: int) -> list[tuple[int, Settings]]:
    """Return the configs with which a run began, before it was resumed with others, and the update each ends at."""
    found = [until for until in earlier_configs(workdir) if until <= step]
    return [(until, read_settings(os.path.join(workdir, f"config.until-{until}.json"))) for until in found]


def _data(annotations: str) -> str:
    """Name the sources, without the folders they lie in."""
    named = []
    for path, weight in split_sources(annotations):
        last = path.rstrip("/").split("/")[-2 if is_dataset(path) else -1 :]  # a data set's last folder is its version
        name = path if path.startswith((HUB, TFDS)) else "/".join(last)
        named.append(f"`{name}`" + (f" (weight {weight:g})" if weight is not None else ""))
    return ", ".join(named)


def _rows(workdir: str, step: int) -> int | None:
    try:
        return checkpoint_meta(workdir, step)["inputs"]["data.annotations"]["rows"]
    except UNREADABLE:  # of a run that did not count them yet, or that is damaged
        return None


def _logged(workdir: str, step: int) -> dict[str, Any] | None:
    """Return the last whole line of metrics.jsonl up to the checkpoint."""
    path = os.path.join(workdir, "metrics.jsonl")
    if not exists(path):
        return None
    with opened(path) as file:
        lines = [json.loads(line) for line in file if line.endswith(b"}\n")]
    return next((line for line in reversed(lines) if line["step"] < step), None)
