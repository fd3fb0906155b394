"""Hugging Face folders in and out, without torch: bit-equal round trips, every spelling, every refusal."""

import dataclasses
import json
import os
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.cli.main import main, run
from llava_jax.data import tokenize
from llava_jax.models.llava import build
from llava_jax.types import ClipConfig, InputError, LlamaConfig, ModelConfig, RopeConfig
from llava_jax.weights import convert, hf, hf_config, name_table
from llava_jax.weights.hf_config import clip_json, llama_json
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.load import read_model
from llava_jax.weights.processor import LlavaExtras
from tests import make_tokenizers
from tests.tiny_llava import write_tokenizer

CLIP = ClipConfig(width=8, mlp_width=12, layers=3, heads=2, image_size=8, patch_size=4)
LLAMA = LlamaConfig(vocab_size=400, width=8, mlp_width=12, layers=2, heads=4, kv_heads=2, head_dim=6, norm_eps=1e-6)
CONFIG = ModelConfig(vision=CLIP, llm=LLAMA, image_token_id=400)
LLAMA3 = RopeConfig(
    theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    flat = name_table.flatten(build(config)[1])
    return name_table.unflatten({path: rng.normal(size=x.shape).astype(np.float32) for path, x in flat.items()})


def hub_tensors(config, params):
    """{hub name: float32 array} of parameters, with CLIP's last block and post-norm as a published folder has them."""
    tensors = {}
    for path, array in name_table.flatten(params).items():
        row = name_table.ROWS[path]
        for layer in range(len(array)) if row.stacked else (None,):
            tensors[row.hf.format(layer)] = name_table.to_hf(row, array if layer is None else array[layer])
    last = name_table.BLOCK.format(config.vision_layers - 1)
    beyond = {
        k.replace(last, name_table.BLOCK.format(config.vision_layers)): v + 1 for k, v in tensors.items() if last in k
    }
    norm = {
        name_table.VISION + "post_layernorm." + k: np.full(config.vision.width, 3, np.float32)
        for k in ("weight", "bias")
    }
    return tensors | beyond | norm | {name_table.VISION + "embeddings.position_ids": np.arange(5)[None]}


def write_folder(folder, config, tensors):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, os.path.join(folder, "model.safetensors"))
    return str(folder)


