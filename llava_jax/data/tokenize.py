"""Ids and targets together, by character spans; back from ids to text.

LLaVA tokenises the text between two images by itself (each piece as if it began the prompt, BOS once at the front);
the ids of such a piece are those of its whole text. A token is a target when every character it covers is one: its
offsets decide. (A token that joins the end of a header with the beginning of an answer, such as a byte-level
tokenizer's double newline, is therefore none.)
"""

import array
import bisect
import codecs
import functools
import hashlib
import itertools
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from llava_jax.data.chat_template import AddedToken, chat_template
from llava_jax.data.images import image_size
from llava_jax.data.templates import NONCHARACTER, OWN, SPECIAL_STRINGS, Span, Template, find_template, render
from llava_jax.io import LFS_POINTER, check_small, is_lfs_pointer, read_json
from llava_jax.types import IMAGE_MARK, IMAGE_PLACEHOLDER, DataSettings, Encoded, InputError, ModelConfig, Record

# A template's special strings enter the text as Unicode noncharacters: no conversation may hold those, so nothing a
# user writes can become a special token.
_FIRST_MARK = 0xFDD0
_MARKS = {text: chr(_FIRST_MARK + index) for index, text in enumerate(SPECIAL_STRINGS)}
# Around the id of any other special token, which a tokenizer's own template may write.
_NUMBER_MARK = "\ufde0"
END = "</s>"
# Chunks without targets that are kept: what stands before the first image is the same in most rows.
KNOWN = 16
# Key of an exported tokenizer_config.json, with the `post_processor` that begins texts with BOS: exports leave that to
# the chat template.
EXPORT_KEY = "llava_jax"
MOST_IDS = 1 << 24  # a table of them is made
# model_type of the original code's folders -> that of the decoder inside.
ORIGINAL_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


class Chunk(NamedTuple):
    """Text between two images: the bytes of `ids` int32[t] and of `targets` bool[t]."""

    ids: bytes
    targets: bytes


def _lone(token: int) -> Chunk:
    """Return one token that is not to be predicted."""
    return Chunk(np.int32(token).tobytes(), b"\x00")


IMAGE = _lone(IMAGE_MARK)


