"""A TFDS data set in ArrayRecord files: rows with their images as the bytes of the files, read without TensorFlow.

`tfds.data_source("llava_rows", split="train", data_dir=OUTPUT)` gives the rows by number, in their order; `train` takes
OUTPUT/llava_rows/1.0.0 as data.annotations. Images are stored as text features, which hold any bytes: TFDS would
decode an Image inside a Sequence at every read. `image_names` are the files' names, for messages.
"""

import functools
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow_datasets as tfds

from llava_jax.data.images import check_image
from llava_jax.data.records import Rows, load_records
from llava_jax.data.rows import Rejected
from llava_jax.types import InputError

SPLIT = re.compile(r"[A-Za-z]\w*", re.ASCII)
NAME, VERSION = "llava_rows", "1.0.0"
CHUNK = 4096  # rows that wait for threads at one time
FEATURES = tfds.features.FeaturesDict(
    {
        "id": tfds.features.Text(),
        "images": tfds.features.Sequence(tfds.features.Text()),
        "image_names": tfds.features.Sequence(tfds.features.Text()),
        "conversations": tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()}),
    }
)


class LlavaRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The builder of one data set; its rows are those it is given."""

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(self, rows: Rows, images: str, split: str, **how: Any):
        self._rows, self._images, self._split = rows, images, split
        super().__init__(**how)

    def _info(self) -> tfds.core.DatasetInfo:
        about = "Conversations about images, rows of LLaVA's format; images are the bytes of image files."
        return tfds.core.DatasetInfo(builder=self, description=about, features=FEATURES, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in range(len(self._rows)):
            record = self._rows[row]
            said = [{"from": turn.speaker, "value": turn.text} for turn in record.turns]
            files = [image_bytes(image, self._images) for image in record.images]
            names = [image_name(image) for image in record.images]
            yield row, {"id": record.id, "images": files, "image_names": names, "conversations": said}


def write(annotations: str, images: str, output: str, *, split: str = "train", shards: int = 0) -> tuple[str, int]:
    """Write the data set below `output` and return its folder and the number of rows; `shards` 0 goes by size.

    Every row is checked and every image decoded before the first is written. Raises InputError, which names those that
    cannot be used, with their files.
    """
    if not SPLIT.fullmatch(split) or split == "all":
        raise InputError(f"--split={split}: expected a name of letters, digits and _, other than all")
    rows = load_records(annotations)
    folder = os.path.join(output, NAME, VERSION)
    if os.path.exists(folder):
        raise InputError(f"--output={output}: {folder} is there already; remove it, or choose another folder")
    if shards > len(rows):
        raise InputError(f"--shards={shards}: more than the {len(rows)} rows; expected at most one shard per row")
    problems = find_problems(rows, images)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{len(problems)} of {len(rows)} rows cannot be packed: {'; '.join(problems[:3])}{more}")
    builder = LlavaRows(rows, images, split, data_dir=output, file_format="array_record")
    how = tfds.download.DownloadConfig(manual_dir=output, num_shards=shards or None)
    with tempfile.TemporaryDirectory() as nothing:  # TFDS makes a folder for downloads, where there are none, too
        builder.download_and_prepare(download_dir=nothing, download_config=how)
    return folder, len(rows)


def find_problems(rows: Rows, images: str) -> list[str]:
    """Return why rows cannot be packed, in their order; an image file that several rows show is decoded once."""
    of_file = functools.cache(image_problem)

    def problem_of(row: int) -> str | None:
        entry = rows.entry(row)
        if isinstance(entry, Rejected):
            return str(entry)
        if not all(turn.target for turn in entry.turns):
            weight = "weight 0 of a turn is not packed; train such rows from their JSON file"
            return str(Rejected(row, entry.id, weight))
        for image in entry.images:
            problem = image_problem(image) if isinstance(image, bytes) else of_file(os.path.join(images, image))
            if problem:
                return str(Rejected(row, entry.id, problem))
        return None

    problems: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), CHUNK):
            chunk = range(start, min(start + CHUNK, len(rows)))
            problems += filter(None, pool.map(problem_of, chunk))
    return problems


def image_problem(image: str | bytes) -> str | None:
    try:
        check_image(image)
    except InputError as error:
        return str(error)
    return None


def image_name(image: str | bytes) -> bytes:
    """Return the file's name as the file system has it; empty for an image that came with its row and had none."""
    return os.fsencode(getattr(image, "name", "") if isinstance(image, bytes) else image)


def image_bytes(image: str | bytes, folder: str) -> bytes:
    if isinstance(image, bytes):
        return image
    with open(os.path.join(folder, image), "rb") as file:
        return file.read()