def part(tensors, prefix, new):
    return {new + name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def assert_same(found, expected):
    found, expected = name_table.flatten(found), name_table.flatten(expected)
    assert set(found) == set(expected)
    for path, array in expected.items():
        assert found[path].dtype == array.dtype and found[path].tobytes() == np.ascontiguousarray(array).tobytes(), path


@pytest.fixture
def sources(tmp_path):
    """(clip folder, llama folder with tokenizer, params) as two published models."""
    params = random_params(CONFIG)
    tensors = hub_tensors(CONFIG, params)
    clip = write_folder(tmp_path / "clip", clip_json(CLIP), part(tensors, "vision_tower.", ""))
    llama = write_folder(tmp_path / "llama", llama_json(LLAMA), part(tensors, "language_model.", ""))
    return clip, write_tokenizer(llama), params


def write(sources, folder, config=CONFIG, params=None, *, extras=None, **options):
    clip, llama, given = sources
    extras = LlavaExtras(**dict(aspect="pad", tokenizer=llama, vision=clip) | (extras or {}))
    return write_llava(str(folder), config, params or given, extras, **options)


# ---- weights ------------------------------------------------------------------------------------------------------


def test_every_parameter_has_one_row_and_every_row_a_parameter():
    full = dataclasses.replace(LLAMA, attention_bias=True, mlp_bias=True)
    siglip = dataclasses.replace(CLIP, family="siglip")
    found = [
        set(name_table.flatten(build(dataclasses.replace(CONFIG, llm=llm, vision=vision))[1]))
        for llm, vision in ((full, CLIP), (dataclasses.replace(LLAMA, family="qwen3"), siglip))
    ]
    tiled = set(name_table.flatten(build(dataclasses.replace(CONFIG, pinpoints=((16, 16),)))[1]))
    assert set.union(tiled, *found) == set(name_table.ROWS)
    assert len({row.hf for row in name_table.TABLE}) == len(name_table.TABLE)


def test_layout_is_torch_linear(sources):
    """[out, in] with heads flattened: the kernel as torch would apply it gives our einsum."""
    _, llama, params = sources
    weight = load_file(os.path.join(llama, "model.safetensors"))["model.layers.1.self_attn.q_proj.weight"]
    x = np.random.default_rng(1).normal(size=8).astype(np.float32)
    expected = np.einsum("d,dnh->nh", x, params["llm"]["layers"]["attn"]["q"]["kernel"][1]).reshape(-1)
    np.testing.assert_allclose(weight @ x, expected, rtol=1e-5)


def test_parts_are_read_bit_equal(sources):
    clip, llama, params = sources
    config, vision = hf.read_clip(clip)
    assert config == CLIP
    assert_same(vision, params["vision"])
    config, llm = hf.read_llama(llama)
    assert config == LLAMA
    assert_same(llm, params["llm"])
    half = hf.read_llama(llama, dtype="bfloat16")[1]
    assert half["norm"]["scale"].dtype == ml_dtypes.bfloat16


NAMES = {
    "clip_model": (
        "clip",
        lambda t: part(t, "vision_tower.", "") | {"logit_scale": np.ones(1), "text_model.x": np.ones(1)},
    ),
    "clip_flat": ("clip", lambda t: part(t, "vision_tower.vision_model.", "")),
    "llama_inner": (
        "llama",
        lambda t: part(t, "language_model.model.", "") | part(t, "language_model.lm_head", "lm_head"),
    ),
    "llava_5_native": (
        "llava",
        lambda t: (
            part(t, "vision_tower.vision_model.", "model.vision_tower.")
            | part(t, "language_model.model.", "model.language_model.")
            | part(t, "language_model.lm_head", "lm_head")
            | part(t, "multi_modal", "model.multi_modal")
        ),
    ),
    "llava_hub": ("llava", lambda t: t),
}


@pytest.mark.parametrize("name", NAMES)
def test_other_spellings(tmp_path, name):
    kind, rename = NAMES[name]
    params = random_params(CONFIG)
    tensors = rename(hub_tensors(CONFIG, params))
    given = {
        "clip": {"model_type": "clip", "vision_config": clip_json(CLIP)},
        "llama": llama_json(LLAMA),
        "llava": hf_config.llava_json(CONFIG, dtype="float32", pad_id=0, bos_id=1, eos_id=2),
    }[kind]
    folder = write_folder(tmp_path / "m", given, tensors)
    if kind == "clip":
        assert_same(hf.read_clip(folder)[1], params["vision"])
    elif kind == "llama":
        assert_same(hf.read_llama(folder)[1], params["llm"])
    else:
        config, read, extras = hf.read_llava(folder)
        assert config == CONFIG and (extras.template, extras.aspect) == ("v1", "crop")
        assert_same(read, params)


PROJECTORS = {
    "ours": ("linear_1.", "linear_2."),
    "hub": ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    "original": ("model.mm_projector.0.", "model.mm_projector.2."),
    "bare": ("0.", "2."),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_projector_files(tmp_path, name):
    params = random_params(CONFIG)
    first, second = PROJECTORS[name]
    tensors = hub_tensors(CONFIG, params)
    path = str(tmp_path / "p.safetensors")
    save_file(
        part(tensors, "multi_modal_projector.linear_1.", first)
        | part(tensors, "multi_modal_projector.linear_2.", second),
        path,
    )
    assert_same(hf.read_projector(path, CONFIG), params["projector"])


def test_linear_projector_file_of_the_original(tmp_path):
    config = dataclasses.replace(CONFIG, projector="linear")
    params = random_params(config)
    path = str(tmp_path / "p.safetensors")
    save_file(part(hub_tensors(config, params), "multi_modal_projector.linear_1.", "model.mm_projector."), path)
    assert_same(hf.read_projector(path, config), params["projector"])


# ---- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    dict(projector="linear"),
    dict(image_token_id=7),
    dict(llm=dataclasses.replace(LLAMA, tied=True)),
    dict(llm=dataclasses.replace(LLAMA, rope=LLAMA3, attention_bias=True, mlp_bias=True)),
    dict(llm=dataclasses.replace(LLAMA, rope=RopeConfig(theta=1e5, kind="linear", factor=2.0))),
    dict(feature_layer=-3),
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_round_trip_is_bit_equal(tmp_path, sources, change):
    config = dataclasses.replace(CONFIG, **change)
    params = random_params(config)
    if change.get("feature_layer") == -3:  # the two blocks not held come from the source
        params["vision"]["layers"] = name_table.unflatten(
            {path: x[:1] for path, x in name_table.flatten(sources[2]["vision"]["layers"]).items()}
        )
    exported = write(sources, tmp_path / "out", config, params)
    read_config, read, extras = hf.read_llava(str(tmp_path / "out"))
    assert read_config == exported
    assert (extras.template, extras.aspect, extras.image_position) == ("v1", "pad", "front")
    read["llm"]["embed"]["table"] = read["llm"]["embed"]["table"][: config.llm.vocab_size]
    if not config.llm.tied:
        read["llm"]["head"]["kernel"] = read["llm"]["head"]["kernel"][:, : config.llm.vocab_size]
    assert_same(read, params)


def test_vocabulary_grows_only_when_an_id_lies_outside(tmp_path, sources):
    exported = write(sources, tmp_path / "inside")
    assert exported.llm.vocab_size == 400 and exported.image_token_id < 400  # rows to spare: the tokenizer has fewer
    small = dataclasses.replace(CONFIG, llm=dataclasses.replace(LLAMA, vocab_size=exported.image_token_id))
    params = random_params(small)
    exported = write(sources, tmp_path / "outside", small, params)
    assert exported.llm.vocab_size % 64 == 0 and exported.llm.vocab_size > exported.image_token_id
    rows = hf.read_llava(str(tmp_path / "outside"))[1]["llm"]["embed"]["table"]
    mean = params["llm"]["embed"]["table"].mean(0)
    np.testing.assert_allclose(
        rows[small.llm.vocab_size :], np.broadcast_to(mean, (len(rows) - small.llm.vocab_size, 8)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("multiple, rows", [(1, 359), (16, 368), (512, 512)])
def test_a_vocabulary_of_the_tokenizers_ids(tmp_path, sources, multiple, rows):
    """Rows that no token has are left out on request; the ids that stay have theirs."""
    write(sources, tmp_path / "out", pad_vocab=multiple)
    read, params, _ = hf.read_llava(str(tmp_path / "out"))
    assert read.llm.vocab_size == rows and tokenize.load_tokenizer(str(tmp_path / "out")).size == 359
    table, given = params["llm"]["embed"]["table"], sources[2]["llm"]["embed"]["table"]
    assert table[:359].tobytes() == given[:359].tobytes() and table.shape[0] == rows
    for wrong, to in ((-1, "hf"), (1, "projector")):
        with pytest.raises(InputError, match=f"--pad_vocab={wrong}: expected 1 or more"):
            convert.convert(str(tmp_path / "out"), f"{to}:{tmp_path / 'x'}", pad_vocab=wrong)


def test_shards(tmp_path, sources):
    write(sources, tmp_path / "out", shard_bytes=4000, dtype="bfloat16")
    files = sorted(name for name in os.listdir(tmp_path / "out") if name.endswith(".safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    read = hf.read_llava(str(tmp_path / "out"), dtype="bfloat16")[1]
    half = {path: x.astype(ml_dtypes.bfloat16) for path, x in name_table.flatten(sources[2]).items()}
    assert_same(read, name_table.unflatten(half))


def test_blocks_beyond_the_features_are_copied(tmp_path, sources):
    write(sources, tmp_path / "out")
    written, source = (load_file(os.path.join(f, "model.safetensors")) for f in (tmp_path / "out", sources[0]))
    beyond = [name for name in source if "layers.2." in name or "post_layernorm" in name]
    assert len(beyond) == 18
    for name in beyond:
        np.testing.assert_array_equal(written["vision_tower." + name], source[name])


def test_without_a_source_fresh_values_are_announced(tmp_path, sources, capsys):
    write(sources, tmp_path / "out", extras=dict(vision=""))
    assert "fresh values" in capsys.readouterr().out
    assert_same(hf.read_llava(str(tmp_path / "out"))[1], sources[2])


def test_tokenizer_files_are_copied_and_extended(tmp_path, sources):
    write(sources, tmp_path / "out")
    source, copy = (json.load(open(os.path.join(f, "tokenizer.json"))) for f in (sources[1], tmp_path / "out"))
    added = copy.pop("added_tokens")
    assert [token["content"] for token in added[len(source.pop("added_tokens")) :]] == ["<image>", "<pad>"]
    # BOS is in the chat template, and what added it is kept for us and for the original's layout.
    kept = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert copy.pop("post_processor") is None and kept["add_bos_token"] is False
    assert kept["llava_jax"]["post_processor"] == source.pop("post_processor") and copy == source
    assert kept["model_input_names"] == ["input_ids", "attention_mask"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_token_index"] == config["image_token_id"] == added[-2]["id"]
    assert config["pad_token_id"] == added[-1]["id"]
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000.0


def test_convert_command(tmp_path, sources):
    write(sources, tmp_path / "a", dtype="bfloat16")
    convert.convert(str(tmp_path / "a"), f"hf:{tmp_path / 'b'}")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(first) == set(second) and all(first[k].tobytes() == second[k].tobytes() for k in first)
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


# ---- configs ------------------------------------------------------------------------------------------------------


def test_sparse_configs_take_the_published_defaults():
    """llava-hf/llava-1.5-7b-hf's config.json names little more than this."""
    given = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {
            "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": 14, "model_type": "clip_vision_model", "projection_dim": 768,
        },
    }  # fmt: skip
    config = hf_config.llava_config(given, "x")
    assert config.llm == LlamaConfig(32064, 4096, 11008, 32, 32, 32, 128, max_positions=4096, norm_eps=1e-5)
    assert config.vision == ClipConfig(1024, 4096, 24, 16, 336, 14)
    assert (config.projector, config.feature_layer, config.vision_layers, config.vision.patches) == (
        "mlp2x_gelu",
        -2,
        23,
        576,
    )
    assert hf_config.llava_config({"model_type": "llava"}, "x").vision == config.vision
    assert hf_config.llama_config({"model_type": "llama"}, "x").norm_eps == 1e-6
    assert hf_config.clip_config({"model_type": "clip"}, "x").patch_size == 32


@pytest.mark.parametrize("given, rope", [
    (dict(rope_theta=5e5), RopeConfig(theta=5e5)),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), RopeConfig(theta=5e5)),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), RopeConfig(kind="linear", factor=2.0)),
    (dict(rope_parameters=dict(rope_type="linear", factor=2)), RopeConfig(kind="linear", factor=2.0)),
    (dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                            original_max_position_embeddings=64)), LLAMA3),
    (dict(rope_theta=1.0, rope_parameters=dict(rope_type="default", rope_theta=5e5)), RopeConfig(theta=5e5)),
])  # fmt: skip
def test_rope_spellings(given, rope):
    assert hf_config.llama_config({"model_type": "llama"} | given, "x").rope == rope