class TextTokenizer:
    """A Hugging Face tokenizer as LLaVA uses it: `bos_id` (None when it adds none), `eos_id`, `pad_id`, `size`.

    `ends` are the ids that end an answer whatever the template, `eos_id` first; `size` is one more than the largest
    id; `chat` is its own chat template, a Jinja text, or None. Threads may share it.
    """

    def __init__(self, source: Any, ends: Sequence[int] = ()):
        """Take over `source`, a fast transformers tokenizer (one with `backend_tokenizer`).

        `ends` are those the model names, of which the first is `eos_id` if the tokenizer has none.
        """
        self._codec = _whole_text(tokenizers.Tokenizer.from_str(source.backend_tokenizer.to_str()))
        own = {i: token for i, token in source.added_tokens_decoder.items() if token.content not in SPECIAL_STRINGS}
        self._marks = _MARKS | {t.content: f"{_NUMBER_MARK}{i}{_NUMBER_MARK}" for i, t in own.items() if t.special}
        self._splitter = _make_splitter(self._codec, self._marks, [*own.values()])
        vocabulary = source.get_vocab()
        self.size = max(vocabulary.values()) + 1
        if self.size > MOST_IDS:
            raise InputError(f"the tokenizer's largest id is {self.size - 1:,}, expected one below {MOST_IDS:,}")
        exported = "post_processor" in source.init_kwargs.get(EXPORT_KEY, {})
        self.bos_id = source.bos_token_id if exported or adds_bos(source) else None
        own = source.eos_token_id
        self.eos_id = own if own is not None else next(iter(ends), None)
        self.ends = tuple(dict.fromkeys([*([] if self.eos_id is None else [self.eos_id]), *ends]))
        self.pad_id = next((i for i in (source.pad_token_id, source.unk_token_id) if i is not None), 0)
        self._image_id = vocabulary.get(IMAGE_PLACEHOLDER)
        self._special = {text: vocabulary[text] for text in SPECIAL_STRINGS if text in vocabulary}
        self._special |= {token.content: i for i, token in source.added_tokens_decoder.items()}
        # A template written for LLaMA works with a tokenizer that spells its ends differently.
        if END not in self._special and self.eos_id is not None:
            self._special[END] = self.eos_id
        if "<s>" not in self._special and source.bos_token_id is not None:
            self._special["<s>"] = source.bos_token_id
        self._known: dict[tuple[Span, ...], Chunk] = {}
        added = {i for i, token in source.added_tokens_decoder.items() if token.special}
        reserved = added | {*source.all_special_ids}
        reserved |= {i for i in (self.eos_id,) if i is not None}
        reserved -= {source.unk_token_id}
        places = {text: self._splitter.token_to_id(mark) for text, mark in self._marks.items()}
        marks = {place: self._special.get(text, -1) for text, place in places.items() if place is not None}
        # What each id of the splitter becomes: itself, -1 where no text may have it, a mark what it stands for.
        self._final = np.arange(max(self.size, *(mark + 1 for mark in marks)), dtype=np.int32)
        self._final[sorted(reserved)] = -1
        self._final[list(marks)] = list(marks.values())
        named = source.chat_template
        self.chat = named.get("default") if isinstance(named, dict) else named
        self._variables = tuple((name, t) for name, t in source.special_tokens_map.items() if isinstance(t, str))
        tokens = source.added_tokens_decoder.values()
        self._added = tuple(AddedToken(token.content, token.special, token.rstrip) for token in tokens)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text gets."""
        facts = (self.bos_id, self.eos_id, self.pad_id, self._special, self._final.tolist(), self._splitter.to_str())
        facts += (self.chat, self._variables)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def template(self, name: str) -> Template:
        """Return the template of that name, `tokenizer` for the tokenizer's own.

        InputError where there is no such one, or none that can be trained with.
        """
        if name != OWN:
            return find_template(name)
        return self._own

    @functools.cached_property
    def _own(self) -> Template:
        if self.chat is None:
            raise InputError("data.template=tokenizer: the tokenizer brings no chat template; choose another template")
        return chat_template(self.chat, self._variables, self._added)

    def special_id(self, text: str) -> int | None:
        """Return the id of a template's special string; None when this tokenizer has none and writes it as text."""
        return self._special.get(text)

    def stop_ids(self, template: Template) -> tuple[int, ...]:
        """Return the ids that end an answer; a stop that is plain text has none (StreamDecoder watches for it)."""
        stops = (self.special_id(text) for text in template.stop)
        return tuple(sorted({*self.ends, *(i for i in stops if i is not None)}))

    def image_token_id(self, vocab_rows: int) -> int:
        """Return the id of `<image>`, or the first one that neither the tokenizer nor the embedding table uses."""
        return self._image_id if self._image_id is not None else max(vocab_rows, self.size)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of generated ids; ids outside the vocabulary have none."""
        return self._codec.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text, without BOS."""
        (chunk,) = self.encode_chunks([[Span(text)]])
        return np.frombuffer(chunk.ids, np.int32).tolist()

    def encode_chunks(self, chunks: Sequence[Sequence[Span]]) -> list[Chunk]:
        """Encode spans without images, without BOS; all texts are tokenised side by side, on all cores there are."""
        keys = [tuple(spans) for spans in chunks]
        known = [self._known.get(spans) for spans in keys]
        fresh = [spans for spans, chunk in zip(keys, known, strict=True) if chunk is None]
        pieces = [[self._piece(span) for span in spans] for spans in fresh]
        texts = ["".join(of_chunk) for of_chunk in pieces]
        encodings = self._splitter.encode_batch(texts, add_special_tokens=False) if texts else []
        found = map(self._chunk, fresh, pieces, encodings)
        done = [next(found) if chunk is None else chunk for chunk in known]
        for spans, chunk in zip(keys, done, strict=True):
            if len(self._known) < KNOWN and not any(span.is_target for span in spans):
                self._known[spans] = chunk
        return done

    def _chunk(self, spans: Sequence[Span], pieces: Sequence[str], encoding: tokenizers.Encoding) -> Chunk:
        ids = np.frombuffer(array.array("i", encoding.ids), np.int32)
        final = self._final[ids]
        if final.min(initial=0) < 0:
            token = self._codec.id_to_token(int(ids[final < 0].min()))
            raise InputError(
                f"the text spells the special token {token!r} and this tokenizer cannot write it as plain text; remove "
                "it from the text"
            )
        runs, length = [], 0
        for span, piece in zip(spans, pieces, strict=True):
            start, length = length, length + len(piece)
            if span.is_target and runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], length)
            elif span.is_target and piece:
                runs.append((start, length))

        def start_of(token: int) -> int:
            # A token without characters (an inserted prefix) goes with the character it stands before.
            return min(encoding.token_to_chars(token)[0], length - 1)  # ty: ignore[not-subscriptable], of a text

        def end_of(token: int) -> int:
            start, end = encoding.token_to_chars(token)  # ty: ignore[not-iterable]
            return end if end > start else min(start, length - 1) + 1

        targets = np.zeros(len(ids), bool)
        for start, end in runs:
            first = bisect.bisect_left(range(len(ids)), start, key=start_of)
            targets[first : bisect.bisect_right(range(len(ids)), end, first, key=end_of)] = True
        return Chunk(final.tobytes(), targets.tobytes())

    def _piece(self, span: Span) -> str:
        if span.special and span.text in self._special:
            return self._marks[span.text]
        found = None if span.text.isascii() else NONCHARACTER.search(span.text)
        if found:
            raise InputError(f"the text holds the Unicode noncharacter U+{ord(found[0]):04X}; remove it")
        return span.text


