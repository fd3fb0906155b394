"""The chat template of an export, as programs use it that know nothing of ours: the training ids, and what is trained."""

import dataclasses
import json

import pytest
import transformers

from llava_jax.data.templates import TEMPLATES, render
from llava_jax.data.tokenize import encode, load_tokenizer
from llava_jax.types import IMAGE_MARK, Turn
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras
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
TOKENIZERS = LLAMAS | {
    "bytes": byte_bpe,
    "llama_3": lambda folder: write_family(folder, "llama_3_1"),
    "qwen": lambda folder: write_family(folder, "qwen_2_5"),
}
PAIRS = [(name, template) for name in LLAMAS for template in FORMATS]
PAIRS += [("bytes", "chatml_direct"), ("llama_3", "llama_3"), ("llama_3", "v1"), ("qwen", "qwen"), ("qwen", "v1")]


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
    image, rules = theirs.convert_tokens_to_ids("<image>"), TEMPLATES[template]
    talks = [CAPTION] if rules.caption_only else [TALK, TALK[:2], (*CAPTION, Turn("human", " Sure? "))]
    talks += [(SYSTEM, *TALK)] if rules.system else []
    for turns in talks:
        asks = turns[-1].speaker == "human"
        wanted = encode(render(turns, rules, open_turn=asks), ours)
        ids = [image if token == IMAGE_MARK else token for token in wanted.tokens.tolist()]
        text = theirs.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=asks)
        assert theirs(text).input_ids == theirs(text, add_special_tokens=False).input_ids == ids
        given = theirs.apply_chat_template(
            messages(turns), add_generation_prompt=asks, return_dict=True, return_assistant_tokens_mask=True
        )
        assert given["input_ids"] == ids
        if not asks:
            # The first token is predicted from nothing.
            assert given["assistant_masks"] == [0, *wanted.targets.astype(int).tolist()[1:]]
    # Read back, the export trains and answers with the same ids.
    again = load_tokenizer(str(tmp_path / "out"))
    assert again.bos_id == ours.bos_id
    assert (
        encode(render(TALK[:2], rules), again).tokens.tolist() == encode(render(TALK[:2], rules), ours).tokens.tolist()
    )
