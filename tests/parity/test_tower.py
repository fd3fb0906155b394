"""A run whose tower learns, exported: transformers loads the tuned tower and gives the logits of the run."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from flax import nnx

from llava_jax.models.llava import build
from llava_jax.train.loop import train
from llava_jax.weights.convert import convert
from llava_jax.weights.load import load_trained, read_model
from tests.tiny_run import make_inputs, make_settings

CASES = {
    "all of it": ("mid", {}),
    "last block": ("pretrain", dict(train__trainable="projector|vision", train__vision_blocks=1)),
    "adapters": ("lora", dict(lora__vision_targets="vision/layers/attn/[qv]", optim__groups="vision=1e-1")),
}


@pytest.mark.parametrize("name", CASES)
def test_export_has_the_tuned_tower(tmp_path, name):
    stage, changes = CASES[name]
    make_inputs(tmp_path)
    settings = make_settings(tmp_path, stage, optim__lr=1e-2, optim__warmup_ratio=0.0, **changes)
    train(settings, str(tmp_path / "run"))
    spec, params, _ = load_trained(str(tmp_path / "run"))
    params = jax.tree.map(np.asarray, params)
    convert(f"orbax:{tmp_path}/run", f"hf:{tmp_path}/out")

    theirs = peers.load_strict(str(tmp_path / "out"))
    tokens = np.random.default_rng(0).integers(3, 600, (2, 24)).astype(np.int32)
    tokens[:, 3:7] = spec.config.image_token_id
    pixels = np.random.default_rng(1).normal(size=(2, 1, 16, 16, 3)).astype(np.float32)
    ours = logits(spec.config, params, tokens, pixels)
    seen = np.where(tokens == spec.config.image_token_id, theirs.config.image_token_index, tokens)
    with torch.no_grad():
        found = theirs(**peers.torch_inputs(seen, np.zeros_like(tokens, bool), pixels)).logits
    assert peers.relative(ours, found[..., : spec.config.llm.vocab_size]) <= 1e-4
    before = read_model(settings.init.model, "model")[1]["vision"]
    untuned = logits(spec.config, params | {"vision": jax.tree.map(np.asarray, before)}, tokens, pixels)
    assert peers.relative(untuned, ours) > 1e-3


def logits(config, params, tokens, pixels):
    return np.asarray(nnx.merge(build(config)[0], params)(jnp.asarray(tokens), jnp.asarray(pixels)))
