"""Model families by Hugging Face's model_type: what their config classes fall back to, and what must be neutral.

A key that a family's code in transformers does not read, or that belongs to an architecture that is not built here, is
allowed with the values that change nothing and refused by name with any other.
"""

from typing import Any

Json = dict[str, Any]

_LLAMA = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)
_QWEN = _LLAMA | dict(
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    max_window_layers=28,
)
# What the config classes of transformers fall back to (4.46 and 5 agree).
DECODERS: dict[str, Json] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32, sliding_window=4096),
    "qwen2": _QWEN | dict(attention_bias=True),
    "qwen3": _QWEN | dict(head_dim=128),
}
_CLIP = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
_SIGLIP = dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=True)
TOWERS: dict[str, Json] = {"clip_vision_model": _CLIP, "siglip_vision_model": _CLIP | _SIGLIP}

_OFF = (None, False)
_ONE = (None, 1, 1.0)
_ABSENT = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv", "no_rope_layers")
_ABSENT += ("no_rope_layer_interval", "attention_chunk_size", "dual_chunk_attention_config", "quantization_config")
_SCALES = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale")
_FLAGS = ("use_qk_norm", "qk_layernorm", "rope_interleaved", "use_mrope")
# Keys of other decoders with the values that change nothing.
FOREIGN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_ABSENT, (None,)),
    **dict.fromkeys(_SCALES, _ONE),
    **dict.fromkeys(_FLAGS, _OFF),
    **dict.fromkeys(("num_experts", "num_local_experts"), (None, 0)),
}
# Keys that one family knows and another one would silently not read.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"sliding_window": (None,), "use_sliding_window": _OFF},
    "mistral": {"attention_bias": _OFF, "mlp_bias": _OFF, "use_sliding_window": (None, True)},
    "qwen2": {"attention_bias": (None, True), "mlp_bias": _OFF},
    "qwen3": {"mlp_bias": _OFF},
}
# What a rope object may hold next to its type; anything else would turn by other angles than ours.
ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}
