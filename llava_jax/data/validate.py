"""Which rows can be trained, why the others cannot, and how many tokens each has: one check for `train` and `prepare
verify`.

Every row is parsed, rendered, encoded and cut as in training. `train` asks for image files to be there, `prepare
verify` decodes them; what was found is kept, so that a restart need not tokenise, or plan, again what has not changed.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TextIO

import numpy as np

from llava_jax.buckets import names
from llava_jax.data.images import check_image
from llava_jax.data.packing import BatchPlan, BatchShape, check_order, plan_batches
from llava_jax.data.records import Rejected, Rows, load_records
from llava_jax.data.rows import count_words, unread_line
from llava_jax.data.sources import KEPT_ROWS, code, keep, key_of, recall
from llava_jax.data.tiles import Tiling
from llava_jax.data.tokenize import (
    TextTokenizer,
    check_end,
    cut,
    encode_turns,
    encode_turns_together,
    full_length,
    image_paths,
    image_sizes,
    require_file,
)
from llava_jax.io import is_bucket, opened, replacing
from llava_jax.types import DataSettings, Encoded, InputError, Record

# Settings that say where a row stands or who reads it, not what it becomes.
ORDER = ("annotations", "exclude", "shuffle", "group_by", "pack", "pack_length", "pack_images", "workers")
# Rows that are tokenised together (some bring their images along, so not many), and threads that do that: while the
# tokenizer works outside of Python's lock, the other one reads rows.
TOGETHER, THREADS = 256, 2
# Of each row, zeros where it cannot be trained: tokens that are trained on, those of them to be predicted, tokens that
# max_length cuts off, images (anyres: tiles), words of its turns; and whether an answer before the first question, or a
# last question without an answer, is left out.
FIGURES = np.dtype(
    [
        *((name, np.int32) for name in ("tokens", "targets", "cut", "slots", "words")),
        *((name, np.bool_) for name in ("leading", "open")),
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Checked:
    """What was found in all rows: their FIGURES, the rows that cannot be trained, and the image files that can be.

    `unread` says of each key that is not read in how many rows it stands, `missing` which of the rows that are kept
    have an image that does not exist: training leaves these out.
    """

    figures_A: np.ndarray
    rejected: tuple[Rejected, ...]
    images: frozenset[str]
    unread: dict[str, int] = dataclasses.field(default_factory=dict)
    missing: tuple[Rejected, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.figures_A)

    @property
    def kept(self) -> int:
        return self.rows - len(self.rejected)

    def total(self, figure: str) -> int:
        """Return the sum of a figure over all rows."""
        return int(self.figures_A[figure].sum(dtype=np.int64))

    def count(self, figure: str) -> int:
        """Count the rows of which a figure is not 0."""
        return int(np.count_nonzero(self.figures_A[figure]))

    @property
    def lengths_A(self) -> np.ndarray:
        """Tokens trained of each row."""
        return self.figures_A["tokens"].copy()

    @property
    def slots_A(self) -> np.ndarray:
        """Images (anyres: tiles) that each row shows."""
        return self.figures_A["slots"].copy()

    @property
    def words_A(self) -> np.ndarray:
        """Words of the turns of each row."""
        return self.figures_A["words"].copy()

    def require_clean(self, shown: int = 3) -> None:
        """Raise InputError with the number of bad rows and the first of them, if there are any."""
        if self.rejected:
            count = len(self.rejected)
            first = "; ".join(map(str, self.rejected[:shown]))
            more = f"; and {count - shown} more" if count > shown else ""
            raise InputError(
                f"{count} of {self.rows} rows cannot be trained (`prepare verify` lists them): {first}{more}"
            )

    def require_order(self, records: Rows, settings: DataSettings) -> None:
        """Raise InputError when the rows cannot be ordered or packed as the settings ask for."""
        check_order(records, self.lengths_A, self.slots_A, self.words_A, settings, records.mixture)

    def require_fit(self, annotations: str, max_positions: int) -> None:
        """Raise InputError when the longest row is longer than the decoder's positions."""
        longest = int(self.lengths_A.max(initial=0))
        if longest > max_positions:
            raise InputError(
                f"{annotations}: the longest row has {longest} tokens, the decoder {max_positions} positions "
                "(max_position_embeddings); lower data.max_length to that"
            )


