"""`convert`: a model from one checkpoint form into another."""

import os

from llava_jax.convert.chat_known import chat_template_note
from llava_jax.convert.hf import read_llava, stored_dtype, write_llava
from llava_jax.convert.peft import write_peft
from llava_jax.settings import read_settings
from llava_jax.source import parse
from llava_jax.train.assemble import load_adapters, load_trained
from llava_jax.types import InputError

TARGETS = "hf:DIR, or peft:DIR for the adapters of a lora run"


def convert(source: str, target: str) -> None:
    """Write the model at `source` to `target`. Raises InputError for forms that are not known and broken folders.

    A run is written in the dtype it computes in, a folder in the dtype it is stored in (float16 as bfloat16).
    """
    form, folder = parse(source, "--from")
    kind, _, destination = target.partition(":")
    if kind not in ("hf", "peft") or not destination:
        raise InputError(f"--to={target}: cannot be written; expected {TARGETS}")
    if os.path.abspath(folder) == os.path.abspath(destination):
        raise InputError(f"--to={target}: is the source; choose another folder")
    if kind == "peft":
        convert_adapters(form, folder, destination)
        return
    if form == "orbax":
        plan, params, settings = load_trained(folder, check_merge=True)
        config, dtype = plan.config, plan.config.dtype
        rules, vision, tokenizer = settings.data, plan.vision_folder, plan.tokenizer
    else:
        dtype = stored_dtype(folder)
        config, params, rules = read_llava(folder, dtype=dtype)
        if rules.template_assumed:
            print(f"{folder}: names no template and its chat template is none of ours; {rules.template} is assumed")
        vision, tokenizer = folder, rules.tokenizer
    if form == "orbax" or not rules.template_assumed:
        note = chat_template_note(tokenizer, rules.template)
        if note:
            print(note)
    exported = write_llava(
        destination,
        config,
        params,
        source_vision_folder=vision,
        tokenizer_folder=tokenizer,
        template=rules.template,
        aspect=rules.aspect,
        image_position=rules.image_position,
        dtype=dtype,
    )
    if exported.llm.vocab_size != config.llm.vocab_size:
        print(f"vocabulary: {config.llm.vocab_size} -> {exported.llm.vocab_size} rows, for <image> and padding")
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
