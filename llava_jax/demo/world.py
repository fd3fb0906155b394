"""The demo's small world: scenes of one to three coloured shapes, their images, captions, maps and questions."""

import dataclasses
import itertools
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
EMPTY = "empty"
NUMBERS = ("zero", "one", "two", "three")
KINDS = ("presence", "colour", "shape", "count", "position")
IMAGE_SIZE = 96
CELL = IMAGE_SIZE // 3
MAP_SIDE = 6
OPENINGS = ("", "there is ", "a picture of ", "an image with ", "the picture shows ")


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """One coloured shape in cell (row, column) of the 3 x 3 grid."""

    row: int
    column: int
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


Scene = tuple[Thing, ...]  # sorted by (row, column), no two in one cell


@dataclasses.dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is kept for the final questions, by hash, so that nothing ever trains on it.

    That is a tenth of all scenes, and a third of the few with one thing.
    """
    return zlib.crc32(repr(scene).encode()) % (3 if len(scene) == 1 else 10) == 0


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw one to three things (equally likely) in different cells; colours and shapes may repeat."""
    while True:
        count = int(rng.integers(1, 4))
        cells = rng.choice(9, size=count, replace=False)
        colours = rng.choice(list(COLOURS), size=count)
        shapes = rng.choice(SHAPES, size=count)
        things = zip(cells, colours, shapes, strict=True)
        scene = tuple(sorted(Thing(int(c) // 3, int(c) % 3, str(a), str(b)) for c, a, b in things))
        if is_held_out(scene) == held_out:
            return scene


def sample_scenes(rng: np.random.Generator, number: int, held_out: bool = False) -> list[Scene]:
    """Draw `number` different scenes."""
    scenes: dict[Scene, None] = {}
    while len(scenes) < number:
        scenes[sample_scene(rng, held_out)] = None
    return list(scenes)


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with one thing changed in one way: another colour, shape or cell. It is not held out."""
    while True:
        index = int(rng.integers(len(scene)))
        thing, others = scene[index], scene[:index] + scene[index + 1 :]
        change = rng.integers(3)
        if change == 0:
            thing = dataclasses.replace(thing, colour=str(rng.choice([c for c in COLOURS if c != thing.colour])))
        elif change == 1:
            thing = dataclasses.replace(thing, shape=str(rng.choice([s for s in SHAPES if s != thing.shape])))
        else:
            taken = {(t.row, t.column) for t in scene}
            free = [cell for cell in itertools.product(range(3), range(3)) if cell not in taken]
            row, column = free[int(rng.integers(len(free)))]
            thing = dataclasses.replace(thing, row=row, column=column)
        changed = tuple(sorted((*others, thing)))
        if not is_held_out(changed):
            return changed


# ---- images -----------------------------------------------------------------------------------------------------


def draw(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, list[tuple[float, float, float, float]]]:
    """Return the image (96 x 96) and each thing's box (x1, y1, x2, y2) in pixels; size, place and grey vary."""
    scale = 4
    grey = int(rng.integers(205, 246))
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), (grey, grey, grey))
    canvas = ImageDraw.Draw(image)
    boxes = []
    for thing in scene:
        half = rng.uniform(0.30, 0.42) * CELL
        slack = CELL / 2 - half - 1
        x = (thing.column + 0.5) * CELL + rng.uniform(-slack, slack)
        y = (thing.row + 0.5) * CELL + rng.uniform(-slack, slack)
        box = (x - half, y - half, x + half, y + half)
        shade = rng.uniform(0.85, 1.0)
        colour = tuple(int(c * shade) for c in COLOURS[thing.colour])
        _draw_shape(canvas, thing.shape, tuple(scale * value for value in box), colour)
        boxes.append(box)
    return image.reduce(scale), boxes


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, box: tuple[float, ...], colour: tuple[int, ...]) -> None:
    x1, y1, x2, y2 = box
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([((x1 + x2) / 2, y1), (x2, y2), (x1, y2)], fill=colour)
    else:
        third_x, third_y = (x2 - x1) / 3, (y2 - y1) / 3
        canvas.rectangle((x1 + third_x, y1, x2 - third_x, y2), fill=colour)
        canvas.rectangle((x1, y1 + third_y, x2, y2 - third_y), fill=colour)


# ---- words ------------------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write one sentence that names every thing with its colour and place, in any order and after any opening."""
    things = [scene[i] for i in rng.permutation(len(scene))]
    return f"{OPENINGS[int(rng.integers(len(OPENINGS)))]}{listed(things)}."


def listed(things: Sequence[Thing]) -> str:
    """Name things with their places, in the order given."""
    *first, last = (f"a {thing.name} at the {thing.place}" for thing in things)
    return f"{', '.join(first)}{' and ' if first else ''}{last}"


def place_map(scene: Scene) -> list[str]:
    """Return the scene as a 6 x 6 map in words: `empty`, or the four words of a thing on its four fields."""
    fields = [[EMPTY] * MAP_SIDE for _ in range(MAP_SIDE)]
    for thing in scene:
        words = (thing.colour, thing.shape, ROWS[thing.row], COLUMNS[thing.column])
        for word, (dy, dx) in zip(words, itertools.product(range(2), range(2)), strict=True):
            fields[2 * thing.row + dy][2 * thing.column + dx] = word
    return [word for row in fields for word in row]


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Return every question of the five kinds that has one answer, with as many presence questions of yes as of no."""
    colours = [t.colour for t in scene]
    shapes = [t.shape for t in scene]
    names = [t.name for t in scene]
    asked = [Question("count", "How many objects are there?", NUMBERS[len(scene)])]
    for noun in sorted(set(shapes)):
        plural = noun + "es" if noun.endswith("s") else noun + "s"
        asked.append(Question("count", f"How many {plural} are there?", NUMBERS[shapes.count(noun)]))
    for thing in scene:
        if shapes.count(thing.shape) == 1:
            asked.append(Question("colour", f"What colour is the {thing.shape}?", thing.colour))
        if colours.count(thing.colour) == 1:
            asked.append(Question("shape", f"What shape is the {thing.colour} object?", thing.shape))
        if names.count(thing.name) == 1:
            asked.append(Question("position", f"Where is the {thing.name}?", thing.place))
        asked.append(Question("presence", f"Is there a {thing.name}?", "yes"))
        asked.append(Question("presence", f"Is there a {_absent(scene, thing, rng)}?", "no"))
    return list(dict.fromkeys(asked))


def _absent(scene: Scene, thing: Thing, rng: np.random.Generator) -> str:
    """Draw a name that no thing of the scene has; mostly one that shares the colour or the shape with `thing`."""
    present = {t.name for t in scene}
    if rng.random() < 0.4:
        near = [f"{thing.colour} {shape}" for shape in SHAPES]
    elif rng.random() < 0.67:
        near = [f"{colour} {thing.shape}" for colour in COLOURS]
    else:
        near = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    free = [name for name in near if name not in present]
    return str(rng.choice(free))
