"""Small tokenizers of the families whose chat templates `data.template=tokenizer` is tested with.

Each has its family's special tokens and rules, a vocabulary trained on a few lines, and the published chat template.
"""

import dataclasses
import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.make_tokenizers import CORPUS

TEMPLATES = pathlib.Path(__file__).parent / "data" / "chat_templates"
# Without words that hold a special token: no merges make one.
WORDS = [text for text in CORPUS if "INST" not in text and "<|" not in text]
WORDS += ["user assistant system model tool\n\nYou are Qwen, created by Alibaba Cloud. Today Date: 26 Jul 2024"]
# How Llama 3 and Qwen cut a text into words.
CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")


@dataclasses.dataclass(frozen=True)
class Family:
    """`answer` finds, in a rendered conversation, an answer and the token that ends its turn (group 1)."""

    answer: str
    eos: str
    special: tuple[str, ...]
    bos: str | None = None
    adds_bos: bool = False
    plain: tuple[str, ...] = ()
    bytes: bool = True
    prefix: str = ""
    rstrip: bool = False
    system: bool = True


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama_3_1": Family(
        answer=r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        special=("<|begin_of_text|>", "<|end_of_text|>", *HEADERS, "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        adds_bos=True,
    ),
    "qwen_2_5": Family(answer=r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", eos="<|im_end|>", special=CHATML),
    "qwen_3": Family(
        answer=r"<\|im_start\|>assistant\n(?:<think>\n\n</think>\n\n)?(.*?<\|im_end\|>)",
        eos="<|im_end|>",
        special=CHATML,
        plain=("<think>", "</think>", "<tool_response>", "</tool_response>"),
    ),
    "smollm2": Family(
        answer=r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", bos="<|im_start|>", eos="<|im_end|>", special=CHATML
    ),
    "mistral_v0_3": Family(
        answer=r"\[/INST\](.*?</s>)",
        bos="<s>",
        eos="</s>",
        special=("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        adds_bos=True,
        bytes=False,
        prefix="metaspace",
        system=False,
    ),
    "phi_3_5": Family(
        answer=r"<\|assistant\|>\n(.*?<\|end\|>\n?)",
        bos="<s>",
        eos="<|endoftext|>",
        special=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bytes=False,
        prefix="normalizer",
        rstrip=True,
    ),
    "gemma": Family(
        answer=r"<start_of_turn>model\n(.*?<end_of_turn>)",
        bos="<bos>",
        eos="<eos>",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        adds_bos=True,
        bytes=False,
        system=False,
    ),
}


def template_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def write_family(folder: pathlib.Path, name: str, chat_template: str | None = None) -> str:
    """Write the family's tokenizer, with its own chat template or another one, and return its folder."""
    family = FAMILIES[name]
    codec = byte_level() if family.bytes else sentence_piece(family)
    added = [AddedToken(t, special=True, normalized=False, rstrip=family.rstrip) for t in family.special]
    codec.add_special_tokens(added)
    codec.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    if family.adds_bos:
        bos = (family.bos, codec.token_to_id(family.bos))
        codec.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=codec, eos_token=family.eos, bos_token=family.bos)
    tokenizer.chat_template = chat_template or template_of(name)
    tokenizer.save_pretrained(folder)
    return str(folder)


def byte_level() -> Tokenizer:
    codec = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    codec.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CUT), "isolated"), as_bytes])
    codec.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    codec.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return codec


def sentence_piece(family: Family) -> Tokenizer:
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pieces = ["<unk>", *(f"<0x{value:02X}>" for value in range(256))]
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=pieces, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator((line for text in WORDS for line in text.split("\n")), trainer)
    # Without the added tokens that training makes of bytes: they are pieces.
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    codec = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    if family.prefix == "metaspace":
        codec.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        codec.pre_tokenizer = None
        codec.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if family.prefix == "normalizer" else spaces
        )
    ends = [decoders.Strip(" ", 1, 0)] if family.prefix else []
    codec.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return codec
