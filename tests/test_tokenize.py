import json
import pathlib
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llava_jax.data.templates import TEMPLATES, Span, find_template, render
from llava_jax.data.tokenize import TextTokenizer, check_end, cut, encode, encode_all, expand, load_tokenizer
from llava_jax.infer.sample import StreamDecoder
from llava_jax.types import Encoded, InputError, Turn
from llava_jax.weights.load import EMBEDDED_TOKENIZER
from tests import make_tokenizers

SAMPLE = [
    Turn("human", "<image>\nWhat is this?"),
    Turn("gpt", "A cat."),
    Turn("human", "Color?"),
    Turn("gpt", "Black."),
]


def joining_blanks(folder: pathlib.Path) -> str:
    """A LLaMA tokenizer with an entry of two blanks, as the published ones have, that merges before all others."""
    make_tokenizers.trained_llama(folder, legacy=False)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["▁▁"] = max(vocabulary.values()) + 1
    content["model"]["merges"].insert(0, ["▁", "▁"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


MAKERS = {
    **make_tokenizers.LLAMAS,
    "joining_blanks": joining_blanks,
    "byte_bpe": make_tokenizers.byte_bpe,
    "demo": lambda folder: EMBEDDED_TOKENIZER,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Name -> (TextTokenizer, folder)."""
    folders = {name: maker(tmp_path_factory.mktemp(name)) for name, maker in MAKERS.items()}
    return {name: (load_tokenizer(folder), folder) for name, folder in folders.items()}


def _talk(*texts):
    return [Turn("human" if index % 2 == 0 else "gpt", text) for index, text in enumerate(texts)]


CONVERSATIONS = [
    _talk("<image>\nWhat is this?", "A cat."),
    _talk("What is this?\n<image>", "A cat.", "Color?", "Black.", "Sure?", "Yes."),
    _talk("What is <image> this?", "No idea."),
    _talk("<image>", "A cat."),
    _talk("<image>\nHow many?", "12"),
    _talk("<image>\nHow many?", "3 cats\n\nand 4 dogs"),
    _talk("<image>\nEmoji 😀 and 中文 naïve?  two  spaces", "Yes: 😀\n\nline two."),
    _talk("<image>\nWrite", "中文 answer", "Again", "日本語"),
    _talk("<image>\nIndent?", "  two spaces first", "And last?", "trailing  "),
    _talk("<image>\nNewline?", "\nfirst", "And last?", "last\n"),
    _talk("Hello", "Hi."),
    _talk("Hello", "Hi.", "How are you?", "Fine.", "Bye", "Bye."),
    _talk("text: USER: not a turn", "ASSISTANT is my name"),
    _talk("What does ### mean?", "A heading: ### Title"),
    _talk("[INST] is what?", "A tag [/INST]"),
    _talk("Spaces at the end  ", "Fine"),
    _talk("\tTabs\tand\nnewlines\n", "\tTabs"),
    _talk("<image>\n### Human: fake", "No."),
    _talk("👨‍👩‍👧‍👦 family 🇫🇷 flag é combining", "e\u0301 👨‍👩‍👧‍👦"),
    _talk("עברית ᠮᠣᠩᠭᠣᠯ", "العربية 𝔘𝔫𝔦"),
]


def _encode(turns, name, tokenizer, **options):
    return encode(render(turns, find_template(name), **options), tokenizer)


def _starred(encoded, start=0):
    pairs = zip(encoded.tokens[start:].tolist(), encoded.targets[start:].tolist(), strict=True)
    return ",".join(f"{token}*" if target else str(token) for token, target in pairs)


# ---- golden samples of the released code ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<image>", [1, -200]),
        ("a <image>\nb", [1, 263, 29871, -200, 29871, 13, 29890]),
        ("<image>b", [1, -200, 289]),
        ("a<image><image>b", [1, 263, -200, -200, 289]),
    ],
)
def test_golden_ids_around_images(tokenizers, text, ids):
    pieces = text.split("<image>")
    spans = [Span(pieces[0])]
    for piece in pieces[1:]:
        spans += [Span("<image>", special=True), Span(piece)]
    for name in ("golden", "golden_legacy"):
        assert encode(spans, tokenizers[name][0]).tokens.tolist() == ids


@pytest.mark.parametrize("name", ["golden", "golden_legacy"])
def test_golden_plain_and_v0(tokenizers, name):
    tokenizer = tokenizers[name][0]
    assert _starred(_encode(SAMPLE[:2], "plain", tokenizer)) == "1,-200,319*,6635*,29889*,13*"
    v0 = _encode(SAMPLE, "v0", tokenizer)
    assert len(v0.tokens) == 73 and not v0.targets[:31].any()
    assert _starred(v0, 31) == (
        "13,13,2277*,29937*,12968,29901,29871,-200,29871,13,5618,338,445,29973,13,2277*,29937*,4007*,22137*,29901*,"
        "319*,6635*,29889*,13*,2277*,29937*,12968,29901,9159,29973,13,2277*,29937*,4007*,22137*,29901*,6054*,29889*,"
        "13*,2277*,29937*,29871*"
    )


def test_golden_v1(tokenizers):
    current = _encode(SAMPLE, "v1", tokenizers["golden"][0])
    assert len(current.tokens) == 63 and not current.targets[:31].any()
    assert _starred(current, 31) == (
        "3148,1001,29901,29871,-200,29871,13,5618,338,445,29973,319,1799,9047,13566,29901,319*,6635*,29889*,2*,"
        "11889,29901,9159,29973,319,1799,9047,13566,29901,6054*,29889*,2*"
    )
    legacy = _encode(SAMPLE, "v1", tokenizers["golden_legacy"][0])
    assert len(legacy.tokens) == 64 and legacy.tokens[51:53].tolist() == [3148, 1001]
    assert np.flatnonzero(legacy.targets).tolist() == [47, 48, 49, 50, 61, 62, 63]


@pytest.mark.parametrize("name", ["golden", "golden_legacy"])
def test_golden_llama_2_and_mistral(tokenizers, name):
    tokenizer = tokenizers[name][0]
    row = _encode(SAMPLE, "llava_llama_2", tokenizer)
    assert len(row.tokens) == 82
    assert np.flatnonzero(row.targets).tolist() == [63, 64, 65, 66, 67, 78, 79, 80, 81]
    assert row.tokens[63:69].tolist() == [319, 6635, 29889, 29871, 2, 1]
    mistral = _encode(SAMPLE, "mistral_instruct", tokenizer)
    assert mistral.tokens[mistral.targets].tolist() == [319, 6635, 29889, 29871, 2, 6054, 29889, 29871, 2]


# ---- against the original's way of masking, on its own terms -------------------------------------------------------


def _original_ids(text, tok):
    """Every piece between images tokenised alone; the BOS of all but the first is taken away."""
    first, *others = [tok(piece).input_ids for piece in text.split("<image>")]
    for other in others:
        first = [*first, -200, *other[1:]]
    return first


def _original_text(text):
    return ("<image>\n" + text.replace("<image>", "").strip()).strip() if "<image>" in text else text


def _original_v0(turns, tok, _):
    polite = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\n\n"
    )
    roles = {"human": "Human", "gpt": "Assistant"}
    segments = [f"### {roles[turn.speaker]}: {_original_text(turn.text)}\n" for turn in turns]
    ids = _original_ids(polite + "".join(segments) + "### ", tok)
    targets = np.ones(len(ids), bool)
    position = len(_original_ids(polite, tok))
    targets[:position] = False
    for turn, segment in zip(turns, segments, strict=True):
        length = len(_original_ids(segment, tok))
        if turn.speaker == "human":
            targets[position + 2 : position + length] = False
        position += length
    return ids, targets


def _original_rounds(text, separator, tok, correction):
    """Shared by v1 and llama_2: lengths of rounds tokenised alone, less `correction` for all but the first."""
    ids = _original_ids(text, tok)
    targets = np.ones(len(ids), bool)
    targets[0] = False
    position = 1
    for index, part in enumerate(text.split("</s>")[:-1]):
        question, _ = part.split(separator)
        less = correction if index else 0
        targets[position : position + len(_original_ids(question + separator, tok)) - 2 - less] = False
        position += len(_original_ids(part, tok)) - less
    assert position == len(ids), "the original would mask this row"
    return ids, targets


def _original_v1(turns, tok, legacy):
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    )
    for turn in turns:
        text += f"USER: {_original_text(turn.text)} " if turn.speaker == "human" else f"ASSISTANT: {turn.text}</s>"
    return _original_rounds(text, " ASSISTANT: ", tok, 0 if legacy else 1)


def _original_llama_2(turns, tok, _):
    text = (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language."
        "\n<</SYS>>\n\n"
    )
    for index, turn in enumerate(turns):
        if turn.speaker == "gpt":
            text += f" {turn.text} </s>"
        else:
            text += ("<s>[INST] " if index else "") + f"{_original_text(turn.text)} [/INST]"
    return _original_rounds(text, "[/INST] ", tok, 0)


def _original_plain(turns, tok, _):
    ids = _original_ids("<image>" + turns[1].text + "\n", tok)
    return ids, np.arange(len(ids)) >= 2


ORIGINALS = {"v0": _original_v0, "v1": _original_v1, "llava_llama_2": _original_llama_2, "plain": _original_plain}


@pytest.mark.parametrize("template", ORIGINALS)
@pytest.mark.parametrize("name", ["golden", "golden_legacy"])
def test_equals_the_original_on_rows_it_trains(tokenizers, name, template):
    from transformers import AutoTokenizer

    tokenizer, folder = tokenizers[name]
    tok = AutoTokenizer.from_pretrained(folder)
    compared = 0
    for turns in CONVERSATIONS:
        if template == "plain" and (len(turns) != 2 or "<image>" not in turns[0].text):
            continue
        # The original splits rounds at this string wherever it stands, and masks the row.
        if template == "llava_llama_2" and any("[/INST]" in turn.text for turn in turns):
            continue
        ids, targets = ORIGINALS[template](turns, tok, name == "golden_legacy")
        ours = _encode(turns, template, tokenizer)
        assert ours.tokens.tolist() == ids, turns
        assert ours.targets.tolist() == targets.tolist(), turns
        compared += 1
    assert compared >= (7 if template == "plain" else 19)


# ---- several texts at a time ----------------------------------------------------------------------------------------

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
    *(" naïve", "中文", " 😀", "e\u0301", "▁", " x▁", "</s>", " <s> ", "###", " [INST]", "<0x0A>", " \u00a0b", ""),
    *(" word" * 30, "long" * 20, " " + "long" * 20, "<image>", " two  spaces", "trailing "),
]


def random_spans(draw: random.Random) -> list[Span]:
    spans = []
    for _ in range(draw.randint(1, 6)):
        if draw.random() < 0.2:
            spans.append(Span("</s>", is_target=draw.random() < 0.5, special=True))
        else:
            text = "".join(draw.choices(PIECES, k=draw.randint(0, 4)))
            spans.append(Span(text, is_target=draw.random() < 0.4))
    return spans


def by_all_offsets(spans: list[Span], tokenizer: TextTokenizer) -> tuple[list[int], list[bool]]:
    """Ids and targets of spans, by the rule: a token is a target when all characters it covers are."""
    pieces = [tokenizer._piece(span) for span in spans]
    text, is_target = "".join(pieces), []
    for span, piece in zip(spans, pieces, strict=True):
        is_target += [span.is_target] * len(piece)
    encoding = tokenizer._splitter.encode(text, add_special_tokens=False)
    ids, targets = [], []
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        start = min(start, len(text) - 1)
        targets.append(all(is_target[start : max(end, start + 1)]))
        end_of_text = 0xFDD0 <= ord(text[start]) <= 0xFDEF
        ids.append(tokenizer.special_id("</s>") if end_of_text else token)
    return ids, targets


@pytest.mark.parametrize("name", MAKERS)
def test_targets_are_the_tokens_inside_target_spans(tokenizers, name):
    tokenizer = tokenizers[name][0]
    draw = random.Random(0)
    given = [random_spans(draw) for _ in range(3000)]
    found = tokenizer.encode_chunks(given)
    for spans, chunk in zip(given, found, strict=True):
        ids, targets = by_all_offsets(spans, tokenizer)
        assert np.frombuffer(chunk.ids, np.int32).tolist() == ids, spans
        assert np.frombuffer(chunk.targets, bool).tolist() == targets, spans


@pytest.mark.parametrize("name", MAKERS)
def test_conversations_together_are_those_one_by_one(tokenizers, name):
    tokenizer = tokenizers[name][0]
    rendered = [render(turns, find_template("v1")) for turns in [*CONVERSATIONS, SAMPLE[:2]]]
    together = encode_all(rendered, tokenizer)
    assert [_starred(found) for found in together] == [_starred(encode(spans, tokenizer)) for spans in rendered]
    assert [found.images for found in together] == [turns[0].text.count("<image>") for turns in CONVERSATIONS] + [1]
    assert encode_all([], tokenizer) == []


def test_threads_share_a_tokenizer(tokenizers):
    folder, draw = tokenizers["llama"][1], random.Random(1)
    given = [random_spans(draw) for _ in range(500)]
    expected = load_tokenizer(folder).encode_chunks(given)
    shared = load_tokenizer(folder)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: shared.encode_chunks(given[start : start + 50]), [*range(0, 500, 50)] * 2))
    assert sum(parts, []) == expected * 2


@pytest.mark.parametrize("added", ["red square", "square", "US", "a"])
def test_an_added_entry_is_found_wherever_it_stands(tmp_path, added):
    folder = make_tokenizers.trained_llama(tmp_path, legacy=False)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    entry = dict(content["added_tokens"][-1], id=len(content["model"]["vocab"]), content=added, special=False)
    content["added_tokens"].append(entry)
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    for spans in ([Span("USER: a red square")], [Span("USER: a red"), Span(" square is", is_target=True)]):
        (chunk,) = tokenizer.encode_chunks([spans])
        assert tokenizer._codec.token_to_id(added) in np.frombuffer(chunk.ids, np.int32)
        assert np.frombuffer(chunk.targets, bool).tolist() == by_all_offsets(spans, tokenizer)[1]


def test_a_special_token_in_the_text_is_named_each_time(tmp_path):
    """Of a tokenizer whose words can make one."""
    folder = make_tokenizers.trained_llama(tmp_path, legacy=False)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    word = load_tokenizer(folder).encode_text("a red")[-1]
    piece = next(text for text, token in content["model"]["vocab"].items() if token == word)
    content["added_tokens"].append(dict(content["added_tokens"][-1], id=word, content=piece, special=True))
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    for _ in range(2):
        with pytest.raises(InputError, match=f"spells the special token '{piece}'"):
            tokenizer.encode_text("a red")


# ---- properties, for tokenizers of several kinds -------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("template", ["v0", "v1", "llava_llama_2", "mistral_instruct", "chatml_direct"])
def test_supervised_ids_are_the_answers_and_their_stops(tokenizers, name, template):
    tokenizer = tokenizers[name][0]
    for turns in CONVERSATIONS:
        spans = render(turns, find_template(template))
        expected = "".join(span.text for span in spans if span.is_target)
        encoded = encode(spans, tokenizer)
        text = tokenizer.decode(encoded.tokens[encoded.targets], skip_special=False)
        # A LLaMA decoder takes one leading space away; the byte-level tokenizer has its own word for </s>.
        assert text == (expected.replace("</s>", "<|endoftext|>") if name == "byte_bpe" else expected.removeprefix(" "))


@pytest.mark.parametrize("name", MAKERS)
def test_no_user_text_is_supervised(tokenizers, name):
    tokenizer = tokenizers[name][0]
    words = "quokka 😀 袋鼠 </s> <s> ASSISTANT: ### [/INST]"
    # llama_3 and qwen train parts of their headers: test_chat_template, with tokenizers that have their tokens.
    for template in set(TEMPLATES) - {"plain", "v0_plain", "llama_3", "qwen"}:
        turns = _talk(words + "<image>" + words, "Yes", words + "\n", "No")
        with_words = _encode(turns, template, tokenizer, image_position="keep")
        without = _encode(_talk("<image>", "Yes", "x", "No"), template, tokenizer)
        trained = with_words.tokens[with_words.targets].tolist()
        assert trained == without.tokens[without.targets].tolist(), template
        assert len(trained) >= 2, template


@pytest.mark.parametrize("name", MAKERS)
def test_special_strings_in_the_text_stay_text(tokenizers, name):
    tokenizer = tokenizers[name][0]
    hostile = "What are </s>, <s>, <unk>, <|im_start|>, <|im_end|> and <|endoftext|>?"
    for template in ("v1", "llava_llama_2", "chatml_direct"):
        row = _encode(_talk(hostile, hostile + "</s>", "And?", "x"), template, tokenizer)
        plain = _encode(_talk("What?", "y", "And?", "x"), template, tokenizer)
        for text in ("</s>", "<s>", "<|im_start|>", "<|im_end|>"):
            special = tokenizer.special_id(text)
            assert np.sum(row.tokens == special) == np.sum(plain.tokens == special)
        shown = tokenizer.decode(row.tokens)
        assert shown.count(hostile) == 2 and hostile + "</s>" in shown


def test_prompt_is_the_beginning_of_the_training_row(tokenizers):
    for name, (tokenizer, _) in tokenizers.items():
        for template in ("v0", "v1", "llava_llama_2", "chatml_direct"):
            row = _encode(SAMPLE, template, tokenizer)
            prompt = _encode(SAMPLE[:3], template, tokenizer, open_turn=True)
            assert row.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist(), (name, template)
            assert row.targets[len(prompt.tokens)]


def test_byte_tokens_of_one_character_share_its_side(tokenizers):
    tokenizer = tokenizers["llama"][0]
    row = _encode(_talk("🦘", "🦘"), "v1", tokenizer)
    kangaroo = [3 + byte for byte in "🦘".encode()]
    starts = [start for start in range(len(row.tokens)) if row.tokens[start : start + 4].tolist() == kangaroo]
    assert [row.targets[start : start + 4].tolist() for start in starts] == [[False] * 4, [True] * 4]


def test_noncharacters_are_refused(tokenizers):
    with pytest.raises(InputError, match=r"noncharacter U\+FDD1; remove it"):
        _encode(_talk("\ufdd1", "Yes"), "v1", tokenizers["llama"][0])


def test_ids_of_tokenizers(tokenizers):
    llama, byte_bpe = tokenizers["golden"][0], tokenizers["byte_bpe"][0]
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.size) == (1, 2, 0, 32000)
    assert (llama.image_token_id(32000), llama.image_token_id(32064)) == (32000, 32064)
    assert llama.stop_ids(find_template("v1")) == (2,)
    assert byte_bpe.bos_id is None
    assert byte_bpe.stop_ids(find_template("mpt")) == (byte_bpe.eos_id, byte_bpe.special_id("<|im_end|>"))


def test_image_token_of_the_tokenizer_wins(tmp_path):
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(make_tokenizers.byte_bpe(tmp_path / "base"))
    source.add_tokens(["<image>"], special_tokens=True)
    source.save_pretrained(tmp_path / "with_image")
    tokenizer = load_tokenizer(str(tmp_path / "with_image"))
    assert tokenizer.image_token_id(9999) == tokenizer.size - 1


@pytest.mark.parametrize("name", ["llama", "llama_prepend", "byte_bpe"])
def test_stored_truncation_and_padding_change_nothing(tokenizers, tmp_path, name):
    MAKERS[name](tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    path.write_text(json.dumps(content))
    again = load_tokenizer(str(tmp_path))
    for turns in CONVERSATIONS[:4]:
        assert _starred(_encode(turns, "v1", again)) == _starred(_encode(turns, "v1", tokenizers[name][0]))


def test_end_of_text_comes_from_the_decoders_config_or_is_missed(tokenizers, tmp_path):
    MAKERS["byte_bpe"](tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    end = tokenizers["byte_bpe"][0].eos_id
    del config["eos_token"]
    path.write_text(json.dumps(config))
    without = load_tokenizer(str(tmp_path))
    assert without.eos_id is None
    with pytest.raises(InputError, match="ends answers with the end-of-text token and the tokenizer has none"):
        check_end(without, find_template("v1"))
    for template in ("v0", "plain", "chatml_direct"):
        check_end(without, find_template(template))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [end, 7]}))
    found = load_tokenizer(str(tmp_path))
    check_end(found, find_template("v1"))
    assert found.eos_id == found.special_id("</s>") == end
    assert set(found.stop_ids(find_template("v1"))) == {end, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, end, 10**6]}))
    assert load_tokenizer(str(tmp_path)).ends == (9, end)
    assert _encode(SAMPLE, "v1", found).tokens[-1] == end


# ---- length --------------------------------------------------------------------------------------------------------

ROW = Encoded(np.array([1, -200, 5, 6, 7, 2], np.int32), np.array([0, 0, 0, 1, 1, 1], bool))


def test_images_expand_and_the_right_end_is_cut():
    tokens, targets = expand(ROW.tokens, ROW.targets, 99, 4, 8)
    assert (tokens.dtype, targets.dtype) == (np.int32, bool)
    assert tokens.tolist() == [1, 99, 99, 99, 99, 5, 6, 7]
    assert targets.tolist() == [False] * 6 + [True] * 2
    assert expand(ROW.tokens, ROW.targets, 99, 4, 9)[0].tolist() == [1, 99, 99, 99, 99, 5, 6, 7, 2]
    assert cut(ROW, 4, 8).tokens.tolist() == [1, -200, 5, 6, 7]


def test_prompts_are_not_cut():
    tokens, targets = expand(ROW.tokens[:3], np.zeros(3, bool), 99, 4, None)
    assert tokens.tolist() == [1, 99, 99, 99, 99, 5] and not targets.any()


@pytest.mark.parametrize(
    ("row", "max_length", "reason"),
    [
        (ROW, 6, "row longer than max_length keeps no target: 9 tokens, the first target is token 6, max_length 6"),
        (ROW, 4, "image 1 of 1 ends at token 5, beyond max_length 4"),
        (Encoded(np.array([1, 5, 2, -200, 6]), np.array([0, 1, 1, 0, 1], bool)), 3, "image 1 of 1 ends at token 7"),
        (Encoded(np.array([1, 5]), np.zeros(2, bool)), 8, "the row has no target"),
    ],
)
def test_rows_that_cannot_be_cut(row, max_length, reason):
    with pytest.raises(InputError, match=reason):
        expand(row.tokens, row.targets, 99, 4, max_length)


# ---- text of generated ids -----------------------------------------------------------------------------------------

ANSWERS = ["A cat.", "Emoji 😀😀 and 中文, naïve.", "two\n\n  lines  ", "👨‍👩‍👧‍👦", " x", "1. one\n2. two\n"]


def _stream(tokenizer, ids, stop=()):
    decoder = StreamDecoder(tokenizer, stop)
    return [*(decoder.push(token) for token in ids), decoder.finish()], decoder


@pytest.mark.parametrize("name", MAKERS)
def test_streamed_text_is_the_decoded_text(tokenizers, name):
    tokenizer = tokenizers[name][0]
    for answer in ANSWERS:
        ids = _encode(_talk("Q", answer), "v1", tokenizer)
        ids = ids.tokens[ids.targets]
        pieces, _ = _stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "".join(pieces) == (" " + answer if name == "byte_bpe" else answer)
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_stops_before_the_stop_string(tokenizers):
    tokenizer = tokenizers["golden"][0]
    ids = _encode(_talk("Q", "A # b ##c"), "v0", tokenizer)
    ids = ids.tokens[-ids.targets[::-1].argmin() :][5:]
    pieces, decoder = _stream(tokenizer, [*ids, 319], find_template("v0").stop)
    assert "".join(pieces) == "A # b ##c\n" and decoder.stopped
    pieces, decoder = _stream(tokenizer, ids[:-2], find_template("v0").stop)
    assert "".join(pieces) == "A # b ##c\n##" and not decoder.stopped


def test_half_a_character_at_the_end_is_marked(tokenizers):
    pieces, _ = _stream(tokenizers["golden"][0], [3 + byte for byte in "😀".encode()[:3]])
    assert set(pieces[:-1]) == {""} and set(pieces[-1]) == {"\ufffd"}


# ---- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds no tokenizer; expected tokenizer.json, tokenizer.model"),
        ({"vocab.json": "{}"}, "holds no tokenizer"),
        ({"tokenizer.json": "no json"}, "not JSON"),
        ({"tokenizer.json": "{}"}, "no tokenizer in it"),
        ({"tokenizer.json": '{"model": {}}'}, "transformers cannot read this tokenizer"),
    ],
)
def test_folder_without_a_tokenizer(tmp_path, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason):
        load_tokenizer(str(tmp_path))


def test_folder_with_sizes_that_contradict_each_other(tmp_path):
    """transformers refuses its config.json with an error of its own kind."""
    shutil.copytree(EMBEDDED_TOKENIZER, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(InputError, match="hidden size .64. is not a multiple"):
        load_tokenizer(str(tmp_path))


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(str(tmp_path / "none"))
