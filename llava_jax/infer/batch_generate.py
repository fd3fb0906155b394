"""A file of questions to a file of answers, many at a time, resumed where it stopped.

The fields are LLaVA's: question_id, image, text → question_id, prompt, text, answer_id, model_id, metadata; and
image_sha256, so that an image that has changed does not keep its answer.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from llava_jax.data.rows import check_path, parse_images, parse_system, unread_line
from llava_jax.infer.engine import Model
from llava_jax.infer.generate import Prompt, question_message
from llava_jax.io import check_text, check_unicode, read_lines, replacing, unread_keys
from llava_jax.types import InputError, Sampling

# The last two are what `evaluate` reads.
QUESTION_KEYS = ("question_id", "image", "images", "text", "system", "category", "answer")


Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a questions file; `where` names it in messages, `images` are paths that exist.

    `system` is a text in place of the template's system prompt, "" for that; `unread` are keys that mean nothing to us.
    """

    where: str
    id: Any
    images: tuple[str, ...]
    text: str
    system: str = ""
    unread: tuple[str, ...] = ()

    @functools.cached_property
    def key(self) -> str:
        """Return what an answer is recognised by: some benchmarks ask several questions under one id."""
        return json.dumps([self.id, self.text])

    @functools.cached_property
    def image_sha256(self) -> str:
        """Return the hash of what the images hold, one after another; "" without any."""
        digest = hashlib.sha256()
        for path in self.images:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest() if self.images else ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, question_message(self.text, self.images)]


def read_questions(path: str, folder: str) -> list[Question]:
    """Read a JSONL file of questions, images below `folder`. Raises InputError with the line that cannot be asked."""
    questions = []
    for where, row in read_lines(path, "one question"):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with question_id and text, found {json.dumps(row)[:80]}")
        try:
            questions.append(_question(row, where, folder))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return questions


def _question(row: dict[str, Any], where: str, folder: str) -> Question:
    missing = [field for field in ("question_id", "text") if field not in row]
    if missing:
        raise InputError(f"no field {' and '.join(missing)}; expected question_id, image and text")
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise InputError(f"text is {json.dumps(row['text'])[:80]}; expected a question as a string")
    check_unicode(json.dumps(row["question_id"], ensure_ascii=False), "question_id")
    check_text(row["text"], "text")
    paths = []
    for name in parse_images(row):
        check_path(name, "image")
        paths.append(os.path.join(folder, name))
        if not os.path.isfile(paths[-1]):
            raise InputError(f"no image {paths[-1]}; check the line's image and the images folder")
    unread = unread_keys(row, QUESTION_KEYS)
    return Question(where, row["question_id"], tuple(paths), row["text"], parse_system(row), unread)


# ---- what is there already ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def held_answers(path: str) -> Iterator[TextIO]:
    """Yield the file to append to, made where there is none. Raises InputError while another process holds it."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except BlockingIOError:
            is_ours = False  # it is being written, or was replaced by its sorted form just now
        if not is_ours:
            raise InputError(f"{path}: another process is writing to it; wait for it, or name another answers file")
        yield file


def open_answers(
    path: str, questions: Sequence[Question], model_id: str, metadata: dict[str, Any], progress: TextIO
) -> list[str]:
    """Return the key of each answer in the file, in the file's order; a torn last line is cut off.

    Raises InputError, and leaves the file as it is, when it belongs to other questions, another model or sampling, or
    to images of other content. Answers of earlier versions do not name their image; how many is said.
    """
    asked: dict[str, list[Question]] = {}
    for question in questions:
        asked.setdefault(question.key, []).append(question)
    done: Counter[str] = Counter()
    keys, unnamed = [], 0
    for where, row in _whole_answers(path):
        if row["model_id"] != model_id or row["metadata"] != metadata:
            theirs, ours = ([row["model_id"], row["metadata"]], [model_id, metadata])
            raise InputError(
                f"{where}: answered by {json.dumps(theirs)}, this run is {json.dumps(ours)}; "
                "name another answers file or remove this one"
            )
        key = json.dumps([row["question_id"], row["prompt"]])
        keys.append(key)
        done[key] += 1
        if done[key] > len(asked.get(key, ())):
            raise InputError(
                f"{where}: question {json.dumps(row['question_id'])} is not in the questions file, or not so often; "
                "name another answers file or remove this one"
            )
        unnamed += "image_sha256" not in row
        if "image_sha256" in row and all(row["image_sha256"] != question.image_sha256 for question in asked[key]):
            raise InputError(
                f"{where}: the image of question {json.dumps(row['question_id'])} is not the one that was answered; "
                "put it back, name another answers file or remove this one"
            )
    if unnamed:
        print(f"{unnamed} answers of {path} do not say which image they saw, as in earlier versions", file=progress)
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return keys


def _whole_answers(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every line that ends in a newline; what follows the last newline was cut by an interruption."""
    with open(path, "rb") as file:
        *lines, _ = file.read().split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"question_id", "prompt", "model_id", "metadata"} <= row.keys():
            raise InputError(f"{where}: not an answer; name another answers file or remove this one")
        yield where, row


