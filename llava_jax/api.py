"""A model in a user's hands: load it from where it lies, ask it, read its logits."""

import dataclasses
import functools
import os
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from llava_jax.data.images import image_size, load_tiles, normalised
from llava_jax.data.templates import Template, check_template, render
from llava_jax.data.tiles import Tiling, rows_of_tiles, spread, tiling
from llava_jax.data.tokenize import TextTokenizer, check_vocabulary, encode, expand, load_tokenizer
from llava_jax.infer import passes
from llava_jax.infer.conversation import Conversation
from llava_jax.infer.engine import Engine
from llava_jax.infer.generate import Prompt, bucket, question_message, row_bucket
from llava_jax.infer.placed_model import PlacedModel, mesh_for_answers, place_model
from llava_jax.infer.sample import AnswerDecoder, check_sampling, stop_table
from llava_jax.io import check_text, check_unicode, unread_keys
from llava_jax.models.llava import unstacked_model
from llava_jax.settings import DTYPES
from llava_jax.types import (
    IMAGE_PLACEHOLDER,
    InputError,
    ModelConfig,
    Sampling,
    Turn,
)
from llava_jax.weights.load import read_model
from llava_jax.weights.source import is_name, repository, split

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
MESSAGE_KEYS = ("role", "content")

Message = Mapping[str, Any]
# A path, the content of a file, or an image in memory.
ImageLike = str | os.PathLike[str] | bytes | Image.Image
IMAGE_TYPES = (str, os.PathLike, bytes, Image.Image)


# ---- text and images to what the model takes, and back ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Processor:
    """Everything between messages and tokens: tokenizer, template and image settings, as in training."""

    tokenizer: TextTokenizer
    config: ModelConfig
    template: str
    aspect: str
    image_position: str
    exif: str = "apply"

    @property
    def rules(self) -> Template:
        return self.tokenizer.template(self.template)

    @property
    def tiling(self) -> Tiling | None:
        return tiling(self.config) if self.config.pinpoints else None

    def tokens(self, messages: Sequence[Message]) -> np.ndarray:
        """Return int32[t] of a conversation that the assistant is to continue, each image as its image tokens."""
        turns, images = read_messages(messages)
        return self._tokens(turns, self._sizes(images))[0]

    def prompt(self, messages: Sequence[Message], pixels: np.ndarray | None = None) -> Prompt:
        """Return these tokens and the pixels of the images (a LLaVA-NeXT's: of their tiles), in order.

        `pixels` are those of a prompt with the same images, which are then not read.
        """
        turns, images = read_messages(messages)
        tokens, _ = self._tokens(turns, self._sizes(images))
        return self._with_pixels(tokens, images, pixels)

    def answered(self, messages: Sequence[Message], answer: str) -> tuple[Prompt, np.ndarray]:
        """Return the same with an answer, and bool[t]: which tokens are the answer and what ends it, as in training."""
        check_text(answer, "the answer")
        turns, images = read_messages(messages)
        before = [turn._replace(target=False) for turn in turns]
        tokens, targets = self._tokens((*before, Turn("gpt", answer)), self._sizes(images), open_turn=False)
        return self._with_pixels(tokens, images), targets

    def _with_pixels(self, tokens: np.ndarray, images: Sequence[ImageLike], pixels: np.ndarray | None = None) -> Prompt:
        pixels = self._pixels(images) if pixels is None else pixels
        if self.tiling is None:
            return Prompt(tokens, pixels)
        feature_index = self.tiling.feature_index(self._sizes(images))
        return Prompt(tokens, pixels, spread(tokens, self.config.image_token_id, feature_index))

    def _pixels(self, images: Sequence[ImageLike]) -> np.ndarray:
        tiles, how, size = self.tiling, self.config.vision.pixels, self.config.vision.image_size
        arrays = [np.zeros((0, size, size, 3), np.float32)]
        for image in images:
            image = image if isinstance(image, Image.Image) else os.fspath(image)
            arrays.append(normalised(load_tiles(image, size, self.aspect, tiles, how, self.exif), how))
        return np.concatenate(arrays)

    def _tokens(
        self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]], open_turn: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        rules = self.rules
        spans = render(turns, rules, image_position=self.image_position, open_turn=open_turn)
        encoded = encode(spans, self.tokenizer, bos=rules.bos)
        tiles = self.tiling
        counts = self.config.vision.patches if tiles is None else tiles.tokens(sizes)
        tokens, targets = expand(encoded.tokens, encoded.targets, self.config.image_token_id, counts, max_length=None)
        positions = self.config.llm.max_positions
        if tokens.size >= positions:
            raise InputError(
                f"prompt of {tokens.size} tokens (image tokens included), but the model holds {positions} with its "
                "answer: shorten the text or give fewer images"
            )
        return tokens.astype(np.int32), targets

    def _sizes(self, images: Sequence[ImageLike]) -> list[tuple[int, int]]:
        """Return the (width, height) of each image, from a file's header; none where images are not tiled."""
        if not self.config.pinpoints:
            return []
        return [image_size(p if isinstance(p, Image.Image) else os.fspath(p), self.exif) for p in images]

    def text(self, ids: Iterable[int]) -> str:
        """Return the answer that ids spell: up to the template's first stop, without white space at its ends."""
        decoder = self.decoder()
        return "".join(decoder.push(token) for token in ids) + decoder.finish()

    def decoder(self, stop: Sequence[str] = ()) -> AnswerDecoder:
        """Return what makes this text of ids as they come; it ends at the strings `stop`, too."""
        return AnswerDecoder(self.tokenizer, (*self.rules.stop, *stop))

    def stop_table(self) -> np.ndarray:
        """Return `sample.stop_table` of the template: ids where a stop is a token, automaton where it is plain text."""
        ids = self.tokenizer.stop_ids(self.rules)
        spelled = [stop for stop in self.rules.stop if self.tokenizer.special_id(stop) is None]
        size = self.config.llm.vocab_size
        return stop_table(spelled, ids, token_texts(self.tokenizer, range(size)) if spelled else [""] * size)


