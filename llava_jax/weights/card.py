"""The model card of an export, README.md: what the model is, what it was made from and how, and how it is loaded.

It repeats what the run or the folder says that the model comes from. What is not known is left out.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from llava_jax.data.sources import TFDS, is_dataset, split_sources
from llava_jax.settings import RANDOM, flatten, read_settings
from llava_jax.types import InputError, ModelConfig, Settings
from llava_jax.weights import hub
from llava_jax.weights.hf_config import llama_json
from llava_jax.weights.processor import LlavaExtras
from llava_jax.weights.source import UNREADABLE, checkpoint_meta, first_line, is_workdir, parse, split, steps_on_disk

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


# ---- of a folder ------------------------------------------------------------------------------------------------


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
    bases = [hub.repository(each)[0] for each in given.values() if hub.is_name(each)]
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
    if not hub.is_name(source):
        return f"`{os.path.basename(os.path.abspath(source))}`"
    repo, revision = hub.repository(source)
    return f"[{repo}](https://huggingface.co/{repo})" + (f" at `{revision}`" if revision else "")


# ---- of a run ---------------------------------------------------------------------------------------------------


def _of_run(workdir: str, step: int | None) -> Made:
    stages = list(_stages(workdir, step))
    bases = list(dict.fromkeys(base for _, _, settings in stages for base in _bases(settings)))
    licences = [_licence(base) for base in bases]
    metadata: dict[str, Any] = {}
    if named := [hub.repository(base)[0] for base in bases if hub.is_name(base)]:
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
        metadata, _ = read_card(hub.local(base, "the base model"))
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
    if logged:
        figures = f"loss {logged['loss']:.4g}, gradient norm {logged['grad_norm']:.4g}"
        lines += ["", f"Logged last, at update {logged['step'] + 1:,}: {figures}."]
    return "\n".join(lines)


def _data(annotations: str) -> str:
    """Name the sources, without the folders they lie in."""
    named = []
    for path, weight in split_sources(annotations):
        last = path.rstrip("/").split("/")[-2 if is_dataset(path) else -1 :]  # a data set's last folder is its version
        name = path if path.startswith(TFDS) else "/".join(last)
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
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("}\n")]
    return next((line for line in reversed(lines) if line["step"] < step), None)
