"""Ids a word at a time are the ids of the whole text, or the text is taken as a whole."""

import json
import pathlib
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llava_jax.data import words
from llava_jax.data.templates import Span
from llava_jax.data.tokenize import TextTokenizer, load_tokenizer
from llava_jax.data.words import BLANK, can_split
from llava_jax.types import InputError
from llava_jax.weights.spec import EMBEDDED_TOKENIZER
from tests import make_tokenizers


def joining_blanks(folder: pathlib.Path) -> str:
    """A LLaMA tokenizer with an entry of two blanks, as the published ones have, that merges before all others."""
    make_tokenizers.trained_llama(folder, legacy=False)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[2 * BLANK] = max(vocabulary.values()) + 1
    content["model"]["merges"].insert(0, [BLANK, BLANK])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


MAKERS = {**make_tokenizers.LLAMAS, "joining_blanks": joining_blanks, "demo": lambda folder: EMBEDDED_TOKENIZER}
PIECES = [
    *(
        "USER: ",
        "ASSISTANT:",
        "A red square",
        " stands",
        " left of",
        "a",
        " a",
        "\n",
        " \n ",
        "\t",
        "  ",
        " ",
        ".",
        "?",
    ),
    *(" naïve", "中文", " 😀", "e\u0301", BLANK, " x" + BLANK, "</s>", " <s> ", "###", " [INST]", "<0x0A>", " \u00a0b"),
    *(" word" * 30, "long" * 20, " " + "long" * 20, "<image>", " two  spaces", "trailing "),
]


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, tmp_path_factory) -> str:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


def whole(folder: str) -> TextTokenizer:
    """The tokenizer that never looks at words."""
    tokenizer = load_tokenizer(folder)
    tokenizer._words = None
    return tokenizer


def random_spans(draw: random.Random) -> list[Span]:
    spans = []
    for _ in range(draw.randint(1, 6)):
        if draw.random() < 0.2:
            spans.append(Span("</s>", is_target=draw.random() < 0.5, special=True))
        else:
            text = "".join(draw.choices(PIECES, k=draw.randint(0, 4)))
            spans.append(Span(text, is_target=draw.random() < 0.4))
    return spans


def test_ids_and_targets_are_those_of_the_whole_text(folder):
    by_words, reference = load_tokenizer(folder), whole(folder)
    draw, split = random.Random(0), 0
    for _ in range(3000):
        spans = random_spans(draw)
        assert by_words.encode_chunk(spans) == reference.encode_chunk(spans), spans
        split += by_words._words.encode(by_words._runs(spans)[0]) is not None
    assert 300 < split < 2700  # both ways were gone


def test_a_conversation_needs_no_tokenizer_once_its_words_are_known(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    spans = [Span("USER: Is it red? ASSISTANT:"), Span(" It is.", is_target=True), Span("</s>", True, True)]
    first = tokenizer.encode_chunk(spans)
    monkeypatch.setattr(tokenizer, "_split", None)
    assert tokenizer.encode_chunk(spans) == first
    other = [Span("USER: Is it red? ASSISTANT: It"), Span(" is.", is_target=True)]
    assert tokenizer.encode_chunk(other).ids + first.ids[-4:] == first.ids


def test_vocabularies_whose_merges_may_cross_blanks(folder):
    content = json.loads((pathlib.Path(folder) / "tokenizer.json").read_text())
    codec = load_tokenizer(folder)._codec
    assert can_split(codec)
    crossing = json.loads(json.dumps(content))
    vocabulary = crossing["model"]["vocab"]
    vocabulary["a" + BLANK] = max(vocabulary.values()) + 1
    crossing["model"]["merges"].append(["a", BLANK])
    changes = {
        "crossing": crossing,
        "lower": content | {"normalizer": {"type": "Lowercase"}},
        "bytes": content | {"pre_tokenizer": {"type": "Whitespace"}, "normalizer": None},
        # A character without an entry would be left out, and all offsets behind it be wrong.
        "drops": content | {"model": content["model"] | {"byte_fallback": False, "unk_token": None}},
    }
    for key, value in dict(dropout=0.1, ignore_merges=True, end_of_word_suffix="</w>").items():
        changes[key] = content | {"model": content["model"] | {key: value}}
    model = {"continuing_subword_prefix": "##", "merges": []}
    changes["continuing_subword_prefix"] = content | {"model": content["model"] | model}
    word_level = {"type": "WordLevel", "vocab": {BLANK: 0, "<unk>": 1}, "unk_token": "<unk>"}
    changes["no BPE"] = content | {"model": word_level, "added_tokens": []}
    for name, changed in changes.items():
        assert not can_split(type(codec).from_str(json.dumps(changed))), name


def test_byte_level_tokenizers_are_given_the_whole_text(tmp_path):
    assert load_tokenizer(make_tokenizers.byte_bpe(tmp_path))._words is None


@pytest.mark.parametrize("added", ["red square", "square", "US", "a"])
def test_an_added_entry_is_found_across_words(tmp_path, added):
    folder = make_tokenizers.trained_llama(tmp_path, legacy=False)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    entry = dict(content["added_tokens"][-1], id=len(content["model"]["vocab"]), content=added, special=False)
    content["added_tokens"].append(entry)
    path.write_text(json.dumps(content))
    tokenizer, reference = load_tokenizer(folder), whole(folder)
    assert tokenizer._words is None
    for spans in (
        [Span("USER: a red square")],
        [Span("USER: a red"), Span(" square is", is_target=True)],
        [Span("a redsquare")],
    ):
        assert tokenizer.encode_chunk(spans) == reference.encode_chunk(spans)
    found = np.frombuffer(tokenizer.encode_chunk([Span("USER: a red square")]).ids, np.int32)
    assert tokenizer._codec.token_to_id(added) in found


def test_a_reserved_id_is_named_each_time(folder):
    tokenizer = load_tokenizer(folder)
    word = np.frombuffer(tokenizer.encode_chunk([Span("a red")]).ids, np.int32)[-1]
    again = load_tokenizer(folder)
    again._reserved[word] = True
    for _ in range(2):
        with pytest.raises(InputError, match="spells the special token"):
            again.encode_chunk([Span("a red")])


def test_few_words_are_kept_and_none_that_is_long(folder, monkeypatch):
    monkeypatch.setattr(words, "KEPT_WORDS", 3)
    monkeypatch.setattr(words, "LONGEST_WORD", 4)
    tokenizer, reference = load_tokenizer(folder), whole(folder)
    for text in ("USER: one two three four five six", "USER: one concatenated two"):
        assert tokenizer.encode_text(text) == reference.encode_text(text)
    assert list(tokenizer._words._inside) == ["one", "two", "four"]


def test_threads_share_a_tokenizer(folder):
    shared, reference = load_tokenizer(folder), whole(folder)
    draw = random.Random(1)
    given = [random_spans(draw) for _ in range(500)]
    expected = [reference.encode_chunk(spans) for spans in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [shared.encode_chunk(spans) for spans in given], range(4)))
    assert found == [expected] * 4


def test_words_go_along_into_another_process(folder):
    tokenizer = load_tokenizer(folder)
    spans = [Span("USER: Is </s> it red? ASSISTANT:"), Span(" It is.", is_target=True), Span("</s>", True, True)]
    expected = tokenizer.encode_chunk(spans)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode_chunk(spans) == expected and again._words._inside._encode.__self__ is again
    assert again.encode_chunk([Span("Another </s> word")]) == whole(folder).encode_chunk([Span("Another </s> word")])
