"""A folder that we write, as transformers reads it: weights, logits, tokens, chat template, images, answers."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from flax import nnx
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

import llava_jax
from llava_jax.api import Processor, question
from llava_jax.data.images import preprocess
from llava_jax.data.templates import TEMPLATES, render
from llava_jax.data.tokenize import encode, expand, load_tokenizer
from llava_jax.models.llava import build
from llava_jax.types import IMAGE_MARK, ClipConfig, LlamaConfig, ModelConfig, Turn
from llava_jax.weights import hf
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras, check_ids, write_processor
from tests.chat_families import FAMILIES, write_family

CONFIG = ModelConfig(
    vision=ClipConfig(width=16, mlp_width=32, layers=3, heads=2, image_size=16, patch_size=4),
    llm=LlamaConfig(vocab_size=128, width=32, mlp_width=48, layers=1, heads=2, kv_heads=2, head_dim=16),
)
TURNS = [
    Turn("human", "<image>\nWhat is this?"),
    Turn("gpt", "It is a café."),
    Turn("human", "Why\nso?"),
    Turn("gpt", "Because."),
    Turn("human", "Sure?"),
]


def exported(tmp_path, *, projector="mlp2x_gelu", text=None, style="bytes", dtype="float32", **ours):
    """A trained-looking model of CLIP and LLaMA folders, written with write_llava: (folder, config, params)."""
    peers.clip(tmp_path / "clip", whole=True)
    peers.llama(tmp_path / "llama", **(text or {}))
    peers.tokenizer(tmp_path / "llama", style)
    vision, vision_params = hf.read_clip(str(tmp_path / "clip"))
    llm, llm_params = hf.read_llama(str(tmp_path / "llama"))
    image_id = load_tokenizer(str(tmp_path / "llama")).image_token_id(llm.vocab_size)
    config = ModelConfig(vision=vision, llm=llm, projector=projector, image_token_id=image_id)
    params = peers.random_params(build(config)[1]) | {"vision": vision_params, "llm": llm_params}
    folder = str(tmp_path / "out")
    extras = LlavaExtras(**ours, tokenizer=str(tmp_path / "llama"), vision=str(tmp_path / "clip"))
    write_llava(folder, config, params, extras, dtype=dtype)
    return folder, config, params


CASES = {
    "mlp": dict(),
    "linear": dict(projector="linear"),
    "tied": dict(text=dict(tie_word_embeddings=True)),
    "llama3": dict(text=dict(rope_parameters=peers.LLAMA3, head_dim=12, attention_bias=True)),
    "linear_rope": dict(text=dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.0))),
    "room_in_vocabulary": dict(text=dict(vocab_size=640)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    folder, config, params = exported(tmp_path, **CASES[case])
    theirs = peers.load_strict(folder)
    tokens, targets, pixels = peers.batch()
    is_image = tokens == peers.IMAGE_ID
    ours = nnx.merge(build(config)[0], params)(
        jnp.asarray(np.where(is_image, config.image_token_id, tokens)), jnp.asarray(pixels)
    )
    tokens = np.where(is_image, theirs.config.image_token_index, tokens)
    with torch.no_grad():
        logits = theirs(**peers.torch_inputs(tokens, targets, pixels)).logits
    assert theirs.config.image_token_index < logits.shape[-1]
    assert peers.relative(ours, logits[..., : config.llm.vocab_size]) <= 1e-4


def test_vocabulary_grows_by_mean_rows_to_a_multiple_of_64(tmp_path):
    folder, config, params = exported(tmp_path)
    theirs = peers.load_strict(folder)
    rows, head = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    assert len(rows) == len(head) == -(-(config.image_token_id + 2) // 64) * 64
    table = params["llm"]["embed"]["table"]
    np.testing.assert_allclose(rows[len(table) :].detach()[0], table.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head[-1].detach(), params["llm"]["head"]["kernel"].mean(1), rtol=1e-5, atol=1e-6)


def test_blocks_that_are_not_held_are_copied(tmp_path):
    folder, _, _ = exported(tmp_path)
    source = peers.CLIPModel.from_pretrained(tmp_path / "clip").vision_model.state_dict()
    theirs = peers.load_strict(folder).model.vision_tower.state_dict()
    for name, value in theirs.items():
        assert torch.equal(value, source[name]), name


def test_bfloat16_and_shards(tmp_path):
    folder, _config, params = exported(tmp_path, dtype="bfloat16")
    assert json.load(open(folder + "/config.json"))["torch_dtype"] == "bfloat16"
    _read, again, _ = hf.read_llava(folder, dtype="bfloat16")
    np.testing.assert_array_equal(
        np.asarray(again["projector"]["linear_1"]["kernel"]),
        np.asarray(params["projector"]["linear_1"]["kernel"].astype(jnp.bfloat16)),
    )
    peers.load_strict(folder)


@pytest.mark.parametrize("style", ["bytes", "metaspace", "prepend"])
def test_whole_string_ids_equal_ours(tmp_path, style, capsys):
    folder, _, _ = exported(tmp_path, style=style)
    assert "warning" not in capsys.readouterr().out
    ours = load_tokenizer(str(tmp_path / "llama"))
    theirs = AutoTokenizer.from_pretrained(folder)
    image = theirs.convert_tokens_to_ids("<image>")
    for asked in ("<image>\nWhat is this?", "<image>And this?", "Say, é: <image>", "no image"):
        spans = render([Turn("human", asked), *TURNS[1:]], TEMPLATES["v1"], image_position="keep", open_turn=True)
        wanted = [image if token == IMAGE_MARK else token for token in encode(spans, ours).tokens.tolist()]
        text = "".join(span.text for span in spans)
        assert theirs(f"<s>{' ' if style == 'metaspace' else ''}{text}").input_ids == wanted
        assert theirs(text).input_ids == wanted[1:]


@pytest.fixture(scope="module")
def folder_with_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    peers.tokenizer(folder, "bytes")
    return str(folder)


@pytest.mark.parametrize("image_position", ["front", "keep"])
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_chat_template_renders_as_ours(tmp_path, folder_with_tokenizer, template, image_position):
    extras = LlavaExtras(template, image_position=image_position, tokenizer=folder_with_tokenizer)
    write_processor(str(tmp_path), CONFIG, extras)
    processor = AutoProcessor.from_pretrained(tmp_path)
    rules = TEMPLATES[template]
    conversations = [[Turn("human", "Look: <image> here. ")]]
    if not rules.caption_only:
        conversations += [TURNS[:1], TURNS[:3], TURNS, [Turn("human", " No image. ")], TURNS[:4]]
    for turns in conversations:
        messages = [
            {"role": {"human": "user", "gpt": "assistant"}[turn.speaker], "content": turn.text} for turn in turns
        ]
        open_turn = turns[-1].speaker == "human"
        spans = render(turns, rules, image_position=image_position, open_turn=open_turn)
        wanted = "<s>" + "".join(span.text for span in spans)
        given = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
        assert given == wanted
        parts = [{**message, "content": as_parts(message["content"])} for message in messages]
        if turns[0].text.startswith("<image>"):
            assert processor.apply_chat_template(parts, add_generation_prompt=open_turn) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_processor_gives_our_ids_with_the_tokenizers_own_template(tmp_path, name):
    """Parts and a real image through transformers' processor, as `generate` asks."""
    extras = LlavaExtras("tokenizer", tokenizer=write_family(tmp_path / "llm", name))
    (tmp_path / "out").mkdir()
    tokens = write_processor(str(tmp_path / "out"), CONFIG, extras)
    check_ids(str(tmp_path / "out"), extras, force=False)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    asked = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
    asked |= dict(enable_thinking=False) if "thinking" in processor.chat_template else {}
    given = processor.apply_chat_template([{"role": "user", "content": parts}], **asked)["input_ids"]
    config = dataclasses.replace(CONFIG, image_token_id=tokens.image_id)
    ours = Processor(load_tokenizer(extras.tokenizer), config, "tokenizer", "crop", "front")
    assert np.asarray(given).ravel().tolist() == ours.tokens(question("What is this?", image)).tolist()


