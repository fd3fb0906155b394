"""Instruction data: contexts in, messages to the teacher, replies to rows or to a counted reason."""

import collections
import json
import re

import numpy as np
import pytest

from llava_jax.demo import files, world
from llava_jax.demo.teacher import EmbeddedTeacher, read_scene
from llava_jax.synthesize.context import Context, Instance, context_text, open_contexts
from llava_jax.synthesize.journal import Journal
from llava_jax.synthesize.kinds import DETAIL_QUESTIONS, KINDS, load_prompts, messages_for
from llava_jax.synthesize.parse import RejectedReply, parse_description, parse_dialogue, parse_exchange
from llava_jax.synthesize.teacher import Reply
from llava_jax.synthesize.write import open_job, synthesize
from llava_jax.types import InputError, Turn

HARBOUR = {
    "id": "17",
    "image": "17.jpg",
    "captions": ["Boats in a harbour.", "a quay with a bicycle "],
    "instances": [
        {"category": "boat", "bbox": [0.31849, 0.579, 0.575, 1.0]},
        {"category": "bicycle", "bbox": [0, 0.1, 0.5, 0.6]},
    ],
}
DIALOGUE = (
    "Question:\nHow many boats?\n===\nAnswer:\nTwo.\n\nThey are white.\n===\nQuestion: Where?\n===\nAnswer:\nLeft."
)


class Scripted:
    """A teacher that says what it is told to, and remembers what it was asked."""

    name = "scripted"
    settings = {"model": "scripted"}

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def answer(self, messages):
        self.asked.append(messages)
        return Reply(self.replies.pop(0))


def write_data(contexts, kind, output, teacher, seed=0, attempts=1):
    """What `synthesize` does, without a file for its answers."""
    with Journal(None) as journal:
        return synthesize(open_job(contexts, kind, seed=seed, attempts=attempts), output, teacher, journal)


def write_contexts(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    train, _ = files.split_scenes(seed=1, train=90, held_out=3)
    files.write_split(str(path), train, 2)
    return str(path), train


# ---- contexts -----------------------------------------------------------------------------------------------------


def test_context_text_is_captions_then_boxes(tmp_path):
    (context,) = list(open_contexts(write_contexts(tmp_path / "c.jsonl", HARBOUR)))
    assert context.instances[1] == Instance("bicycle", (0.0, 0.1, 0.5, 0.6))
    captions = "Boats in a harbour.\na quay with a bicycle"
    assert context_text(context, boxes=False) == captions
    boxes = "boat: [0.318, 0.579, 0.575, 1.0]\nbicycle: [0.0, 0.1, 0.5, 0.6]"
    assert context_text(context, boxes=True) == f"{captions}\n\n{boxes}"
    assert context_text(Context("1", "1.jpg", ("A sea.",), ()), boxes=True) == "A sea."


def test_coco_folder(tmp_path):
    image = {"id": 9, "file_name": "sub/000009.jpg", "width": 640, "height": 480}
    captions = {"images": [image], "annotations": [{"image_id": 9, "caption": text} for text in ("One.", "Two.\n")]}
    box = {"image_id": 9, "category_id": 4, "bbox": [64, 48, 320.0, 432.4]}
    instances = {"images": [image], "annotations": [box], "categories": [{"id": 4, "name": "boat"}]}
    (tmp_path / "captions_val2017.json").write_text(json.dumps(captions), encoding="utf-8")
    (tmp_path / "instances_val2017.json").write_text(json.dumps(instances), encoding="utf-8")
    (context,) = list(open_contexts(str(tmp_path)))
    assert (context.id, context.image, context.captions) == ("000009", "sub/000009.jpg", ("One.", "Two."))
    # A box that rounding carries over the border ends at the border.
    assert context_text(context, boxes=True).splitlines()[-1] == "boat: [0.1, 0.1, 0.6, 1.0]"
    box["bbox"] = [64, 48, 700, 10]
    (tmp_path / "instances_val2017.json").write_text(json.dumps(instances), encoding="utf-8")
    with pytest.raises(InputError, match="000009.jpg is"):
        list(open_contexts(str(tmp_path)))
    image["width"] = 0
    (tmp_path / "instances_val2017.json").write_text(json.dumps(instances), encoding="utf-8")
    with pytest.raises(InputError, match="width and height above 0"):
        list(open_contexts(str(tmp_path)))
    (tmp_path / "instances_val2017.json").rename(tmp_path / "instances_train2017.json")
    with pytest.raises(InputError, match="captions_val2017.json: no .*instances_val2017.json next to it"):
        list(open_contexts(str(tmp_path)))
    (tmp_path / "captions_train2017.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"2 files captions\*.json"):
        list(open_contexts(str(tmp_path)))


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"image": None}, "line 2: id '17', image None"),
        ({"id": [1]}, "line 2: id [1], image"),
        ({"captions": "one"}, "line 2: captions is 'one'"),
        ({"captions": [1]}, "line 2: captions"),
        ({"instances": [{"category": "boat"}]}, "line 2: bbox None of 'boat'"),
        ({"instances": [{"category": "boat", "bbox": [0.1, 0.2, 0.3]}]}, "line 2: bbox"),
        ({"instances": [{"category": "boat", "bbox": [10, 20, 30, 40]}]}, "line 2: bbox of 'boat' is"),
        ({"instances": [{"category": "boat", "bbox": [0.6, 0.2, 0.3, 0.4]}]}, "line 2: bbox of 'boat' is"),
        ({"instances": ["boat"]}, "line 2: instance 'boat'"),
    ],
)
def test_contexts_that_cannot_be_read(tmp_path, change, problem):
    with pytest.raises(InputError, match=re.escape(problem)):
        list(open_contexts(write_contexts(tmp_path / "c.jsonl", HARBOUR, {**HARBOUR, **change})))