def load_tokenizer(folder: str) -> TextTokenizer:
    """Return the tokenizer of a Hugging Face folder, as transformers' AutoTokenizer reads it without running its code.

    The same object for as long as the folder's files stay as they are. Raises InputError.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; expected one with a Hugging Face tokenizer")
    if not any(all(os.path.isfile(os.path.join(folder, name)) for name in names) for names in _TOKENIZER_FILES):
        raise InputError(
            f"{folder}: holds no tokenizer; expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
        )
    return _read_folder(folder, _stamp(folder))[0]


def auto_tokenizer(folder: str) -> Any:
    """Return the tokenizer behind `load_tokenizer` as transformers has it; not to be changed."""
    load_tokenizer(folder)
    return _read_folder(folder, _stamp(folder))[1]


def adds_bos(tokenizer: Any) -> bool:
    """Return whether a transformers tokenizer begins a text with its BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _stamp(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Return names, sizes and times of the files that decide how the folder's tokenizer reads."""
    names = ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
    names += ["added_tokens.json", "chat_template.jinja", *(name for names in _TOKENIZER_FILES for name in names)]
    found = {name: os.path.join(folder, name) for name in names if os.path.isfile(os.path.join(folder, name))}
    return tuple((name, os.stat(path).st_size, os.stat(path).st_mtime_ns) for name, path in found.items())


@functools.lru_cache(maxsize=2)
def _read_folder(folder: str, stamp: tuple[tuple[str, int, int], ...]) -> tuple[TextTokenizer, Any]:
    """Return the tokenizer as ours and as transformers', built once: it takes seconds."""
    names = [name for name, _, _ in stamp]
    for name in names:
        check_small(os.path.join(folder, name))
    try:
        return _build(folder, names)
    except InputError:
        for name in names:
            if is_lfs_pointer(os.path.join(folder, name)):
                raise InputError(f"{os.path.join(folder, name)}: {LFS_POINTER}") from None
        raise


def _build(folder: str, names: Sequence[str]) -> tuple[TextTokenizer, Any]:
    path = os.path.join(folder, "tokenizer.json")
    content = read_json(path, "a tokenizer: copy it again") if os.path.isfile(path) else {"model": {}}
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"{path}: no tokenizer in it; expected the file that save_pretrained writes")
    try:
        source = _auto_tokenizer(folder, names)
        is_fast = getattr(source, "is_fast", False)
        found = TextTokenizer(source, _ends_of_model(folder, source.get_vocab())) if is_fast else None
    except InputError:
        raise
    except Exception as error:  # tokenizers raises no class of its own
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{folder}: its tokenizer is Python code in the folder (auto_map in tokenizer_config.json or "
                "config.json), which is not run; expected one with a tokenizer.json that transformers reads by itself"
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{folder}: transformers cannot read this tokenizer: {reason}") from error
    if found is None:
        raise InputError(f"{folder}: {type(source).__name__} gives no character offsets; save it with a tokenizer.json")
    return found, source


def _auto_tokenizer(folder: str, names: Sequence[str]) -> Any:
    """Return the tokenizer as AutoTokenizer reads it, in a folder of the original LLaVA code by its decoder.

    transformers knows no `llava_llama`, and takes the original's `llava` for its own, whose tokenizer.model it reads
    without the space before the first word. It reads no file with a byte order mark: it gets a copy without.
    """
    contents = {name: pathlib.Path(folder, name).read_bytes() for name in names if name.endswith(".json")}
    if any(content.startswith(codecs.BOM_UTF8) for content in contents.values()):
        with tempfile.TemporaryDirectory() as copy:
            for name in names:
                content = contents.get(name) or pathlib.Path(folder, name).read_bytes()
                pathlib.Path(copy, name).write_bytes(content.removeprefix(codecs.BOM_UTF8))
            return _auto_tokenizer(copy, names)
    # Seconds of import that only a command that reads a tokenizer should pay for.
    from transformers import AutoConfig, AutoTokenizer

    path = os.path.join(folder, "config.json")
    kind = None
    if os.path.isfile(path):
        given = read_json(path, "a config of Hugging Face: copy it again")
        kind = ORIGINAL_DECODERS.get(given.get("model_type")) if "mm_vision_tower" in given else None
    known = {} if kind is None else {"config": AutoConfig.for_model(kind)}
    # Without the last one transformers asks on a terminal, and runs the folder's code for a `y`.
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **known)


