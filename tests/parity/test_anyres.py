"""LLaVA-NeXT against transformers: tiles, token counts, logits of a tiny random model, and folders both ways."""

import json

import numpy as np
import peers
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

import llava_jax
from llava_jax.data.images import normalised
from llava_jax.data.tiles import Tiling
from llava_jax.weights import convert, hf, name_table

PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = {"landscape": (61, 23), "portrait": (19, 40), "square": (33, 33), "small": (10, 14), "thin": (150, 2)}


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 255, (size[1], size[0], 3), np.uint8))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder, model): a tiny random LLaVA-NeXT with its tokenizer, written by transformers."""
    folder = str(tmp_path_factory.mktemp("next") / "theirs")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**peers.VISION),
        text_config=LlamaConfig(**peers.TEXT | dict(vocab_size=192, max_position_embeddings=1024)),
        image_token_index=peers.IMAGE_ID + 1,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )
    model = peers.randomised(LlavaNextForConditionalGeneration(config))
    model.save_pretrained(folder)
    peers.tokenizer(folder, "bytes", image=True)
    return folder, model


@pytest.fixture(scope="module")
def exported(theirs, tmp_path_factory):
    """(folder that we wrote, our model read from theirs)."""
    folder = str(tmp_path_factory.mktemp("ours") / "ours")
    convert.convert("hf:" + theirs[0], "hf:" + folder)
    return folder, llava_jax.load(theirs[0])


def named(folder: str) -> dict[str, np.ndarray]:
    """The folder's tensors in one spelling: transformers 5 writes a fresh CLIP tower without `vision_model.`."""
    return {name_table.canonical(name, "llava"): x for name, x in load_file(folder + "/model.safetensors").items()}


def test_a_folder_goes_through_us_bit_equal(theirs, exported):
    (source, _), (folder, model) = theirs, exported
    before, after = (named(f) for f in (source, folder))
    assert "image_newline" in before and set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
    configs = [json.load(open(f"{f}/config.json")) for f in (source, folder)]
    for key in ("architectures", "model_type", "image_grid_pinpoints", "image_token_index"):
        assert configs[0][key] == configs[1][key], key
    assert model.config.pinpoints == tuple(map(tuple, PINPOINTS)) and model.processor.aspect == "anyres"
    read, params, extras = hf.read_llava(folder)
    assert read.pinpoints == model.config.pinpoints and extras.aspect == "anyres"
    assert np.array_equal(params["projector"]["image_newline"], before["image_newline"])


def load_strict(folder: str) -> LlavaNextForConditionalGeneration:
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


BATCHES = {name: [[name]] for name in SIZES} | {
    "two_rows": [["landscape"], ["portrait"]],
    "two_in_a_row": [["square", "portrait"], [], ["small"]],
}


@pytest.mark.parametrize("case", BATCHES)
def test_logits(exported, case):
    """transformers reads our folder and makes the inputs; its pixels, ids and logits are ours."""
    folder, ours = exported
    model, processor = load_strict(folder), AutoProcessor.from_pretrained(folder)
    assert type(processor) is LlavaNextProcessor
    processor.tokenizer.padding_side = "right"
    pictures = [[picture(SIZES[name]) for name in row] for row in BATCHES[case]]
    questions = [[{"role": "user", "content": content(row)}] for row in pictures]
    texts = [processor.apply_chat_template(question, add_generation_prompt=True) for question in questions]
    shown = [image for row in pictures for image in row]
    inputs = processor(text=texts, images=shown, return_tensors="pt", padding=True)

    assert type(processor.image_processor).__name__.startswith("LlavaNextImageProcessor")
    for row, (question, images) in enumerate(zip(questions, pictures, strict=True)):
        asked = [{"type": "image", "image": image} for image in images] + [
            part for part in question[0]["content"] if part["type"] == "text"
        ]
        prompt = ours.prompt([{"role": "user", "content": asked}])
        length = int(inputs["attention_mask"][row].sum())
        np.testing.assert_array_equal(prompt.tokens, inputs["input_ids"][row, :length])
        first, places = sum(map(len, pictures[:row])), ours_tiles(images)
        tiles = [inputs["pixel_values"][first + n, :count] for n, count in enumerate(places)]
        if tiles:
            np.testing.assert_allclose(prompt.pixels.transpose(0, 3, 1, 2), torch.cat(tiles), atol=1e-6)

    with torch.no_grad():
        wanted = model(**inputs).logits
    names = ("input_ids", "pixel_values", "attention_mask", "image_sizes")
    given = ours.logits(*(inputs[name].numpy() for name in names))
    mask = inputs["attention_mask"].numpy()[..., None] == 1
    assert peers.relative(given * mask, wanted.numpy() * mask) <= 1e-4


def content(images: list[Image.Image]) -> list[dict]:
    return [*({"type": "image"} for _ in images), {"type": "text", "text": "What is this?"}]


def ours_tiles(images: list[Image.Image]) -> list[int]:
    return Tiling(16, 4, tuple(map(tuple, PINPOINTS))).tiles([image.size for image in images])


def test_greedy_answers(exported):
    folder, ours = exported
    model, processor = load_strict(folder), AutoProcessor.from_pretrained(folder)
    images = [picture(size) for size in SIZES.values()] + [None]
    wanted = []
    for image in images:
        question = [{"role": "user", "content": content([] if image is None else [image])}]
        text = processor.apply_chat_template(question, add_generation_prompt=True)
        inputs = processor(text=text, images=image, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
        wanted.append(processor.decode(ids, skip_special_tokens=True).strip())
    assert len(set(wanted)) > 3
    assert ours.generate(["What is this?"] * len(images), images, max_new_tokens=10) == wanted


@pytest.mark.parametrize("size, pinpoints", [(16, PINPOINTS), (336, PUBLISHED)])
def test_counts_of_any_size(size, pinpoints):
    """The processor's own count for 2000 sizes, those of one pixel and of 200:1 included."""
    processor = object.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14 if size == 336 else 4, 0
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints)
    ours = Tiling(size, size // processor.patch_size, tuple(map(tuple, pinpoints)))
    rng = np.random.default_rng(0)
    for width, height in [(1, 1), (200, 1), (1, 200), *rng.integers(1, 3000, (2000, 2)).tolist()]:
        wanted = processor._get_number_of_features(height, width, size, size)
        assert ours.tokens([(width, height)]) == [wanted], (width, height)


@pytest.mark.parametrize("size", [(640, 427), (333, 500), (1200, 90), (50, 51), (1400, 1380)])
def test_tiles_of_published_size(size):
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=PUBLISHED
    )
    image = picture(size)
    wanted = processor(image, return_tensors="np")["pixel_values"][0]
    ours = normalised(Tiling(336, 24, tuple(map(tuple, PUBLISHED))).cut(image)).transpose(0, 3, 1, 2)
    assert ours.shape == wanted.shape
    np.testing.assert_array_equal(ours, wanted)