BAD_LLAMA = {
    "model_type": (dict(model_type="gemma2"), "gemma2"),
    "activation": (dict(hidden_act="gelu"), "gelu"),
    "rope": (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "yarn"),
    "rope_factor": (dict(rope_scaling=dict(rope_type="linear")), "factor"),
    "rope_per_layer": (dict(rope_parameters=dict(full=dict(rope_type="default"))), "flat"),
    "partial": (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "width": (dict(hidden_size="8"), "hidden_size"),
    "heads": (dict(num_attention_heads=3, num_key_value_heads=2), "multiple"),
    "tied": (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
}


@pytest.mark.parametrize("name", BAD_LLAMA)
def test_unknown_llama_configs_are_refused_by_name(name):
    change, says = BAD_LLAMA[name]
    with pytest.raises(InputError, match=says):
        hf_config.llama_config(llama_json(LLAMA) | {"rope_scaling": None, "rope_parameters": None} | change, "here")


BAD_CLIP = {
    "model_type": (dict(model_type="siglip2_vision_model"), "siglip2"),
    "activation": (dict(hidden_act="gelu_new"), "gelu_new"),
    "patch": (dict(patch_size=3), "image_size"),
    "heads": (dict(num_attention_heads=3), "heads"),
}


@pytest.mark.parametrize("name", BAD_CLIP)
def test_unknown_clip_configs_are_refused_by_name(name):
    change, says = BAD_CLIP[name]
    with pytest.raises(InputError, match=says):
        hf_config.clip_config(clip_json(CLIP) | change, "here")


BAD_LLAVA = {
    "model_type": (dict(model_type="llava_onevision"), "llava_onevision"),
    "select": (dict(vision_feature_select_strategy="full"), "full"),
    "layers": (dict(vision_feature_layer=[-2, -5]), "one whole number"),
    "layer": (dict(vision_feature_layer=-9), "outside"),
    "projector": (dict(projector_hidden_act="relu"), "relu"),
    "bias": (dict(multimodal_projector_bias=False), "multimodal_projector_bias"),
    "quantised": (dict(quantization_config=dict(load_in_4bit=True)), "quantization_config"),
    "image_id": (dict(image_token_id="<image>"), "image_token_id or image_token_index) is '<image>'"),
    "ours": (dict(llava_jax=dict(template="v9")), "v9"),
}


@pytest.mark.parametrize("name", BAD_LLAVA)
def test_unknown_llava_configs_are_refused_by_name(tmp_path, name):
    change, says = BAD_LLAVA[name]
    given = hf_config.llava_json(CONFIG, dtype="float32", pad_id=0, bos_id=1, eos_id=2) | change
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(InputError, match=re.escape(says)):
        hf.read_llava_config(str(tmp_path))


# ---- folders that cannot be used ----------------------------------------------------------------------------------


def test_all_differences_come_in_one_error(tmp_path):
    tensors = part(hub_tensors(CONFIG, random_params(CONFIG)), "language_model.", "")
    del (
        tensors["model.norm.weight"],
        tensors["model.layers.0.mlp.up_proj.weight"],
        tensors["model.layers.1.mlp.up_proj.weight"],
    )
    tensors["lm_head.weight"] = np.zeros((3, 8), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((24, 8), np.int8)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    folder = write_folder(tmp_path / "m", llama_json(LLAMA), tensors)
    with pytest.raises(InputError) as caught:
        hf.read_llama(folder)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(folder)
    for says in (
        "missing language_model.model.layers.{0,1}.mlp.up_proj.weight, language_model.model.norm.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight is [3, 8], expected [400, 8]",
        "q_proj.weight is I8",
    ):
        assert says in message


def test_a_head_that_contradicts_tying_is_refused(tmp_path):
    tied = dataclasses.replace(LLAMA, tied=True)
    tensors = part(hub_tensors(CONFIG, random_params(CONFIG)), "language_model.", "")
    with pytest.raises(InputError, match="ties"):
        hf.read_llama(write_folder(tmp_path / "a", llama_json(tied), tensors))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert "head" not in hf.read_llama(write_folder(tmp_path / "b", llama_json(tied), tensors))[1]


def test_linear_projector_needs_the_identity(tmp_path, sources):
    config = dataclasses.replace(CONFIG, projector="linear")
    write(sources, tmp_path / "out", config, random_params(config))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["multi_modal_projector.linear_2.weight"][0, 1] = 1
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(InputError, match="identity"):
        hf.read_llava(str(tmp_path / "out"))


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    tensors = part(hub_tensors(CONFIG, random_params(CONFIG)), "language_model.", "")
    tensors["norm.weight"] = tensors["model.norm.weight"]
    with pytest.raises(InputError, match="same tensor"):
        hf.read_llama(write_folder(tmp_path / "m", llama_json(LLAMA), tensors))


def sharded(tmp_path, sources):
    folder = tmp_path / "out"
    write(sources, folder, shard_bytes=8000)
    return folder, folder / "model.safetensors.index.json"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_absent_shard(tmp_path, sources):
    folder, _ = sharded(tmp_path, sources)
    name = min(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    os.remove(folder / name)
    with pytest.raises(InputError, match=name):
        hf.read_llava(str(folder))


@pytest.mark.parametrize("shard", ["../llama/model.safetensors", "/etc/hostname", "..", 3])
def test_shards_outside_the_folder_are_refused(tmp_path, sources, shard):
    folder, index = sharded(tmp_path, sources)
    edit(index, lambda value: value["weight_map"].update({"language_model.model.norm.weight": shard}))
    with pytest.raises(InputError, match="name of a file"):
        hf.read_llava(str(folder))


def test_index_that_lies(tmp_path, sources):
    folder, index = sharded(tmp_path, sources)
    first = sorted(json.loads(index.read_text())["weight_map"].values())[0]
    edit(index, lambda value: value["weight_map"].update(nowhere=first))
    with pytest.raises(InputError, match="nowhere"):
        hf.read_llava(str(folder))
    index.write_text("{}")
    with pytest.raises(InputError, match="weight_map"):
        hf.read_llava(str(folder))


def test_folders_that_are_none(tmp_path, sources):
    clip, llama, _ = sources
    with pytest.raises(InputError, match="no such folder; expected a Hugging Face CLIP folder"):
        hf.read_clip(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no config.json; expected a Hugging Face LLaMA folder"):
        hf.read_llama(str(tmp_path))
    with pytest.raises(InputError, match="clip_vision_model"):
        hf.read_llama(clip)
    with pytest.raises(InputError, match="'llama'"):
        hf.read_llava(llama)
    with pytest.raises(InputError, match="outside the 3 layers"):
        hf.read_clip(clip, feature_layer=4)
    os.remove(os.path.join(llama, "model.safetensors"))
    with pytest.raises(InputError, match="neither model.safetensors"):
        hf.read_llama(llama)
    open(os.path.join(llama, "pytorch_model.bin"), "w").close()
    with pytest.raises(InputError, match="pytorch_model.bin: is no zip archive"):
        hf.read_llama(llama)
    (tmp_path / "llama" / "config.json").write_text("{oops")
    with pytest.raises(InputError, match="not JSON"):
        hf.read_llama(llama)


def test_truncated_file(sources):
    path = os.path.join(sources[1], "model.safetensors")
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 5)
    with pytest.raises(InputError, match="is cut short or no safetensors file"):
        hf.read_llama(sources[1])


def test_projector_paths(tmp_path):
    for name, says in (
        ("p.bin", "no such file"),
        ("p.pt", "expected a .safetensors"),
        ("p.safetensors", "no such file"),
    ):
        with pytest.raises(InputError, match=says):
            hf.read_projector(str(tmp_path / name), CONFIG)


def test_an_existing_target_is_left_alone(tmp_path, sources):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        write(sources, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


def test_a_failed_write_leaves_nothing(tmp_path, sources):
    shutil.rmtree(sources[0])
    with pytest.raises(InputError):
        write(sources, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["llama"]


@pytest.mark.parametrize("source, target, says", [
    ("hf:{llama}", "zip:{out}", "cannot be written"),
    ("hf:{llama}", "{out}", "cannot be written"),
    ("llava:{llama}", "hf:{out}", "holds a config.json without checkpoints"),
    ("orbax:{llama}", "hf:{out}", "checkpoints"),
    ("hf:nowhere", "hf:{out}", "no folder 'nowhere'"),
    ("{llama}", "hf:{out}", "'llama'"),
    ("hf:{llama}", "hf:{llama}", "is the source"),
])  # fmt: skip
def test_convert_refuses(tmp_path, sources, source, target, says):
    names = dict(llama=sources[1], out=tmp_path / "out")
    with pytest.raises(InputError, match=says):
        convert.convert(source.format(**names), target.format(**names))


# ---- what foreign folders say ----------------------------------------------------------------------------------------


def foreign(tmp_path, sources, **extras):
    """An exported folder without our key in config.json."""
    write(sources, tmp_path / "out", extras=extras)
    edit(tmp_path / "out" / "config.json", lambda value: value.pop("llava_jax"))
    return tmp_path / "out"


@pytest.mark.parametrize("template", ["v0", "v1", "llava_llama_2", "mistral_instruct", "chatml_direct"])
def test_a_foreign_chat_template_and_padding_are_recognised(tmp_path, sources, template):
    folder = foreign(tmp_path, sources, template=template)
    extras = hf.read_llava_config(str(folder))[1]
    assert (extras.template, extras.aspect, extras.template_assumed) == (template, "pad", False)


@pytest.mark.parametrize("source", [None, "{% for m in messages %}{{ m.role }}: hello{% endfor %}", "{% broken"])
def test_another_chat_template_is_assumed_and_said(tmp_path, sources, source, capsys):
    folder = foreign(tmp_path, sources, aspect="crop")
    edit(folder / "tokenizer_config.json", lambda value: value.pop("chat_template"))
    os.remove(folder / "chat_template.json")
    os.remove(folder / "chat_template.jinja")
    if source is not None:
        (folder / "chat_template.jinja").write_text(source)
    extras = hf.read_llava_config(str(folder))[1]
    assert (extras.template, extras.aspect, extras.template_assumed) == ("v1", "crop", True)
    convert.convert(str(folder), f"hf:{tmp_path / 'again'}")
    assert "v1 is assumed" in capsys.readouterr().out


def test_a_chat_template_that_contradicts_the_template_is_said(tmp_path, sources, capsys):
    write(sources, tmp_path / "out")
    convert.convert(str(tmp_path / "out"), f"hf:{tmp_path / 'same'}")
    assert "chat template" not in capsys.readouterr().out
    (tmp_path / "out" / "chat_template.json").unlink()
    (tmp_path / "out" / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    convert.convert(str(tmp_path / "out"), f"hf:{tmp_path / 'other'}")
    assert "template v1 writes 'A chat" in capsys.readouterr().out


def test_images_are_normalised_and_resized_as_the_folder_says(tmp_path, sources):
    folder = foreign(tmp_path, sources)
    says = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.2, 0.3, 0.4], resample=2)
    edit(folder / "preprocessor_config.json", lambda value: value.update(says))
    config, params, _ = hf.read_llava(str(folder))
    assert config.vision.pixels == ((0.5, 0.5, 0.5), (0.2, 0.3, 0.4), "bilinear")
    write(sources, tmp_path / "again", config, params)
    assert hf.read_llava_config(str(tmp_path / "again"))[0].vision.pixels == config.vision.pixels
    shutil.copy(folder / "preprocessor_config.json", sources[0])
    assert hf.read_clip(sources[0])[0].pixels == config.vision.pixels


@pytest.mark.parametrize("change", [
    dict(do_normalize=False), dict(rescale_factor=1 / 127.5), dict(image_std=0.5), dict(resample=0),
], ids=str)  # fmt: skip
def test_other_image_settings_are_refused_by_name(tmp_path, sources, change):
    folder = foreign(tmp_path, sources)
    edit(folder / "preprocessor_config.json", lambda value: value.update(change))
    with pytest.raises(InputError, match=next(iter(change))):
        hf.read_llava_config(str(folder))


def test_an_exported_tokenizer_neither_cuts_nor_fills(tmp_path, sources):
    path = tmp_path / "llama" / "tokenizer.json"
    padding = dict(strategy={"Fixed": 9}, direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0)
    limits = dict(
        truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0),
        padding=padding | dict(pad_token="<unk>"),
    )
    edit(path, lambda value: value.update(limits))
    write(sources, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None


def test_an_end_of_text_only_in_config_json_is_exported(tmp_path, sources):
    path = tmp_path / "llama" / "tokenizer_config.json"
    edit(path, lambda value: value.pop("eos_token"))
    with pytest.raises(InputError, match="no end-of-text token"):
        write(sources, tmp_path / "out")
    edit(tmp_path / "llama" / "config.json", lambda value: value.update(eos_token_id=2))
    write(sources, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_a_tokenizer_that_reads_whole_strings_otherwise_is_said(tmp_path, sources, capsys):
    """`<image>` that swallows the white space before it: no rule of ours gives the pieces' ids."""
    write(sources, tmp_path / "out")
    assert "warning" not in capsys.readouterr().out
    path = tmp_path / "llama" / "tokenizer.json"
    swallowing = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"][-2] | dict(lstrip=True)
    assert swallowing["content"] == "<image>"
    edit(path, lambda value: value["added_tokens"].append(swallowing))
    with pytest.raises(InputError, match=r"the exported tokenizer reads .<s>A chat .* otherwise than it was.*--force"):
        write(sources, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    convert.convert(str(tmp_path / "out"), f"hf:{tmp_path / 'whole'}")
    shutil.copy(path, tmp_path / "whole")
    with pytest.raises(InputError, match="--force"):
        convert.convert(str(tmp_path / "whole"), f"hf:{tmp_path / 'again'}")
    assert main(["convert", f"--from={tmp_path / 'whole'}", f"--to=hf:{tmp_path / 'again'}", "--force"]) == 0
    assert re.search(
        r"warning: the exported tokenizer reads .<s>A chat .* otherwise than it was", capsys.readouterr().out
    )


@pytest.mark.parametrize("target", ["hf:DIR", "projector:DIR.safetensors"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, sources, target):
    """One value of the second layer of a stack, and one of the projector."""
    params = random_params(CONFIG)
    params["llm"]["layers"]["mlp"]["up"]["kernel"][1, 3, 2] = np.nan
    params["projector"]["linear_1"]["bias"][0] = np.inf
    write(sources, tmp_path / "whole", params=params)
    arguments = ["convert", f"--from={tmp_path / 'whole'}", f"--to={target.replace('DIR', str(tmp_path / 'again'))}"]
    with pytest.raises(InputError, match=r"(llm/layers/mlp/up/kernel and 1|projector/linear_1/bias and 0) other"):
        run(arguments)
    assert main([*arguments, "--force"]) == 0


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_flags_of_image_are_the_same_in_both_tokenizer_files(tmp_path, sources, capsys, legacy, with_image):
    """A SentencePiece tokenizer saved with added_tokens_decoder, as every transformers from 4.34 on writes it."""
    folder = make_tokenizers.trained_llama(tmp_path / "tokenizer", legacy)
    decoder = {str(i): dict(content=text, special=True) for i, text in enumerate(("<unk>", "<s>", "</s>"))}
    image = dict(content="<image>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    if with_image:
        decoder["700"] = image
        edit(tmp_path / "tokenizer" / "tokenizer.json", lambda value: value["added_tokens"].append(image | {"id": 700}))
    edit(tmp_path / "tokenizer" / "tokenizer_config.json", lambda value: value.update(added_tokens_decoder=decoder))
    llm = dataclasses.replace(LLAMA, vocab_size=701)
    config = dataclasses.replace(CONFIG, llm=llm, image_token_id=700)
    write(sources, tmp_path / "out", config, random_params(config), extras=dict(tokenizer=folder))
    assert "warning" not in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    (flags,) = [token["normalized"] for token in written if token["content"] == "<image>"]
    both = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert both["700"]["normalized"] == flags
    assert hf_config.contradictions(str(tmp_path / "out")) == []


@pytest.mark.parametrize("change, says", [
    (dict(size=256), "size is 256"), (dict(size=dict(shortest_edge=9)), "size is .*expected 8, the tower's image_size"),
    (dict(crop_size=dict(height=8, width=9)), "crop_size is"), (dict(do_center_crop=False, do_pad=False), "no square"),
    (dict(size=8, crop_size=8), None), (dict(size=None), None),
], ids=str)  # fmt: skip
def test_images_that_end_as_no_square_of_the_tower_are_refused(tmp_path, sources, change, says):
    folder = foreign(tmp_path, sources)
    edit(folder / "preprocessor_config.json", lambda value: value.update(change))
    if says is None:
        assert hf.read_llava_config(str(folder))[1].aspect == "pad"
        return
    with pytest.raises(InputError, match=says):
        hf.read_llava_config(str(folder))


# ---- facts stated twice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards_stay", [True, False])
def test_a_single_file_counts_before_the_index_of_older_shards(tmp_path, sources, capsys, shards_stay):
    """What transformers leaves after it saves in place: the new weights in one file, the old index next to it."""
    write(sources, tmp_path / "old", params=random_params(CONFIG, seed=5), shard_bytes=4000)
    write(sources, tmp_path / "new")
    shutil.copyfile(tmp_path / "new" / "model.safetensors", tmp_path / "old" / "model.safetensors")
    if not shards_stay:
        for shard in tmp_path.glob("old/model-0*"):
            shard.unlink()
    assert_same(hf.read_llava(str(tmp_path / "old"))[1], hf.read_llava(str(tmp_path / "new"))[1])
    capsys.readouterr()
    convert.convert(f"hf:{tmp_path / 'old'}", f"projector:{tmp_path / 'p.safetensors'}")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "model.safetensors.index.json" in line and line.endswith("model.safetensors counts")


def test_a_folder_that_contradicts_nothing_says_nothing(tmp_path, sources):
    write(sources, tmp_path / "out")
    assert hf_config.contradictions(str(tmp_path / "out")) == []


def test_a_contradiction_names_both_places(tmp_path, sources):
    folder = str(tmp_path / "out")
    write(sources, folder)
    path = tmp_path / "out" / "config.json"
    given = json.loads(path.read_text())
    given["text_config"] |= dict(
        rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(rope_type="default")
    )
    path.write_text(json.dumps(given | dict(torch_dtype="float16")))
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[7, 8])))
    dtype, eos, rope = (line.removeprefix(f"{folder}: ") for line in hf_config.contradictions(folder))
    assert "dtype: config.json dtype says 'float32' and config.json torch_dtype 'float16'; config.json dtype" in dtype
    assert "generation_config.json eos_token_id says" in eos and "config.json eos_token_id" in eos
    assert (
        "rope_scaling says rope_type 'linear' and config.json text_config.rope_parameters rope_type 'default'" in rope
    )
    assert hf.read_llava_config(folder)[0].llm.rope == RopeConfig(kind="linear", factor=2.0)


def test_a_feature_layer_in_a_list_of_one(tmp_path, sources):
    write(sources, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | dict(vision_feature_layer=[-2])))
    assert hf.read_llava_config(str(tmp_path / "out"))[0].feature_layer == -2
    path.write_text(json.dumps(given | dict(vision_feature_layer=[-2, -1])))
    with pytest.raises(InputError, match="expected one whole number"):
        hf.read_llava_config(str(tmp_path / "out"))


# ---- what a tokenizer's folder may hold -----------------------------------------------------------------------------

CODE = """
import pathlib
from transformers import PreTrainedTokenizerFast

pathlib.Path(__file__).with_name("ran").touch()


class Custom(PreTrainedTokenizerFast):
    pass
"""


def test_code_in_a_folder_is_not_run(tmp_path, monkeypatch):
    """On a terminal transformers would ask, and run it for a `y`."""
    folder = write_tokenizer(str(tmp_path))
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "config.json").write_text(
        json.dumps(dict(model_type="custom", auto_map=dict(AutoConfig="code.Custom")))
    )
    auto = dict(tokenizer_class="Custom", auto_map=dict(AutoTokenizer=["code.Custom", "code.Custom"]))
    edit(tmp_path / "tokenizer_config.json", lambda value: value.update(auto))
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(InputError, match="is Python code in the folder .* not run"):
        tokenize.load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_byte_order_mark_is_read_over(tmp_path, sources, name):
    write(sources, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_model(str(tmp_path / "out"), "--from")[0].vision == CLIP
    assert tokenize.load_tokenizer(str(tmp_path / "out")).eos_id == 2


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 499723\n"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "pytorch_model.bin"]
)
def test_a_git_lfs_pointer_is_named_so(tmp_path, sources, name):
    write(sources, tmp_path / "out")
    if name == "tokenizer.model":
        (tmp_path / "out" / "tokenizer.json").unlink()
    if name == "pytorch_model.bin":
        (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / name).write_text(POINTER)
    with pytest.raises(InputError, match=f"{name}: is a git-lfs pointer"):
        convert.convert(str(tmp_path / "out"), f"hf:{tmp_path / 'again'}")


@pytest.mark.parametrize("kind", ["hf", "llava", "orbax"])
def test_each_tokenizer_is_built_once(tmp_path, sources, monkeypatch, kind):
    """The source's, and the one that was written, to be compared with it."""
    write(sources, tmp_path / "one")
    convert.convert(f"hf:{tmp_path / 'one'}", f"llava:{tmp_path / 'llava'}")
    # A folder that was not read before.
    source = shutil.copytree(tmp_path / ("llava" if kind == "llava" else "one"), tmp_path / "source")
    built = []
    init = tokenize.TextTokenizer.__init__
    monkeypatch.setattr(tokenize.TextTokenizer, "__init__", lambda self, *a: (built.append(a), init(self, *a))[1])
    convert.convert(str(source), f"{kind}:{tmp_path / 'out'}")
    assert len(built) == 2
