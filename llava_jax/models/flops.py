"""Model FLOPs of an update: what MFU counts, whatever the program really computes."""

from llava_jax.settings import STAGES
from llava_jax.types import ClipConfig, LlamaConfig, LoraConfig, ModelConfig


def decoder_weights(config: LlamaConfig) -> int:
    """Return how many weights of the decoder take part in matmuls: with the head, without embeddings and norms."""
    layer = sum(inputs * outputs for inputs, outputs in linear_sizes(config).values())
    return config.layers * layer + config.width * config.vocab_size


def linear_sizes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every linear layer of a decoder block."""
    D, F = config.width, config.mlp_width
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = {"attn/q": (D, heads), "attn/k": (D, kv_heads), "attn/v": (D, kv_heads), "attn/o": (heads, D)}
    return attention | {"mlp/gate": (D, F), "mlp/up": (D, F), "mlp/down": (F, D)}


def adapter_weights(config: LlamaConfig, lora: LoraConfig) -> int:
    """Return how many weights all adapters of the decoder have."""
    sizes = linear_sizes(config)
    return config.layers * lora.rank * sum(sum(sizes[name]) for name in lora.targets)


def clip_forward_flops(config: ClipConfig, layers: int) -> float:
    """Return the FLOPs of one image through the patch embedding and `layers` blocks."""
    tokens, width = config.patches + config.class_tokens, config.width
    block = 2 * tokens * (4 * width**2 + 2 * width * config.mlp_width) + 4 * tokens**2 * width
    return layers * block + 2 * config.patches * 3 * config.patch_size**2 * width


def projector_weights(config: ModelConfig) -> int:
    """Return how many weights of the projector take part in matmuls."""
    linear_1 = config.vision.width * config.llm.width
    return linear_1 + (config.llm.width**2 if config.projector == "mlp2x_gelu" else 0)


def step_flops(config: ModelConfig, stage: str, *, rows: int, length: int, images: float) -> float:
    """Return the model FLOPs of one update over `rows` rows of `length` tokens and `images` images in all.

    Every token of a row counts, image tokens as text; attention counts the positions seen, half of the row without a
    window; what remat computes again does not count. A part that trains counts three times its forward pass, a frozen
    decoder that gradients pass through twice (its attention, which has no weights, three times), and the frozen vision
    tower's blocks that run once.
    """
    tokens = rows * length
    matmuls = 2 * decoder_weights(config.llm)
    window = min(config.llm.window or length, length)
    seen = window - window**2 / (2 * length)  # positions that one sees, on average
    attention = 4 * config.llm.layers * seen * config.llm.heads * config.llm.head_dim
    decoder = tokens * ((3 if "llm" in STAGES[stage] else 2) * matmuls + 3 * attention)
    if config.lora is not None:
        decoder += 6 * tokens * adapter_weights(config.llm, config.lora)
    vision = clip_forward_flops(config.vision, config.vision_layers)
    projector = 6 * config.vision.patches * projector_weights(config)
    return float(decoder + images * (vision + projector))
