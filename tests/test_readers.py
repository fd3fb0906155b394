"""Keys of rows, questions and messages: honoured, refused by name, or counted; and text that is no text."""

import json
import os
import pathlib
import re

import pytest
from PIL import Image

from llava_jax.api import Llava, question, read_messages
from llava_jax.cli.train import load_settings
from llava_jax.data import validate
from llava_jax.data.records import load_records
from llava_jax.data.rows import Rejected, parse_or_reject
from llava_jax.data.templates import find_template, render
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.infer.batch_generate import read_questions
from llava_jax.prepare.arrayrecord import find_problems
from llava_jax.train.checkpoint import hold_workdir
from llava_jax.train.setup import warmup_note
from llava_jax.types import UNPACKED, DataSettings, InputError, OptimSettings, Turn
from tests.tiny_llava import write_tokenizer

CUT = "a\ud83d"  # an emoji cut in two


def row(question="Hi", answer="Yes.", **others):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "a", "conversations": turns} | others


def turns_of(entry, **last):
    return entry | {"conversations": [*entry["conversations"][:-1], entry["conversations"][-1] | last]}


def text(spans, targets=False):
    return "".join(span.text for span in spans if span.is_target or not targets)


# ---- what is honoured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v0", "v1", "llava_v1", "llama_2", "llava_llama_2", "mpt", "chatml_direct"])
def test_a_system_text_replaces_that_of_the_template(name):
    template = find_template(name)
    own = parse_or_reject(row(system="Answer in French."), 0)
    as_turn = row()
    as_turn["conversations"].insert(0, {"from": "system", "value": "Answer in French."})
    assert parse_or_reject(as_turn, 0) == own
    plain = render(parse_or_reject(row(), 0).turns, template)
    said = render(own.turns, template)
    assert text(said) == text(plain).replace(template.system, "Answer in French.") != text(plain)
    assert text(said, targets=True) == text(plain, targets=True)
    empty = parse_or_reject(row(system=" "), 0)
    assert render(empty.turns, template) == plain


@pytest.mark.parametrize("name", ["plain", "mistral_instruct"])
def test_a_template_without_system_prompt_refuses_one(name):
    turns = (Turn("system", "Answer in French."), Turn("human", "<image>\nHi"), Turn("gpt", "Yes."))
    with pytest.raises(InputError, match="system"):
        render(turns, find_template(name))


@pytest.mark.parametrize("name", ["v0", "v1", "llama_2", "mistral_instruct", "mpt"])
def test_an_answer_of_weight_0_is_no_target(name):
    template = find_template(name)
    turns = [Turn("human", "Q1"), Turn("gpt", "bad"), Turn("human", "Q2"), Turn("gpt", "good")]
    entry = row()
    entry["conversations"] = [{"from": turn.speaker, "value": turn.text} for turn in turns]
    entry["conversations"][1]["weight"] = 0
    entry["conversations"][3]["weight"] = 1
    spans = render(parse_or_reject(entry, 0).turns, template)
    only_second = render([Turn("human", "Q2"), Turn("gpt", "good")], template)
    assert text(spans) == text(render(turns, template))
    assert text(spans, targets=True) == text(only_second, targets=True)
    entry["conversations"][3]["weight"] = 0
    nothing = render(parse_or_reject(entry, 0).turns, template)
    assert text(nothing, targets=True) == ""


