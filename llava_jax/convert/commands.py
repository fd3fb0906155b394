"""`convert`: a model from one checkpoint form into another."""

import os

from llava_jax.convert import config as hf_config
from llava_jax.convert.hf import read_llava, write_llava
from llava_jax.train.assemble import is_workdir, load_trained
from llava_jax.types import InputError

SOURCES = "hf:DIR (LlavaForConditionalGeneration folder), orbax:DIR (a workdir of train), or such a DIR alone"
TARGETS = "hf:DIR"


def convert(source: str, target: str) -> None:
    """Write the model at `source` to `target`. Raises InputError for forms that are not known and broken folders.

    A run is written in the dtype it computes in, a folder in the dtype it is stored in (float16 as float32, which
    holds it exactly).
    """
    form, folder = _form(source)
    kind, _, destination = target.partition(":")
    if kind != "hf" or not destination:
        raise InputError(f"--to={target}: cannot be written; expected {TARGETS}")
    if os.path.abspath(folder) == os.path.abspath(destination):
        raise InputError(f"--to={target}: is the source; choose another folder")
    if form == "orbax":
        plan, params, settings = load_trained(folder)
        config, dtype = plan.config, plan.config.dtype
        rules, vision, tokenizer = settings.data, plan.vision_folder, plan.tokenizer
    else:
        config, params, rules = read_llava(folder)
        dtype = _stored_dtype(folder)
        vision, tokenizer = folder, rules.tokenizer
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


def _form(source: str) -> tuple[str, str]:
    """(hf or orbax, folder) of SRC; a bare folder is known by the files in it."""
    kind, separator, folder = source.partition(":")
    if not separator or kind not in ("hf", "orbax", "llava"):
        kind, folder = "", source
    if kind == "llava":
        raise InputError(f"--from={source}: the original LLaVA layout cannot be read; expected {SOURCES}")
    if not os.path.isdir(folder):
        raise InputError(f"--from={source}: no such folder; expected {SOURCES}")
    if kind == "orbax" and not is_workdir(folder):
        raise InputError(f"--from={source}: has no config.json and checkpoints/; expected {SOURCES}")
    return kind or ("orbax" if is_workdir(folder) else "hf"), folder


def _stored_dtype(folder: str) -> str:
    given = hf_config.read_config(folder, "a LlavaForConditionalGeneration folder")
    stored = given.get("dtype", given.get("torch_dtype"))
    return "bfloat16" if stored == "bfloat16" else "float32"
