"""Sixteen steps of AdamW in each stage follow the PyTorch loop, on rows our own pipeline encodes."""

import json

import numpy as np
import peer_training
import peers
import pytest
from PIL import Image

from llava_jax.types import UNPACKED, DataSettings, OptimSettings
from llava_jax.weights import hf

ROWS = [
    dict(image="a.png", turns=["<image>\nWhat is the man doing in the image?", "He is using his cell phone."]),
    dict(image="b.jpg", turns=["Is there a dog?\n<image>", "Yes, there is.", "What colour is it?", "Brown and white."]),
    dict(turns=["How many legs does a spider have?", "A spider has eight legs."]),
    dict(image="a.png", turns=["<image>\nDescribe it.", "A street at night 🌃, with cars — and 3 people."]),
    dict(image="b.jpg", turns=["<image>\nWhy is he there?", "Because it rains.\nHe waits.", "Sure?", "Yes."]),
    dict(turns=["Name a fruit.", "An apple."]),
]
CAPTIONS = [
    dict(image="a.png", turns=["Render a summary of the photo.\n<image>", "a man with a phone"]),
    dict(image="b.jpg", turns=["<image>\nWhat is this?", "the brown dog, café style"]),
    dict(image="a.png", turns=["<image>\nProvide a brief description.", "night street with cars"]),
]
STAGES = {
    "pretrain": (CAPTIONS, "plain", "crop", dict(lr=5e-3, clip_norm=0.0, weight_decay=0.0)),
    "finetune": (ROWS, "v1", "pad", dict(lr=1e-3, clip_norm=1.0, weight_decay=0.05)),
}


def write_rows(folder, rows):
    """An annotation file as LLaVA's and two images, neither of them square."""
    rng = np.random.default_rng(1)
    for name, shape in (("a.png", (20, 31, 3)), ("b.jpg", (40, 24, 3))):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / name)
    speakers = ["human", "gpt"] * 2
    records = [
        {"id": str(index)}
        | ({"image": row["image"]} if "image" in row else {})
        | {"conversations": [{"from": s, "value": t} for s, t in zip(speakers, row["turns"], strict=False)]}
        for index, row in enumerate(rows)
    ]
    (folder / "rows.json").write_text(json.dumps(records))
    return str(folder / "rows.json")


@pytest.mark.parametrize("stage", STAGES)
def test_stage_follows_torch(tmp_path, stage):
    rows, template, aspect, changes = STAGES[stage]
    model = str(tmp_path / "model")
    peers.llava(model)
    peers.tokenizer(model, "bytes", size=peers.IMAGE_ID, image=True)
    data = DataSettings(
        annotations=write_rows(tmp_path, rows),
        images=str(tmp_path),
        template=template,
        image_position="front",
        aspect=aspect,
        max_length=320,
        shuffle=True,
        **UNPACKED,
    )
    settings = OptimSettings(groups="", schedule="cosine", warmup_ratio=0.03, b1=0.9, b2=0.999, eps=1e-8, **changes)
    batches = peer_training.batches(data, model, hf.read_llava_config(model)[0], batch_size=2)
    ours = peer_training.ours(model, stage, settings, batches)
    theirs = peer_training.theirs(model, stage, settings, batches)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=2e-3)
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-2)
    assert theirs[-3:, 0].mean() < 0.9 * theirs[:3, 0].mean()
