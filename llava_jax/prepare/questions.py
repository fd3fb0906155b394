"""Published files of benchmarks as question files in LLaVA's format, with the prompts of LLaVA-1.5.

A row has question_id, image (relative to the benchmark's images), text, and where they are published category and
answer.
"""

import base64
import binascii
import os
from collections.abc import Iterator
from typing import Any

from llava_jax.evaluate import gqa, mmbench, mmvet, pope, seed, textvqa, vizwiz
from llava_jax.evaluate.answers import field, read_rows
from llava_jax.evaluate.prompts import OPTION_LETTER, OPTION_LETTER_CN, SHORT_ANSWER, UNANSWERABLE, with_options
from llava_jax.evaluate.vqav2 import read_list
from llava_jax.io import read_json
from llava_jax.prepare.scienceqa import convert
from llava_jax.types import IMAGE_PLACEHOLDER, InputError

Question = dict[str, Any]
MME_ENDING = "Please answer yes or no."
IMAGE_ENDS = (".jpg", ".png", ".jpeg")


def vqav2_questions(source: str) -> Iterator[Question]:
    """Yield VQAv2's questions, of a split's JSON as published."""
    subtype = field(read_json(source, "VQAv2's questions"), "data_subtype", str, source).replace("-dev", "")
    for number, entry in enumerate(read_list(source, "questions")):
        where = f"{source}: question {number}"
        image = f"COCO_{subtype}_{field(entry, 'image_id', int, where):012d}.jpg"
        yield _short(field(entry, "question_id", int, where), image, field(entry, "question", str, where))


def vizwiz_questions(source: str) -> Iterator[Question]:
    """Yield VizWiz's questions, each under its image's name."""
    for entry in vizwiz.read_entries(source):
        yield _short(entry["image"], entry["image"], f"{entry['question']}\n{UNANSWERABLE}")


def gqa_questions(source: str) -> Iterator[Question]:
    """Yield GQA's questions with their answers."""
    for key, entry in gqa.read_questions(source).items():
        answer = {"category": entry["category"], "answer": entry["answer"]}
        yield {**_short(key, entry["image"], entry["question"]), **answer}


def textvqa_questions(source: str, ocr: str | None) -> Iterator[Question]:
    """Yield TextVQA's questions, with the tokens of an OCR file where one is given."""
    tokens = None
    if ocr is not None:
        tokens = {
            field(entry, "image_id", str, ocr): ", ".join(map(str, field(entry, "ocr_tokens", list, ocr)))
            for entry in read_list(ocr, "data")
        }
    for entry in textvqa.read_annotations(source).values():
        image, question = entry["image_id"], entry["question"]
        if tokens is not None and image not in tokens:
            raise InputError(f"{ocr}: has no tokens of image {image}; expected those of the same split")
        read = "" if tokens is None else f"{textvqa.OCR} {tokens[image]}"
        yield _short(image, f"{image}.jpg", f"{question[:1].upper()}{question[1:]}{read}")


def pope_questions(source: str) -> Iterator[Question]:
    """Yield the questions of POPE's splits, numbered through all of them."""
    number = 0
    for split, path in pope.split_files(source).items():
        for label in pope.read_labels(path):
            number += 1
            question = _short(number, label["image"], label["text"])
            yield {**question, "category": split, "answer": label["label"]}


def mme_questions(source: str) -> Iterator[Question]:
    """Yield MME's questions, of the folder of its categories; two share the id of their image."""
    found = False
    for category in _names(source):
        folder = os.path.join(source, category)
        texts = os.path.join(folder, "questions_answers_YN")
        images = os.path.join(folder, "images")
        texts, images = (texts, images) if os.path.isdir(texts) else (folder, folder)
        for name in _names(texts):
            if name.endswith(".txt"):
                found = True
                yield from _mme_pair(category, os.path.join(texts, name), images, source)
    if not found:
        raise InputError(f"{source}: no CATEGORY/*.txt in it; expected MME_Benchmark_release_version")


