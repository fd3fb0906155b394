"""What a language-only teacher gets to know of an image: its captions and its boxes, as text.

Source of the layout: the LLaVA paper, section 3: captions, one per line, a blank line, then a line for each object,
`category: [x1, y1, x2, y2]`.
"""

import array
import dataclasses
import glob
import os
from collections.abc import Iterable, Iterator
from typing import Any

from llava_jax.io import elements, read_lines
from llava_jax.types import InputError

# Boxes of COCO reach over the border by rounding; what reaches further is an error of the file.
SLACK = 0.01
FIELDS = ("id", "image", "captions", "instances")
FORMS = "JSONL of contexts, COCO's captions*.json with instances*.json next to it, or a folder of these two"


@dataclasses.dataclass(frozen=True)
class Instance:
    """One object: its category and its box (x1, y1, x2, y2) as shares of width and height, 0 to 1."""

    category: str
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Context:
    """An image in words; `image` is its file name, relative to the folder of images."""

    id: str
    image: str
    captions: tuple[str, ...]
    instances: tuple[Instance, ...]


def context_text(context: Context, boxes: bool) -> str:
    """Return the symbolic context: the captions, one a line, and with `boxes` a blank line and one line an object."""
    lines = list(context.captions)
    if boxes and context.instances:
        lines.append("")
        lines += [f"{item.category}: {[round(value, 3) for value in item.box]}" for item in context.instances]
    return "\n".join(lines)


def one_line(caption: str) -> str:
    """Return the caption with its white space folded: a line break in it would make two of it, or end it early."""
    return " ".join(caption.split())


def open_contexts(path: str) -> Iterable[Context]:
    """Return the contexts of a file, in its order, as often as they are gone through; none of them is kept.

    `path` is a JSONL file (id, image, captions, instances), COCO's captions*.json with instances*.json next to it, or a
    folder that holds one of each. Raises InputError naming the file and the line, those of a JSONL file on the way.
    """
    files = context_files(path)
    if not os.path.isfile(files[0]):
        raise InputError(f"{files[0]}: no such file, expected {FORMS}")
    if len(files) == 1:
        return JsonlContexts(path)
    if not os.path.isfile(files[1]):
        raise InputError(f"{files[0]}: no {files[1]} next to it; COCO keeps the boxes there")
    return CocoContexts(*files)


def context_files(path: str) -> list[str]:
    """Return the files that `open_contexts` reads: JSON Lines, or COCO's captions and then its instances."""
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "captions*.json")))
        if not found:
            raise InputError(f"{path}: no file captions*.json, expected one (COCO's annotations)")
        if len(found) > 1:
            raise InputError(f"{path}: {len(found)} files captions*.json; name one of them, as {found[0]}")
        path = found[0]
    name = os.path.basename(path)
    if not (name.startswith("captions") and name.endswith(".json")):
        return [path]
    return [path, os.path.join(os.path.dirname(path), name.replace("captions", "instances", 1))]


# ---- JSONL ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class JsonlContexts:
    """The contexts of a JSONL file, read anew each time."""

    path: str

    def __iter__(self) -> Iterator[Context]:
        for where, row in read_lines(self.path, "one context"):
            yield _context(row, where)


def _context(row: Any, where: str) -> Context:
    if not isinstance(row, dict):
        raise InputError(f"{where}: {row!r:.60}, expected an object with {', '.join(FIELDS)}")
    missing = [name for name in ("id", "image", "captions") if name not in row]
    if missing:
        raise InputError(f"{where}: no {' and no '.join(missing)}, expected an object with {', '.join(FIELDS)}")
    if not isinstance(row["id"], str | int) or not isinstance(row["image"], str) or not row["image"].strip():
        raise InputError(f"{where}: id {row['id']!r:.60}, image {row['image']!r:.60}, expected a name and a file name")
    captions = row["captions"]
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise InputError(f"{where}: captions is {captions!r:.60}, expected a list of sentences")
    instances = row.get("instances", [])
    if not isinstance(instances, list):
        raise InputError(f"{where}: instances is {instances!r:.60}, expected a list of {{category, bbox}}")
    return Context(
        id=str(row["id"]),
        image=row["image"],
        captions=tuple(filter(None, map(one_line, captions))),
        instances=tuple(_instance(item, where) for item in instances),
    )