def summary(checked: Checked, max_length: int) -> list[str]:
    """Return the sums for a person, and what of the rows is not trained on."""
    tokens, targets = checked.total("tokens"), checked.total("targets")
    full_A = checked.figures_A["tokens"] + checked.figures_A["cut"]
    longest = int(full_A.argmax()) if checked.rows else 0
    lines = [
        f"{checked.kept:,} rows, {tokens:,} tokens, {targets:,} of them supervised ({targets / max(tokens, 1):.1%}); "
        f"longest row: {longest} with {full_A[longest] if checked.rows else 0:,} tokens"
    ]
    if checked.count("cut"):
        cut_off = f"{checked.total('cut'):,} tokens off {checked.count('cut'):,} rows"
        lines.append(f"data.max_length={max_length} cuts {cut_off}")
    for figure, what in ("leading", "answers before the first question"), ("open", "last questions without an answer"):
        if checked.count(figure):
            lines.append(f"{what} left out: {checked.count(figure):,}")
    if checked.missing:
        lines.append(f"data.max_rejects allows {len(checked.missing)} rows without their images: {checked.missing[0]}")
    if checked.unread:
        lines.append(unread_line(checked.unread, "rows"))
    return lines


def rejects_allowed(settings: DataSettings, rows: int) -> int:
    """Return how many of `rows` may turn out unreadable: data.max_rejects."""
    return int(settings.max_rejects if settings.max_rejects >= 1 else settings.max_rejects * rows)


# ---- the check ----------------------------------------------------------------------------------------------------


def check_records(
    records: Sequence[Record],
    settings: DataSettings,
    tokenizer: TextTokenizer,
    *,
    patches: int,
    tiling: Tiling | None = None,
    look: Callable[[str | bytes], None] = require_file,
    dump: TextIO | None = None,
    may_miss: int = 0,
) -> Checked:
    """Check every row. Raises InputError only for what spoils all of them, such as an unknown template.

    Args:
        records: the rows; of `Rows` those that cannot be read are rejected, too.
        patches: image tokens of an image, or of a tile.
        tiling: with data.aspect=anyres, how an image becomes tiles; its header then says how many tokens it takes.
        look: raises InputError for an image that cannot be used, and is asked about once each path.
        dump: what is trained is written there, a line of JSON for each row that is kept.
        may_miss: rows that are kept though `look` refuses their images; where there are more, all of them are rejected.
    """
    check_end(tokenizer, tokenizer.template(settings.template))
    if not records:
        raise InputError(f"{settings.annotations}: no rows; expected at least one")
    check = _Check(records, settings, tokenizer, patches, tiling, look, may_miss > 0)
    figures_A, rejected, unread = np.zeros(len(records), FIGURES), [], collections.Counter()
    missing: list[Rejected] = []
    for row, found in enumerate(check.rows()):
        if isinstance(found, Rejected):
            rejected.append(found)
            continue
        figures_A[row] = found.figures
        if found.missing:
            missing.append(Rejected(row, found.id, found.missing))
        if found.unread:
            unread.update(found.unread)
        if dump is not None:
            tokens, targets = found.encoded.tokens, found.encoded.targets
            text = tokenizer.decode(tokens[targets], skip_special=False)
            line = {"id": found.id, "tokens": tokens.tolist(), "targets": targets.astype(int).tolist(), "text": text}
            dump.write(json.dumps(line, ensure_ascii=False) + "\n")
    good = frozenset(path for path, problem in check.images.items() if problem is None)
    if len(missing) > may_miss:
        rejected, missing = sorted([*rejected, *missing], key=lambda problem: problem.row), []
    return Checked(figures_A, tuple(rejected), good, dict(unread), tuple(missing))


def verify(
    settings: DataSettings,
    tokenizer: TextTokenizer,
    *,
    patches: int,
    tiling: Tiling | None = None,
    look: Callable[[str | bytes], None] = check_image,
    dump_path: str | None = None,
) -> tuple[Rows, Checked]:
    """Return the rows of data.annotations and what `check_records` finds in them with every image decoded.

    What is trained is written to `dump_path` (JSONL) when given; the file appears when it is complete.
    """
    records = load_records(settings.annotations)
    with contextlib.nullcontext() if dump_path is None else replacing(dump_path) as dump:
        return records, check_records(
            records, settings, tokenizer, patches=patches, tiling=tiling, look=look, dump=dump
        )