def mmbench_questions(source: str, images: str, *, chinese: bool, all_rounds: bool) -> Iterator[Question]:
    """Yield MMBench's questions, and write their images to the folder `images`."""
    os.makedirs(images, exist_ok=True)
    rows = mmbench.read_annotations(source, images=True, all_rounds=all_rounds)
    for key, row in rows.items():
        name = f"{int(key) % mmbench.ROUND if all_rounds else key}.jpg"
        encoded = row.get("image")
        if encoded in rows:  # some tables name the row that holds it
            encoded = rows[encoded].get("image")
        _write_image(os.path.join(images, name), encoded, f"{source}: index {key}")
        question = row["question"] if row.get("hint") is None else f"{row['hint']}\n{row['question']}"
        text = with_options(question, mmbench.options_of(row), OPTION_LETTER_CN if chinese else OPTION_LETTER)
        yield {"question_id": int(key), "image": name, "text": text, "category": row.get("category") or ""}


def seed_questions(source: str) -> Iterator[Question]:
    """Yield SEED-Bench's questions; the image of a video is its middle frame, TYPE_QUESTION.png."""
    questions, names = seed.read_annotations(source)
    for entry in questions.values():
        kind, frame = entry["question_type_id"], f"{entry['question_type_id']}_{entry['question_id']}.png"
        is_image = entry["data_type"] == "image"
        image = f"SEED-Bench-image/{entry['data_id']}" if is_image else f"SEED-Bench-video-image/{frame}"
        text = with_options(entry["question"], [str(entry[name]) for name in seed.CHOICES], OPTION_LETTER)
        answer = {"category": names[kind], "answer": entry["answer"]}
        yield {"question_id": entry["question_id"], "image": image, "text": text, **answer}


def mmvet_questions(source: str) -> Iterator[Question]:
    """Yield MM-Vet's questions, which are asked as they stand."""
    for key, entry in mmvet.read_annotations(source).items():
        yield {"question_id": key, "image": entry["imagename"], "text": entry["question"]}


def llava_bench_questions(source: str) -> Iterator[Question]:
    """Yield LLaVA-Bench's questions, which are published in this format."""
    yield from read_rows(source, ("image", "text", "category")).values()


def scienceqa_questions(source: str, split: str, subset: str = "all") -> Iterator[Question]:
    """Yield ScienceQA's questions (CQM-A), of the folder of problems.json and pid_splits.json."""
    for row in convert(source, split, "CQM-A", subset=subset):
        text = row["conversations"][0]["value"].replace(IMAGE_PLACEHOLDER, "").strip()
        image = {"image": row["image"]} if "image" in row else {}
        yield {"question_id": row["id"], **image, "text": f"{text}\n{OPTION_LETTER}"}


def _short(key: Any, image: str, question: str) -> Question:
    return {"question_id": key, "image": image, "text": f"{question}\n{SHORT_ANSWER}"}


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _mme_pair(category: str, path: str, images: str, source: str) -> Iterator[Question]:
    stem = os.path.join(images, os.path.splitext(os.path.basename(path))[0])
    image = next((stem + end for end in IMAGE_ENDS if os.path.isfile(stem + end)), None)
    if image is None:
        raise InputError(f"{path}: no image {stem}{'|'.join(IMAGE_ENDS)} for it; expected the whole release")
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file if line.strip()]
    for line in lines:
        question, tab, answer = line.partition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise InputError(f"{path}: {line!r:.80}, expected a question, a tab, and Yes or No")
        shown = f"{category}/{os.path.basename(image)}"
        text = question.replace(MME_ENDING, "").strip()
        row = _short(shown, os.path.relpath(image, source), text)
        yield {**row, "category": category, "answer": answer.strip()}


def _write_image(path: str, encoded: str | None, where: str) -> None:
    """Write the file that stands in a table as text; one that is there already stays."""
    if os.path.exists(path):
        return
    try:
        content = base64.b64decode(encoded or "", validate=True)
    except binascii.Error as error:
        raise InputError(f"{where}: its image is not base64 ({error}); expected the published table") from error
    if not content:
        raise InputError(f"{where}: has no image; expected the published table")
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)
