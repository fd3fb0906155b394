"""A random LLaVA and its tokenizer, small enough to answer in milliseconds, for the tests of what answers."""

import functools
import os
import string

import jax
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from llava_jax.api import Llava, Processor, assemble
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.models import llava
from llava_jax.types import ClipConfig, LlamaConfig, ModelConfig

VOCAB = 400
CHARACTERS = 259


def config(**changes) -> ModelConfig:
    llm = dict(vocab_size=VOCAB, width=32, mlp_width=64, layers=2, heads=4, kv_heads=2, head_dim=8, max_positions=512)
    vision = ClipConfig(width=16, mlp_width=32, layers=2, heads=2, image_size=16, patch_size=8)
    return ModelConfig(vision=vision, llm=LlamaConfig(**llm | changes), image_token_id=VOCAB)


@functools.cache
def sharp_params(config: ModelConfig, seed: int = 0) -> dict:
    """Random parameters whose next-token distributions depend on all that went before, are far from flat, and prefer
    characters over the bytes and the special tokens that open the vocabulary."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = "/".join(str(key.key) for key in path)
        if name.endswith("scale"):
            return np.ones(leaf.shape, np.float32)
        if "bias" in name:
            return np.zeros(leaf.shape, np.float32)
        scale = 1.0 if "embed" in name else 0.3 if "projector" in name or "attn" in name else 0.16
        return rng.normal(size=leaf.shape).astype(np.float32) * scale

    params = jax.tree_util.tree_map_with_path(draw, llava.build(config)[1])
    params["llm"]["head"]["kernel"][:, :CHARACTERS] *= 0.2
    return params


def write_tokenizer(folder: str) -> str:
    """A LLaMA-like tokenizer of single characters, `##` and byte fallback."""
    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *sorted(set(string.printable[:95]) - {" "})]
    tokens += ["##", "▁a", "an"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("#", "#"), ("▁", "a"), ("a", "n")]
    codec = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    codec.add_special_tokens(specials)
    codec.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    codec.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    codec.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    os.makedirs(folder, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=codec, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@functools.cache
def model(folder: str, template: str = "v1", aspect: str = "pad") -> Llava:
    """The random model with the tokenizer written to `folder`."""
    return assembled(folder, config(), template=template, aspect=aspect)


def assembled(folder: str, config: ModelConfig, tensor: int = 0, template: str = "v1", aspect: str = "pad") -> Llava:
    tokenizer = load_tokenizer(write_tokenizer(os.path.join(folder, "tokenizer")))
    return assemble("tiny", sharp_params(config), Processor(tokenizer, config, template, aspect, "front"), tensor)


def draw_image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    return Image.fromarray(pixels)