def check_end(tokenizer: TextTokenizer, template: Template) -> None:
    """Raise InputError when answers are to end with the end-of-text token and the tokenizer has none to train."""
    if any(span.special and span.text == END for span in template.end_of_answer) and tokenizer.special_id(END) is None:
        raise InputError(
            "the template ends answers with the end-of-text token and the tokenizer has none; name its eos_token in "
            "tokenizer_config.json, or its eos_token_id in config.json"
        )


def encode(spans: Sequence[Span], tokenizer: TextTokenizer, *, bos: bool = True) -> Encoded:
    """Return ids and targets of a rendered conversation, each image once as IMAGE_MARK; not to be written to.

    `bos`: whether the tokenizer's BOS goes in front, where it adds one.
    """
    (encoded,) = encode_all([spans], tokenizer, bos=bos)
    return encoded


def encode_all(conversations: Sequence[Sequence[Span]], tokenizer: TextTokenizer, *, bos: bool = True) -> list[Encoded]:
    """Encode several conversations as `encode` does, which takes less time than one after another."""
    chunks, counts = [], []
    for spans in conversations:
        chunk, before = [], len(chunks)
        chunks.append(chunk)
        for span in spans:
            if span.special and span.text == IMAGE_PLACEHOLDER:
                chunk = []
                chunks.append(chunk)
            else:
                chunk.append(span)
        counts.append(len(chunks) - before)
    found = iter(tokenizer.encode_chunks(chunks))
    opening = _lone(tokenizer.bos_id) if bos and tokenizer.bos_id is not None else Chunk(b"", b"")
    encoded = []
    for count in counts:
        ids, targets = zip(*itertools.islice(found, count), strict=True)
        tokens = np.frombuffer(opening.ids + IMAGE.ids.join(ids), np.int32)
        encoded.append(Encoded(tokens, np.frombuffer(opening.targets + IMAGE.targets.join(targets), bool)))
    return encoded


