"""`convert`: a model from one checkpoint form into another."""

import dataclasses
import os

from llava_jax.data.templates import check_template
from llava_jax.data.tokenize import check_vocabulary, load_tokenizer
from llava_jax.settings import DTYPES, read_settings
from llava_jax.types import InputError
from llava_jax.weights import hub
from llava_jax.weights.card import made_from, model_card
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.hub import TOWER
from llava_jax.weights.load import load_adapters, read_model
from llava_jax.weights.original_export import write_original, write_projector
from llava_jax.weights.peft import write_peft
from llava_jax.weights.processor import chat_template_note
from llava_jax.weights.source import parse, pinned, split

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
    force: bool = False,
    name: str = "",
) -> None:
    """Write the model at `source` to `target`. Raises InputError for forms that are not known and broken folders.

    A run is written in the dtype it computes in, a folder in the dtype it is stored in (float16 as bfloat16), unless
    `dtype` says another. `template` replaces the one the source names. `vision` and `base` are folders for what an
    original LLaVA folder only names; `mm_vision_tower` is what a written one names its tower by. `step` is that of a
    run's checkpoint, the newest by default. `force` writes also where the export's tokenizer gives other ids than the
    model was trained on. `name` is what the model card says that the model is loaded by, the folder by default.
    """
    source, vision, base = pinned(source, "--from"), pinned(vision, "--vision"), pinned(base, "--base")
    _, folder = parse(source, "--from")
    kind, _, destination = target.partition(":")
    if kind not in KINDS or not destination:
        raise InputError(f"--to={target}: cannot be written; expected {TARGETS}")
    if os.path.abspath(folder) == os.path.abspath(destination):
        raise InputError(f"--to={target}: is the source; choose another folder")
    if dtype and dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if template:
        check_template(template)
    if mm_vision_tower and kind != "llava":
        raise InputError(f"--mm_vision_tower={mm_vision_tower}: goes with --to=llava:DIR, which names a tower")
    if kind == "peft":
        if dtype or template or vision or base:
            raise InputError(
                "--dtype, --template, --vision and --base do not go with --to=peft:DIR: adapters stay as trained"
            )
        convert_adapters(source, destination, step, name)
        return
    config, params, rules = read_model(
        source, "--from", dtype=dtype, vision=vision, base=base, step=step, check_merge=True
    )
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
            destination, config, params, rules, dtype=config.dtype, tower_name=mm_vision_tower, force=force, card=card
        )
        print(
            f"mm_vision_tower is {mm_vision_tower or TOWER!r}; the original code looks for it from where it is "
            "started: give --mm_vision_tower=NAME for a published tower or another path"
        )
    else:
        weights = "orbax" if kind == "orbax" else "safetensors"
        exported = write_llava(
            destination, config, params, rules, dtype=config.dtype, weights=weights, force=force, card=card
        )
    before, after = config.llm.vocab_size, exported.llm.vocab_size
    if after != before:
        change = "for" if after > before else "without those for"
        print(f"vocabulary: {before} -> {after} rows, {change} <image> and padding")
    print(f"wrote {target}: {config.dtype}, template {rules.template}, images {rules.aspect}; read back and compared")


def convert_adapters(source: str, destination: str, step: int | None = None, name: str = "") -> None:
    """Write the adapters and the projector of a lora run as peft loads them. Raises InputError for another source."""
    form, folder = parse(source, "--from")
    if form != "run":
        raise InputError(f"{folder}: is a whole model; --to=peft:DIR takes the adapters of a run with stage=lora")
    config, trained = load_adapters(folder, step)
    assert config.lora is not None
    start = read_settings(os.path.join(folder, "config.json")).init.model
    start_form = parse(start, "init.model")[0] if start else ""
    base = split(start)[1] if start_form == "hf" else ""
    if hub.is_name(base):
        base = hub.repository(base)[0]
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
