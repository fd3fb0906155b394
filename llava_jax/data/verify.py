"""Which rows of an annotation file can be trained, why the others cannot, and what exactly is trained.

Every row takes the way of training: parsed, rendered, encoded, cut, its images decoded.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import TextIO

import numpy as np

from llava_jax.data import images
from llava_jax.data.example import encode_turns, image_paths, image_sizes
from llava_jax.data.records import Rejected, parse_records
from llava_jax.data.templates import check_image_position, find_template
from llava_jax.data.tiles import Tiling
from llava_jax.data.tokenize import TextTokenizer, check_end, cut, full_length
from llava_jax.types import UNPACKED, DataSettings, Encoded, InputError, Record


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `tokens`, `targets` and `longest` count the kept rows with their images expanded.

    `longest` is (row, tokens before cutting). `cut`, `leading_answers` and `open_questions` count kept rows that lose
    text: to max_length, the answer before the first question, the last question without an answer.
    """

    rows: int
    rejected: tuple[Rejected, ...]
    tokens: int
    targets: int
    longest: tuple[int, int]
    cut: int
    leading_answers: int
    open_questions: int

    @property
    def kept(self) -> int:
        return self.rows - len(self.rejected)

    @property
    def supervised_share(self) -> float:
        return self.targets / self.tokens if self.tokens else 0.0


def verify(
    annotations: str,
    images: str,
    tokenizer: TextTokenizer,
    template: str,
    *,
    image_position: str = "front",
    max_length: int = 2048,
    patches: int = 576,
    aspect: str = "pad",
    tiling: Tiling | None = None,
    exif: str = "apply",
    dump_path: str | None = None,
    check_image: Callable[[str | bytes], None] = images.check_image,
) -> VerifyReport:
    """Checks every row; writes what is trained to `dump_path` (JSONL, a line a kept row) when given.

    `check_image` raises InputError for an image that cannot be read; each image is looked at once. InputError is
    raised only for what spoils all rows: no annotations, an unknown template, an images folder that is none.
    """
    check_image_position(image_position)
    check_end(tokenizer, find_template(template))
    drops_leading = find_template(template).drop_leading_answer
    settings = DataSettings(
        annotations, images, template, image_position, aspect, max_length, shuffle=False, exif=exif, **UNPACKED
    )
    entries = parse_records(annotations)
    image_errors: dict[str, str | None] = {}
    has_folder = os.path.isdir(images)
    rejected, longest, rows = [], (0, 0), 0
    tokens = targets = cut_rows = leading = trailing = 0
    with _open_dump(dump_path) as dump:
        for row, record in enumerate(entries):
            rows = row + 1
            if isinstance(record, Rejected):
                rejected.append(record)
                continue
            if not has_folder and any(isinstance(image, str) for image in record.images):
                found = f"{images}: no such folder" if images else "data.images is empty"
                raise InputError(f"{found}; expected the folder that image paths start from")
            try:
                encoded = encode_turns(record, settings, tokenizer)
                counts = patches if tiling is None else tiling.tokens(image_sizes(record, settings))
                trained = cut(encoded, counts, max_length)
                _require_images(image_paths(record, settings), check_image, image_errors)
            except InputError as error:
                rejected.append(Rejected(row, record.id, str(error)))
                continue
            length = full_length(encoded, counts)
            longest = max(longest, (row, length), key=lambda item: item[1])
            tokens += full_length(trained, counts)
            targets += int(np.count_nonzero(trained.targets))
            cut_rows += length > max_length
            leading += drops_leading and record.turns[0].speaker == "gpt"
            trailing += record.turns[-1].speaker == "human"
            if dump is not None:
                dump.write(_dump_line(record, trained, tokenizer))
    return VerifyReport(rows, tuple(rejected), tokens, targets, longest, cut_rows, leading, trailing)


def report_lines(report: VerifyReport) -> list[str]:
    """The report for a person: every rejected row, then the sums."""
    lines = [f"rejected: {rejected}" for rejected in report.rejected]
    lines.append(
        f"{report.kept} of {report.rows} rows can be trained, {len(report.rejected)} cannot (rows are counted from 0)"
    )
    lines.append(
        f"{report.tokens} tokens, {report.targets} of them supervised ({report.supervised_share:.1%}); "
        f"longest row: {report.longest[0]} with {report.longest[1]} tokens"
    )
    lines.append(
        f"shortened to fit: {report.cut}; answers before the first question left out: "
        f"{report.leading_answers}; last questions without an answer left out: {report.open_questions}"
    )
    return lines


def _require_images(
    paths: list[str | bytes], check_image: Callable[[str | bytes], None], errors: dict[str, str | None]
) -> None:
    for path in paths:
        if isinstance(path, bytes):
            check_image(path)
            continue
        if path not in errors:
            errors[path] = _image_error(path, check_image)
        if errors[path] is not None:
            raise InputError(errors[path])


def _image_error(path: str, check_image: Callable[[str | bytes], None]) -> str | None:
    try:
        check_image(path)
    except InputError as error:
        return str(error)
    return None


def _dump_line(record: Record, trained: Encoded, tokenizer: TextTokenizer) -> str:
    line = {
        "id": record.id,
        "tokens": trained.tokens.tolist(),
        "targets": trained.targets.astype(int).tolist(),
        "text": tokenizer.decode(trained.tokens[trained.targets], skip_special=False),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _open_dump(path: str | None) -> Iterator[TextIO | None]:
    """A file that appears under `path` only when it is complete."""
    if path is None:
        yield None
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise InputError(f"{path}: the folder {folder} does not exist; make it first")
    partial = path + ".partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
