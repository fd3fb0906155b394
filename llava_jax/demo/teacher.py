"""The embedded teacher: a program that writes instruction data about the demo's small world.

It takes the place of the large language model of a real run and knows no more than one would: it reads the last user
message (captions, and for some kinds boxes), works out what is in the image, and answers in the layout asked for.
"""

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_jax.demo import world
from llava_jax.demo.world import Scene, Thing
from llava_jax.synthesize.teacher import Message, Reply
from llava_jax.types import InputError

_COLOUR, _SHAPE, _ROW, _COLUMN = ("|".join(words) for words in (world.COLOURS, world.SHAPES, world.ROWS, world.COLUMNS))
# Name and place in either order: "a red circle at the top left", "at the top left a red circle".
NAME_PLACE = re.compile(rf"\b({_COLOUR}) ({_SHAPE}) at the ({_ROW}) ({_COLUMN})\b")
PLACE_NAME = re.compile(rf"\b({_ROW}) ({_COLUMN}) (?:holds )?a ({_COLOUR}) ({_SHAPE})\b")
BOX = re.compile(rf"({_COLOUR}) ({_SHAPE}): \[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]")
QUESTIONS_LEAST, QUESTIONS_MOST = 4, 5


class EmbeddedTeacher:
    """Writes one kind of data (conversation, detail, reasoning); the same seed and text give the same reply."""

    def __init__(self, kind: str, seed: int = 0):
        writers = {"conversation": conversation, "detail": description, "reasoning": reasoning}
        if kind not in writers:
            raise InputError(f"kind {kind!r}: expected one of {', '.join(writers)}")
        self.name = "embedded"
        self.settings: Mapping[str, Any] = {"model": "embedded", "seed": seed}
        self._write = writers[kind]
        self._seed = seed

    def answer(self, messages: Sequence[Message]) -> Reply:
        """Return the reply to the last message. Raises InputError when it is not about the small world."""
        text = messages[-1]["content"]
        return Reply(self._write(read_scene(text), np.random.default_rng([self._seed, zlib.crc32(text.encode())])))


def read_scene(text: str) -> Scene:
    """Return the scene of captions and boxes. Raises InputError when they are of another world or contradictory."""
    captions, _, boxes = text.partition("\n\n")
    readings = [_read_caption(line) for line in captions.splitlines()]
    if boxes:
        readings.append(_read_boxes(boxes))
    scenes = set(readings)
    if () in scenes or not scenes:
        unknown = next((line for line in text.splitlines() if not _read_caption(line)), text)
        raise InputError(
            f"the embedded teacher cannot read {unknown!r:.70}: it knows only the demo's world of coloured shapes; "
            "give it the contexts that `demo` wrote"
        )
    if len(scenes) > 1:
        raise InputError(f"captions and boxes of one image contradict each other: {text!r:.200}")
    return readings[0]


def _read_caption(line: str) -> Scene:
    mentions = NAME_PLACE.findall(line)
    mentions += [(colour, shape, row, column) for row, column, colour, shape in PLACE_NAME.findall(line)]
    rows, columns = world.ROWS.index, world.COLUMNS.index
    return tuple(sorted(Thing(rows(row), columns(column), colour, shape) for colour, shape, row, column in mentions))


def _read_boxes(text: str) -> Scene:
    things = []
    for colour, shape, *edges in BOX.findall(text):
        x1, y1, x2, y2 = (float(edge) for edge in edges)
        things.append(Thing(int(3 * (y1 + y2) / 2), int(3 * (x1 + x2) / 2), colour, shape))
    return tuple(sorted(things))


def conversation(scene: Scene, rng: np.random.Generator) -> str:
    """Write four or five different questions, each kind in its turn, with answers of one or two words."""
    by_kind: dict[str, list[world.Question]] = {}
    for question in world.questions(scene, rng):
        by_kind.setdefault(question.kind, []).append(question)
    rounds = [[group[i] for i in rng.permutation(len(group))] for group in by_kind.values()]
    rounds = [rounds[i] for i in rng.permutation(len(rounds))]
    ordered = [question for group in itertools.zip_longest(*rounds) for question in group if question is not None]
    asked = ordered[: int(rng.integers(QUESTIONS_LEAST, QUESTIONS_MOST + 1))]
    return "\n===\n".join(_exchange(question.text, question.answer) for question in asked)


def description(scene: Scene, rng: np.random.Generator) -> str:
    """Write how many things there are, and each with its colour, shape and place, in any order."""
    things = [scene[i] for i in rng.permutation(len(scene))]
    number = world.NUMBERS[len(scene)]
    opening = f"there is {number} object." if len(scene) == 1 else f"there are {number} objects."
    return " ".join([opening, *(f"a {thing.name} is at the {thing.place}." for thing in things)])


def reasoning(scene: Scene, rng: np.random.Generator) -> str:
    """Write one question that takes two facts, and an answer that names both and ends in the conclusion."""
    asked = [*_comparisons(scene), *_conjunctions(scene, rng), *_sameness(scene)]
    return _exchange(*asked[int(rng.integers(len(asked)))])


def _comparisons(scene: Scene) -> list[tuple[str, str]]:
    """Ask which of two things is higher, lower, further left or further right, where there is a difference."""
    names = [thing.name for thing in scene]
    asked = []
    for one, other in itertools.permutations(scene, 2):
        if names.count(one.name) > 1 or names.count(other.name) > 1:
            continue
        facts = f"the {one.name} is at the {one.place} and the {other.name} is at the {other.place}"
        either = f"the {one.name} or the {other.name}?"
        if one.row != other.row:
            higher, lower = (one, other) if one.row < other.row else (other, one)
            asked.append((f"Which object is higher, {either}", f"{facts}, so the higher one is the {higher.name}."))
            asked.append((f"Which object is lower, {either}", f"{facts}, so the lower one is the {lower.name}."))
        if one.column != other.column:
            left, right = (one, other) if one.column < other.column else (other, one)
            asked.append((f"Which object is further left, {either}", f"{facts}, so it is the {left.name}."))
            asked.append((f"Which object is further right, {either}", f"{facts}, so it is the {right.name}."))
    return asked


def _conjunctions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Ask whether a thing named by its shape has a colour and is in a row: yes where both hold, else no."""
    shapes = [thing.shape for thing in scene]
    asked = []
    for thing in scene:
        if shapes.count(thing.shape) > 1:
            continue
        colour = thing.colour if rng.random() < 0.7 else str(rng.choice(list(world.COLOURS)))
        row = world.ROWS[thing.row] if rng.random() < 0.7 else str(rng.choice(world.ROWS))
        holds = colour == thing.colour and row == world.ROWS[thing.row]
        facts = f"the {thing.shape} is {thing.colour} and it is at the {thing.place}"
        question = f"Is the {thing.shape} both {colour} and in the {row} row?"
        asked.append((question, f"{facts}, so the answer is {'yes' if holds else 'no'}."))
    return asked


def _sameness(scene: Scene) -> list[tuple[str, str]]:
    """Ask whether two or three things all have one colour, and whether they all have one shape."""
    if len(scene) == 1:
        return []
    asked = []
    for noun, values in (("colour", [t.colour for t in scene]), ("shape", [t.shape for t in scene])):
        answer = "yes" if len(set(values)) == 1 else "no"
        facts = f"the {noun}s are {', '.join(values[:-1])} and {values[-1]}"
        asked.append((f"Do all objects have the same {noun}?", f"{facts}, so the answer is {answer}."))
    return asked


def _exchange(question: str, answer: str) -> str:
    return f"Question:\n{question}\n===\nAnswer:\n{answer}"
