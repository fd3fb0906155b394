"""Model FLOPs of an update: what MFU counts, whatever the program really computes."""

from collections.abc import Collection

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


def tower_adapter_weights(config: ClipConfig, layers: int, lora: LoraConfig) -> int:
    """Return how many weights the adapters of the tower's `layers` blocks have."""
    narrow, wide = 2 * config.width, config.width + config.mlp_width
    return layers * lora.rank * sum(wide if name.startswith("mlp/") else narrow for name in lora.vision_targets)


def clip_forward_flops(config: ClipConfig, layers: int) -> float:
    """Return the FLOPs of one image through the patch embedding and `layers` blocks."""
    tokens, width = config.patches + config.class_tokens, config.width
    block = 2 * tokens * (4 * width**2 + 2 * width * config.mlp_width) + 4 * tokens**2 * width
    return layers * block + 2 * config.patches * 3 * config.patch_size**2 * width


def projector_weights(config: ModelConfig) -> int:
    """Return how many weights of the projector take part in matmuls."""
    linear_1 = config.vision.width * config.llm.width
    return linear_1 + (config.llm.width**2 if config.projector == "mlp2x_gelu" else 0)


def step_flops(config: ModelConfig, learns: Collection[str], *, rows: int, length: int, images: float) -> float:
    """Return the model FLOPs of one update over `rows` rows of `length` tokens and `images` images in all.

    Every token of a row counts, image tokens as text; attention counts the positions seen, half of the row without a
    window; what remat computes again does not count. A part of which something is in `learns` (projector, llm, vision,
    lora, vision_lora) counts three times its forward pass, a frozen part that gradients pass through twice (its
    attention, which has no weights, three times), and the blocks of the tower before those that learn once.
    """
    tokens = rows * length
    matmuls = 2 * decoder_weights(config.llm)
    window = min(config.llm.window or length, length)
    seen = window - window**2 / (2 * length)  # positions that one sees, on average
    attention = 4 * config.llm.layers * seen * config.llm.heads * config.llm.head_dim
    decoder = tokens * ((3 if "llm" in learns else 2) * matmuls + 3 * attention)
    if config.lora is not None:
        decoder += 6 * tokens * adapter_weights(config.llm, config.lora)
    vision = clip_forward_flops(config.vision, config.vision_layers) + _tower_backward_flops(config, learns)
    projector = 6 * config.vision.patches * projector_weights(config)
    return float(decoder + images * (vision + projector))


def _tower_backward_flops(config: ModelConfig, learns: Collection[str]) -> float:
    """Return the FLOPs of an image backward through the tower that learns, and both ways through its adapters."""
    vision, blocks = config.vision, config.learning_blocks or config.vision_layers
    tokens = vision.patches + vision.class_tokens
    through = clip_forward_flops(vision, blocks) - (clip_forward_flops(vision, 0) if config.learning_blocks else 0)
    if "vision" in learns:
        flops = 2 * through
    elif "vision_lora" in learns:
        flops = through + 4 * blocks * tokens**2 * vision.width
    else:
        return 0.0
    return flops + (6 * tokens * tower_adapter_weights(vision, blocks, config.lora) if config.lora is not None else 0)