def test_contexts_that_are_none(tmp_path):
    (tmp_path / "c.jsonl").write_text("1\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1: 1, expected an object with id"):
        list(open_contexts(str(tmp_path / "c.jsonl")))
    (tmp_path / "c.jsonl").write_text('{"id": 1}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 1: no image and no captions, expected an object with id, image"):
        list(open_contexts(str(tmp_path / "c.jsonl")))
    with pytest.raises(InputError, match="none.jsonl: no such file, expected JSONL of contexts, COCO"):
        list(open_contexts(str(tmp_path / "none.jsonl")))
    (tmp_path / "c.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no rows"):
        list(open_contexts(str(tmp_path / "c.jsonl")))


# ---- replies ------------------------------------------------------------------------------------------------------


def test_a_dialogue_becomes_turns():
    assert parse_dialogue(DIALOGUE) == (
        Turn("human", "How many boats?"),
        Turn("gpt", "Two.\n\nThey are white."),
        Turn("human", "Where?"),
        Turn("gpt", "Left."),
    )


@pytest.mark.parametrize(
    "reply, reason",
    [
        (" \n", "empty reply"),
        ("There are two boats.", "text outside a Question or Answer block"),
        (f"Sure! Here it is.\n{DIALOGUE}", "text outside a Question or Answer block"),
        (f"{DIALOGUE}\n===\n", "empty block"),
        ("Question:\nWhere?\n===\nAnswer:\n", "empty answer"),
        ("Question:\nWhere?\n===\nQuestion:\nWhen?", "question without an answer"),
        ("Question:\nWhere?", "question without an answer"),
        ("Answer:\nThere.\n===\nQuestion:\nWhere?", "answer without a question"),
        ("Question:\nWhere?\nAnswer:\nThere.", "no === between two blocks"),
        ("Question:\n<image> Where?\n===\nAnswer:\nThere.", "the placeholder <image> in the text"),
        ("Question:\nWhere?\n===\nAnswer:\nAt [0.1, 0.25, 0.3, 0.4].", "box coordinates in the text"),
    ],
)
def test_replies_that_are_no_dialogue(reply, reason):
    with pytest.raises(RejectedReply) as error:
        parse_dialogue(reply)
    assert str(error.value) == reason


def test_exchange_and_description():
    assert len(parse_exchange("Question:\nWhy?\n===\nAnswer:\nSo.")) == 2
    with pytest.raises(RejectedReply, match="more than one question"):
        parse_exchange(DIALOGUE)
    assert parse_description(" Boats, in 1.5 rows (0.5 each). ") == "Boats, in 1.5 rows (0.5 each)."
    with pytest.raises(RejectedReply, match="blocks where a description"):
        parse_description(DIALOGUE)


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_rows_and_rejections(tmp_path):
    rows = [{**HARBOUR, "id": str(number), "image": f"{number}.jpg"} for number in range(4)]
    contexts = write_contexts(tmp_path / "c.jsonl", *rows, {**HARBOUR, "captions": []})
    teacher = Scripted(DIALOGUE, "no idea", DIALOGUE, "Question:\nWhere?")
    written = write_data(contexts, "conversation", str(tmp_path / "o.json"), teacher)
    assert (written.rows, written.turns) == (2, 8)
    assert written.rejected == {
        "text outside a Question or Answer block": 1,
        "question without an answer": 1,
        "no captions": 1,
    }
    assert str(written).startswith("2 rows, 8 turns, 3 rejected (1 text outside")
    rows = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert [(row["id"], row["image"]) for row in rows] == [("0", "0.jpg"), ("2", "2.jpg")]
    assert [turn["from"] for turn in rows[0]["conversations"]] == ["human", "gpt"] * 2
    values = [turn["value"] for turn in rows[0]["conversations"]]
    assert values[0] in ("<image>\nHow many boats?", "How many boats?\n<image>")
    assert values[1:] == ["Two.\n\nThey are white.", "Where?", "Left."]
    # Conversations are written from the captions alone.
    assert teacher.asked[0][-1] == {"role": "user", "content": "Boats in a harbour.\na quay with a bicycle"}


def test_nothing_usable_is_an_error_and_writes_nothing(tmp_path):
    contexts = write_contexts(tmp_path / "c.jsonl", HARBOUR)
    with pytest.raises(InputError, match=r"scripted: none of its 1 replies .*empty reply"):
        write_data(contexts, "detail", str(tmp_path / "o.json"), Scripted(""))
    assert not (tmp_path / "o.json").exists()


def test_the_image_stands_before_or_after_by_seed(tmp_path):
    contexts = write_contexts(tmp_path / "c.jsonl", *({**HARBOUR, "id": str(n)} for n in range(60)))
    firsts = []
    for seed in (0, 0, 1):
        write_data(contexts, "detail", str(tmp_path / "o.json"), Scripted(*["Boats."] * 60), seed=seed)
        rows = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
        firsts.append([row["conversations"][0]["value"] for row in rows])
    assert firsts[0] == firsts[1] != firsts[2]
    before = sum(text.startswith("<image>\n") for text in firsts[0])
    assert 15 < before < 45 and all(text.count("<image>") == 1 for text in firsts[0])
    asked = {text.replace("<image>", "").strip() for text in firsts[0]}
    assert asked <= set(DETAIL_QUESTIONS) and len(asked) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_our_prompts_are_a_system_message_and_examples_in_the_layout_asked_for(kind):
    messages = load_prompts(kind)
    assert [message["role"] for message in messages[:3]] == ["system", "user", "assistant"]
    parse = {"conversation": parse_dialogue, "detail": parse_description, "reasoning": parse_exchange}[kind]
    for user, assistant in zip(messages[1::2], messages[2::2], strict=True):
        assert parse(assistant["content"])
        assert ("\n\n" in user["content"]) is KINDS[kind].boxes


def test_prompts_of_ones_own(tmp_path):
    folder = tmp_path / "complex_reasoning"
    folder.mkdir()
    with pytest.raises(InputError, match="system_message.txt: no such file"):
        load_prompts("reasoning", str(tmp_path))
    (folder / "system_message.txt").write_text("Look.\n", encoding="utf-8")
    (folder / "000_caps.txt").write_text("A sea.\n", encoding="utf-8")
    with pytest.raises(InputError, match="000_conv.txt: no such file"):
        load_prompts("reasoning", str(tmp_path))
    (folder / "001_conv.txt").write_bytes(b"caf\xe9")
    (folder / "000_conv.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="001_caps.txt: no such file"):
        load_prompts("reasoning", str(tmp_path))
    (folder / "001_caps.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="001_conv.txt: not UTF-8"):
        load_prompts("reasoning", str(tmp_path))
    (folder / "001_caps.txt").unlink()
    (folder / "001_conv.txt").unlink()
    (folder / "000_conv.txt").write_text("Question:\nWhy?\n===\nAnswer:\nSo.\n", encoding="utf-8")
    context = Context("1", "1.jpg", ("A boat.",), (Instance("boat", (0, 0, 1, 1)),))
    sent = messages_for(context, "reasoning", load_prompts("reasoning", str(tmp_path)))
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in sent][::3] == ["Look.", "A boat.\n\nboat: [0, 0, 1, 1]"]
    with pytest.raises(InputError, match="kind 'chat'"):
        load_prompts("chat")


# ---- the embedded teacher -----------------------------------------------------------------------------------------


def by_kind(small_world, tmp_path, kind):
    """(scene, turns as texts without the placeholder) of every row that the embedded teacher writes."""
    contexts, scenes = small_world
    output = tmp_path / f"{kind}.json"
    written = write_data(contexts, kind, str(output), EmbeddedTeacher(kind))
    assert (written.rows, written.rejected) == (len(scenes), {})
    rows = json.loads(output.read_text(encoding="utf-8"))
    texts = [[turn["value"].replace("<image>", "").strip() for turn in row["conversations"]] for row in rows]
    return list(zip(scenes, texts, strict=True))


def test_embedded_conversations_are_right_and_of_all_kinds(small_world, tmp_path):
    kinds = collections.Counter()
    for scene, texts in by_kind(small_world, tmp_path, "conversation"):
        asked = dict(zip(texts[::2], texts[1::2], strict=True))
        assert 3 <= len(asked) == len(texts) // 2 <= 5  # no question twice
        names = {thing.name for thing in scene}
        possible = {question.text: question for question in world.questions(scene, np.random.default_rng(0))}
        for text, said in asked.items():
            if text.startswith("Is there a "):
                kinds["presence", said] += 1
                assert said == ("yes" if text[len("Is there a ") : -1] in names else "no")
            else:
                kinds[possible[text].kind] += 1
                assert said == possible[text].answer
    assert len(kinds) == 6 and min(kinds.values()) > 20


def test_embedded_descriptions_tell_the_whole_scene(small_world, tmp_path):
    for scene, (_, said) in by_kind(small_world, tmp_path, "detail"):
        things = re.findall(r"a (\w+ \w+) is at the (\w+ \w+)\.", said)
        assert sorted(things) == sorted((thing.name, thing.place) for thing in scene)
        assert f" {world.NUMBERS[len(scene)]} object" in said


def test_embedded_reasoning_is_right(small_world, tmp_path):
    seen = set()
    for scene, (question, said) in by_kind(small_world, tmp_path, "reasoning"):
        things = {thing.name: thing for thing in scene}
        if question.startswith("Which object is"):
            order, one, other = re.fullmatch(r"Which object is (.*), the (.*) or the (.*)\?", question).groups()
            keys = {
                "higher": lambda thing: thing.row,
                "lower": lambda thing: -thing.row,
                "further left": lambda thing: thing.column,
                "further right": lambda thing: -thing.column,
            }
            expected = min((things[one], things[other]), key=keys[order]).name
        elif question.startswith("Do all objects"):
            values = {getattr(thing, question.split()[-1][:-1]) for thing in scene}
            expected = "yes" if len(values) == 1 else "no"
            order = "same"
        else:
            shape, colour, row = re.fullmatch(r"Is the (\w+) both (\w+) and in the (\w+) row\?", question).groups()
            (thing,) = [thing for thing in scene if thing.shape == shape]
            expected = "yes" if (thing.colour, world.ROWS[thing.row]) == (colour, row) else "no"
            order = expected
        assert said.endswith(f" {expected}."), (question, said)
        seen.add(order)
    assert seen == {"higher", "lower", "further left", "further right", "same", "yes", "no"}


def test_the_embedded_teacher_reads_only_its_own_world():
    with pytest.raises(InputError, match="cannot read 'Boats in a harbour.'"):
        EmbeddedTeacher("detail").answer([{"role": "user", "content": "Boats in a harbour."}])
    with pytest.raises(InputError, match="kind 'chat'"):
        EmbeddedTeacher("chat")
    told = "a red circle at the top left."
    assert read_scene(f"{told}\n\nred circle: [0.05, 0.05, 0.3, 0.3]") == (world.Thing(0, 0, "red", "circle"),)
    with pytest.raises(InputError, match="contradict"):
        read_scene(f"{told}\n\nred circle: [0.7, 0.05, 0.9, 0.3]")
