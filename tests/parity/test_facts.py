"""Facts stated twice in a Hugging Face folder: our table's order against what transformers takes."""

import json
import pathlib

import numpy as np
import peers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llava_jax.data.tokenize import load_tokenizer
from llava_jax.weights import hf
from llava_jax.weights.hf_config import contradictions, folder_value, special_tokens


def change(folder, name, **keys):
    path = pathlib.Path(folder, name)
    given = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(given | keys))


@pytest.fixture
def folder(tmp_path):
    """A tiny LLaVA with its tokenizer and image settings, as transformers saves them."""
    peers.llava(tmp_path)
    peers.tokenizer(tmp_path, "prepend")
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path)
    return str(tmp_path)


def text_config(folder, **keys):
    given = json.loads(pathlib.Path(folder, "config.json").read_text())["text_config"]
    given.pop("rope_parameters", None)
    change(folder, "config.json", text_config=given | keys)


def ours(folder):
    return hf.read_llava_config(folder)[0]


def theirs(folder):
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards_stay", [True, False])
def test_weights(folder, kind, shards_stay):
    """Both take the single file next to the index of older shards, whether these are there or not."""
    single = pathlib.Path(folder, "model.safetensors")
    new = load_file(single)
    old = {name: torch.zeros_like(tensor) for name, tensor in new.items()}
    shard, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    if kind == "bin":
        single.unlink()
        torch.save(new, pathlib.Path(folder, "pytorch_model.bin"))
        shard, index = "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"
    if shards_stay and kind == "bin":
        torch.save(old, pathlib.Path(folder, shard))
    elif shards_stay:
        save_file(old, pathlib.Path(folder, shard), metadata={"format": "pt"})
    pathlib.Path(folder, index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(new, shard)}))
    wanted = peers.load_strict(folder).state_dict()["lm_head.weight"].numpy()
    found = hf.read_llava(folder)[1]["llm"]["head"]["kernel"]
    assert np.any(wanted) and np.array_equal(found, wanted.T)
    assert ["weights" in line for line in contradictions(folder)] == [True]


LINEAR, DEFAULT = {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "keys",
    [
        dict(rope_scaling=LINEAR, rope_parameters=DEFAULT),
        dict(rope_scaling=LINEAR, rope_parameters=DEFAULT, rope_theta=700.0),
        dict(rope_scaling=None, rope_parameters=DEFAULT, rope_theta=700.0),
        dict(rope_scaling={}, rope_parameters={"rope_type": "linear", "factor": 3.0}),
        dict(rope_scaling=LINEAR, rope_theta=700.0),
    ],
    ids=str,
)
def test_rope(folder, keys):
    text_config(folder, **keys)
    wanted, found = theirs(folder).text_config.rope_parameters, ours(folder).llm.rope
    kind = wanted.get("rope_type") or wanted["type"]
    assert (found.kind, found.theta) == (kind, wanted["rope_theta"])
    assert kind == "default" or found.factor == wanted["factor"]
    assert bool(contradictions(folder)) == bool(keys["rope_scaling"] and "rope_parameters" in keys)


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("inner", [True, False, None])
def test_tied_embeddings(folder, top, inner):
    given = json.loads(pathlib.Path(folder, "config.json").read_text())
    for config, value in ((given, top), (given["text_config"], inner)):
        config.pop("tie_word_embeddings", None)
        config.update({} if value is None else {"tie_word_embeddings": value})
    pathlib.Path(folder, "config.json").write_text(json.dumps(given))
    assert ours(folder).llm.tied == theirs(folder).tie_word_embeddings
    assert bool(contradictions(folder)) == ({top, inner} == {True, False})


@pytest.mark.parametrize("keys", [(120, 121), (None, 121), (120, None)])
def test_image_token(folder, keys):
    given = json.loads(pathlib.Path(folder, "config.json").read_text())
    given = {key: value for key, value in given.items() if not key.startswith("image_token")}
    given |= {k: v for k, v in zip(("image_token_id", "image_token_index"), keys, strict=True) if v is not None}
    pathlib.Path(folder, "config.json").write_text(json.dumps(given))
    assert ours(folder).image_token_id == theirs(folder).image_token_id
    assert bool(contradictions(folder)) == (None not in keys)


