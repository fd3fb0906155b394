"""Write what both sides read: a model folder of random weights, a batch, images. Run with the work as its argument.

It is a program of its own, on the CPU, so that its memory is not counted for either side.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageFilter

from llava_jax.data.images import normalised
from llava_jax.models.llava import init
from llava_jax.types import ClipConfig, LlamaConfig, ModelConfig
from llava_jax.weights import hf, hf_config
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.load import CLIPS, EMBEDDED_TOKENIZER, LLAMAS
from llava_jax.weights.processor import LlavaExtras

MODELS = {
    "tiny": ModelConfig(CLIPS["tiny"], LLAMAS["tiny"], image_token_id=LLAMAS["tiny"].vocab_size),
    "small": ModelConfig(
        ClipConfig(width=256, mlp_width=1024, layers=7, heads=4, image_size=168, patch_size=14),
        LlamaConfig(vocab_size=8192, width=512, mlp_width=1376, layers=8, heads=8, kv_heads=8, head_dim=64),
        image_token_id=8192,
    ),
    "7b": ModelConfig(CLIPS["clip-l-14-336"], LLAMAS["vicuna-7b"]),
}


def make(work: Mapping[str, Any]) -> None:
    """Write `model` (with weights where `weights` says so), `batch` and the `images` that the work names."""
    if "model" in work:
        config = write_model(work["model"], MODELS[work["size"]], work["weights"])
        write_batch(work["batch"], config, work)
    for seed, path in enumerate(work.get("images", ())):
        write_image(path, seed)


def write_model(folder: str, config: ModelConfig, weights: bool) -> ModelConfig:
    """Write a LlavaForConditionalGeneration folder; return the config it is read back with."""
    if weights:
        extras = LlavaExtras(aspect="pad", tokenizer=EMBEDDED_TOKENIZER)
        write_llava(folder, config, jax.tree.map(np.asarray, init(config, seed=0)), extras)
    else:
        os.makedirs(folder)
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(hf_config.llava_json(config, dtype="bfloat16", pad_id=0, bos_id=1, eos_id=2), file)
    return hf.read_llava_config(folder)[0]


def write_batch(path: str, config: ModelConfig, work: Mapping[str, Any]) -> None:
    """Write full rows: a few tokens, one image, the rest text; the last `targets` tokens of a row are supervised.

    Images as `bytes`, which our step takes, and normalised as `pixels`.
    """
    rng = np.random.default_rng(0)
    shape, patches, size = (work["rows"], work["length"]), config.vision.patches, config.vision.image_size
    tokens_BT = rng.integers(3, min(config.image_token_id, config.llm.vocab_size), shape).astype(np.int32)
    tokens_BT[:, 1 : 1 + patches] = config.image_token_id
    targets_BT = np.zeros(shape, bool)
    targets_BT[:, shape[1] - work["targets"] :] = True
    pixels_BNXYC = rng.integers(0, 256, (shape[0], 1, size, size, 3), np.uint8)
    scaled_BNXYC = normalised(pixels_BNXYC, config.vision.pixels)
    np.savez(path, tokens=tokens_BT, targets=targets_BT, bytes=pixels_BNXYC, pixels=scaled_BNXYC)


def write_image(path: str, seed: int) -> None:
    """Write a JPEG of 640 x 480 (480 x 640 every third): noise smoothed to about the file size of a photograph."""
    rng = np.random.default_rng(seed)
    width, height = (480, 640) if seed % 3 == 2 else (640, 480)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
    grain = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    image = Image.blend(coarse.resize((width, height)), grain, 0.15).filter(ImageFilter.GaussianBlur(0.7))
    image.save(path, quality=90)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as work_file:
        make(json.load(work_file))