def test_a_weight_is_not_lost_when_rows_are_packed(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.json").write_text(json.dumps([turns_of(row(), weight=1), turns_of(row(), weight=0)]))
    (problem,) = find_problems(load_records(str(tmp_path / "rows.json")), "")
    assert "row 1" in problem and "weight 0" in problem


def test_questions_are_read_as_rows(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    lines = [
        {"question_id": 1, "image": "a.jpg", "text": "What?"},
        {"question_id": 2, "images": ["a.jpg", "b.jpg"], "text": "What?"},
        {"question_id": 3, "images": "a.jpg", "text": "What?"},
        {"question_id": 4, "text": "What?", "image": None, "system": "Answer in French.", "difficulty": 3},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_questions(str(path), str(tmp_path))
    names = [tuple(os.path.basename(image) for image in one.images) for one in found]
    assert names == [("a.jpg",), ("a.jpg", "b.jpg"), ("a.jpg",), ()]
    turns, _ = read_messages(found[3].messages)
    assert turns == (Turn("system", "Answer in French."), Turn("human", "What?"))
    assert [one.unread for one in found] == [(), (), (), ("difficulty",)]


def test_a_conversation_may_begin_with_a_system_message():
    messages = [{"role": "system", "content": "Be brief."}, *question("Hi", None)]
    assert read_messages(messages)[0] == (Turn("system", "Be brief."), Turn("human", "Hi"))
    with pytest.raises(InputError, match="message 3: role is 'system'"):
        read_messages([*messages, {"role": "system", "content": "Be brief."}])


# ---- what is refused, and what is counted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, says",
    [
        (row(video="v.mp4"), "video"),
        (row(videos=["v.mp4"]), "videos"),
        (row(audio="a.wav"), "audio"),
        (row(question="<video>\nWhat happens?"), "<video>"),
        (row(question="What is heard?\n<audio>"), "<audio>"),
        (row(img="a.jpg"), "img.*image"),
        (row(imgs=["a.jpg"]), "imgs.*image"),
        (row(image_file="a.jpg"), "image_file.*image"),
        (row(image_path="a.jpg"), "image_path.*image"),
        (row(Image="a.jpg"), "Image.*image"),
        (row(imagse=["a.jpg"]), "imagse.*image"),
        (row(picture="a.jpg"), "picture.*image"),
        (row(system_prompt="Be brief."), "system_prompt.*system"),
        (row(system=3), "system"),
        (row(system="Show <image>."), "<image>"),
        (row(weight=0), "weight"),
        (row(tools="[]"), "tools"),
        (row(chosen="Yes", rejected="No"), "chosen"),
        (turns_of(row(), weight=0.5), "weight is 0.5"),
        (turns_of(row(), weight="0"), "weight is '0'"),
        (turns_of(row(), weight=True), "weight is True"),
        (turns_of(row(), train=False), "train"),
        (turns_of(row(), weights=0), "weights.*weight"),
        (turns_of(row(), image="a.jpg"), "image"),
        ({"id": "a", "conversations": [{"from": "human", "value": "Hi", "weight": 1}]}, "weight 1 on a human turn"),
        ({"id": "a", "conversations": row()["conversations"] + [{"from": "system", "value": "Hi"}]}, "system"),
        (row(system="A") | {"conversations": [{"from": "system", "value": "B"}]}, "system"),
    ],
)
def test_a_key_that_could_change_the_meaning_is_refused(entry, says):
    found = parse_or_reject(entry, 0)
    assert isinstance(found, Rejected), found
    assert re.search(says, found.reason), found.reason


def test_other_keys_are_counted():
    entry = turns_of(row(source="web", video=None, images=[], audio="", quality=3), emotion="glad")
    assert parse_or_reject(entry, 0).unread == ("source", "quality", "conversations.emotion")
    shown = row("<image>\nHi", image="a.jpg", image_id=7, image_path="/a.jpg")
    assert parse_or_reject(shown, 0).unread == ("image_id", "image_path")
    code = row(question="What does this do?\n<video>\n<source src='a.mp4'>\n</video>")
    assert parse_or_reject(code, 0).unread == ()


@pytest.mark.parametrize(
    "line, says",
    [
        ({"image_file": "a.jpg"}, "image_file.*image"),
        ({"video": "a.mp4"}, "video"),
        ({"image": "a.jpg", "images": ["a.jpg"]}, "both"),
        ({"text": CUT}, "lone surrogate"),
        ({"question_id": CUT}, "lone surrogate"),
        ({"system": CUT}, "lone surrogate"),
        ({"text": "<video>\nWhat?"}, "<video>"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(line, says, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question_id": 1, "text": "What?"} | line) + "\n")
    with pytest.raises(InputError, match=rf"q.jsonl line 1: .*{says}"):
        read_questions(str(path), str(tmp_path))


@pytest.mark.parametrize(
    "message, says",
    [
        ({"content": CUT}, "lone surrogate"),
        ({"content": [{"type": "text", "text": CUT}]}, "lone surrogate"),
        ({"content": "What \udcff?"}, "byte 0xFF"),
        ({"content": "Hi", "images": ["a.jpg"]}, "images"),
        ({"content": "Hi", "image": "a.jpg"}, "image"),
        ({"content": "Hi", "video": "a.mp4"}, "video"),
        ({"content": "<video>\nHi"}, "<video>"),
    ],
)
def test_a_message_that_cannot_be_asked_is_named(message, says):
    with pytest.raises(InputError, match=rf"message 1: .*{says}"):
        read_messages([{"role": "user"} | message])


@pytest.mark.parametrize("image", ["x.jpg", pathlib.Path("x.jpg"), Image.new("RGB", (4, 4))], ids=type)
def test_one_image_for_a_list_of_prompts_is_an_error_that_says_what_to_give(image):
    model = Llava("m", placed=None, processor=None, weights="")
    with pytest.raises(InputError, match="one image for a list of 2 prompts; give a list with an entry"):
        model.generate(["a", "b"], images=image)


# ---- ids and names --------------------------------------------------------------------------------------------------


def test_an_id_that_pandas_wrote():
    assert parse_or_reject(row() | {"id": 1.0}, 0).id == "1"
    assert "id" in parse_or_reject(row() | {"id": 1.5}, 0).reason
    assert "id" in parse_or_reject(row() | {"id": float("nan")}, 0).reason


def test_a_file_name_in_another_encoding_is_told():
    reason = parse_or_reject(row("<image>", image="caf\udce9.jpg"), 0).reason
    assert "byte 0xE9" in reason and "rename the file" in reason


@pytest.mark.parametrize("kept", [False, True])
def test_keys_that_are_not_read_are_said_at_every_start(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(validate, "KEPT_ROWS", 1 if kept else 100)
    write_tokenizer(str(tmp_path / "llm"))
    rows = [row(source="web"), row(source="book", quality=3), row()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = DataSettings(str(tmp_path / "rows.json"), "", "v1", "front", "pad", 2048, shuffle=False, **UNPACKED)
    records, tokenizer = load_records(settings.annotations), load_tokenizer(str(tmp_path / "llm"))
    for _ in range(2):
        checked = validate.check_once(records, settings, tokenizer, patches=4)
        assert "keys not read: source (2 rows), quality (1 rows)" in validate.summary(checked, 2048)


# ---- what a start says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, ratio, says",
    [(1, 0.03, "nothing is learned"), (3, 1.0, "does not reach 0.002"), (2, 0.03, ""), (1, 0.0, "")],
)
def test_a_run_that_is_all_warmup_says_so(steps, ratio, says):
    optim = OptimSettings(0.002, "", "cosine", ratio, 0.0, 0.0, 0.9, 0.999, 1e-8)
    lines = warmup_note(optim, steps)
    assert len(lines) == bool(says) and says in "".join(lines)


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    settings = load_settings(["--config=tiny:stage=finetune"])
    with pytest.raises(InputError), hold_workdir(str(tmp_path / "new"), settings):
        os.mkdir(tmp_path / "new" / "checkpoints")
        raise InputError("no rows")
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    for folder, written in (("mine", ()), ("run", ("metrics.jsonl",))):
        with pytest.raises(InputError), hold_workdir(str(tmp_path / folder), settings):
            for name in written:
                (tmp_path / folder / name).write_text("")
            raise InputError("no rows")
        assert set(os.listdir(tmp_path / folder)) == {".lock", *written}


@pytest.mark.parametrize(
    "word, expected",
    [
        ("train.steps=two", "a whole number"),
        ("train.steps=1.5", "a whole number"),
        ("train.steps=", "a whole number"),
        ("optim.lr=fast", "a number"),
        ("data.pack=maybe", "true or false"),
    ],
)
def test_an_override_of_another_type_is_one_clear_line(word, expected):
    key, _, value = word.partition("=")
    with pytest.raises(InputError, match=rf"^--config.{key}={value}: expected {expected}, as in --config.{key}=\S+$"):
        load_settings(["--config=tiny:stage=finetune", f"--config.{word}"])