def widths(tokens: np.ndarray, patches: int | Sequence[int]) -> np.ndarray:
    """Return int[t], the tokens each id stands for; `patches` for an IMAGE_MARK (one number, or one for each image)."""
    is_image = tokens == IMAGE_MARK
    counts = np.ones(len(tokens), np.int64)
    counts[is_image] = patches
    return counts


def full_length(encoded: Encoded, patches: int | Sequence[int]) -> int:
    """Count the tokens of the row with its images expanded, before max_length cuts it."""
    expanded = encoded.images * patches if isinstance(patches, int) else sum(patches)
    return len(encoded.tokens) - encoded.images + expanded


def cut(encoded: Encoded, patches: int | Sequence[int], max_length: int) -> Encoded:
    """Return the row cut on the right so that it fits `max_length` with every image expanded to `patches` tokens.

    It is never cut through an image. Raises InputError for a row whose last image does not fit, and for one that keeps
    no target.
    """
    if full_length(encoded, patches) <= max_length and encoded.targets.any():
        return encoded
    counts = widths(encoded.tokens, patches)
    ends = np.cumsum(counts)
    length = int(np.sum(ends <= max_length))
    images = np.flatnonzero(encoded.tokens == IMAGE_MARK)
    lost = images[images >= length]
    if lost.size:
        raise InputError(
            f"image {int(np.sum(images < length)) + 1} of {images.size} ends at token {ends[lost[0]]}, "
            f"beyond max_length {max_length}; raise data.max_length or shorten the row"
        )
    if not encoded.targets.any():
        raise InputError("the row has no target; expected an answer to train on")
    if not encoded.targets[:length].any():
        first = ends[np.flatnonzero(encoded.targets)[0]] - 1
        raise InputError(
            f"row longer than max_length keeps no target: {ends[-1]} tokens, the first target is token "
            f"{first}, max_length {max_length}; raise data.max_length or shorten the question"
        )
    return Encoded(encoded.tokens[:length], encoded.targets[:length])


def expand(
    tokens: np.ndarray, targets: np.ndarray, image_token_id: int, patches: int | Sequence[int], max_length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens int32[T], targets bool[T]) in which each IMAGE_MARK has become `patches` times `image_token_id`.

    `max_length` cuts and checks as `cut` does; None (a prompt, which has no targets) does neither. The
    arrays are not to be written to: without an image they are those given.
    """
    if max_length is not None:
        fitting = cut(Encoded(tokens, targets), patches, max_length)
        tokens, targets = fitting.tokens, fitting.targets
    is_image = tokens == IMAGE_MARK
    if not is_image.any():
        return tokens, targets
    counts = widths(tokens, patches)
    tokens = np.where(is_image, image_token_id, tokens).astype(np.int32)
    return np.repeat(tokens, counts), np.repeat(targets, counts)


def _make_splitter(
    codec: tokenizers.Tokenizer, marks: dict[str, str], own: Sequence[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """Return the tokenizer that reads `marks` as tokens: those of tokens in `own` as it would read these."""
    splitter = _whole_text(tokenizers.Tokenizer.from_str(codec.to_str()))
    # Post-processors add BOS, which is ours to place, and byte-level ones trim spaces off the offsets.
    splitter.post_processor = None
    # Special tokens in the text stay text.
    splitter.encode_special_tokens = True
    plain = tokenizers.AddedToken("", normalized=False)
    how = dict.fromkeys(marks, plain) | {token.content: token for token in own}
    flags = ("normalized", "lstrip", "rstrip", "single_word")
    splitter.add_tokens(
        [tokenizers.AddedToken(m, **{flag: getattr(how[t], flag) for flag in flags}) for t, m in marks.items()]
    )
    return splitter


def _whole_text(codec: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return the tokenizer without the cutting and filling a tokenizer.json may ask for: lengths are ours to decide."""
    codec.no_truncation()
    codec.no_padding()
    return codec


