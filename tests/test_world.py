"""The small world and its files: scenes, pictures, captions and questions tell the same thing; nothing leaks."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from llava_jax.demo import files, world
from llava_jax.demo.teacher import read_scene
from llava_jax.demo.world import Thing

SCENES = [world.sample_scene(np.random.default_rng(seed)) for seed in range(200)]


def answer(scene, text):
    """The answer to a question, worked out anew from its words."""
    words = text.rstrip("?").split()
    if text.startswith("Is there"):
        return "yes" if any(thing.name == " ".join(words[3:]) for thing in scene) else "no"
    if text == "How many objects are there?":
        return world.NUMBERS[len(scene)]
    if text.startswith("How many"):
        return world.NUMBERS[sum(words[2].startswith(thing.shape) for thing in scene)]
    if text.startswith("What colour"):
        (found,) = [thing.colour for thing in scene if thing.shape == words[-1]]
    elif text.startswith("What shape"):
        (found,) = [thing.shape for thing in scene if thing.colour == words[-2]]
    else:
        (found,) = [thing.place for thing in scene if thing.name == " ".join(words[-2:])]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small world on disk: (folder, training scenes, held-out scenes)."""
    path = tmp_path_factory.mktemp("world")
    train, held_out = files.split_scenes(seed=3, train=60, held_out=45)
    files.write_caption_rows(str(path / "captions.json"), files.write_split(str(path / "train"), train, 4), 5)
    captions = files.write_split(str(path / "held_out"), held_out, 6)
    files.write_questions(str(path / "held_out"), held_out, captions, 7)
    return path, train, held_out


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_have_the_right_answers_and_all_kinds():
    rng = np.random.default_rng(0)
    kinds, presence = set(), []
    for scene in SCENES:
        for question in world.questions(scene, rng):
            assert question.answer == answer(scene, question.text), (scene, question)
            kinds.add(question.kind)
            presence += [question.answer] * (question.kind == "presence")
    assert kinds == set(world.KINDS)
    assert 0.4 < presence.count("yes") / len(presence) < 0.6


def test_every_caption_tells_the_whole_scene():
    rng = np.random.default_rng(0)
    texts = set()
    for scene in SCENES:
        text = world.caption(scene, rng)
        assert read_scene(text) == scene
        texts.add(re.sub(r"\b(red|green|blue|yellow|purple|orange)\b", "red", text).split(" red")[0])
    assert len(texts) == len(world.OPENINGS)


def test_a_near_miss_differs_in_one_thing():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        other = world.near_miss(scene, rng)
        assert len(set(scene) - set(other)) == len(set(other) - set(scene)) == 1


def test_the_picture_shows_each_thing_in_its_colour_and_cell():
    rng = np.random.default_rng(0)
    for scene in SCENES[:40]:
        picture, boxes = world.draw(scene, rng)
        for thing, (x1, y1, x2, y2) in zip(scene, boxes, strict=True):
            assert thing.column * world.CELL <= x1 < x2 <= (thing.column + 1) * world.CELL
            assert thing.row * world.CELL <= y1 < y2 <= (thing.row + 1) * world.CELL
            seen = np.array(picture.getpixel((round((x1 + x2) / 2), round((y1 + y2) / 2))), float)
            distance = {name: np.abs(seen - 0.92 * np.array(rgb)).sum() for name, rgb in world.COLOURS.items()}
            assert min(distance, key=distance.get) == thing.colour


def test_held_out_scenes_do_not_occur_in_training():
    train, held_out = files.split_scenes(seed=0, train=2000, held_out=150)
    assert (len(train), len(held_out), len(set(held_out))) == (2000, 150, 150)
    assert not set(train) & set(held_out)
    for scenes in (train, held_out):
        counts = np.bincount([len(scene) for scene in scenes], minlength=4)[1:]
        assert counts.min() > 0.25 * len(scenes)
    assert files.split_scenes(seed=0, train=2000, held_out=150) == (train, held_out)


def test_the_files_are_cocos_and_tell_the_scenes(folder):
    path, train, _ = folder
    captions, instances = read(path / "train" / "captions.json"), read(path / "train" / "instances.json")
    assert set(captions) == {"info", "images", "annotations"}
    assert set(instances) == {"info", "images", "annotations", "categories"}
    names = {category["id"]: category["name"] for category in instances["categories"]}
    assert len(set(names.values())) == 24
    for image, scene in zip(captions["images"], train, strict=True):
        with Image.open(path / "train" / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (96, 96)
        texts = [note["caption"] for note in captions["annotations"] if note["image_id"] == image["id"]]
        assert len(texts) == 5
        assert {read_scene(text) for text in texts} == {scene}
        found = []
        for note in instances["annotations"]:
            if note["image_id"] == image["id"]:
                x, y, width, height = note["bbox"]
                row, column = int((y + height / 2) // world.CELL), int((x + width / 2) // world.CELL)
                found.append(Thing(row, column, *names[note["category_id"]].split()))
        assert tuple(found) == scene


def test_caption_rows_are_llavas(folder):
    path, train, _ = folder
    rows = read(path / "captions.json")
    assert len(rows) == 5 * len(train) == len({row["id"] for row in rows})
    for row in rows:
        human, gpt = row["conversations"]
        assert human["from"] == "human" and human["value"].startswith("<image>\n")
        assert gpt["from"] == "gpt" and read_scene(gpt["value"]) == train[int(row["image"].split(".")[0]) - 1]


def test_questions_shuffled_pictures_and_texts_belong_together(folder):
    path, _, held_out = folder
    asked, shuffled, texts = (
        read_lines(path / "held_out" / f"{name}.jsonl") for name in ("questions", "shuffled", "text")
    )
    assert {row["category"] for row in asked} == set(world.KINDS)
    assert len({row["question_id"] for row in asked}) == len(asked) > 4 * len(held_out)
    for row, other, text in zip(asked, shuffled, texts, strict=True):
        scene = held_out[int(row["image"].split(".")[0]) - 1]
        assert answer(scene, row["text"]) == row["answer"]
        assert {**other, "image": row["image"]} == row
        assert answer(held_out[int(other["image"].split(".")[0]) - 1], row["text"]) != row["answer"]
        caption, _, question = text["text"].partition("\n")
        assert "image" not in text and question == row["text"] and read_scene(caption) == scene
