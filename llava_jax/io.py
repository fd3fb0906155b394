"""JSON, its keys and texts read with an answer to what is wrong in them, and files that are there only when whole."""

import codecs
import contextlib
import difflib
import errno
import functools
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, TextIO

import ijson
from safetensors import SafetensorError

from llava_jax import buckets
from llava_jax.types import InputError

# A full disk, a quota, a file system that holds no file of that size: so say the libraries that write, too.
NO_ROOM = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
# What Python, tensorstore and safetensors raise where a disk is full.
WRITE_ERRORS = (OSError, ValueError, SafetensorError)
SMALL_FILE = 1 << 27  # bytes; the largest tokenizer.json has a quarter of it
PIECE, SCANNED = 1 << 16, 1 << 24  # bytes that are parsed, and looked through, at a time
BOM = codecs.BOM_UTF8
# A surrogate's escape without its other half, of which ijson's parser in C makes a question mark.
LONE = re.compile(
    rb"\\u(?:[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u)[dD][c-fC-F])"
)
# A file that is no JSON but begins with brackets: ijson's memory grows with the square of the depth.
DEEP = re.compile(rb"(?:[\[{]\s*){200}")
NOISE = re.compile(r"^(?:b')?(?:lexical|parse) error: |\.?(?:\n|\\n).*", re.DOTALL)


def each_line(path: str) -> Iterator[tuple[str, Any]]:
    """Yield ("line N", decoded) of every line that is not blank, one at a time; in place of one that is no JSON, why.

    Raises InputError where the file is a JSON list, or has other line ends.
    """
    first = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                if first:
                    check_first_line(path, line, "a JSON list, expected one object a line")
                first = False
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    value = ValueError(f"not JSON ({error})")
                yield f"line {number}", value


def check_first_line(path: str, line: bytes, a_list: str) -> None:
    """Raise InputError where a file that begins with this line is no JSON Lines; `a_list` says so of a JSON list."""
    line = line.removeprefix(BOM).strip()
    if line.startswith(b"["):
        raise InputError(f"{path}: {a_list}")
    if b"\r" in line:
        raise InputError(f"{path}: its lines end in a carriage return alone; write a line feed there")


def read_lines(path: str, expected: str) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, decoded) of every line of a JSONL file; `expected` says what a line holds.

    Raises InputError where there is no such file, at a line that is no JSON, and where there is no line.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, expected JSONL with {expected} per line")
    found = False
    for line, value in each_line(path):
        found = True
        if isinstance(value, ValueError):
            raise InputError(f"{path} {line}: {value}, expected {expected} per line")
        yield f"{path} {line}", value
    if not found:
        raise InputError(f"{path}: holds no rows, expected {expected} per line")