def report_lines(checked: Checked, max_length: int) -> list[str]:
    """Return the report for a person: every rejected row, then the sums."""
    lines = [f"rejected: {rejected}" for rejected in checked.rejected]
    count = len(checked.rejected)
    lines.append(f"{checked.kept} of {checked.rows} rows can be trained, {count} cannot (rows are counted from 0)")
    return lines + summary(checked, max_length)


class _Trained(NamedTuple):
    """The id of a row that can be trained, what is trained of it, its FIGURES, and its keys that are not read.

    `missing` says which of its images does not exist.
    """

    id: str
    encoded: Encoded
    figures: tuple[int, ...]
    unread: tuple[str, ...]
    missing: str


@dataclasses.dataclass(frozen=True)
class _Check:
    """The check of `check_records`; `images` says of each path that was looked at what is wrong with it."""

    records: Sequence[Record]
    settings: DataSettings
    tokenizer: TextTokenizer
    patches: int
    tiling: Tiling | None
    look: Callable[[str | bytes], None]
    may_miss: bool
    images: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def rows(self) -> Iterator[_Trained | Rejected]:
        """Yield all rows in order; a few parts are read ahead."""
        pending: collections.deque[Future] = collections.deque()
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(self.records), TOGETHER):
                pending.append(pool.submit(self._part, start))
                if len(pending) > THREADS:
                    yield from pending.popleft().result()
            for part in pending:
                yield from part.result()

    def _part(self, start: int) -> list[_Trained | Rejected]:
        rows = range(start, min(start + TOGETHER, len(self.records)))
        records = self.records
        entries = [records.entry(row) if isinstance(records, Rows) else records[row] for row in rows]
        given = [entry for entry in entries if isinstance(entry, Record)]
        folder = self.settings.images
        by_path = any(isinstance(image, str) for entry in given for image in entry.images)
        if by_path and not is_bucket(folder) and not os.path.isdir(folder):
            found = f"{folder}: no such folder" if folder else "data.images is empty"
            raise InputError(f"{found}; expected the folder that image paths start from")
        try:
            encoded = iter(encode_turns_together(given, self.settings, self.tokenizer))
        except InputError:  # of one of them
            encoded = itertools.repeat(None)
        return [
            entry if isinstance(entry, Rejected) else self._row(row, entry, next(encoded))
            for row, entry in zip(rows, entries, strict=True)
        ]

    def _row(self, row: int, record: Record, encoded: Encoded | None) -> _Trained | Rejected:
        missing = ""
        try:
            try:
                for path in image_paths(record, self.settings):
                    self._require_image(path)
            except InputError as error:
                if not self.may_miss:
                    raise
                missing = str(error)
            encoded = encoded or encode_turns(record, self.settings, self.tokenizer)
            counts, slots = self.patches, len(record.images)
            if self.tiling is not None:
                sizes = image_sizes(record, self.settings)
                counts, slots = self.tiling.tokens(sizes), sum(self.tiling.tiles(sizes))
            trained = cut(encoded, counts, self.settings.max_length)
        except InputError as error:
            return Rejected(row, record.id, str(error))
        full = full_length(encoded, counts)
        length = full if trained is encoded else full_length(trained, counts)
        targets, words = int(np.count_nonzero(trained.targets)), count_words(record)
        speakers = [turn.speaker for turn in record.turns if turn.speaker != "system"]
        leading = speakers[:1] == ["gpt"] and self.tokenizer.template(self.settings.template).drop_leading_answer
        figures = (length, targets, full - length, slots, words, leading, speakers[-1:] == ["human"])
        return _Trained(record.id, trained, figures, record.unread, missing)

    def _require_image(self, path: str | bytes) -> None:
        if isinstance(path, bytes):
            self.look(path)
            return
        if path not in self.images:
            try:
                self.look(path)
                self.images[path] = None
            except InputError as error:
                self.images[path] = str(error)
        if self.images[path] is not None:
            raise InputError(self.images[path])


def looking_in(folder: str) -> Callable[[str | bytes], None]:
    """Return what raises InputError for an image file that does not exist; a folder in a bucket is listed once."""
    if not is_bucket(folder):
        return require_file
    there = names(folder)

    def look(image: str | bytes) -> None:
        if isinstance(image, str) and image.removeprefix(folder).lstrip("/") not in there:
            raise InputError(f"image {image}: no such object; check the path, or data.images")

    return look