def _sort_answers(path: str, questions: Sequence[Question], keys: Sequence[str]) -> None:
    """Put the finished file, whose lines answer `keys`, in the questions' order, by one rename."""
    places: dict[str, list[int]] = {}
    for index, question in reversed(list(enumerate(questions))):
        places.setdefault(question.key, []).append(index)
    with open(path, encoding="utf-8", newline="\n") as file:
        lines = sorted(zip([places[key].pop() for key in keys], file, strict=True))
    with replacing(path) as file:
        file.writelines(line for _, line in lines)


# ---- answering ------------------------------------------------------------------------------------------------------


def answer_file(
    model: Model,
    questions: str,
    images: str,
    answers: str,
    sampling: Sampling,
    *,
    batch_size: int = 8,
    progress: TextIO,
) -> int:
    """Answer every question of the file `questions` that `answers` does not hold yet; return how many that were.

    `batch_size` of them are answered at a time; each answer is appended and flushed as it comes, and when all are there
    the file is put in the questions' order. Raises InputError for questions or an answers file that cannot be used.
    """
    asked = read_questions(questions, images)
    metadata = {**model.about, **dataclasses.asdict(sampling)}
    with held_answers(answers) as file:
        keys = open_answers(answers, asked, model.name, metadata, progress)
        done, left = Counter(keys), []
        for question in asked:
            if done[question.key] > 0:
                done[question.key] -= 1
            else:
                left.append(question)
        already = len(asked) - len(left)
        unread = Counter(key for question in asked for key in question.unread)
        if unread:
            print(unread_line(unread, "questions"), file=progress)
        print(f"{len(asked)} questions, {already} answered already, {batch_size} at a time", file=progress)
        start = time.monotonic()
        engine = model.engine(batch_size)
        for answered, answer in enumerate(engine.answers(_prompts(left, model, engine.slots), sampling), 1):
            question = left[answer.index]
            file.write(_line(_answer(question, answer.text, model.name, metadata)))
            file.flush()
            keys.append(question.key)
            if answered % batch_size == 0 or answered == len(left):
                _report(progress, already + answered, len(asked), answered / (time.monotonic() - start))
        _sort_answers(answers, asked, keys)
        return len(left)


def _prompts(questions: Sequence[Question], model: Model, slots: int) -> Iterator[Prompt]:
    """Yield the prompt of each question; the images are read once for questions that follow each other.

    The others are looked at while the device answers those of the first `slots`: no answer is written yet, and a
    question that cannot be asked must not be found after hours of work.
    """
    images, pixels = None, None
    for index, question in enumerate(questions):
        if index == slots:
            for later in questions[index:]:
                _asked(later, model.length)
        images, known = question.images, pixels if question.images == images else None
        _ = question.image_sha256  # of what is read now, not of what lies there once it is answered
        prompt = _asked(question, functools.partial(model.prompt, pixels=known))
        pixels = prompt.pixels
        yield prompt


def _asked(question: Question, of: Callable[[list[dict[str, Any]]], Result]) -> Result:
    """Return what `of` makes of the question's messages; an InputError that `of` raises then names the question."""
    try:
        return of(question.messages)
    except InputError as error:
        raise InputError(f"{question.where}: {error}") from None


def _answer(question: Question, text: str, model_id: str, metadata: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([question.key, text, model_id, metadata]).encode())
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": text,
        "answer_id": digest.hexdigest()[:22],
        "model_id": model_id,
        "metadata": metadata,
        "image_sha256": question.image_sha256,
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _report(progress: TextIO, done: int, total: int, rate: float) -> None:
    """Write one line that is written over on a terminal, and one line a batch elsewhere."""
    text = f"answered {done}/{total} · {rate:.2f} questions/s · {(total - done) / rate:.0f} s left"
    last = done == total
    if progress.isatty():
        progress.write(f"\r{text:<70}" + ("\n" if last else ""))
    else:
        progress.write(text + "\n")
    progress.flush()