def read_json(path: str, expected: str) -> Any:
    """Return the content of a JSON file. Raises InputError with the file and what was `expected` where it is none."""
    try:
        with opened(path) as file:
            return json.loads(file.read().decode("utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"{path}: no such file; expected {expected}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    except (ValueError, RecursionError) as error:
        why = LFS_POINTER if is_lfs_pointer(path) else f"not JSON ({error})"
        raise InputError(f"{path}: {why}; expected {expected}") from error


def check_small(path: str) -> None:
    """Raise InputError for a local file that is much larger than any that describes a model or its tokenizer."""
    size = os.path.getsize(path)
    if size > SMALL_FILE:
        raise InputError(f"{path}: has {size:,} bytes, of such a file at most {SMALL_FILE:,} are read; copy it again")


def is_bucket(path: str) -> bool:
    """Return whether a path is an address in a bucket."""
    return path.startswith(buckets.SCHEME)


def absolute_path(path: str) -> str:
    """Return the path so that it means the same from any folder."""
    return path.rstrip("/") if is_bucket(path) else os.path.abspath(path)


def exists(path: str) -> bool:
    """Return whether there is a file or folder, local or in a bucket. Raises InputError for a bucket."""
    return buckets.exists(path) if is_bucket(path) else os.path.exists(path)


def reached(path: str) -> contextlib.AbstractContextManager[None]:
    """Return a context that raises InputError for what fails in a bucket; over a local `path` errors pass."""
    return buckets.reached(path) if is_bucket(path) else contextlib.nullcontext()


def opened(path: str) -> BinaryIO:
    """Open a file to be read, local or in a bucket. Raises OSError as `open` does, InputError for a bucket."""
    if not is_bucket(path):
        return open(path, "rb")
    content = buckets.read(path)
    if content is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return io.BytesIO(content)


def cache_folder(kind: str) -> str:
    """Return the folder of that kind in LLAVA_JAX_CACHE, or in llava_jax of the user's cache."""
    user = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llava_jax")
    return os.path.join(os.environ.get("LLAVA_JAX_CACHE") or user, kind)


def write_rows(path: str, rows: Iterable[dict[str, Any]]) -> int:
    """Write the rows of a data set as a JSON list, or as JSONL where the name says so; returns how many there are.

    The file appears under its name only when it is whole: an error of `rows` leaves what was there.
    """
    lines = path.lower().endswith((".jsonl", ".ndjson"))
    before, between, after = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    count = 0
    with replacing(path) as file:
        file.write(before)
        for count, row in enumerate(rows, 1):
            file.write(("" if count == 1 else between) + json.dumps(row, ensure_ascii=False))
        file.write(after)
    return count


def write_json(path: str, content: Any) -> None:
    """Write a JSON file for a person to read; it appears under its name only when it is whole."""
    with replacing(path) as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")


def no_room(error: BaseException) -> str:
    """Return why nothing more can be written, where an error of any library says so; "" for any other error."""
    return next((reason for reason in NO_ROOM if reason in str(error)), "")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[TextIO]:
    """Yield a text file that takes the name `path` when it is whole and on the disk; until then what was there stays.

    Processes that write to one name do not mix; the last one stays. Raises InputError when it cannot be written.
    """
    if is_bucket(path):
        text = io.StringIO()
        yield text
        buckets.write(path, text.getvalue().encode())
        return
    path = os.path.realpath(path)  # of a link the file behind it is replaced, not the link
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is not a regular file, expected the name of one")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a file that can") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None:  # of a file that was read meanwhile, or of the name itself
            raise
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room, run again") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


LFS_POINTER = "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`, or download it"


def is_lfs_pointer(path: str) -> bool:
    """Return whether a file is what git keeps in place of one that git-lfs has not fetched."""
    with opened(path) as file:
        return file.read(24) == b"version https://git-lfs."


# ---- large JSON files, an element at a time ------------------------------------------------------------------------


class _Object(dict):
    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            raise ValueError(f"key {key!r} twice in one object")
        dict.__setitem__(self, key, value)  # once a key of a file: super() takes longer


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of `pairs`, as json.loads' `object_pairs_hook`. Raises ValueError where it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        named = _Object()
        for key, value in pairs:
            named[key] = value
    return found


def elements(path: str, prefix: str, expected: str) -> Iterator[Any]:
    """Yield the elements at an ijson prefix: `item` of a file that is a list, `images.item` of an object's list.

    Raises InputError where the file is not JSON, or is something else; `expected` ends the message. Memory holds one
    element.
    """
    parse = _parser(path, expected)
    opening = _opening(path)
    if opening != ("[" if prefix == "item" else "{"):
        kind = {"{": "an object", "[": "a list", '"': "text", "": "nothing"}.get(opening, "a number or a word")
        raise InputError(f"{path}: expected {expected}, found {kind}{_hint(path) if opening == '{' else ''}")
    found = ijson.sendable_list()
    parser = parse(found, prefix, use_float=True, map_type=_Object)
    for start, piece in _pieces(path, PIECE):
        try:
            parser.send(piece)
        except (ijson.JSONError, ValueError) as error:
            raise _broken(path, _place(path, parse, prefix, start), error, expected) from None
        yield from found
        found.clear()
    try:
        parser.close()
    except (ijson.JSONError, ValueError):
        raise _broken(path, None, "the file ends too early", expected) from None
    yield from found


def line_of(path: str, at: int) -> int:
    """Return the line of a file, counted from 1, in which byte `at` stands."""
    line, left = 1, at
    with open(path, "rb") as file:
        while piece := file.read(min(left, SCANNED)):
            line, left = line + piece.count(b"\n"), left - len(piece)
    return line


def utf8_pieces(path: str, expected: str) -> Iterator[bytes]:
    """Yield the file piece by piece, a byte order mark left out.

    Raises InputError, which names the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start, piece in _pieces(path, SCANNED):
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(piece)
        except UnicodeDecodeError as error:
            at = start - held + error.start
            raise InputError(f"{path}: not UTF-8 text (byte {at}); expected {expected}") from None
        yield piece
    if held := len(decoder.getstate()[0]):
        raise InputError(f"{path}: ends within a character ({held} bytes of it); expected {expected}")


def _pieces(path: str, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield (place in the file, bytes), without a byte order mark."""
    with open(path, "rb") as file:
        file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        while piece := file.read(size):
            yield file.tell() - len(piece), piece


def _parser(path: str, expected: str) -> Any:
    """Return ijson's parser: the one in C, or where that would change a text the slow one in Python."""
    rest, lone = b"", False
    for number, piece in enumerate(utf8_pieces(path, expected)):
        if number == 0 and DEEP.match(piece):
            raise InputError(f"{path}: not JSON that can be read: nested more than 200 deep; expected {expected}")
        # No escape reaches past a quote.
        head, _, rest = (rest + piece).rpartition(b'"')
        lone = lone or LONE.search(head) is not None
    return (ijson.get_backend("python") if lone else ijson).items_coro


def _place(path: str, parse: Any, prefix: str, last: int) -> int:
    """Return the byte at which the parser gives up, which it does not say: it gets the piece at `last` byte by byte."""
    found = ijson.sendable_list()
    parser = parse(found, prefix, use_float=True, map_type=_Object)
    for start, piece in _pieces(path, PIECE):
        parts = [piece] if start < last else [piece[at : at + 1] for at in range(len(piece))]
        for at, part in enumerate(parts):
            try:
                parser.send(part)
            except (ijson.JSONError, ValueError):
                return start + at
        found.clear()
    return last


def _broken(path: str, at: int | None, reason: object, expected: str) -> InputError:
    where = "" if at is None else f", line {line_of(path, at)} (byte {at})"
    text = NOISE.sub("", str(reason))
    text = text.replace("trailing garbage", "more text after its end (one object a line belongs into a .jsonl file)")
    return InputError(f"{path}: not JSON: {text}{where}; expected {expected}")


def _opening(path: str) -> str:
    """Return the first character that is no blank; "" where there is none."""
    for _, piece in _pieces(path, PIECE):
        if piece.strip():
            return piece.lstrip()[:1].decode("utf-8", "replace")
    return ""


def _hint(path: str) -> str:
    """Return what to do with an object in place of a list of rows."""
    lists, error = [], None
    with open(path, "rb") as file:
        file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        try:
            lists = [name for name, event, _ in ijson.parse(file) if event == "start_array" and "." not in name]
        except ijson.JSONError as found:
            error = found
    if "conversations" in lists or "trailing garbage" in str(error):
        return "; one object a line belongs into a .jsonl file"
    return f"; if its list {lists[0]!r} holds the rows, write that alone" if lists else ""


# ---- keys and texts that are given to us -----------------------------------------------------------------------------

# What another program would show otherwise for such a key.
MEDIA = ("video", "videos", "audio", "audios")
IMAGE_LIKE = re.compile(r"(?:image|img|picture|pic|photo)s?(?:_?(?:file|path|name|url|list)s?)?")
SYSTEM_LIKE = re.compile(r"system_?(?:prompt|message|text|instruction)")
# Where the text shows a video: alone at an end of a line, as LLaVA-NeXT writes it. Elsewhere it may be about HTML.
OTHER_MEDIA = re.compile(r"^[ \t]*(<(?:video|audio)>)|(<(?:video|audio)>)[ \t]*$", re.MULTILINE)


def unread_keys(given: Mapping[str, Any], known: tuple[str, ...], more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the keys that are not `known` and hold something.

    Raises InputError for a key that could change what is meant. That is a key of other media, one of `more`, and one
    that looks like a known key which is not given.
    """
    if given.keys() <= set(known):
        return ()
    found = [key for key in given if key not in known and given[key] not in (None, "", [], {})]
    for key in found:
        if key in MEDIA:
            raise InputError(f"{key} is not read: only images are shown; remove it with its row, or alone")
        if key in more:
            raise InputError(f"{key} is not read, though it says what is trained; remove the row, or the key")
        meant = _meant(key, known)
        if meant and not any(given.get(name) for name in (meant, f"{meant}s")):
            raise InputError(f"{key} is not read: did you mean {meant}? Rename the key, or remove it")
    return tuple(found)


@functools.cache
def _meant(key: str, known: tuple[str, ...]) -> str:
    """Return the known key that another one looks like; "" where it looks like none."""
    name = key.lower().replace("-", "_")
    if "image" in known and IMAGE_LIKE.fullmatch(name):
        return "image"
    if "system" in known and SYSTEM_LIKE.fullmatch(name):
        return "system"
    return next(iter(difflib.get_close_matches(name, [key for key in known if "id" not in key], 1, 0.8)), "")


def check_text(text: str, where: str, index: int | None = None) -> None:
    """Raise InputError for what a human turn cannot hold: characters that are none, and media we do not show."""
    check_unicode(text, where, index)
    if "<" not in text:
        return
    found = OTHER_MEDIA.search(text)
    if found is not None and f"</{found[0].strip()[1:]}" not in text:
        where = where if index is None else f"{where}[{index}]"
        raise InputError(
            f"{where}: {found[0].strip()} is not read: only images are shown; remove it with its row, or alone"
        )


def check_unicode(text: str, where: str, index: int | None = None, fix: str = "give it in UTF-8") -> None:
    """Raise InputError where the text holds half a character, or a byte that is no UTF-8, which `fix` corrects."""
    if text.isascii():
        return
    where = where if index is None else f"{where}[{index}]"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            problem = f"byte 0x{code - 0xDC00:02X} at character {error.start} is not UTF-8; {fix}"
        else:
            problem = f"lone surrogate U+{code:04X} at character {error.start}; the text was cut inside a character"
        raise InputError(f"{where}: {problem}") from None
