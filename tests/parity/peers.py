"""Tiny random transformers models, and the bridge between their tensors and ours."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from llava_jax.weights import name_table

torch.set_num_threads(1)

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
)
TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
IMAGE_ID = 127


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with weights large enough that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim < 2:
                is_scale = "norm" in name and name.endswith("weight")
                value.copy_((1.0 if is_scale else 0.0) + 0.1 * noise)
            else:
                value.copy_(noise / value[0].numel() ** 0.5)
    return model.eval()


def clip(folder: str, *, whole: bool, **overrides) -> torch.nn.Module:
    """A CLIPModel (`whole`) or CLIPVisionModel saved in `folder`; returns the vision model."""
    vision = CLIPVisionConfig(**VISION | overrides)
    if not whole:
        model = randomised(CLIPVisionModel(vision))
        model.save_pretrained(folder)
        return model
    text = dict(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=8)))
    model.save_pretrained(folder)
    return model.vision_model


def llama(folder: str, **overrides) -> LlamaForCausalLM:
    model = randomised(LlamaForCausalLM(LlamaConfig(**TEXT | overrides)))
    model.save_pretrained(folder)
    return model


def llava(folder: str, *, text: dict | None = None, vision: dict | None = None) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION | (vision or {})),
        text_config=LlamaConfig(**TEXT | (text or {})),
        image_token_index=IMAGE_ID,
        image_seq_length=16,
    )
    model = randomised(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def load_strict(folder: str) -> LlavaForConditionalGeneration:
    """The folder as transformers reads it, float32; fails on any missing, unexpected or mismatched tensor."""
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def batch(seed: int = 0, rows: int = 2, length: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens_BT with one image of 16 patches a row at different places, targets_BT, pixels_B1XYC."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, IMAGE_ID, (rows, length)).astype(np.int32)
    for row in range(rows):
        start = 1 + 5 * row
        tokens[row, start : start + 16] = IMAGE_ID
    targets = (rng.random((rows, length)) < 0.5) & (tokens != IMAGE_ID)
    targets[:, 0] = False
    return tokens, targets, rng.normal(size=(rows, 1, 16, 16, 3)).astype(np.float32)


def torch_inputs(tokens: np.ndarray, targets: np.ndarray, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    return dict(
        input_ids=torch.from_numpy(tokens).long(),
        attention_mask=torch.ones(tokens.shape, dtype=torch.long),
        pixel_values=torch.from_numpy(pixels[:, 0].transpose(0, 3, 1, 2).copy()),
        labels=torch.from_numpy(np.where(targets, tokens, -100)).long(),
    )


def in_our_layout(tensors: dict[str, torch.Tensor | None], abstract: dict) -> dict[str, np.ndarray]:
    """{our path: array} of named torch tensors (weights or gradients); paths whose tensors are None are left out."""
    named = {name_table.canonical(name, "llava"): value for name, value in tensors.items()}
    flat = {}
    for path, leaf in name_table.flatten(abstract).items():
        row = name_table.ROWS[path]
        layers = range(leaf.shape[0]) if row.stacked else (0,)
        shape = leaf.shape[1:] if row.stacked else leaf.shape
        found = [named[row.hf.format(layer)] for layer in layers]
        if all(value is not None for value in found):
            arrays = [name_table.to_ours(row, value.detach().numpy(), shape) for value in found]
            flat[path] = np.stack(arrays) if row.stacked else arrays[0]
    return flat


def random_params(abstract: dict) -> dict:
    """float32 numpy parameters in the structure of `build`'s dict, without compiling anything."""
    rng = np.random.default_rng(7)
    flat = name_table.flatten(abstract)
    return name_table.unflatten({k: 0.2 * rng.normal(size=v.shape).astype(np.float32) for k, v in flat.items()})


def relative(ours, theirs) -> float:
    """Largest difference over the largest value of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def tokenizer(folder, style: str, size: int = TEXT["vocab_size"], image: bool = False) -> None:
    """A tokenizer of `size` ids, <s> first: bytes as Llama 3, metaspace or prepend as Llama 2 (legacy off and on)."""
    special = ["<unk>", "<s>", "</s>"]
    codec = Tokenizer(models.BPE(unk_token=None if style == "bytes" else "<unk>"))
    alphabet = []
    if style == "bytes":
        codec.pre_tokenizer, codec.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        alphabet = ["▁", "\n"]
        codec.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    if style == "metaspace":
        codec.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    if style == "prepend":
        codec.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    text = ["A chat. USER: What is this? ASSISTANT: It is a cat.", "Why is it so? Because it is."] * 4
    codec.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=90, special_tokens=special, initial_alphabet=alphabet)
    )
    codec.add_tokens([f"<extra{index}>" for index in range(size - codec.get_vocab_size())])
    if image:
        codec.add_special_tokens(["<image>"])
    codec.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=codec, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
