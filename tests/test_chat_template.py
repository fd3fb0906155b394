import itertools
import json
import random
import re
import shutil

import numpy as np
import pytest
import transformers

import llava_jax
from llava_jax.data.templates import render
from llava_jax.data.tokenize import encode, load_tokenizer
from llava_jax.data.validate import verify
from llava_jax.settings import read_settings
from llava_jax.train.loop import train
from llava_jax.types import UNPACKED, DataSettings, InputError, Turn
from llava_jax.weights.convert import convert
from llava_jax.weights.hf import default_template
from llava_jax.weights.load import with_template
from llava_jax.weights.processor import (
    LlavaExtras,
    check_ids,
    copy_tokenizer,
    with_images,
    write_processor,
)
from tests import tiny_llava
from tests.chat_families import FAMILIES, template_of, write_family
from tests.make_tokenizers import byte_bpe
from tests.tiny_run import LLM, make_inputs, make_settings

ROLES = {"human": "user", "gpt": "assistant"}
PIECES = (
    "A red square",
    "What is it?",
    "naïve façade",
    "猫です 😀",
    "3.5 kg\nand more",
    "a  b\t",
    "<b>",
    "##",
    "x",
    "\n\n",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_family(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


def _conversation(draw, name, hostile):
    """A row of one to four exchanges; now and then a system text, an empty text, white space at an end."""
    words = [*PIECES, *hostile]

    def text():
        return (
            draw.choice(("", "", " ", "\n"))
            + " ".join(draw.choices(words, k=draw.randint(1, 5)))
            + draw.choice(("", " \n"))
        )

    said = [{"from": ("human", "gpt")[turn % 2], "value": text()} for turn in range(2 * draw.randint(1, 4))]
    if draw.random() < 0.1:
        draw.choice(said)["value"] = ""
    row = {"id": name, "conversations": said}
    return row | ({"system": draw.choice(("Be terse.", " Über alles: höflich\n"))} if draw.random() < 0.25 else {})


def _checked(tmp_path, folder, rows):
    """What `prepare verify` keeps of the rows, by id, and the reasons of the others."""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = DataSettings(
        str(tmp_path / "rows.json"), "", "tokenizer", "front", "pad", 4096, shuffle=False, **UNPACKED
    )
    _, checked = verify(settings, load_tokenizer(folder), patches=4, dump_path=str(tmp_path / "dump.jsonl"))
    kept = {row["id"]: row for row in map(json.loads, (tmp_path / "dump.jsonl").read_text().splitlines())}
    assert len(kept) + len(checked.rejected) == len(rows)
    return kept, {rejected.id: rejected.reason for rejected in checked.rejected}


def _messages(row):
    turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    return [*([{"role": "system", "content": row["system"]}] if "system" in row else []), *turns]


def _rendered(tokenizer, messages, **more):
    return tokenizer.apply_chat_template(messages, tokenize=False, **more)


def _by_hand(text, offsets, pattern):
    """Which tokens lie inside the answers that a regular expression finds in transformers' text."""
    runs = [found.span(1) for found in re.finditer(pattern, text, re.DOTALL)]
    inside = [any(start <= a and b <= end for start, end in runs) for a, b in offsets]
    # A token without characters (an inserted ▁) goes with the one it stands before.
    return [
        next((inside[j] for j in range(i, len(inside)) if offsets[j][1] > offsets[j][0]), False)
        if a == b
        else inside[i]
        for i, (a, b) in enumerate(offsets)
    ]


def _system_refused(name, row):
    """Gemma's template refuses one; Mistral's moves it to the last question, so that no prompt leads to an answer."""
    return "system" in row and not FAMILIES[name].system


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_targets_of_300_conversations(folders, tmp_path, name):
    draw, reference = random.Random(7), transformers.AutoTokenizer.from_pretrained(folders[name])
    rows = [_conversation(draw, str(index), hostile=()) for index in range(300)]
    kept, rejected = _checked(tmp_path, folders[name], rows)
    blank = [row for row in rows if any(not turn["value"].strip() for turn in row["conversations"])]
    refused = [row for row in rows if row not in blank and _system_refused(name, row)]
    assert all("empty" in rejected[row["id"]] for row in blank if any(not t["value"] for t in row["conversations"]))
    assert all("chat template re" in rejected[row["id"]] for row in refused)
    good = [row for row in rows if row not in blank and row not in refused]
    assert not [rejected[row["id"]] for row in good if row["id"] in rejected]
    assert len(good) > 150 and (len(refused) > 30) == (not FAMILIES[name].system)
    for row in good:
        text = _rendered(reference, _messages(row))
        whole = reference.apply_chat_template(_messages(row), tokenize=True)["input_ids"]
        offsets = reference(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        assert kept[row["id"]]["tokens"] == whole, text
        targets = _by_hand(text, offsets, FAMILIES[name].answer)
        assert kept[row["id"]]["targets"] == [int(target) for target in targets], text
        ends = [reference.convert_ids_to_tokens(i) for i, t in zip(whole, targets, strict=True) if t]
        assert sum(end in FAMILIES[name].special for end in ends) == len(row["conversations"]) // 2


# ---- special strings, prompts, stops --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_special_strings_in_a_text_stay_text(folders, tmp_path, name):
    draw, tokenizer = random.Random(8), load_tokenizer(folders[name])
    hostile, special = FAMILIES[name].special, {tokenizer.special_id(text) for text in FAMILIES[name].special}
    rows = [_conversation(draw, str(index), hostile) for index in range(60)]
    rows = [row for row in rows if all(t["value"].strip() for t in row["conversations"])]
    rows = [row for row in rows if not _system_refused(name, row)]
    harmless = json.loads(json.dumps(rows, ensure_ascii=False))
    for turn in itertools.chain.from_iterable(row["conversations"] for row in harmless):
        turn["value"] = turn["value"].translate(str.maketrans("<[", "(("))
    kept, rejected = _checked(tmp_path, folders[name], rows)
    tame, _ = _checked(tmp_path, folders[name], harmless)
    assert not rejected and len(kept) > 20
    for row in rows:
        found, plain = kept[row["id"]], tame[row["id"]]
        ends = [
            (token, target) for token, target in zip(found["tokens"], found["targets"], strict=True) if token in special
        ]
        assert ends == [
            (token, target) for token, target in zip(plain["tokens"], plain["targets"], strict=True) if token in special
        ]
        shown = tokenizer.decode(found["tokens"], skip_special=False)
        assert all(turn["value"].strip() in shown for turn in row["conversations"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_how_its_row_begins(folders, name):
    tokenizer, reference = load_tokenizer(folders[name]), transformers.AutoTokenizer.from_pretrained(folders[name])
    turns = [Turn("human", "What is it?"), Turn("gpt", "A cat."), Turn("human", "Why?"), Turn("gpt", "It sits.")]
    template = tokenizer.template("tokenizer")
    row = encode(render(turns, template), tokenizer, bos=template.bos)
    prompt = encode(render(turns[:3], template, open_turn=True), tokenizer, bos=template.bos)
    messages = [{"role": ROLES[turn.speaker], "content": turn.text} for turn in turns[:3]]
    given = reference.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)["input_ids"]
    assert prompt.tokens.tolist() == given == row.tokens[: len(given)].tolist()
    assert row.targets[len(given) :].tolist()[:5] == [True] * 5 and not row.targets[len(given) - 1]
    assert tokenizer.special_id(template.stop[0]) in tokenizer.stop_ids(template)
    if FAMILIES[name].adds_bos:
        assert tokenizer.bos_id == row.tokens[0] and np.sum(row.tokens == tokenizer.bos_id) == 1
    with pytest.raises(InputError, match="noncharacter"):
        render([Turn("human", "\ufdd0"), *turns[1:]], template)


def test_an_image_splits_the_text_and_an_answer_may_be_context(folders):
    tokenizer = load_tokenizer(folders["qwen_2_5"])
    template = tokenizer.template("tokenizer")
    turns = [
        Turn("human", "What is it?\n<image>"),
        Turn("gpt", "A cat.", False),
        Turn("human", "Why?"),
        Turn("gpt", "So."),
    ]
    found = encode(render(turns, template), tokenizer, bos=template.bos)
    pieces = "".join(span.text for span in render(turns, template)).split("<image>")
    assert pieces[1].startswith("\nWhat is it?<|im_end|>")
    # The template's own tokens in each piece, as transformers reads it by itself.
    reference = transformers.AutoTokenizer.from_pretrained(folders["qwen_2_5"])
    before, after = (reference(piece).input_ids for piece in pieces)
    assert found.tokens.tolist() == [*before, -200, *after]
    assert tokenizer.decode(found.tokens[found.targets], skip_special=False) == "So.<|im_end|>"


# ---- templates that rewrite, refuse, or say what they generate ------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = (Turn("human", "What is it?"), Turn("gpt", "A cat."), Turn("human", "Why?"), Turn("gpt", "It sits."))


def _own(tmp_path, source, name="qwen_3"):
    tokenizer = load_tokenizer(write_family(tmp_path, name, source))
    return tokenizer, tokenizer.template("tokenizer")


def test_generation_blocks_are_what_transformers_masks(tmp_path):
    tokenizer, template = _own(tmp_path, CHATML)
    row = encode(render(TALK, template), tokenizer, bos=template.bos)
    reference = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": ROLES[turn.speaker], "content": turn.text} for turn in TALK]
    given = reference.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert row.tokens.tolist() == given["input_ids"] and row.targets.tolist() == [*map(bool, given["assistant_masks"])]
    # One that leaves out the token that ends the turn trains it all the same.
    short = CHATML.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>"
    )
    other, template = _own(tmp_path / "short", short)
    assert encode(render(TALK, template), other, bos=template.bos).targets.tolist() == row.targets.tolist()


THINKS = "<think>\nIt has fur.\n</think>\n\nA cat."


@pytest.mark.parametrize(
    ("name", "source", "turns", "reason"),
    [
        ("qwen_3", None, (TALK[0], Turn("gpt", THINKS), *TALK[2:]), "changes answer 1: it writes 'A cat.<|im_end|>"),
        ("mistral_v0_3", None, (Turn("system", "Be terse."), *TALK), "rewrites what it wrote before answer 1"),
        ("gemma", None, (Turn("system", "Be terse."), *TALK), "refuses the conversation .System role not supported."),
        ("qwen_3", CHATML.replace("m.content +", "m.content|upper +"), TALK, "changes answer 1: it writes 'A CAT"),
        ("qwen_3", CHATML.replace("<|im_end|>", "\n"), TALK, "ends answer 1 with no token of its own"),
        ("qwen_3", CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"), TALK, "rewrites"),
        ("qwen_3", "{{ messages.__class__.__mro__ }}", TALK, "refuses"),
        ("qwen_3", "{% for", TALK, "refuses"),
    ],
)
def test_what_a_template_does_to_a_row_is_named(tmp_path, name, source, turns, reason):
    with pytest.raises(InputError, match=reason):
        _, template = _own(tmp_path, source, name)
        render(turns, template)


def test_thinking_in_the_last_answer_is_trained(folders):
    template = load_tokenizer(folders["qwen_3"]).template("tokenizer")
    spans = render((*TALK[:3], Turn("gpt", THINKS)), template)
    assert "".join(span.text for span in spans if span.is_target) == f"A cat.<|im_end|>{THINKS}<|im_end|>"


def test_no_day_is_trained(tmp_path):
    _, template = _own(tmp_path, "{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert render(TALK, template)[0].text == "26 Jul 2024"


def test_without_a_chat_template(tmp_path):
    with pytest.raises(InputError, match="brings no chat template"):
        load_tokenizer(byte_bpe(tmp_path)).template("tokenizer")


# ---- LLaVA-NeXT's named templates -----------------------------------------------------------------------------------

ONE_MESSAGE = {
    "llama_3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}",
    "qwen": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}",
}
SYSTEM = {
    "llama_3": "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.",
    "qwen": "You are a helpful assistant.",
}


def _next(name, tokenizer, turns):
    """Ids and targets as LLaVA-NeXT makes them: message by message, its format's tokens trained wherever they stand."""
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    always = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"] if name == "llama_3" else CHATML_TOKENS
    always = [*tokenizer.convert_tokens_to_ids(always), *(tokenizer("\n").input_ids if name == "qwen" else [])]
    ids, targets = [], []
    for turn in (Turn("system", SYSTEM[name]), *turns):
        role = ROLES.get(turn.speaker, turn.speaker)
        text = [{"role": role, "content": turn.text}]
        found = tokenizer.apply_chat_template(text, chat_template=ONE_MESSAGE[name])["input_ids"]
        found = found[1:] if ids and name == "llama_3" else found
        ids += found
        targets += [role == "assistant"] * len(found)
    targets = [target or token in always for token, target in zip(ids, targets, strict=True)]
    return [-200 if token == image else token for token in ids], targets


CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(("name", "family"), [("llama_3", "llama_3_1"), ("qwen", "qwen_2_5")])
def test_named_templates_are_those_of_llava_next(folders, name, family):
    draw, tokenizer = random.Random(9), load_tokenizer(folders[family])
    reference = transformers.AutoTokenizer.from_pretrained(folders[family])
    template = tokenizer.template(name)
    # A newline of a question is never trained here; there it is, where it stands alone.
    words = [piece for piece in PIECES if "\n" not in piece]
    for _ in range(100):
        texts = [" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(2 * draw.randint(1, 4))]
        texts[0] = draw.choice(("<image>\n", "")) + texts[0]
        turns = [Turn(speaker, text) for speaker, text in zip(itertools.cycle(("human", "gpt")), texts, strict=False)]
        found = encode(render(turns, template, image_position="keep"), tokenizer)
        ids, targets = _next(name, reference, turns)
        ours = found.targets.tolist()
        if texts[0].startswith("<image>\n") and name == "qwen":
            ours[ids.index(-200) + 1] = targets[ids.index(-200) + 1]
        assert found.tokens.tolist() == ids
        assert ours == targets
        asked = encode(render(turns[:-1], template, image_position="keep", open_turn=True), tokenizer)
        assert asked.tokens.tolist() == ids[: len(asked.tokens)]
        assert tokenizer.decode(ids[len(asked.tokens) :]).strip() == turns[-1].text.strip()


# ---- exports and runs -----------------------------------------------------------------------------------------------


def _parts(turn):
    """A message as transformers' processors take it: the image a part of its own."""
    text = turn.text.removeprefix("<image>\n")
    parts = [{"type": "image"}] * (text != turn.text) + [{"type": "text", "text": text}]
    return {"role": ROLES[turn.speaker], "content": parts}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_carries_the_template(folders, tmp_path, name):
    ours, extras = load_tokenizer(folders[name]), LlavaExtras("tokenizer", tokenizer=folders[name])
    write_processor(str(tmp_path), tiny_llava.config(), extras)
    check_ids(str(tmp_path), extras, force=False)
    written = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    assert written.endswith(template_of(name)) and with_images(written, "front") == written
    # The files alone, as the original's layout has them, keep it, too.
    (tmp_path / "copy").mkdir()
    copy_tokenizer(folders[name], str(tmp_path / "copy"))
    assert load_tokenizer(str(tmp_path / "copy")).chat == template_of(name)
    exported = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    image = exported.convert_tokens_to_ids("<image>")
    again = load_tokenizer(str(tmp_path)).template("tokenizer")
    assert render(TALK, again) == render(TALK, ours.template("tokenizer"))
    for turns in ((Turn("human", "<image>\nWhat is it?"),), (Turn("human", "<image>\n Why? "), *TALK[1:3]), TALK[:3]):
        spans = render(turns, ours.template("tokenizer"), open_turn=True)
        assert render(turns, again, open_turn=True) == spans
        wanted = [image if token == -200 else token for token in encode(spans, ours, bos=False).tokens.tolist()]
        for messages in ([*map(_parts, turns)], [{"role": ROLES[t.speaker], "content": t.text} for t in turns]):
            assert exported.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == wanted


@pytest.fixture
def decoder(tmp_path):
    """The inputs of a small run whose decoder has Qwen 3's tokenizer and chat template."""
    make_inputs(tmp_path)
    write_family(tmp_path / "llm", "qwen_3")
    return tmp_path


def _run_settings(folder, **changes):
    llm = dict(LLM, model_type="qwen3", head_dim=8, eos_token_id=None)
    (folder / "llm.json").write_text(json.dumps(llm))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(folder / "llm" / name, folder / name)
    vision, decoder = f"random:{folder}/vision.json", f"random:{folder}/llm.json"
    towers = dict(init__model="", model__vision=vision, model__llm=decoder)
    return make_settings(folder, "finetune", train__steps=2, data__template="", **towers, **changes)


def test_a_run_takes_it_by_default_and_remembers_it(decoder, capsys):
    settings = _run_settings(decoder)
    assert settings.data.template == ""
    train(settings, str(decoder / "run"))
    assert "template tokenizer (its own chat template)" in capsys.readouterr().out
    assert read_settings(str(decoder / "run" / "config.json")).data.template == "tokenizer"
    convert(f"orbax:{decoder}/run", f"hf:{decoder}/out")
    assert json.loads((decoder / "out" / "config.json").read_text())["llava_jax"]["template"] == "tokenizer"
    exported = llava_jax.load(f"{decoder}/out")
    run = llava_jax.load(f"{decoder}/run")
    question = [{"role": "user", "content": "Is it a dog?"}]
    reference = transformers.AutoTokenizer.from_pretrained(str(decoder / "out"))
    wanted = reference.apply_chat_template(question, add_generation_prompt=True, enable_thinking=False)["input_ids"]
    for model in (run, exported):
        assert model.about["template"] == "tokenizer"
        assert model.processor.tokens(question).tolist() == wanted
        assert model.processor.tokenizer.special_id("<|im_end|>") in model.processor.tokenizer.stop_ids(
            model.processor.rules
        )
    assert exported.generate("Is it a dog?", max_new_tokens=8) == run.generate("Is it a dog?", max_new_tokens=8)
    # What was trained with is the template as it was.
    (decoder / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(InputError, match="the chat template"):
        train(settings, str(decoder / "run"))
    # The next run begins with what the model knows, Vicuna's template where a decoder has none of its own.
    further = make_settings(decoder, "finetune", init__model=f"hf:{decoder}/out", data__template="")
    assert with_template(further).data.template == "tokenizer"
    assert with_template(make_settings(decoder, "finetune", data__template="")).data.template == "v1"
    assert default_template(byte_bpe(decoder / "bare")) == "v1"
