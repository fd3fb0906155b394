"""Small tokenizers for the tests, made in a folder at test time by the rules of the families they stand for.

`golden_llama` holds LLaMA's own ids for the pieces of the golden samples (32,000 rows, the rest are fillers);
`trained_llama` and `byte_bpe` are trained on `CORPUS`.
"""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llava_jax.data.templates import TEMPLATES

CORPUS = [
    "A red square stands left of a blue circle. What is the position of the skateboard in the image?",
    "The skateboard in the image is in an upside-down position, with its wheels pointing up.",
    "Can you elaborate on the elements of the image provided?\nDescribe the image concisely.",
    "The main focus of the image is a car parked on the side of the road, next to a parking meter.",
    "How many people are visible in the image? There are 3 people: two women and one man.",
    "USER: Is there a dog? ASSISTANT: Yes, there is. </s> ### Human: ### Assistant: [INST] <<SYS>> [/INST]",
    "naïve façade, 中文, 日本語, emoji 😀, tabs\tand  two  spaces \n\nline two.  trailing ",
]
# Numbers in tests are of the words of these.
SAID = [template for name, template in TEMPLATES.items() if name not in ("llama_3", "qwen")]
CORPUS += [span.text for template in SAID for span in (*template.opening, *template.question, *template.cue)]

_BYTES = [f"<0x{value:02X}>" for value in range(256)]
# Pieces that open a word merge before those inside one; within each list an earlier piece wins.
_WORD_PIECES = {
    "▁a": 263,
    "▁b": 289,
    "▁A": 319,
    "▁cat": 6635,
    "▁Human": 12968,
    "▁is": 338,
    "▁this": 445,
    "▁Ass": 4007,
    "▁Color": 9159,
    "▁Black": 6054,
    "▁US": 3148,
    "▁###": 835,
    "▁[": 518,
    "▁<<": 3532,
    "▁pol": 1248,
    "▁chat": 13563,
    "▁between": 1546,
    "▁curious": 12758,
    "▁user": 1404,
    "▁human": 5199,
    "▁and": 322,
    "▁an": 385,
    "▁artificial": 23116,
    "▁intelligence": 21082,
    "▁assistant": 20255,
    "▁The": 450,
    "▁gives": 4076,
    "▁helpful": 8444,
    "▁detailed": 13173,
    "▁answers": 6089,
    "▁to": 304,
    "▁the": 278,
    "▁questions": 5155,
    "▁You": 887,
    "▁are": 526,
    "▁language": 4086,
    "▁vision": 18551,
    "▁able": 2221,
    "▁understand": 2274,
    "▁visual": 7604,
    "▁content": 2793,
    "▁that": 393,
    "▁provides": 8128,
    "▁assist": 6985,
    "▁with": 411,
    "▁variety": 12875,
    "▁of": 310,
    "▁tasks": 9595,
    "▁using": 773,
    "▁natural": 5613,
}
_INNER_PIECES = {
    "What": 5618,
    "You": 3492,
    "istant": 22137,
    "ite": 568,
    "USER": 11889,
    "INST": 25580,
    "IST": 9047,
    "ANT": 13566,
    "ER": 1001,
    "SS": 1799,
    "SY": 14816,
    "##": 2277,
    "</": 829,
    ">>": 6778,
}
_CHARACTERS = {
    "▁": 29871,
    "b": 29890,
    ".": 29889,
    "#": 29937,
    ":": 29901,
    "?": 29973,
    "]": 29962,
    "/": 29914,
    "S": 29903,
    "<": 29966,
    ",": 29892,
    "'": 29915,
    "s": 29879,
}
_SIZE = 32000


def golden_llama(folder: pathlib.Path, legacy: bool) -> str:
    """A LLaMA tokenizer folder with the ids of the published one for everything the golden samples contain."""
    pieces = {**_WORD_PIECES, **_INNER_PIECES}
    merges = [pair for piece in pieces for pair in _chain(piece)]
    merges = list(dict.fromkeys(merges))
    taken = {"<unk>": 0, "<s>": 1, "</s>": 2, **{byte: 3 + i for i, byte in enumerate(_BYTES)}, **pieces, **_CHARACTERS}
    parts = {part for left, right in merges for part in (left, right, left + right)} - set(taken)
    used = set(taken.values())
    free = (index for index in range(30100, _SIZE) if index not in used)
    vocabulary = taken | {part: next(free) for part in sorted(parts)}
    used = set(vocabulary.values())
    vocabulary |= {f"<filler_{index}>": index for index in range(_SIZE) if index not in used}
    return _save_llama(folder, vocabulary, merges, legacy)


def trained_llama(folder: pathlib.Path, legacy: bool, size: int = 700) -> str:
    """A LLaMA tokenizer trained small: byte fallback, BOS, the whole text prefixed with ▁."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *_BYTES], limit_alphabet=70, show_progress=False
    )
    # LLaMA's only piece with a newline is the byte.
    trained.train_from_iterator((line for text in CORPUS for line in text.split("\n")), trainer)
    model = json.loads(trained.to_str())["model"]
    return _save_llama(folder, model["vocab"], [tuple(pair) for pair in model["merges"]], legacy)


def prepending_llama(folder: pathlib.Path) -> str:
    """The trained tokenizer as LLaMA's first tokenizer.json wrote it: a normaliser that always prepends ▁."""
    trained_llama(folder, legacy=True)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = None
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    path.write_text(json.dumps(content))
    _change_config(folder, tokenizer_class="PreTrainedTokenizerFast")
    return str(folder)


# Name -> what makes a LLaMA tokenizer in a folder and returns its path.
LLAMAS = {
    "golden_legacy": lambda folder: golden_llama(folder, legacy=True),
    "golden": lambda folder: golden_llama(folder, legacy=False),
    "llama_legacy": lambda folder: trained_llama(folder, legacy=True),
    "llama": lambda folder: trained_llama(folder, legacy=False),
    "llama_prepend": prepending_llama,
}


def byte_bpe(folder: pathlib.Path, size: int = 500) -> str:
    """A byte-level BPE without BOS, with ChatML's tokens (and post-processing that trims offsets, as GPT-2's does)."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.post_processor = processors.ByteLevel(trim_offsets=True)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|endoftext|>", additional_special_tokens=specials[1:]
    ).save_pretrained(folder)
    return str(folder)


def _save_llama(folder: pathlib.Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], legacy: bool) -> str:
    LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True).save_pretrained(folder)
    # save_pretrained forgets the flag; published folders carry it.
    _change_config(folder, legacy=legacy, add_bos_token=True)
    return str(folder)


def _change_config(folder: pathlib.Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _chain(piece: str) -> list[tuple[str, str]]:
    """Merges that build a piece from the left, a character at a time."""
    return [(piece[:end], piece[end]) for end in range(1, len(piece))]
