"""A whole model from any SRC, and whether the tokenizer beside it is its own."""

import dataclasses
from typing import Any

from llava_jax.data.tokenize import TextTokenizer
from llava_jax.types import InputError, ModelConfig
from llava_jax.weights.hf import Beside, LlavaExtras, read_llava, stored_dtype
from llava_jax.weights.source import parse
from llava_jax.weights.spec import load_trained

Params = dict[str, Any]


def read_model(
    source: str, name: str, *, dtype: str = "", vision: str = "", base: str = "", check_merge: bool = False
) -> tuple[ModelConfig, Params, LlavaExtras]:
    """Config, all parameters (numpy or `Stored`, in the config's dtype) and extras of a SRC; `name` is its flag or key.

    A run comes in the dtype it computes in, a folder in the one it is stored in (float16 as bfloat16), unless `dtype`
    says another. `vision` and `base` are folders for what an original LLaVA folder only names; `check_merge` is
    `load_trained`'s.
    """
    form, folder = parse(source, name)
    if form == "run":
        if vision or base:
            raise InputError(f"--vision and --base are for original LLaVA folders; {folder} is a workdir of train")
        plan, params, settings = load_trained(folder, dtype=dtype or None, check_merge=check_merge)
        config, rules = plan.config, settings.data
        dtype = dtype or config.dtype
        extras = LlavaExtras(
            rules.template, rules.aspect, rules.image_position, plan.tokenizer, vision=plan.vision_folder or ""
        )
    else:
        dtype = dtype or stored_dtype(folder)
        config, params, extras = read_llava(folder, dtype=dtype, stored=True, beside=Beside(vision, base))
    return dataclasses.replace(config, dtype=dtype), params, extras


def check_vocabulary(tokenizer: TextTokenizer, config: ModelConfig, folder: str) -> None:
    """InputError when the tokenizer in `folder` is that of another model.

    The embedding may have more rows than the tokenizer has ids; `<image>` and the pad token may lie outside, as their
    rows are never looked up.
    """
    rows, image = config.llm.vocab_size, tokenizer.image_token_id(0)
    outside = {i for i in (config.image_token_id, tokenizer.pad_id) if rows <= i < tokenizer.size}
    mend = "copy the tokenizer's files from where the model came from"
    if tokenizer.size - len(outside) > rows:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {tokenizer.size - 1} and the decoder's embedding {rows} rows: "
            f"expected the tokenizer that belongs to the decoder; {mend}"
        )
    if image < tokenizer.size and image != config.image_token_id:
        raise InputError(
            f"{folder}: <image> is {image} in the tokenizer and {config.image_token_id} in the model "
            f"(image_token_index of config.json): expected one id; {mend}"
        )
    word = tokenizer.decode([config.image_token_id]) if config.image_token_id < image == tokenizer.size else ""
    if word:
        raise InputError(
            f"{folder}: the model's image token {config.image_token_id} (image_token_index of config.json) is the text "
            f"{word!r} in the tokenizer: expected one with <image>; {mend}"
        )
