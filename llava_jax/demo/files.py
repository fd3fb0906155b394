"""Write the small world: images, COCO annotations, caption rows for stage 1 and questions for the evaluation."""

import collections
import os
from collections.abc import Iterator

import numpy as np

from llava_jax.data.rows import single_turn
from llava_jax.demo import world
from llava_jax.demo.world import Question, Scene
from llava_jax.io import write_json, write_rows
from llava_jax.prepare.captions import BRIEF_QUESTIONS

CAPTIONS_EACH = 5
CATEGORIES = tuple(f"{colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES)


def split_scenes(seed: int, train: int, held_out: int) -> tuple[list[Scene], list[Scene]]:
    """Return (training scenes, held-out scenes); no two held-out ones are equal, and nothing trains on them.

    Training scenes may repeat, each time drawn anew: there are only 216 of one thing.
    """
    rng = np.random.default_rng(seed)
    held = world.sample_scenes(rng, held_out, held_out=True)
    return [world.sample_scene(rng) for _ in range(train)], held


def write_split(folder: str, scenes: list[Scene], seed: int) -> list[list[str]]:
    """Write images/, captions.json and instances.json (COCO's format); return the captions of each scene."""
    rng = np.random.default_rng(seed)
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    images, captions, instances, texts = [], [], [], []
    for number, scene in enumerate(scenes, 1):
        image, boxes = world.draw(scene, rng)
        name = f"{number:06d}.png"
        image.save(os.path.join(folder, "images", name))
        images.append({"id": number, "file_name": name, "width": image.width, "height": image.height})
        texts.append([world.caption(scene, rng) for _ in range(CAPTIONS_EACH)])
        for text in texts[-1]:
            captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
        for thing, (x1, y1, x2, y2) in zip(scene, boxes, strict=True):
            box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
            note = {"image_id": number, "category_id": CATEGORIES.index(thing.name) + 1, "bbox": box}
            instances.append({"id": len(instances) + 1, **note, "area": round(box[2] * box[3], 2), "iscrowd": 0})
    info = {"description": "llava_jax small world: scenes of one to three coloured shapes"}
    categories = [{"id": n, "name": name, "supercategory": "shape"} for n, name in enumerate(CATEGORIES, 1)]
    write_json(os.path.join(folder, "captions.json"), {"info": info, "images": images, "annotations": captions})
    content = {"info": info, "images": images, "annotations": instances, "categories": categories}
    write_json(os.path.join(folder, "instances.json"), content)
    return texts


def write_caption_rows(path: str, captions: list[list[str]], seed: int) -> int:
    """Write the rows of stage 1 in LLaVA's format, one row per caption; return how many there are."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, texts in enumerate(captions, 1):
        for index, text in enumerate(texts):
            question = f"<image>\n{rng.choice(BRIEF_QUESTIONS)}"
            rows.append(single_turn(f"{number:06d}-{index}", f"{number:06d}.png", question, text))
    return write_rows(path, rows)


def write_questions(folder: str, scenes: list[Scene], captions: list[list[str]], seed: int) -> collections.Counter:
    """Write three files of the same questions, one of each kind for each scene; return how many a kind.

    questions.jsonl asks about the scene's image, shuffled.jsonl about the image of a scene where the same question has
    another answer, text.jsonl about the scene's first caption instead of an image. A kind is left out where the scene
    has no question of it with one answer, or no other scene answers it differently.
    """
    rng = np.random.default_rng(seed)
    known = [_answers(scene, rng) for scene in scenes]
    right, shuffled, text = [], [], []
    for index, scene in enumerate(scenes):
        for question, other in _one_of_each_kind(scene, known, rng):
            row = {
                "question_id": f"{index + 1:06d}-{question.kind}",
                "image": f"{index + 1:06d}.png",
                "text": question.text,
                "answer": question.answer,
                "category": question.kind,
            }
            right.append(row)
            shuffled.append({**row, "image": f"{other + 1:06d}.png"})
            read = {key: value for key, value in row.items() if key != "image"}
            text.append({**read, "text": f"{captions[index][0]}\n{question.text}"})
    for name, rows in (("questions", right), ("shuffled", shuffled), ("text", text)):
        write_rows(os.path.join(folder, f"{name}.jsonl"), rows)
    return collections.Counter(row["category"] for row in right)


def _one_of_each_kind(
    scene: Scene, known: list[dict[str, str]], rng: np.random.Generator
) -> Iterator[tuple[Question, int]]:
    """Yield a question of each kind that the scene has, and the index of a scene where it has another answer."""
    asked = world.questions(scene, rng)
    for kind in world.KINDS:
        group = [question for question in asked if question.kind == kind]
        for choice in rng.permutation(len(group)):
            question = group[choice]
            others = [i for i, answers in enumerate(known) if answers.get(question.text) not in (None, question.answer)]
            if others:
                yield question, others[int(rng.integers(len(others)))]
                break


def _answers(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """Return the answer to each question that can be asked about the scene, presence of every name included."""
    names = {thing.name for thing in scene}
    presence = {f"Is there a {name}?": "yes" if name in names else "no" for name in CATEGORIES}
    return {question.text: question.answer for question in world.questions(scene, rng)} | presence
