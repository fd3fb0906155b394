"""`convert`: a model from one checkpoint form into another."""

import os
from typing import Any

from llava_jax.convert.chat_known import chat_template_note
from llava_jax.convert.export import DTYPES
from llava_jax.convert.hf import Beside, read_llava, stored_dtype, write_llava
from llava_jax.convert.original_export import TOWER, write_original, write_projector
from llava_jax.convert.peft import write_peft
from llava_jax.settings import read_settings
from llava_jax.source import parse
from llava_jax.train.assemble import load_adapters, load_trained
from llava_jax.types import InputError, ModelConfig

TARGETS = "hf:DIR, llava:DIR, projector:FILE.safetensors, or peft:DIR for the adapters of a lora run"


def convert(
    source: str, target: str, *, dtype: str = "", vision: str = "", base: str = "", mm_vision_tower: str = ""
) -> None:
    """Write the model at `source` to `target`. Raises InputError for forms that are not known and broken folders.

    A run is written in the dtype it computes in, a folder in the dtype it is stored in (float16 as bfloat16), unless
    `dtype` says another. `vision` and `base` are folders for what an original LLaVA folder only names;
    `mm_vision_tower` is what a written one names its tower by.
    """
    form, folder = parse(source, "--from")
    kind, _, destination = target.partition(":")
    if kind not in ("hf", "llava", "projector", "peft") or not destination:
        raise InputError(f"--to={target}: cannot be written; expected {TARGETS}")
    if os.path.abspath(folder) == os.path.abspath(destination):
        raise InputError(f"--to={target}: is the source; choose another folder")
    if dtype and (dtype not in DTYPES or kind == "peft"):
        raise InputError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)}, and none for peft:DIR")
    if mm_vision_tower and kind != "llava":
        raise InputError(f"--mm_vision_tower={mm_vision_tower}: goes with --to=llava:DIR, which names a tower")
    if kind == "peft":
        convert_adapters(form, folder, destination)
        return
    if form == "orbax":
        if vision or base:
            raise InputError(f"--vision and --base are for original LLaVA folders; {folder} is a workdir of train")
        plan, params, settings = load_trained(folder, dtype=dtype or None, check_merge=True)
        config, dtype = plan.config, dtype or plan.config.dtype
        rules, vision_folder, tokenizer = settings.data, plan.vision_folder, plan.tokenizer
    else:
        dtype = dtype or stored_dtype(folder)
        config, params, rules = read_llava(folder, dtype=dtype, stored=True, beside=Beside(vision, base))
        if rules.template_assumed:
            print(f"{folder}: names no template and its chat template is none of ours; {rules.template} is assumed")
        vision_folder, tokenizer = rules.vision, rules.tokenizer
    if kind == "projector":
        write_projector(destination, config, params, dtype)
        print(f"wrote {target}: {dtype}, {config.projector}; read back and compared")
        return
    if form == "orbax" or not rules.template_assumed:
        note = chat_template_note(tokenizer, rules.template)
        if note:
            print(note)
    settings: dict[str, Any] = dict(
        source_vision_folder=vision_folder,
        tokenizer_folder=tokenizer,
        template=rules.template,
        aspect=rules.aspect,
        image_position=rules.image_position,
        dtype=dtype,
    )
    if kind == "hf":
        exported = write_llava(destination, config, params, **settings)
    else:
        exported = write_original(destination, config, params, **settings, tower_name=mm_vision_tower)
        print(
            f"mm_vision_tower is {mm_vision_tower or TOWER!r}; the original code looks for it from where it is "
            "started: give --mm_vision_tower=NAME for a published tower or another path"
        )
    _say_rows(config, exported)
    print(f"wrote {target}: {dtype}, template {rules.template}, pictures {rules.aspect}; read back and compared")


def convert_adapters(form: str, folder: str, destination: str) -> None:
    """Write the adapters and the projector of a lora run as peft loads them. Raises InputError for another source."""
    if form != "orbax":
        raise InputError(f"{folder}: is a whole model; --to=peft:DIR takes the adapters of a run with stage=lora")
    config, trained = load_adapters(folder)
    start = read_settings(os.path.join(folder, "config.json")).init.model
    start_form, start_folder = parse(start, "init.model") if start else ("", "")
    base = start_folder if start_form == "hf" else ""
    write_peft(destination, config, trained["lora"], trained["projector"], base)
    print(
        f"wrote peft:{destination}: rank {config.lora.rank}, alpha {config.lora.alpha:g}, {len(config.lora.targets)} "
        f"layers a block, and the projector; load it onto {base or 'the export of what the run started from'}"
    )


def _say_rows(config: ModelConfig, exported: ModelConfig) -> None:
    before, after = config.llm.vocab_size, exported.llm.vocab_size
    if after > before:
        print(f"vocabulary: {before} -> {after} rows, for <image> and padding")
    if after < before:
        print(f"vocabulary: {before} -> {after} rows, without those for <image> and padding")