def _instance(item: Any, where: str) -> Instance:
    if not isinstance(item, dict) or not isinstance(item.get("category"), str):
        raise InputError(f"{where}: instance {item!r:.60}, expected {{category, bbox}}")
    box = item.get("bbox")
    if not _is_box(box):
        raise InputError(f"{where}: bbox {box!r:.60} of {item['category']!r}, expected four numbers [x1, y1, x2, y2]")
    return Instance(item["category"], _inside(tuple(box), f"{where}: bbox of {item['category']!r}"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _inside(box: tuple[float, ...], where: str) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    if not (-SLACK <= x1 <= x2 <= 1 + SLACK and -SLACK <= y1 <= y2 <= 1 + SLACK):
        raise InputError(f"{where} is {list(box)}, expected 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1")
    x1, y1, x2, y2 = (min(max(float(value), 0.0), 1.0) for value in box)
    return x1, y1, x2, y2


# ---- COCO -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Image:
    """What COCO says of one image: file name, width, height; captions; five numbers a box, its category first."""

    name: str
    width: float
    height: float
    captions: list[str] = dataclasses.field(default_factory=list)
    boxes: array.array = dataclasses.field(default_factory=lambda: array.array("d"))


class CocoContexts:
    """The contexts of COCO's two files: captions, names and boxes are held, the rest of the files never is."""

    def __init__(self, captions_path: str, instances_path: str):
        self._images: dict[Any, _Image] = {}
        self._categories: dict[Any, str] = {}
        self._instances_path = instances_path
        for path in (captions_path, instances_path):
            for _, item in _coco_list(path, "images", ("id", "file_name", "width", "height")):
                self._images.setdefault(item["id"], _coco_image(item, path))
        for _, item in _coco_list(instances_path, "categories", ("id", "name")):
            self._categories[item["id"]] = str(item["name"])
        for number, note in _coco_list(captions_path, "annotations", ("image_id", "caption")):
            if not isinstance(note["caption"], str):
                problem = f"caption is {note['caption']!r:.60}, expected a text"
                raise InputError(f"{captions_path} annotation {number}: {problem}")
            self._find(captions_path, number, note).captions.append(one_line(note["caption"]))
        for number, note in _coco_list(instances_path, "annotations", ("image_id", "category_id", "bbox")):
            self._find(instances_path, number, note).boxes.extend(_coco_box(note, f"{instances_path} box {number}"))
        if not self._images:
            raise InputError(f"{captions_path}: holds no images, expected COCO's `images`")

    def __iter__(self) -> Iterator[Context]:
        for image in self._images.values():
            numbers = image.boxes
            boxes = [numbers[start : start + 5] for start in range(0, len(numbers), 5)]
            things = tuple(self._instance(image, int(category), *box) for category, *box in boxes)
            yield Context(
                os.path.splitext(os.path.basename(image.name))[0],
                image.name,
                tuple(filter(None, image.captions)),
                things,
            )

    def _find(self, path: str, number: int, note: dict) -> _Image:
        if note["image_id"] not in self._images:
            raise InputError(f"{path} annotation {number}: image_id {note['image_id']} is no image of the file")
        return self._images[note["image_id"]]

    def _instance(self, image: _Image, category: int, x: float, y: float, width: float, height: float) -> Instance:
        if category not in self._categories:
            raise InputError(f"{self._instances_path}: category_id {category} of image {image.name} is no category")
        across, down = image.width, image.height
        shares = (x / across, y / down, (x + width) / across, (y + height) / down)
        where = f"{self._instances_path}: bbox of image {image.name}"
        return Instance(self._categories[category], _inside(shares, where))


def _coco_list(path: str, key: str, needed: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Yield (number, element) of one of the file's lists; all elements have `needed`, first a name or number."""
    number = -1
    for number, item in enumerate(elements(path, f"{key}.item", "COCO's annotations")):
        missing = [name for name in needed if not isinstance(item, dict) or name not in item]
        if missing:
            raise InputError(f"{path}: {key} {item!r:.60} has no {missing[0]}, expected {', '.join(needed)}")
        if not isinstance(item[needed[0]], str | int):
            raise InputError(f"{path}: {key} {item!r:.60}: {needed[0]} is no number, expected COCO's format")
        yield number, item
    if number < 0 and key == "annotations":
        raise InputError(f"{path}: no list `annotations`, expected COCO's format")


def _coco_image(item: dict, path: str) -> _Image:
    name, size = item["file_name"], (item["width"], item["height"])
    if not isinstance(name, str) or not name.strip() or not all(_is_number(side) and side > 0 for side in size):
        raise InputError(f"{path}: image {item!r:.120}, expected a file_name, and width and height above 0")
    return _Image(name, *size)


def _coco_box(note: dict, where: str) -> tuple[float, ...]:
    """Return a box's (category, x, y, width, height), the last four in pixels."""
    box, category = note["bbox"], note["category_id"]
    if not isinstance(category, int) or isinstance(category, bool):
        raise InputError(f"{where}: category_id is {category!r:.60}, expected a number")
    if not _is_box(box):
        raise InputError(f"{where}: bbox is {box!r:.60}, expected four numbers [x, y, width, height] in pixels")
    return (category, *box)
