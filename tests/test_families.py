"""Decoder families and SigLIP without torch: configs as published, tensors, norms and windows by hand, refusals."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.infer import passes
from llava_jax.models import clip, llama, llava
from llava_jax.models.attention import angles, rotate
from llava_jax.models.flops import step_flops
from llava_jax.models.llava import build
from llava_jax.types import ClipConfig, InputError, LlamaConfig, ModelConfig, RopeConfig
from llava_jax.weights import name_table
from llava_jax.weights.hf import chat_template_note
from llava_jax.weights.hf_config import clip_config, clip_json, llama_config, llama_json, llava_config, llava_json
from tests.test_convert import CLIP, LLAMA, random_params
from tests.tiny_llava import write_tokenizer

# What the published config.json say next to what decides nothing here.
PUBLISHED = {
    "mistral_v0.1": (
        dict(model_type="mistral", max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=4096),
        LlamaConfig(32000, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, family="mistral", window=4096),
    ),
    "mistral_v0.3": (
        dict(
            model_type="mistral", vocab_size=32768, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6,
            sliding_window=None,
        ),
        LlamaConfig(32768, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, RopeConfig(1e6), family="mistral"),
    ),
    "mistral_nemo": (
        dict(
            model_type="mistral", vocab_size=131072, hidden_size=5120, head_dim=128, num_hidden_layers=40,
            max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
        ),
        LlamaConfig(131072, 5120, 14336, 40, 32, 8, 128, 131072, 1e-5, RopeConfig(1e6), family="mistral"),
    ),
    "qwen2.5_7b": (
        dict(
            model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=131072,
            max_window_layers=28, use_sliding_window=False,
        ),
        LlamaConfig(
            152064, 3584, 18944, 28, 28, 4, 128, 32768, 1e-6, RopeConfig(1e6), attention_bias=True, family="qwen2"
        ),
    ),
    "qwen3_0.6b": (
        dict(
            model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128,
            num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=40960, rope_theta=1000000,
            tie_word_embeddings=True, sliding_window=None, max_window_layers=28, attention_bias=False,
        ),
        LlamaConfig(151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, RopeConfig(1e6), tied=True, family="qwen3"),
    ),
    "smollm2_135m": (
        dict(
            model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
            rope_theta=100000, rope_interleaved=False, tie_word_embeddings=True, is_llama_config=True,
        ),
        LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, RopeConfig(1e5), tied=True),
    ),
}  # fmt: skip
SIGLIP = dict(
    model_type="siglip",
    vision_config=dict(
        model_type="siglip_vision_model", hidden_size=1152, image_size=384, intermediate_size=4304,
        num_attention_heads=16, num_hidden_layers=27, patch_size=14,
    ),
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_written(name):
    given, wanted = PUBLISHED[name]
    assert llama_config(given, "x") == wanted
    assert llama_config(llama_json(wanted), "x") == wanted
    assert llama_json(wanted)["model_type"] == given["model_type"]


def test_what_a_family_leaves_out_has_no_parameters():
    def attention(family, **changes):
        model = ModelConfig(CLIP, dataclasses.replace(LLAMA, family=family, **changes))
        return {path.split("attn/")[1] for path in name_table.flatten(build(model)[1]) if "llm/layers/attn/" in path}

    kernels = {f"{name}/kernel" for name in "qkvo"}
    assert attention("mistral") == kernels
    assert attention("qwen2", attention_bias=True) == kernels | {"q/bias", "k/bias", "v/bias"}
    assert attention("qwen3") == kernels | {"q_norm/scale", "k_norm/scale"}


BAD = {
    "gemma": (dict(model_type="gemma3_text"), "model_type is 'gemma3_text'"),
    "yarn": (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type is 'yarn'"),
    "longrope": (dict(rope_scaling=dict(type="longrope", short_factor=[1.0])), "rope_type is 'longrope'"),
    "dynamic": (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_type is 'dynamic'"),
    "mrope": (dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 2])), "mrope_section of a default rope"),
    "partial": (dict(partial_rotary_factor=0.75), "partial_rotary_factor"),
    "layer_types": (dict(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    "window_in_some": (dict(model_type="qwen2", use_sliding_window=True, max_window_layers=2), "use_sliding_window"),
    "window_of_llama": (dict(sliding_window=4096), "sliding_window is 4096"),
    "softcap": (dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    "bias_of_mistral": (dict(model_type="mistral", attention_bias=True), "attention_bias"),
    "bias_of_qwen": (dict(model_type="qwen2", attention_bias=False), "attention_bias"),
    "experts": (dict(model_type="qwen3", num_experts=8), "num_experts"),
    "quantised": (dict(quantization_config=dict(quant_method="awq")), "quantization_config"),
    "window": (dict(model_type="mistral", sliding_window=0), "sliding_window is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_built_is_refused_by_name(name):
    change, says = BAD[name]
    with pytest.raises(InputError, match=says):
        llama_config(dict(model_type="llama") | change, "here")


def test_heads_are_normalised_before_they_turn():
    config = dataclasses.replace(LLAMA, family="qwen3")
    params = random_params(ModelConfig(CLIP, config))["llm"]["layers"]["attn"]
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: llama.Attention(config, "xla", 0, rngs=nnx.Rngs(0))))
    attn = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), params))
    x = np.random.default_rng(2).normal(size=(1, 3, 8)).astype(np.float32)
    rope = angles(jnp.arange(3)[None], config.rope, config.head_dim)
    q = np.einsum("btd,dnh->btnh", x, params["q"]["kernel"][0])
    q = q / np.sqrt((q**2).mean(-1, keepdims=True) + config.norm_eps) * params["q_norm"]["scale"][0]
    turned = attn.heads(attn.project(jnp.asarray(x)), rope)[0]
    np.testing.assert_allclose(turned, rotate(jnp.asarray(q), *rope), atol=1e-5)


@pytest.mark.parametrize("family, bias", [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_the_order_of_kernels_for_answers_changes_no_number(family, bias):
    config = ModelConfig(CLIP, dataclasses.replace(LLAMA, family=family, attention_bias=bias))
    params = jax.tree.map(jnp.asarray, random_params(config))
    turned = llava.for_answers(params)
    attn, llm = turned["llm"]["layers"][0]["attn"], config.llm
    wide, narrow = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    shapes = [attn[name]["kernel"].shape for name in ("q", "k", "v", "o")]
    assert shapes == [(wide, llm.width), *[(narrow, llm.width)] * 2, (llm.width, wide)]
    whole, by_block = nnx.merge(llava.build(config)[0], params).llm, llava.unstacked_model(config, turned).llm
    # Ten rows in a product and a hundred: it has a form for few and one for many.
    for batch in (2, 20):
        x_BTD, shape = jax.random.normal(jax.random.key(0), (batch, 5, llm.width)), (batch, 5)
        positions_BT = jnp.broadcast_to(jnp.arange(5), shape)
        hidden_BTD, _ = passes.prefill(by_block, x_BTD, positions_BT, jnp.ones(shape, jnp.int32))
        want_BTD = whole(x_BTD, positions_BT)
        np.testing.assert_allclose(hidden_BTD, want_BTD, atol=1e-5)
        np.testing.assert_allclose(passes.logits(by_block, hidden_BTD), whole.logits(want_BTD), atol=1e-4)


def test_a_window_holds_in_prefill_and_in_decode():
    """Tokens that no window of any layer reaches have no influence, and decoding equals the full pass."""
    config = dataclasses.replace(LLAMA, family="mistral", window=3)
    whole = ModelConfig(CLIP, config)
    params = jax.tree.map(jnp.asarray, random_params(whole))
    model = nnx.merge(llava.build(whole)[0], params).llm
    by_block = llava.unstacked_model(whole, llava.for_answers(params)).llm
    x = jax.random.normal(jax.random.key(0), (1, 9, 8))
    positions, ones = jnp.arange(9)[None], jnp.ones((1, 9), jnp.int32)
    forward = jax.jit(lambda x: model(x, positions))
    full, reach = forward(x), config.layers * (config.window - 1)
    np.testing.assert_array_equal(full[:, -1], forward(x.at[:, : 8 - reach].set(5.0))[:, -1])
    assert np.abs(full[:, -1] - forward(x.at[:, 8 - reach].set(5.0))[:, -1]).max() > 1e-6

    @jax.jit
    def last_by_decoding(x):
        _, cache = passes.prefill(by_block, x[:, :8], positions[:, :8], ones[:, :8])
        return passes.extend(by_block, x[:, 8:], passes.widened(cache, 9))[0]

    np.testing.assert_allclose(last_by_decoding(x), full[:, 8:], atol=1e-5)


def test_a_window_lowers_the_flops_that_count():
    model = ModelConfig(CLIP, dataclasses.replace(LLAMA, window=0))
    windowed = ModelConfig(CLIP, dataclasses.replace(LLAMA, family="mistral", window=16))
    size = dict(rows=1, length=64, images=0)
    all_of_it, some = (step_flops(config, ("projector", "llm"), **size) for config in (model, windowed))
    # 64/2 positions seen on average, or 16 - 16^2/128; 4 flops for each, head and dimension, three passes.
    assert all_of_it - some == 64 * 3 * 4 * (32 - 14) * LLAMA.layers * LLAMA.heads * LLAMA.head_dim


# ---- SigLIP -------------------------------------------------------------------------------------------------------


def test_siglip_is_read_and_written():
    config = clip_config(SIGLIP, "x")
    assert (config.family, config.patches, config.class_tokens, config.norm_eps) == ("siglip", 729, 0, 1e-6)
    assert (config.activation, config.pooling_head, config.pixels.mean) == ("gelu_pytorch_tanh", True, (0.5, 0.5, 0.5))
    assert clip_config(clip_json(config), "x") == config
    whole = ModelConfig(config, LLAMA, feature_layer=-1, image_token_id=7)
    written = llava_json(whole, dtype="float32", pad_id=0, bos_id=1, eos_id=[2, 3])
    assert (written["vision_feature_select_strategy"], written["image_seq_length"]) == ("full", 729)
    assert written["eos_token_id"] == written["text_config"]["eos_token_id"] == [2, 3]
    assert llava_config(written, "x") == whole
    with pytest.raises(InputError, match="vision_feature_select_strategy is 'default'"):
        llava_config(written | dict(vision_feature_select_strategy="default"), "x")
    with pytest.raises(InputError, match="siglip2"):
        clip_config(dict(SIGLIP, model_type="siglip2"), "x")


def test_siglip_patches_have_a_bias_and_leave_the_rest_out():
    config = ClipConfig(8, 12, 2, 2, image_size=10, patch_size=4, family="siglip")
    params = random_params(ModelConfig(config, LLAMA))["vision"]
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: clip.Clip(config, 1, rngs=nnx.Rngs(0))))
    tower = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    pixels = jax.random.normal(jax.random.key(0), (1, 10, 10, 3))
    wanted = np.einsum("xyc,xyce->e", pixels[0, 4:8, :4], params["patch"]["kernel"]) + params["patch"]["bias"]
    np.testing.assert_allclose(tower.patch(pixels)[0, 2], wanted, atol=1e-5)
    features = tower(pixels)
    assert features.shape == (1, 4, 8) and set(params) == {"patch", "position", "layers"}
    np.testing.assert_array_equal(features, tower(pixels.at[:, 8:].set(9.0).at[:, :, 8:].set(9.0)))


# ---- chat templates -----------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source, template, says",
    [
        (None, "v1", None),
        (MISTRAL, "mistral_instruct", None),
        (MISTRAL, "plain", None),
        (
            MISTRAL,
            "v1",
            r"template v1 writes 'A chat .*writes '\[INST\].*; data.template=mistral_instruct writes as it",
        ),
        (CHATML, "chatml_direct", r"template chatml_direct writes 'im_start\|>system.*writes 'im_start\|>user"),
        ("{{ raise_exception('no') }}", "v1", "does not render a question"),
    ],
)
def test_a_chat_template_that_writes_otherwise_is_said_in_a_line(tmp_path, source, template, says):
    folder = write_tokenizer(str(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(chat_template=source)))
    note = chat_template_note(folder, template)
    if says is None:
        assert note is None
    else:
        assert re.search(says, note) and "\n" not in note, note
