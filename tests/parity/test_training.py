"""Gradients and sixteen steps of AdamW follow PyTorch, whatever learns, on rows that our own pipeline encodes."""

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
# Which parts learn, and on what.
LEARN = {
    "pretrain": ({"projector"}, CAPTIONS, "plain", "crop", dict(lr=5e-3, clip_norm=0.0, weight_decay=0.0)),
    "finetune": ({"projector", "llm"}, ROWS, "v1", "pad", dict(lr=1e-3, clip_norm=1.0, weight_decay=0.05)),
    "mid": (
        {"projector", "llm", "vision"},
        *(ROWS, "v1", "pad", dict(lr=1e-3, clip_norm=1.0, weight_decay=0.05, groups="^vision/=2e-4")),
    ),
    "last block": (
        {"projector", "vision"},
        *(CAPTIONS, "plain", "crop", dict(lr=5e-3, clip_norm=0.0, weight_decay=0.01, groups="vision=1e-3")),
    ),
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


def case(folder, learns):
    """(model folder, optimizer's settings, batches) of a case."""
    _, rows, template, aspect, changes = LEARN[learns]
    model = str(folder / "model")
    peers.llava(model)
    peers.tokenizer(model, "bytes", size=peers.IMAGE_ID, image=True)
    data = DataSettings(
        annotations=write_rows(folder, rows),
        images=str(folder),
        template=template,
        image_position="front",
        aspect=aspect,
        max_length=320,
        shuffle=True,
        **UNPACKED,
    )
    fixed = dict(groups="", schedule="cosine", warmup_ratio=0.03, b1=0.9, b2=0.999, eps=1e-8)
    batches = peer_training.batches(data, model, hf.read_llava_config(model)[0], batch_size=2)
    return model, OptimSettings(**fixed | changes), batches


@pytest.mark.parametrize("learns", LEARN)
def test_sixteen_steps_follow_torch(tmp_path, learns):
    model, settings, batches = case(tmp_path, learns)
    ours = peer_training.ours(model, learns, settings, batches)
    theirs = peer_training.theirs(model, learns, settings, batches)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=2e-3)
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-2)
    assert theirs[-3:, 0].mean() < 0.9 * theirs[:3, 0].mean()


@pytest.mark.parametrize("learns", LEARN)
def test_gradients_of_every_group_are_torchs(tmp_path, learns):
    model, _, batches = case(tmp_path, learns)
    seeing = next(batch for batch in batches if batch.image_mask_BN.any())
    ours, theirs = peer_training.gradients(model, learns, seeing)
    assert {path.partition("/")[0] for path in ours} == LEARN[learns][0]
    for path in ours:
        if path == "vision/layers/attn/k/bias":
            # It shifts every score of a query alike, so its gradient is zero but for rounding.
            assert np.abs(ours[path]).max() <= 1e-3 * np.abs(ours["vision/layers/attn/q/bias"]).max()
            continue
        assert peers.relative(ours[path], theirs[path]) <= 1e-3, path