def token_texts(tokenizer: TextTokenizer, ids: Iterable[int]) -> list[str]:
    """Return what each of these ids adds to a text (a leading space counts, so it is read after another token)."""
    before = tokenizer.encode_text("a")[-1]
    start = len(tokenizer.decode([before]))
    return [tokenizer.decode([before, token])[start:] for token in ids]


def read_messages(messages: Sequence[Message]) -> tuple[tuple[Turn, ...], list[ImageLike]]:
    """Return turns with one placeholder an image, and the images in order.

    A message is {"role": "user" | "assistant", "content": text, or a list of parts {"type": "text", "text": …} and
    {"type": "image", "image": path, bytes or PIL image}}; the first one may be the system's. Images of a message whose
    text has no placeholder stand before it. Raises InputError for a message of another shape, a count that does not
    match, or turns that do not alternate.
    """
    turns, images = [], []
    first = 1 if messages and messages[0].get("role") == "system" else 0
    for index, message in enumerate(messages):
        try:
            turn, shown = _read_message(
                message, "system" if index < first else ("user", "assistant")[(index - first) % 2]
            )
        except InputError as error:
            raise InputError(f"message {index + 1}: {error}") from None
        turns.append(turn)
        images += shown
    if (len(turns) - first) % 2 == 0:
        raise InputError(f"{len(turns)} messages: expected the last one to be the user's")
    return tuple(turns), images


def _read_message(message: Message, expected: str) -> tuple[Turn, list[ImageLike]]:
    role = message.get("role")
    if role != expected:
        raise InputError(f"role is {role!r}, expected {expected!r} (user and assistant take turns)")
    if message.get("image") is not None or message.get("images") is not None:
        raise InputError('image and images of a message are not read; give a part {"type": "image", "image": …}')
    unread_keys(message, MESSAGE_KEYS)
    text, shown = _read_content(message.get("content"))
    if role == "user":
        check_text(text, "content")
    else:
        check_unicode(text, "content")
    found = text.count(IMAGE_PLACEHOLDER)
    if role != "user" and (found or shown):
        raise InputError("an image in an answer or a system text; only the user's messages may have one")
    if found != len(shown):
        raise InputError(f"{found} {IMAGE_PLACEHOLDER} in the text for {len(shown)} images; expected as many")
    if not text.strip():
        raise InputError("is empty; expected text")
    return Turn(SPEAKERS[role], text), shown