def excluded_rows(records: Rows, path: str) -> list[int]:
    """Return the rows that a file names, a line each: an id, or # and the number of a row, from 0.

    Raises InputError for a name that no row has.
    """
    try:
        with opened(path) as file:
            ids = {line.strip() for line in file.read().decode().splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.exclude={path}: cannot be read ({error}); expected ids of rows, one a line") from error
    found = {row: names for row in range(len(records)) if (names := {records.entry(row).id, f"#{row}"} & ids)}
    unknown = sorted(ids.difference(*found.values()))
    if unknown:
        more = f", nor {len(unknown) - 1} more of these" if len(unknown) > 1 else ""
        raise InputError(
            f"data.exclude={path}: no row has the id {unknown[0]!r}{more}; expected ids of rows, one a line"
        )
    return list(found)


# ---- what is kept of it -------------------------------------------------------------------------------------------


def check_once(
    records: Rows, settings: DataSettings, tokenizer: TextTokenizer, *, patches: int, tiling: Tiling | None = None
) -> Checked:
    """Return what `check_records` finds, or found before in the same rows with the same tokenizer and settings.

    A result without a problem is kept for data sets of KEPT_ROWS rows or more. Whether the images are there is looked
    up each time; where one is gone, every row is checked again, so that the rows are named. With `tiling` nothing is
    kept: how many tokens a row has then depends on the sizes of its images, which may change in their files.
    """
    check_end(tokenizer, tokenizer.template(settings.template))
    look, may_miss = looking_in(settings.images), rejects_allowed(settings, len(records))
    if len(records) < KEPT_ROWS or tiling is not None:
        return check_records(records, settings, tokenizer, patches=patches, tiling=tiling, look=look, may_miss=may_miss)
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ORDER}
    name = key_of("check", code(), records.fingerprint, tokenizer.fingerprint, patches, facts)
    kept = recall(name)
    if kept is not None:
        images = kept["images"].tobytes().decode().split("\0") if kept["images"].size else []
        with contextlib.suppress(InputError):
            for image in images:
                look(image)
            return Checked(kept["figures"], (), frozenset(images), json.loads(kept["unread"].tobytes()))
    checked = check_records(records, settings, tokenizer, patches=patches, look=look, may_miss=may_miss)
    if not checked.rejected and not checked.missing:
        images = "\0".join(sorted(checked.images)).encode()
        unread = np.frombuffer(json.dumps(checked.unread).encode(), np.uint8)
        keep(name, {"figures": checked.figures_A, "images": np.frombuffer(images, np.uint8), "unread": unread})
    return checked


def plan_once(
    records: Rows,
    checked: Checked,
    settings: DataSettings,
    *,
    batch_size: int,
    row_multiple: int,
    steps: int,
    seed: int,
) -> BatchPlan:
    """Return what `plan_batches` makes of these rows, or the plan made of the same before, which a long run keeps."""
    lengths_A, slots_A, words_A = checked.lengths_A, checked.slots_A, checked.words_A
    facts = {name: getattr(settings, name) for name in ORDER if name not in ("annotations", "exclude", "workers")}
    rows = hashlib.sha256(b"|".join(array.tobytes() for array in (lengths_A, slots_A, words_A))).hexdigest()
    sizes = batch_size, row_multiple, steps, seed
    name = key_of("plan", code(), rows, settings.max_length, facts, sizes, records.mixture)
    long = steps * batch_size >= KEPT_ROWS
    kept = recall(name) if long else None
    if kept is not None:
        rows_, length, images, filled, used, max_per_row = kept["shape"].tolist()
        shape = BatchShape(int(rows_), int(length), int(images), filled, used)
        return BatchPlan(shape, kept["order"], kept["rows"], int(max_per_row))
    plan = plan_batches(
        records,
        lengths_A,
        settings,
        batch_size=batch_size,
        row_multiple=row_multiple,
        steps=steps,
        seed=seed,
        slots_A=slots_A,
        words_A=words_A,
        mixture=records.mixture,
    )
    if long:
        shape = np.array([*dataclasses.astuple(plan.shape), plan.max_per_row], np.float64)
        keep(name, {"shape": shape, "order": plan.order_UC, "rows": plan.rows_UC})
    return plan