@pytest.mark.parametrize("keys", [("bfloat16", "float32"), ("float32", "bfloat16"), (None, "bfloat16")])
def test_dtype(folder, keys):
    change(folder, "config.json", **dict(zip(("dtype", "torch_dtype"), keys, strict=True)))
    assert f"torch.{hf.stored_dtype(folder)}" == str(theirs(folder).dtype)


def test_image_settings(folder):
    """transformers 5 nests them in processor_config.json, which counts before the file of version 4."""
    change(folder, "preprocessor_config.json", image_processor_type="CLIPImageProcessor", image_mean=[0.1, 0.1, 0.1])
    inner = json.loads(pathlib.Path(folder, "preprocessor_config.json").read_text()) | {"image_mean": [0.2, 0.2, 0.2]}
    change(folder, "processor_config.json", image_processor=inner)
    wanted = transformers.AutoImageProcessor.from_pretrained(folder).image_mean
    assert list(ours(folder).vision.pixels.mean) == list(wanted) == [0.2, 0.2, 0.2]
    assert "image_mean" in contradictions(folder)[0]


def test_end_of_an_answer(folder):
    change(folder, "config.json", eos_token_id=5)
    text_config(folder, eos_token_id=6)
    for name, key in (("generation_config.json", 4), ("config.json", 5), ("config.json", 6)):
        if name == "generation_config.json":
            change(folder, name, eos_token_id=key)
        wanted = peers.load_strict(folder).generation_config.eos_token_id
        assert wanted == key and key in load_tokenizer(folder).ends
        assert folder_value(folder, "end of an answer")[0] == key
        if name == "generation_config.json":
            pathlib.Path(folder, name).unlink()
        else:
            change(folder, "config.json", eos_token_id=None)


@pytest.mark.parametrize("absent", range(4))
def test_chat_template(folder, absent):
    """The last ones are asked only where the ones before say nothing."""
    pathlib.Path(folder, "chat_template.jinja").write_text("jinja")
    change(folder, "chat_template.json", chat_template="json")
    change(folder, "tokenizer_config.json", chat_template="tokenizer")
    change(folder, "processor_config.json", processor_class="LlavaProcessor", chat_template="processor")
    assert any("chat template" in line for line in contradictions(folder))
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja")[:absent]:
        if name == "processor_config.json":
            change(folder, name, chat_template=None)
        else:
            pathlib.Path(folder, name).unlink()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    wanted = processor.chat_template or processor.tokenizer.chat_template
    assert folder_value(folder, "chat template")[0] == wanted


@pytest.mark.parametrize("decoder", [True, False])
def test_special_tokens(folder, decoder):
    names = dict(eos_token="</s>", bos_token="<s>")
    change(folder, "special_tokens_map.json", **names)
    more = {"added_tokens_decoder": {"2": dict(content="</s>", special=True)}} if decoder else {}
    change(folder, "tokenizer_config.json", eos_token="<unk>", **more)
    wanted = transformers.AutoTokenizer.from_pretrained(folder)
    assert special_tokens(folder)["eos_token"] == wanted.eos_token
    assert any("special tokens" in line for line in contradictions(folder))


def test_added_tokens(folder):
    """The flags in tokenizer_config.json count before those in tokenizer.json."""
    content = json.loads(pathlib.Path(folder, "tokenizer.json").read_text())
    entry = next(token for token in content["added_tokens"] if token["content"] == "</s>")
    flags = {key: value for key, value in entry.items() if key != "id"} | {"normalized": not entry["normalized"]}
    change(folder, "tokenizer_config.json", added_tokens_decoder={str(entry["id"]): flags})
    found = transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder[entry["id"]]
    assert found.normalized == flags["normalized"]
    assert any("added tokens" in line and "normalized" in line for line in contradictions(folder))
