"""Forward pass, loss and gradients against transformers, float32, tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

from llava_jax.demo.backbones import masked_nll_rows
from llava_jax.models.llava import build
from llava_jax.types import ClipConfig, LlamaConfig, ModelConfig
from llava_jax.weights import hf, name_table

TOLERANCE = 1e-4


NO_CLIP = ClipConfig(width=8, mlp_width=8, layers=2, heads=2, image_size=8, patch_size=4)
NO_LLM = LlamaConfig(vocab_size=8, width=32, mlp_width=8, layers=1, heads=2, kv_heads=2, head_dim=4)


def with_part(config, part, params):
    """The model with the parameters of one part; the others are zero and not looked at."""
    graphdef, abstract = build(config)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    return nnx.merge(graphdef, zeros | {part: params})


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_features(tmp_path, activation, whole):
    theirs = peers.clip(tmp_path, whole=whole, hidden_act=activation)
    config, params = hf.read_clip(str(tmp_path))
    pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    ours = with_part(ModelConfig(vision=config, llm=NO_LLM), "vision", params).vision(jnp.asarray(pixels))
    with torch.no_grad():
        states = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True).hidden_states
    assert peers.relative(ours, states[-2][:, 1:]) <= TOLERANCE
    assert peers.relative(ours, states[-1][:, 1:]) > 0.01  # the layer matters


LLAMAS = {
    "grouped": dict(),
    "plain_heads": dict(num_key_value_heads=4),
    "head_dim": dict(head_dim=12),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.0)),
    "llama3": dict(rope_parameters=peers.LLAMA3),
    "tied": dict(tie_word_embeddings=True),
    "biased": dict(attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_logits(tmp_path, name):
    theirs = peers.llama(tmp_path, **LLAMAS[name])
    llm, params = hf.read_llama(str(tmp_path))
    tokens = np.minimum(peers.batch(length=60)[0], 126)
    model = with_part(ModelConfig(vision=NO_CLIP, llm=llm, image_token_id=peers.IMAGE_ID), "llm", params)
    ours = model(jnp.asarray(tokens), None)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits
    assert peers.relative(ours, logits) <= TOLERANCE


def run_ours(graphdef, params, tokens, targets, pixels):
    logits = nnx.merge(graphdef, params)(jnp.asarray(tokens), jnp.asarray(pixels))
    nll_B, count_B = masked_nll_rows(logits, jnp.asarray(tokens), jnp.asarray(targets))
    return nll_B.sum() / count_B.sum(), logits


WHOLE = {
    "default": dict(),
    "everything": dict(text=LLAMAS["biased"] | LLAMAS["llama3"] | LLAMAS["head_dim"]),
    "tied": dict(text=LLAMAS["tied"], vision=dict(hidden_act="gelu")),
}


@pytest.mark.parametrize("name", WHOLE)
def test_merged_logits_loss_and_gradients(tmp_path, name):
    theirs = peers.llava(tmp_path, **WHOLE[name])
    config, params, _ = hf.read_llava(str(tmp_path))
    graphdef, abstract = build(config)
    inputs = peers.batch()
    grad = jax.jit(jax.value_and_grad(lambda p: run_ours(graphdef, p, *inputs), has_aux=True))
    (loss, logits), grads = grad(jax.tree.map(jnp.asarray, params))

    output = theirs(**peers.torch_inputs(*inputs))
    output.loss.backward()
    assert peers.relative(logits, output.logits.detach()) <= TOLERANCE
    assert abs(float(loss) / output.loss.item() - 1) <= TOLERANCE
    expected = peers.in_our_layout(
        {key: value.grad for key, value in theirs.named_parameters(remove_duplicate=False)}, abstract
    )
    flat = name_table.flatten(grads)
    assert set(expected) == set(flat)
    for path, theirs_grad in expected.items():
        if path == "vision/layers/attn/k/bias":
            # It shifts every score of a query alike, so its gradient is zero but for rounding.
            assert np.abs(flat[path]).max() <= 1e-3 * np.abs(flat["vision/layers/attn/q/bias"]).max()
            continue
        assert peers.relative(flat[path], theirs_grad) <= 1e-3, path


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projector(tmp_path, kind):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 32)
    layers = torch.nn.Sequential(first, torch.nn.GELU(), second) if kind == "mlp2x_gelu" else first
    save_file(
        {"model.mm_projector." + key: value for key, value in layers.state_dict().items()}, tmp_path / "p.safetensors"
    )
    vision = ClipConfig(width=16, mlp_width=32, layers=3, heads=2, image_size=16, patch_size=4)
    config = ModelConfig(vision=vision, llm=NO_LLM, projector=kind)
    params = hf.read_projector(str(tmp_path / "p.safetensors"), config)
    x = 3 * np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    ours = with_part(config, "projector", params).projector(jnp.asarray(x))
    assert peers.relative(ours, layers(torch.from_numpy(x)).detach()) <= TOLERANCE