def _read_content(content: Any) -> tuple[str, list[ImageLike]]:
    """Return the text, with placeholders where parts are images unless the texts have some, and the images."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence):
        raise InputError(f"content is {type(content).__name__}, expected text or a list of parts")
    lines, texts, images = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            lines.append(part["text"])
        elif kind == "image" and isinstance(part.get("image"), IMAGE_TYPES):
            images.append(part["image"])
            lines.append(IMAGE_PLACEHOLDER)
        else:
            raise InputError(
                f'a part is {str(part)[:80]}; expected {{"type": "text", "text": …}} or '
                '{"type": "image", "image": path, bytes or PIL image}'
            )
    placed = any(IMAGE_PLACEHOLDER in text for text in texts)
    return "\n".join(texts if placed else lines), images


def question(text: str, images: ImageLike | Sequence[ImageLike] | None) -> list[Message]:
    """Return the messages of one question about no image, one, or several."""
    shown = [] if images is None else [images] if isinstance(images, IMAGE_TYPES) else images
    return [question_message(text, shown)]


# ---- the model ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Llava:
    """A model that answers; made by `load`. `params` is the plain nested dict {vision, projector, llm}, in which
    llm/layers has the decoder's blocks by their number.

    `weights` is a checksum of the projector, which every stage of training changes. `template_assumed`: neither the
    source nor its user named the template.
    """

    name: str
    placed: PlacedModel
    processor: Processor
    weights: str
    template_assumed: bool = False
    _engines: list[Engine] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def params(self) -> dict[str, Any]:
        return self.placed.params

    @property
    def config(self) -> ModelConfig:
        return self.placed.config

    @property
    def about(self) -> dict[str, Any]:
        """Return what an answer depends on next to the weights and the sampling."""
        rules = {key: getattr(self.processor, key) for key in ("template", "aspect", "image_position", "exif")}
        dtype = f"{self.config.dtype}, int8 weights" if self.config.int8 else self.config.dtype
        return rules | {"dtype": dtype, "weights": self.weights}

    def generate(
        self,
        prompts: str | Sequence[str],
        images: ImageLike | Sequence[ImageLike | Sequence[ImageLike] | None] | None = None,
        *,
        max_new_tokens: int = Sampling.max_new_tokens,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        beams: int = Sampling.beams,
        seed: int = Sampling.seed,
        batch_size: int = 8,
    ) -> list[str]:
        """Return the answer to each prompt, which depends on its own prompt and the sampling only.

        Args:
            prompts: the questions; without a `<image>` in a question its images stand before it.
            images: for each prompt None, an image (path, bytes of a file, or PIL image) or several; for one prompt that
                is a string, an image or several.
            max_new_tokens, temperature, top_p, top_k, beams, seed: as in `llava_jax.Sampling`; greedy by default.
            batch_size: how many prompts are answered at once.

        Raises InputError for what cannot be asked.
        """
        if isinstance(prompts, str):
            asked, shown = [prompts], [images]
        elif isinstance(images, IMAGE_TYPES):
            raise InputError(
                f"images is one image for a list of {len(prompts)} prompts; give a list with an entry (an image, a "
                "list of images or None) for each"
            )
        else:
            asked, shown = prompts, [None] * len(prompts) if images is None else images
        if len(shown) != len(asked):
            raise InputError(f"{len(shown)} images for {len(asked)} prompts: expected one entry (or None) a prompt")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more")
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, beams, seed)
        check_sampling(sampling)
        # A list of lists for one prompt is refused where its entries are opened.
        ready = (self.prompt(question(text, given)) for text, given in zip(asked, shown, strict=True))  # ty: ignore
        answers = sorted(self.engine(row_bucket(min(batch_size, len(asked)))).answers(ready, sampling))
        return [answer.text for answer in answers]

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = Sampling.max_new_tokens,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        beams: int = Sampling.beams,
        seed: int = Sampling.seed,
    ) -> Iterator[str]:
        """Yield the answer to a conversation (see `read_messages`) as it comes; joined it is the whole text."""
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, beams, seed)
        return self.engine(1).stream(self.prompt(messages), sampling)

    def chat(
        self,
        system: str = "",
        *,
        max_new_tokens: int = 512,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        seed: int = Sampling.seed,
    ) -> Conversation:
        """Return a new conversation: `.ask(text, *images)` answers and remembers; a notebook shows it."""
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed=seed)
        check_sampling(sampling)
        return Conversation(self, system, sampling)

    def engine(self, slots: int) -> Engine:
        """Return the engine that answers for this process, with at least as many slots."""
        with self._lock:
            if not self._engines or self._engines[-1].slots < slots:
                self._engines[:] = [Engine(self, slots=slots, waiting=sys.maxsize)]
            return self._engines[-1]

    def logits(
        self, tokens_BT: Any, pixels_BCHW: Any = None, mask_BT: Any = None, image_sizes: Any = None
    ) -> np.ndarray:
        """Return float32[B, T, V] for tokens as transformers' processor gives them: P image tokens for each image.

        `pixels_BCHW` float[n, C, H, W] holds the batch's images in the order of their tokens (any number a row);
        `mask_BT` is 1 at tokens and 0 at padding, on either side. Logits at padding mean nothing. A LLaVA-NeXT takes
        float[n, tiles, C, H, W], filled up with zeros, and `image_sizes` int[n, 2], height and width of each image.
        """
        tokens_BT = np.asarray(tokens_BT, np.int32)
        mask_BT = np.ones_like(tokens_BT) if mask_BT is None else np.asarray(mask_BT, np.int32)
        if self.config.pinpoints:
            pixels_BNXYC, feature_index_BT = rows_of_tiles(tokens_BT, pixels_BCHW, image_sizes, self.config)
        else:
            pixels_BNXYC, feature_index_BT = _rows_of_images(tokens_BT, pixels_BCHW, self.config), None
        return np.asarray(_logits(self.config, self.params, tokens_BT, pixels_BNXYC, mask_BT, feature_index_BT))

    def score(self, messages: Sequence[Message], answer: str) -> tuple[float, bool]:
        """Return the log-probability of an answer to a conversation, and whether greedy decoding would give it.

        The token that ends an answer counts as part of it, as it is trained.
        """
        prompt, targets = self.processor.answered(messages, answer)
        padding = bucket(len(prompt.tokens)) - len(prompt.tokens)
        images = len(prompt.pixels)
        pixels = np.pad(prompt.pixels, [(0, row_bucket(images) - images), (0, 0), (0, 0), (0, 0)]) if images else None
        index_BT = None if prompt.feature_index is None else np.pad(prompt.feature_index, (0, padding))[None]
        tokens_BT = np.pad(prompt.tokens, (0, padding))[None]
        mask_BT = np.pad(np.ones_like(prompt.tokens), (0, padding))[None]
        shown = None if pixels is None else pixels[None]
        logits_BTV = _logits(self.config, self.params, tokens_BT, shown, mask_BT, index_BT)
        places = np.flatnonzero(targets)
        logprobs_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0, places - 1]))
        wanted = prompt.tokens[places]
        given = logprobs_TV[np.arange(len(wanted)), wanted]
        return float(given.sum()), bool((logprobs_TV.argmax(-1) == wanted).all())

    # What infer/ asks for.

    def prompt(self, messages: Sequence[Message], pixels: np.ndarray | None = None) -> Prompt:
        return self.processor.prompt(messages, pixels)

    def length(self, messages: Sequence[Message]) -> int:
        """Count the tokens of a prompt, its images without reading them."""
        return int(self.processor.tokens(messages).size)

    def decoder(self, stop: Sequence[str] = ()) -> AnswerDecoder:
        return self.processor.decoder(stop)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: ModelConfig, params: Any, tokens_BT: Any, pixels_BNXYC: Any, mask_BT: Any, feature_index_BT: Any
) -> jax.Array:
    positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
    model = unstacked_model(config, params)
    features_BPD = None if pixels_BNXYC is None else model.image_features(pixels_BNXYC)
    x_BTD = model.embed_and_merge(tokens_BT, features_BPD, feature_index_BT)
    return passes.logits(model.llm, passes.prefill(model.llm, x_BTD, positions_BT, mask_BT)[0])


def _rows_of_images(tokens_BT: np.ndarray, pixels_BCHW: Any, config: ModelConfig) -> np.ndarray | None:
    """Return a batch's images sorted to their rows, float32[B, N, X, Y, C] (zeros where a row has fewer), or None."""
    patches, size = config.vision.patches, config.vision.image_size
    slots_B = (tokens_BT == config.image_token_id).sum(axis=1)
    given = 0 if pixels_BCHW is None else len(pixels_BCHW)
    if np.any(slots_B % patches) or slots_B.sum() != given * patches:
        raise InputError(
            f"image tokens (id {config.image_token_id}) a row are {slots_B.tolist()} for {given} images; "
            f"expected {patches} for each image"
        )
    if given == 0:
        return None
    pixels = np.asarray(pixels_BCHW, np.float32)
    if pixels.shape[1:] != (3, size, size):
        raise InputError(f"pixels are {list(pixels.shape)}; expected [images, 3, {size}, {size}]")
    images_B = slots_B // patches
    pixels_BNXYC = np.zeros((len(tokens_BT), images_B.max(), size, size, 3), np.float32)
    first = 0
    for row, count in enumerate(images_B):
        pixels_BNXYC[row, :count] = pixels[first : first + count].transpose(0, 2, 3, 1)
        first += count
    return pixels_BNXYC


