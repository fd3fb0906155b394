"""Model FLOPs against the published models and against a small one summed up by hand."""

import dataclasses

import pytest

from llava_jax.models.flops import clip_forward_flops, decoder_weights, projector_weights, step_flops
from llava_jax.types import LoraConfig, ModelConfig
from llava_jax.weights.load import CLIPS, LLAMAS

CONFIG_7B = ModelConfig(vision=CLIPS["clip-l-14-336"], llm=LLAMAS["vicuna-7b"])
CONFIG_13B = ModelConfig(vision=CLIPS["clip-l-14-336"], llm=LLAMAS["vicuna-13b"])
LEARNS = {"pretrain": ("projector",), "finetune": ("projector", "llm"), "mid": ("projector", "llm", "vision")}


def test_parts_of_the_published_models():
    assert decoder_weights(CONFIG_7B.llm) == 6_607_077_376
    assert decoder_weights(CONFIG_13B.llm) == 12_851_609_600
    assert projector_weights(CONFIG_7B) == 1024 * 4096 + 4096 * 4096
    assert projector_weights(dataclasses.replace(CONFIG_7B, projector="linear")) == 1024 * 4096
    assert CONFIG_7B.vision_layers == 23
    assert clip_forward_flops(CONFIG_7B.vision, 23) == pytest.approx(0.366e12, rel=0.002)


@pytest.mark.parametrize(
    "config, stage, length, teraflops",
    [
        (CONFIG_7B, "pretrain", 600, 16.6),
        (CONFIG_7B, "finetune", 836, 34.2),
        (CONFIG_13B, "pretrain", 600, 31.8),
        (CONFIG_13B, "finetune", 836, 66.0),
    ],
)
def test_one_conversation_of_the_published_stages(config, stage, length, teraflops):
    assert step_flops(config, LEARNS[stage], rows=1, length=length, images=1) / 1e12 == pytest.approx(
        teraflops, rel=0.005
    )


def test_a_small_model_by_hand():
    llm = dataclasses.replace(LLAMAS["tiny"], tied=True)  # width 64, mlp 128, 2 layers, 4 heads of 16, 2 kv heads
    config = ModelConfig(vision=CLIPS["tiny"], llm=llm)
    products = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) + 64 * 2048
    assert decoder_weights(llm) == products
    T, attention = 10, 2 * 2 * 2 * 10 * 64 / 2 * 2  # per token: layers x (scores, values) x 2T(heads head_dim) / 2
    block = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 17 * 17 * 32
    image = 2 * block + 2 * 16 * (8 * 8 * 3) * 32 + 6 * 16 * (32 * 64 + 64 * 64)
    finetune = 3 * T * (2 * products + attention / 2) + image
    pretrain = T * (4 * products + 3 * attention / 2) + image
    assert step_flops(config, LEARNS["finetune"], rows=1, length=T, images=1) == finetune
    assert step_flops(config, LEARNS["pretrain"], rows=1, length=T, images=1) == pretrain


def test_a_tower_that_learns_counts_three_times_and_its_frozen_blocks_once():
    config = ModelConfig(vision=CLIPS["tiny"], llm=LLAMAS["tiny"])
    size = dict(rows=0, length=10, images=1)
    frozen = step_flops(config, LEARNS["finetune"], **size)
    block = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 17 * 17 * 32
    patches = 2 * 16 * (8 * 8 * 3) * 32
    assert step_flops(config, LEARNS["mid"], **size) - frozen == 2 * (2 * block + patches)
    last = dataclasses.replace(config, learning_blocks=1)
    assert step_flops(last, LEARNS["mid"], **size) - frozen == 2 * block
    lora = LoraConfig(4, 8.0, 0.0, ("attn/q",), vision_targets=("attn/q", "mlp/up"))
    adapted = dataclasses.replace(config, lora=lora)
    through = 2 * block + patches + 2 * 4 * 17 * 17 * 32  # attention has no weights: its backward pass is all there is
    adapters = 6 * 17 * 2 * 4 * ((32 + 32) + (32 + 64))
    assert step_flops(adapted, ("projector", "lora", "vision_lora"), **size) - frozen == through + adapters


def test_rows_and_images_count_each():
    whole = step_flops(CONFIG_7B, LEARNS["finetune"], rows=128, length=2048, images=100)
    text = step_flops(CONFIG_7B, LEARNS["finetune"], rows=1, length=2048, images=0)
    image = step_flops(CONFIG_7B, LEARNS["finetune"], rows=0, length=2048, images=1)
    assert whole == pytest.approx(128 * text + 100 * image)