def _ends_of_model(folder: str, vocabulary: dict[str, int]) -> list[int]:
    """Return eos_token_id, one or several, of generation_config.json next to the tokenizer, else of config.json.

    That order is transformers': Llama 3 Instruct and Qwen2.5 Instruct end their turns with a token of their own.
    """
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        given = read_json(path, "a config of Hugging Face: copy it again")
        given = given if isinstance(given, dict) else {}
        named = given.get("eos_token_id")
        named = (given.get("text_config") or {}).get("eos_token_id") if named is None else named
        known = set(vocabulary.values())
        ends = [end for end in (named if isinstance(named, list) else [named]) if isinstance(end, int) and end in known]
        if ends:
            return ends
    return []


# ---- rows to tokens ----


def encode_turns(record: Record, settings: DataSettings, tokenizer: TextTokenizer) -> Encoded:
    """Return the record's ids and targets at full length, each image once as IMAGE_MARK.

    Raises InputError when the template cannot hold the turns, or when marks and images differ in number (one mark more
    or less would show an image to the wrong words).
    """
    (encoded,) = encode_turns_together([record], settings, tokenizer)
    return encoded


def encode_turns_together(records: Sequence[Record], settings: DataSettings, tokenizer: TextTokenizer) -> list[Encoded]:
    """Encode several records as `encode_turns` does, in less time. Raises InputError when that does for any of them."""
    template = tokenizer.template(settings.template)
    rendered = [render(record.turns, template, image_position=settings.image_position) for record in records]
    encoded = encode_all(rendered, tokenizer, bos=template.bos)
    for record, found in zip(records, encoded, strict=True):
        if found.images != len(record.images):
            raise InputError(
                f"{found.images} <image> placeholders for {len(record.images)} images; make them the same number"
            )
    return encoded


def encode_record(
    record: Record, settings: DataSettings, tokenizer: TextTokenizer, image_token_id: int, patches: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens int32[t] and targets bool[t] of one training row, t <= settings.max_length, without padding.

    Raises InputError as `encode_turns` does, and when max_length leaves no target or cuts into an image.
    """
    encoded = encode_turns(record, settings, tokenizer)
    return expand(encoded.tokens, encoded.targets, image_token_id, patches, settings.max_length)


def image_sizes(record: Record, settings: DataSettings) -> list[tuple[int, int]]:
    """Return the (width, height) of the record's images, from their headers."""
    return [image_size(path, settings.exif) for path in image_paths(record, settings)]


def image_paths(record: Record, settings: DataSettings) -> list[str | bytes]:
    """Return where the record's images lie, in placeholder order; an image that came with its row is given itself."""
    return [image if isinstance(image, bytes) else os.path.join(settings.images, image) for image in record.images]


def require_file(image: str | bytes) -> None:
    """Raise InputError where an image file does not exist (nothing is decoded)."""
    if isinstance(image, str) and not os.path.isfile(image):
        raise InputError(f"image {image}: no such file; check the path, or data.images")


def check_vocabulary(tokenizer: TextTokenizer, config: ModelConfig, folder: str) -> None:
    """Raise InputError when the tokenizer in `folder` is that of another model.

    The embedding may have more rows than the tokenizer has ids; `<image>` and the pad token may lie outside, as their
    rows are never looked up.
    """
    rows, image = config.llm.vocab_size, tokenizer.image_token_id(0)
    outside = {i for i in (config.image_token_id, tokenizer.pad_id) if rows <= i < tokenizer.size}
    fix = "copy the tokenizer's files from where the model came from"
    if tokenizer.size - len(outside) > rows:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {tokenizer.size - 1} and the decoder's embedding {rows} rows: "
            f"expected the tokenizer that belongs to the decoder; {fix}"
        )
    if image < tokenizer.size and image != config.image_token_id:
        raise InputError(
            f"{folder}: <image> is {image} in the tokenizer and {config.image_token_id} in the model "
            f"(image_token_id or image_token_index of config.json): expected one id; {fix}"
        )
    word = tokenizer.decode([config.image_token_id]) if config.image_token_id < image == tokenizer.size else ""
    if word:
        raise InputError(
            f"{folder}: the model's image token {config.image_token_id} (image_token_id or image_token_index of "
            f"config.json) is the text {word!r} in the tokenizer: expected one with <image>; {fix}"
        )