# ---- loading --------------------------------------------------------------------------------------------------------


def load(
    source: str,
    template: str | None = None,
    dtype: str | None = None,
    *,
    vision: str = "",
    base: str = "",
    step: int | None = None,
    tensor: int = 0,
    weights: str = "",
) -> Llava:
    """Load the model at `source`: hf:DIR, llava:DIR, orbax:DIR, or a DIR that is recognised by the files in it.

    For DIR also a name on the Hugging Face Hub, owner/name or owner/name@REVISION, where no folder has that name.

    `template` replaces the conversation template the source names; `dtype` (float32, bfloat16) is the dtype of the
    weights and the computation, by default the one the source was trained or stored in (float16 becomes bfloat16).
    `vision` and `base` are the folders of the tower and of an adapter's base where an original LLaVA folder names ones
    that are not here; `step` is the checkpoint of a workdir of train, by default the newest. Over several devices
    batches are split, and the weights over `tensor` of them (0: as few as can hold them). `weights` int8
    keeps the kernels of the decoder's blocks in eight bits. Raises InputError for anything else.
    """
    source = os.fspath(source)
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype {dtype!r} is not known; expected {' or '.join(DTYPES)}")
    if weights not in ("", "int8"):
        raise InputError(f"weights {weights!r} is not known; expected int8, or none for those of the dtype")
    if template is not None:
        check_template(template)
    config, params, extras = read_model(source, "model", dtype=dtype or "", vision=vision, base=base, step=step)
    config, tokenizer = (
        dataclasses.replace(config, remat="none", int8=weights == "int8"),
        load_tokenizer(extras.tokenizer),
    )
    check_vocabulary(tokenizer, config, extras.tokenizer)
    processor = Processor(
        tokenizer, config, template or extras.template, extras.aspect, extras.image_position, extras.exif
    )
    folder = split(source)[1]
    name = repository(folder)[0] if is_name(folder) else os.path.abspath(folder)
    model = assemble(os.path.basename(name), params, processor, tensor)
    return dataclasses.replace(model, template_assumed=template is None and extras.template_assumed)


def assemble(name: str, params: dict[str, Any], processor: Processor, tensor: int = 0) -> Llava:
    """Return the model of parameters (numpy or `LazyTensor`), placed on the devices; `tensor` is as in `load`."""
    config = processor.config
    placed = place_model(params, config, processor.stop_table(), mesh_for_answers(config, tensor))
    checksum = 0
    for leaf in jax.tree.leaves(params["projector"]):
        checksum = zlib.crc32(np.ascontiguousarray(leaf, np.float32).data, checksum)
    return Llava(name, placed, processor, f"{checksum:08x}")
