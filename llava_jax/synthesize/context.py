"""What a language-only teacher gets to know of a picture: its captions and its boxes, as text.

Source of the layout: the LLaVA paper, section 3: captions, one per line, a blank line, then a line for each object,
`category: [x1, y1, x2, y2]`.
"""

import dataclasses
import glob
import json
import os
from typing import Any

from llava_jax.types import InputError

# Boxes of COCO reach over the border by rounding; what reaches further is an error of the file.
SLACK = 0.01


@dataclasses.dataclass(frozen=True)
class Instance:
    """One object: its category and its box (x1, y1, x2, y2) as shares of width and height, 0 to 1."""

    category: str
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Context:
    """A picture in words; `image` is its file name, relative to the folder of pictures."""

    id: str
    image: str
    captions: tuple[str, ...]
    instances: tuple[Instance, ...]


def context_text(context: Context, boxes: bool) -> str:
    """The symbolic context: the captions, one per line, and with `boxes` a blank line and one line per object."""
    lines = list(context.captions)
    if boxes and context.instances:
        lines.append("")
        lines += [f"{item.category}: {[round(value, 3) for value in item.box]}" for item in context.instances]
    return "\n".join(lines)


def load_contexts(path: str) -> list[Context]:
    """Contexts of a JSONL file (id, image, captions, instances) or of a folder of COCO annotations.

    Such a folder holds one captions*.json and one instances*.json. Raises InputError naming the file and the line.
    """
    contexts = _load_coco(path) if os.path.isdir(path) else _load_jsonl(path)
    if not contexts:
        raise InputError(f"{path}: holds no pictures, expected one context per line")
    return contexts


# ---- JSONL ------------------------------------------------------------------------------------------------------


def _load_jsonl(path: str) -> list[Context]:
    contexts = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error}), expected one context per line") from error
            contexts.append(_context(row, where))
    return contexts


def _context(row: Any, where: str) -> Context:
    if not isinstance(row, dict) or not {"id", "image", "captions"} <= row.keys():
        raise InputError(f"{where}: expected an object with id, image, captions and instances")
    captions = row["captions"]
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise InputError(f"{where}: captions is {captions!r:.60}, expected a list of sentences")
    instances = row.get("instances", [])
    if not isinstance(instances, list):
        raise InputError(f"{where}: instances is {instances!r:.60}, expected a list of {{category, bbox}}")
    return Context(
        id=str(row["id"]),
        image=str(row["image"]),
        captions=tuple(text.strip() for text in captions if text.strip()),
        instances=tuple(_instance(item, where) for item in instances),
    )


def _instance(item: Any, where: str) -> Instance:
    if not isinstance(item, dict) or not isinstance(item.get("category"), str):
        raise InputError(f"{where}: instance {item!r:.60}, expected {{category, bbox}}")
    box = item.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise InputError(f"{where}: bbox {box!r:.60} of {item['category']!r}, expected four numbers [x1, y1, x2, y2]")
    return Instance(item["category"], _inside(tuple(box), f"{where}: bbox of {item['category']!r}"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _inside(box: tuple[float, ...], where: str) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    if not (-SLACK <= x1 <= x2 <= 1 + SLACK and -SLACK <= y1 <= y2 <= 1 + SLACK):
        raise InputError(f"{where} is {list(box)}, expected 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1")
    return tuple(min(max(float(value), 0.0), 1.0) for value in box)


# ---- COCO -------------------------------------------------------------------------------------------------------


def _load_coco(folder: str) -> list[Context]:
    captions_path, instances_path = _only(folder, "captions"), _only(folder, "instances")
    captions, instances = _read_json(captions_path), _read_json(instances_path)
    try:
        images = {image["id"]: image for image in captions["images"]}
        images |= {image["id"]: image for image in instances["images"]}
        categories = {category["id"]: category["name"] for category in instances["categories"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}: not COCO annotations, no {error}; expected images and categories") from error
    texts: dict[Any, list[str]] = {key: [] for key in images}
    things: dict[Any, list[Instance]] = {key: [] for key in images}
    for index, note in enumerate(_annotations(captions, captions_path, ("image_id", "caption"), images)):
        if not isinstance(note["caption"], str):
            raise InputError(f"{captions_path} annotation {index}: caption is {note['caption']!r:.60}, expected a text")
        texts[note["image_id"]].append(note["caption"].strip())
    for note in _annotations(instances, instances_path, ("image_id", "category_id", "bbox"), images):
        things[note["image_id"]].append(_coco_instance(note, images[note["image_id"]], categories, instances_path))
    return [
        Context(_stem(image["file_name"]), image["file_name"], tuple(filter(None, texts[key])), tuple(things[key]))
        for key, image in images.items()
    ]


def _annotations(content: dict, path: str, keys: tuple[str, ...], images: dict) -> list[dict]:
    notes = content.get("annotations")
    if not isinstance(notes, list):
        raise InputError(f"{path}: no list `annotations`, expected COCO's format")
    for index, note in enumerate(notes):
        missing = [key for key in keys if key not in note]
        if missing or note["image_id"] not in images:
            problem = f"no {missing[0]}" if missing else f"image_id {note['image_id']} is no image of the file"
            raise InputError(f"{path} annotation {index}: {problem}, expected {', '.join(keys)}")
    return notes


def _coco_instance(note: dict, image: dict, categories: dict, path: str) -> Instance:
    where = f"{path}: bbox of image {image['file_name']}"
    if note["category_id"] not in categories:
        raise InputError(f"{path}: category_id {note['category_id']} of image {image['file_name']} is no category")
    box = note["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise InputError(f"{where} is {box!r:.60}, expected four numbers [x, y, width, height] in pixels")
    x, y, width, height = box
    shares = (x / image["width"], y / image["height"], (x + width) / image["width"], (y + height) / image["height"])
    return Instance(categories[note["category_id"]], _inside(shares, where))


def _only(folder: str, prefix: str) -> str:
    found = sorted(glob.glob(os.path.join(glob.escape(folder), f"{prefix}*.json")))
    if len(found) != 1:
        raise InputError(f"{folder}: {len(found)} files {prefix}*.json, expected one (COCO's annotations)")
    return found[0]


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}), expected COCO's annotations") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a {type(content).__name__}, expected COCO's annotations")
    return content


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]
