"""Every family: a random model of transformers to ours, to orbax and out again, bit by bit; two transformers read it.

`make parity` also sets up .venv-parity-446 with transformers 4.46.3, where peer_446.py runs; NOT_IN_446 says what that
version does not know. SigLIP2 of a fixed resolution is published as SigLIP, which it does.
"""

import json
import os
import pathlib
import subprocess

import numpy as np
import peers
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file

import llava_jax
from configs import tiny
from llava_jax.models.llava import build
from llava_jax.settings import settings_from_dict
from llava_jax.train.loop import train
from llava_jax.types import ClipConfig, ModelConfig, Pixels
from llava_jax.weights import convert, hf, name_table
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras

PYTHON_446 = pathlib.Path(__file__).parents[2] / ".venv-parity-446" / "bin" / "python"
ROWS = 192  # of the embedding: more than the tokenizer has, so that <image> and <pad> find room
IMAGE_ID = 128
TEXT = peers.TEXT | dict(vocab_size=ROWS)
HALF = (0.5, 0.5, 0.5)

DECODERS = {
    "llama1": (transformers.LlamaConfig, dict(num_key_value_heads=4, rms_norm_eps=1e-6)),
    "llama2": (transformers.LlamaConfig, dict(num_key_value_heads=1, rms_norm_eps=1e-5)),
    "vicuna": (transformers.LlamaConfig, dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "tinyllama": (transformers.LlamaConfig, dict(rms_norm_eps=1e-5)),
    "smollm2": (transformers.LlamaConfig, dict(rope_parameters=dict(rope_type="default", rope_theta=1e5), tied=True)),
    "llama3": (transformers.LlamaConfig, dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama3.2": (transformers.LlamaConfig, dict(rope_parameters=peers.LLAMA3, tied=True, eos_token_id=[2, 60, 61])),
    "mistral_v0.1": (transformers.MistralConfig, dict(sliding_window=9)),
    "mistral_v0.3": (
        transformers.MistralConfig,
        dict(sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    ),
    "mistral_nemo": (transformers.MistralConfig, dict(sliding_window=None, head_dim=12)),
    "qwen2": (transformers.Qwen2Config, dict(tied=True, rms_norm_eps=1e-6)),
    "qwen2.5": (transformers.Qwen2Config, dict(eos_token_id=[2, 60])),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=12, tied=True)),
}
SIGLIP = dict(image_size=18, layer_norm_eps=1e-6)  # 18 = 4 * 4 + 2, as 384 = 27 * 14 + 6
# Those that come with a SentencePiece tokenizer; the others' are of bytes.
SENTENCEPIECE = ("llama1", "llama2", "vicuna", "tinyllama", "mistral_v0.1", "mistral_v0.3")
TOWERS = {
    "clip_l_14": (transformers.CLIPVisionConfig, {}, "default", -2, Pixels(), "crop"),
    "clip_l_14_336": (transformers.CLIPVisionConfig, dict(image_size=20), "default", -2, Pixels(), "crop"),
    "siglip": (transformers.SiglipVisionConfig, SIGLIP, "full", -2, Pixels(HALF, HALF), "squash"),
    # SigLIP2's filter; the last layer, and no head, as LLaVA-OneVision.
    "siglip2": (
        transformers.SiglipVisionConfig,
        SIGLIP | dict(vision_use_head=False),
        "full",
        -1,
        Pixels(HALF, HALF, "bilinear"),
        "squash",
    ),
}
FAMILIES = {name: (name, "clip_l_14") for name in DECODERS} | {
    "clip_l_14_336": ("vicuna", "clip_l_14_336"),
    "siglip": ("vicuna", "siglip"),
    "siglip2": ("qwen2.5", "siglip2"),
}
NOT_IN_446 = {"qwen3": "came with transformers 4.51"}
IN_446 = [name for name in FAMILIES if name not in NOT_IN_446]
WORDS = ["What", "is", "this", "it", "a", "cat", "so", "Because", "Why", "here"]


def make(folder: str, decoder: str, tower: str) -> None:
    """A whole random model, its tokenizer and how its images become pixels, as transformers 5 writes them."""
    text_class, text = DECODERS[decoder]
    vision_class, vision, strategy, layer, pixels, aspect = TOWERS[tower]
    text = TEXT | {key: value for key, value in text.items() if key != "tied"}
    text["tie_word_embeddings"] = "tied" in DECODERS[decoder][1]
    tower_config = vision_class(**peers.VISION | vision)
    config = transformers.LlavaConfig(
        vision_config=tower_config,
        text_config=text_class(**text),
        image_token_index=IMAGE_ID,
        image_seq_length=(tower_config.image_size // tower_config.patch_size) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    model = peers.randomised(transformers.LlavaForConditionalGeneration(config))
    with torch.no_grad():
        # Or many an answer ends before it begins, or is ids without text.
        model.get_output_embeddings().weight[[2, *range(IMAGE_ID, ROWS)]] *= 0.1
    model.save_pretrained(folder)
    with open(folder + "/generation_config.json", "w") as file:
        json.dump(dict(bos_token_id=1, eos_token_id=text["eos_token_id"], pad_token_id=0), file)
    peers.tokenizer(folder, "prepend" if decoder in SENTENCEPIECE else "bytes", image=True)
    size = config.vision_config.image_size
    square = dict(height=size, width=size)
    settings = dict(image_mean=pixels.mean, image_std=pixels.std, resample=2 if pixels.resample == "bilinear" else 3)
    settings |= dict(size=square) if aspect == "squash" else dict(size=dict(shortest_edge=size), crop_size=square)
    settings |= dict(image_processor_type="SiglipImageProcessor" if aspect == "squash" else "CLIPImageProcessor")
    with open(folder + "/preprocessor_config.json", "w") as file:
        json.dump(settings, file)


def inputs(vision: ClipConfig) -> dict[str, torch.Tensor]:
    """Two rows of 50 tokens with an image each, at different places."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, IMAGE_ID, (2, 50))
    for row, start in enumerate((1, 6)):
        tokens[row, start : start + vision.patches] = IMAGE_ID
    pixels = rng.normal(size=(2, 3, vision.image_size, vision.image_size)).astype(np.float32)
    given = dict(input_ids=tokens, attention_mask=np.ones_like(tokens), pixel_values=pixels)
    return {name: torch.from_numpy(value) for name, value in given.items()}


def logits_of(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return model(**given).logits.numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: (folder of transformers, as orbax, and out again)}, and what 4.46.3 makes of the last, in one go."""
    made, asked = {}, []
    for name, (decoder, tower) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        first, whole, second = (str(folder / part) for part in ("theirs", "orbax", "ours"))
        make(first, decoder, tower)
        convert.convert("hf:" + first, "orbax:" + whole)
        convert.convert("orbax:" + whole, "hf:" + second)
        given = inputs(hf.read_llava_config(first)[0].vision)
        np.savez(second + "/inputs.npz", **{key: value.numpy() for key, value in given.items()})
        made[name] = first, whole, second
        asked += [second] if name in IN_446 else []
    assert PYTHON_446.exists(), "`make parity` sets up .venv-parity-446"
    command = [PYTHON_446, pathlib.Path(__file__).with_name("peer_446.py"), *asked]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    return made


def check_same_tensors(ours: str, theirs: str) -> None:
    """Same names (ours those of the hub; 5.23 leaves `vision_model.` out of them), dtypes and bits."""
    found, wanted = (load_file(folder + "/model.safetensors") for folder in (ours, theirs))
    wanted = {name_table.canonical(name, "llava"): value for name, value in wanted.items()}
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_through_ours_bit_by_bit(folders, name):
    """Every tensor and no other; the same decoder and tower in config.json."""
    first, _, second = folders[name]
    check_same_tensors(second, first)
    configs = [transformers.AutoConfig.from_pretrained(folder) for folder in (first, second)]
    assert type(configs[0].text_config) is type(configs[1].text_config)
    assert configs[0].text_config.model_type == configs[1].text_config.model_type
    assert type(configs[0].vision_config) is type(configs[1].vision_config)
    ends = [transformers.GenerationConfig.from_pretrained(folder).eos_token_id for folder in (first, second)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_ours_and_of_both_transformers(folders, name):
    first, _, second = folders[name]
    ours = llava_jax.load("hf:" + first, template="v1")
    given = inputs(ours.config.vision)
    wanted = logits_of(peers.load_strict(first), given)
    found = ours.logits(given["input_ids"].numpy(), given["pixel_values"].numpy())
    assert peers.relative(found, wanted) <= 1e-4
    np.testing.assert_array_equal(logits_of(peers.load_strict(second), given), wanted)
    if name in IN_446:
        assert peers.relative(np.load(second + "/logits_446.npy"), wanted) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_and_what_the_processor_gives(folders, name):
    """Six prompts, every second one about an image; pixels and ids as transformers 5 and 4.46.3 make them."""
    _, whole, second = folders[name]
    ours, theirs = llava_jax.load("orbax:" + whole), peers.load_strict(second)
    processor = transformers.AutoProcessor.from_pretrained(second)
    rng = np.random.default_rng(5)
    prompts = [" ".join(rng.choice(WORDS, 4)) + "?" for _ in range(6)]
    images = [Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)) if i % 2 else None for i in range(6)]
    wanted = []
    for prompt, image in zip(prompts, images, strict=True):
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        given = processor(
            text=processor.apply_chat_template(messages, add_generation_prompt=True), images=image, return_tensors="pt"
        )
        if image is not None:
            asked = ours.prompt([{"role": "user", "content": [{"type": "image", "image": image}, content[-1]]}])
            np.testing.assert_array_equal(given["input_ids"][0], asked.tokens)
            np.testing.assert_allclose(given["pixel_values"][0].permute(1, 2, 0), asked.pixels[0], atol=1e-6)
        with torch.no_grad():
            ids = theirs.generate(**given, do_sample=False, max_new_tokens=12)[0, given["input_ids"].shape[1] :]
        wanted.append(processor.decode(ids, skip_special_tokens=True).strip())
    assert len(set(wanted)) > 1 and all(wanted)
    assert ours.generate(prompts, images, max_new_tokens=12) == wanted
    if name in IN_446:
        content = [{"type": "image", "image": Image.new("RGB", (20, 30))}, {"type": "text", "text": "What is this?"}]
        ids = ours.prompt([{"role": "user", "content": content}]).tokens
        # 4.46.3 knows no tower without a class token and counts one image token too many (fixed in 4.49).
        extra = [] if FAMILIES[name][1].startswith("clip") else [IMAGE_ID]
        assert sorted(np.load(second + "/ids_446.npy").tolist()) == sorted(ids.tolist() + extra)


@pytest.mark.parametrize("whole", [True, False])
def test_a_siglip_folder_and_a_decoder_folder_become_one(tmp_path, whole):
    """SiglipModel or SiglipVisionModel next to Qwen2ForCausalLM: features, and what no LLaVA runs copied through."""
    vision = transformers.SiglipVisionConfig(**peers.VISION | SIGLIP)
    model = transformers.SiglipVisionModel(vision)
    if whole:
        text = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
        text |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
        config = transformers.SiglipConfig(text_config=text, vision_config=vision.to_dict())
        model = transformers.SiglipModel(config)
    peers.randomised(model).save_pretrained(tmp_path / "siglip")
    decoder = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))
    peers.randomised(decoder).save_pretrained(tmp_path / "qwen")
    peers.tokenizer(tmp_path / "qwen", "bytes", image=True)
    tower, vision_params = hf.read_clip(str(tmp_path / "siglip"))
    llm, llm_params = hf.read_llama(str(tmp_path / "qwen"))
    assert (tower.family, llm.family, tower.pixels.mean) == ("siglip", "qwen2", HALF)
    config = ModelConfig(vision=tower, llm=llm, image_token_id=IMAGE_ID)
    params = peers.random_params(build(config)[1]) | {"vision": vision_params, "llm": llm_params}
    extras = LlavaExtras(aspect="squash", tokenizer=str(tmp_path / "qwen"), vision=str(tmp_path / "siglip"))
    write_llava(str(tmp_path / "out"), config, params, extras)
    theirs = peers.load_strict(str(tmp_path / "out"))
    source = (model.vision_model if whole else model).state_dict()
    source = {name.removeprefix("vision_model."): value for name, value in source.items()}
    for name, value in theirs.model.vision_tower.state_dict().items():
        assert torch.equal(value, source[name.removeprefix("vision_model.")]), name
    given = inputs(tower)
    found = llava_jax.load("hf:" + str(tmp_path / "out")).logits(
        given["input_ids"].numpy(), given["pixel_values"].numpy()
    )
    assert peers.relative(found, logits_of(theirs, given)) <= 1e-4
    tokens = given["input_ids"] % IMAGE_ID
    with torch.no_grad():
        np.testing.assert_allclose(theirs(tokens).logits, decoder(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral_v0.1", "qwen2.5", "qwen3", "siglip2"])
def test_through_a_training_run(folders, name, tmp_path):
    """One update of finetune that moves nothing, its checkpoint, and the folder written from that: bit-equal."""
    first, _, _ = folders[name]
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "It is a cat."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}] * 2))
    Image.new("RGB", (20, 30), (10, 200, 90)).save(tmp_path / "a.png")
    values = tiny.get_config("stage=finetune").to_dict()
    values["init"]["model"] = "hf:" + first
    values["data"] |= dict(annotations=str(tmp_path / "rows.json"), images=str(tmp_path), template="v1", max_length=250)
    values["optim"] |= dict(lr=1e-30, weight_decay=0.0)
    values["train"] |= dict(batch_size=2, steps=1, dtype="float32")
    train(settings_from_dict(values), str(tmp_path / "run"))
    (metrics,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert metrics["grad_norm"] > 0
    convert.convert(f"orbax:{tmp_path / 'run'}", f"hf:{tmp_path / 'out'}")
    check_same_tensors(str(tmp_path / "out"), first)
