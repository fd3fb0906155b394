"""Tokenizer and chat template of an export, as programs use them that know nothing of ours."""

import dataclasses
import json

import jinja2
import pytest
import transformers

from llava_jax.api import read_messages
from llava_jax.data.rows import parse_any
from llava_jax.data.templates import TEMPLATES, render
from llava_jax.data.tokenize import encode, load_tokenizer
from llava_jax.types import IMAGE_MARK, Turn
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras, write_original_tokenizer
from tests.chat_families import FAMILIES, write_family
from tests.make_tokenizers import LLAMAS, byte_bpe
from tests.test_convert import CONFIG, LLAMA, random_params

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
TALK = (
    Turn("human", "<image>\nWhat is this?"),
    Turn("gpt", "A naïve façade, 3.5 m high."),
    Turn("human", "Why so?"),
    Turn("gpt", "猫です 😀\nand more"),
)
CAPTION = (Turn("human", "<image>"), Turn("gpt", "A red square."))
SYSTEM = Turn("system", "Be terse.")
# One of each format next to tokenizers that spell its tokens or write them as text.
FORMATS = ("plain", "v0", "v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "v1_im_start_end")
TOKENIZERS = LLAMAS | {"bytes": byte_bpe}
TOKENIZERS |= {name: lambda folder, name=name: write_family(folder, name) for name in FAMILIES}
PAIRS = [(name, template) for name in LLAMAS for template in FORMATS]
PAIRS += [("bytes", "chatml_direct"), ("llama_3_1", "llama_3"), ("qwen_2_5", "qwen"), ("gemma", "v1")]
PAIRS += [(name, template) for name in ("llama_3_1", "mistral_v0_3", "qwen_2_5") for template in ("v1", "tokenizer")]


def messages(turns):
    return [{"role": ROLES[turn.speaker], "content": turn.text} for turn in turns]


def export(folder, source, template):
    tokenizer = load_tokenizer(source)
    llm = dataclasses.replace(LLAMA, vocab_size=tokenizer.size)
    config = dataclasses.replace(CONFIG, llm=llm, image_token_id=tokenizer.image_token_id(tokenizer.size))
    write_llava(str(folder), config, random_params(config), LlavaExtras(template, tokenizer=source))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in TOKENIZERS.items()}


@pytest.mark.parametrize("name, template", PAIRS)
def test_every_way_to_tokenise_a_chat_gives_ids_and_targets_of_training(tmp_path, sources, name, template):
    """Rendered and tokenised, with special tokens or without, or both in one; the mask that TRL trains with."""
    theirs, ours = export(tmp_path / "out", sources[name], template), load_tokenizer(sources[name])
    image, rules = theirs.convert_tokens_to_ids("<image>"), ours.template(template)
    talks = [CAPTION] if rules.caption_only else [TALK, TALK[:2], (*CAPTION, Turn("human", " Sure? "))]
    talks += [(SYSTEM, *TALK)] if rules.system else []
    for turns in talks:
        asks = turns[-1].speaker == "human"
        wanted = encode(render(turns, rules, open_turn=asks), ours, bos=rules.bos)
        ids = [image if token == IMAGE_MARK else token for token in wanted.tokens.tolist()]
        text = theirs.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=asks)
        assert theirs(text).input_ids == theirs(text, add_special_tokens=False).input_ids == ids
        given = theirs.apply_chat_template(
            messages(turns), add_generation_prompt=asks, return_dict=True, return_assistant_tokens_mask=True
        )
        assert given["input_ids"] == ids
        if not asks and template in TEMPLATES:
            # The first token is predicted from nothing.
            assert given["assistant_masks"] == [0, *wanted.targets.astype(int).tolist()[1:]]
    # Read back, the export trains and answers with the same ids.
    again = load_tokenizer(str(tmp_path / "out"))
    spans = render(talks[0], rules)
    assert again.bos_id == ours.bos_id
    assert encode(spans, again).tokens.tolist() == encode(spans, ours).tokens.tolist()


PARTS = [{"type": "image"}, {"type": "text", "text": "Is this"}, {"type": "image"}, {"type": "text", "text": "it?"}]


@pytest.mark.parametrize("name, template", [("llama", "v1"), ("qwen_2_5", "tokenizer")])
def test_images_stand_at_their_parts_in_training_here_and_elsewhere(tmp_path, sources, name, template):
    """In a row of messages, in a message that is asked, and in the chat template of an export."""
    theirs, ours = export(tmp_path / "out", sources[name], template), load_tokenizer(sources[name])
    answer = {"role": "assistant", "content": "Yes."}
    row = parse_any({"messages": [{"role": "user", "content": PARTS}, answer], "images": ["a", "b"]}, 0)
    (asked,), _ = read_messages([{"role": "user", "content": [part | {"image": "a"} for part in PARTS]}])
    assert row.turns[0] == asked == Turn("human", "<image>\nIs this\n<image>\nit?")
    wanted = encode(render(row.turns, ours.template(template)), ours, bos=ours.template(template).bos)
    image = theirs.convert_tokens_to_ids("<image>")
    ids = theirs.apply_chat_template([{"role": "user", "content": PARTS}, answer], return_dict=True)["input_ids"]
    assert ids == [image if token == IMAGE_MARK else token for token in wanted.tokens.tolist()]


def test_a_template_without_a_system_prompt_refuses_one(tmp_path, sources):
    theirs = export(tmp_path / "out", sources["llama"], "mistral_instruct")
    with pytest.raises(jinja2.TemplateError, match="no system prompt to replace"):
        theirs.apply_chat_template(messages((SYSTEM, *TALK)))
    with pytest.raises(jinja2.TemplateError, match="take turns, user first"):
        theirs.apply_chat_template(messages(TALK[1:]))


@pytest.mark.parametrize("name, template, ends, texts", [
    ("llama", "v0", "</s>", ["###"]), ("llama", "chatml_direct", "</s>", ["<|im_end|>"]), ("llama", "v1", "</s>", None),
    ("bytes", "chatml_direct", ["<|endoftext|>", "<|im_end|>"], None),
])  # fmt: skip
def test_what_ends_an_answer_is_in_the_generation_config(tmp_path, sources, name, template, ends, texts):
    """The template's stop, as a token where the tokenizer has it and else as text."""
    theirs = export(tmp_path / "out", sources[name], template)
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said["eos_token_id"] == theirs.convert_tokens_to_ids(ends) and said.get("stop_strings") == texts


@pytest.mark.parametrize("name", ["llama_legacy", "llama", "llama_3_1", "bytes"])
def test_the_originals_layout_has_the_tokenizer_of_the_decoder(tmp_path, sources, name):
    """It adds BOS again, as the original code expects, where it comes from an export; a chat is the same there."""
    exported, source = export(tmp_path / "out", sources[name], "v1"), transformers.AutoTokenizer.from_pretrained
    extras = LlavaExtras("v1", tokenizer=str(tmp_path / "out"))
    (tmp_path / "original").mkdir()
    write_original_tokenizer(str(tmp_path / "original"), extras)
    given, wanted = source(tmp_path / "original"), source(sources[name])
    assert given("What is this?").input_ids == wanted("What is this?").input_ids
    assert load_tokenizer(str(tmp_path / "original")).bos_id == load_tokenizer(sources[name]).bos_id
    assert given.apply_chat_template(messages(TALK), tokenize=False) == exported.apply_chat_template(
        messages(TALK), tokenize=False
    )