@pytest.mark.parametrize("style", ["bytes", "metaspace", "prepend"])
def test_every_way_through_the_processor_gives_the_training_ids(tmp_path, style):
    """Rendered first or in one, with special tokens and without; the mask of what is trained, images repeated."""
    folder, config, _ = exported(tmp_path, style=style)
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    encoded = encode(render(TURNS[:4], TEMPLATES["v1"]), load_tokenizer(str(tmp_path / "llama")))
    ids, targets = expand(encoded.tokens, encoded.targets, processor.image_token_id, config.vision.patches, None)
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn.speaker], "content": as_parts(turn.text)} for turn in TURNS[:4]]
    text = processor.apply_chat_template(messages)
    for special in (True, False):
        given = processor(text=text, images=image, add_special_tokens=special, return_tensors="np")
        assert given["input_ids"][0].tolist() == ids.tolist()
    messages[0]["content"][0]["image"] = image
    given = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert np.ravel(given["input_ids"]).tolist() == ids.tolist()
    if style == "bytes":  # the others, trained on lines, have a token of the colon and the space after it
        assert np.ravel(given["assistant_masks"]).tolist() == targets.astype(int).tolist()


def as_parts(text):
    image, _, rest = text.rpartition("<image>\n")
    return [{"type": "image"}] * bool(image or text.startswith("<image>\n")) + [{"type": "text", "text": rest}]


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_processor_gives_our_pixels_and_tokens(tmp_path, aspect):
    folder, config, _ = exported(tmp_path, aspect=aspect)
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (23, 37, 3), np.uint8))
    given = processor(images=picture, text="a <image>\nb", return_tensors="np")
    assert (given["input_ids"] == processor.image_token_id).sum() == config.vision.patches
    wanted = preprocess(picture, 16, aspect).transpose(2, 0, 1)
    np.testing.assert_allclose(given["pixel_values"][0], wanted, atol=1e-6)


def test_greedy_answers(tmp_path):
    """Ten prompts, every second one about an image, through `llava_jax.load` and through transformers."""
    folder, _, _ = exported(tmp_path, aspect="pad")
    ours, theirs = llava_jax.load("hf:" + folder), peers.load_strict(folder)
    processor = AutoProcessor.from_pretrained(folder)
    rng = np.random.default_rng(5)
    words = ["What", "is", "this", "it", "a", "cat", "so", "Because", "Why", "here"]
    prompts = [" ".join(rng.choice(words, 4)) + "?" for _ in range(10)]
    images = [
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)) if index % 2 else None for index in range(10)
    ]
    wanted = []
    for prompt, image in zip(prompts, images, strict=True):
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=image, return_tensors="pt")
        with torch.no_grad():
            ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        wanted.append(processor.decode(ids, skip_special_tokens=True).strip())
    assert len(set(wanted)) > 5
    assert ours.generate(prompts, images, max_new_tokens=12) == wanted
