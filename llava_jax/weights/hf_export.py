"""Our parameters to a LlavaForConditionalGeneration folder that transformers 4.46 and 5, vLLM and others load.

Or to the same folder with its weights as orbax.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.settings import DTYPES
from llava_jax.types import InputError, ModelConfig
from llava_jax.weights import hf_config, name_table, orbax_model
from llava_jax.weights.hf_config import read_json, write_json
from llava_jax.weights.processor import (
    VOCAB_MULTIPLE,
    ExportedTokens,
    LlavaExtras,
    check_ids,
    own_rows,
    round_up,
    write_processor,
)
from llava_jax.weights.source import is_original
from llava_jax.weights.tensors import SHARD_BYTES, Piece, check_written, enough_room, open_folder, write_shards

Params = dict[str, Any]


def write_llava(
    folder: str,
    config: ModelConfig,
    params: Params,
    extras: LlavaExtras,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    weights: str = "safetensors",
    pad_vocab: int = 0,
    force: bool = False,
    card: str = "",
) -> ModelConfig:
    """Write the folder and return the config as exported (image token and vocabulary may have moved).

    params   {"vision", "projector", "llm"}, numpy or jax arrays in our layout
    extras   its `vision` is the CLIP or LLaVA folder whose last blocks and post-norm are copied through unchanged;
             none (random towers) writes fresh values there, which no LLaVA ever reads
    weights  safetensors, or orbax: our own parameters, whole in host memory while they are written
    pad_vocab  rows of the vocabulary: as many as the tokenizer has ids, rounded up to a multiple of this; 0 keeps
             those there are, and where `<image>` or padding lie outside rounds up to VOCAB_MULTIPLE
    force    write also where whole strings are tokenised otherwise than the model was trained
    card     text of its README.md; empty: none is written
    Everything is written next to `folder`, read back and compared, and then renamed. Raises InputError when
    `folder` is already there or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    with finished_folder(folder, card) as partial:
        tokens = write_processor(partial, config, extras)
        exported = _grown(config, tokens, pad_vocab)
        rows = own_rows(extras.tokenizer, config.llm.vocab_size)
        _write_configs(partial, exported, tokens, dtype, min(rows, exported.llm.vocab_size), extras)
        check_ids(partial, extras, force)
        params = with_vocabulary(params, exported.llm.vocab_size)
        pieces, beyond = all_pieces(exported, params, extras.vision, dtype)
        if weights == "orbax":
            whole = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
            orbax_model.save(partial, whole, {piece.name: piece.array() for piece in beyond})
        else:
            write_shards(partial, [*pieces, *beyond], shard_bytes)
        check_written(partial, [*pieces, *beyond])
    return exported


@contextlib.contextmanager
def finished_folder(folder: str, card: str = "") -> Iterator[str]:
    """Yield a folder next to `folder` that takes its name when the block ends, and is removed when it fails.

    It holds a README.md with the text of `card`, unless that is empty.
    """
    folder = os.path.abspath(folder)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise InputError(f"{folder}: already exists and is not empty; choose another target or remove it")
    parent = os.path.dirname(folder)
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{os.path.basename(folder)}.", dir=parent)
    try:
        with enough_room(folder):
            if card:
                pathlib.Path(partial, "README.md").write_text(card, encoding="utf-8")
            yield partial
        os.chmod(partial, 0o755)
        os.replace(partial, folder)
    except BaseException:
        _remove(partial)
        raise


def _remove(folder: str) -> None:
    """Remove a folder until it stays away for half a second.

    Writes that tensorstore had begun when one of them failed end a little later, and make it again.
    """
    absent = 0
    for _ in range(100):
        absent = 0 if os.path.exists(folder) else absent + 1
        if absent == 5:
            break
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def _grown(config: ModelConfig, tokens: ExportedTokens, pad_vocab: int) -> ModelConfig:
    """Return the config with the exported image token, the vocabulary grown where image or pad id lie outside."""
    needed = max(tokens.image_id, tokens.pad_id) + 1
    vocab = config.llm.vocab_size
    if pad_vocab:
        vocab = round_up(tokens.size, pad_vocab)
    elif needed > vocab:
        vocab = round_up(needed, VOCAB_MULTIPLE)
    llm = dataclasses.replace(config.llm, vocab_size=vocab)
    return dataclasses.replace(config, llm=llm, image_token_id=tokens.image_id)


def _write_configs(
    folder: str, config: ModelConfig, tokens: ExportedTokens, dtype: str, rows: int, extras: LlavaExtras
) -> None:
    described = hf_config.llava_json(
        config, dtype=dtype, pad_id=tokens.pad_id, bos_id=tokens.bos_id, eos_id=tokens.eos_id
    )
    write_json(folder, "config.json", described | {"llava_jax": extras.rules | {"vocab_size": rows}})
    generation = {key: described[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens.stop_strings:
        generation["stop_strings"] = list(tokens.stop_strings)
    write_json(folder, "generation_config.json", generation)
    read = hf_config.llava_config(read_json(os.path.join(folder, "config.json")), folder, config.dtype)
    # How images become pixels stands in preprocessor_config.json.
    vision = dataclasses.replace(read.vision, pixels=config.vision.pixels)
    if dataclasses.replace(read, vision=vision, remat=config.remat) != config:
        raise ValueError(f"config read back as {read}, wrote {config}")


# ---- tensors ----------------------------------------------------------------------------------------------------


def all_pieces(
    config: ModelConfig, params: Params, source_vision_folder: str, dtype: str
) -> tuple[list[Piece], list[Piece]]:
    """Return every tensor of the model in hub layout: (our parameters, what LLaVA does not run but readers ask)."""
    beyond = [*identity(config, dtype), *_beyond_features(config, source_vision_folder, dtype)]
    return list(parameter_pieces(params, dtype)), beyond


def with_vocabulary(params: Params, rows: int) -> Params:
    """Return the parameters with the first `rows` of their vocabulary; rows that lack are the mean."""
    flat = name_table.flatten(params)
    for path, axis in (("llm/embed/table", 0), ("llm/head/kernel", 1)):
        if path in flat and flat[path].shape[axis] != rows:
            array = np.asarray(flat[path])
            mean = array.astype(np.float64).mean(axis, keepdims=True).astype(array.dtype)
            lacking = np.repeat(mean, max(0, rows - array.shape[axis]), axis)
            flat[path] = np.concatenate([array.take(range(min(rows, array.shape[axis])), axis), lacking], axis)
    return name_table.unflatten(flat)


def parameter_pieces(params: Params, dtype: str) -> Iterator[Piece]:
    """Yield every parameter in hub layout, in the table's order, each made when it is written."""
    flat = name_table.flatten(params)
    unknown = sorted(set(flat) - set(name_table.ROWS))
    if unknown:
        raise ValueError(f"parameters without a row in the table: {unknown}")
    numpy_dtype = np.dtype(jnp.dtype(dtype))
    for row in name_table.TABLE:
        if row.ours not in flat:
            continue
        array = flat[row.ours]
        shape = name_table.hf_shape(row, array.shape[1:] if row.stacked else array.shape)
        for layer in range(array.shape[0]) if row.stacked else (None,):

            def make(array=array, row=row, layer=layer) -> np.ndarray:
                return name_table.to_hf(row, np.asarray(array if layer is None else array[layer]))

            yield Piece(row.hf if layer is None else row.hf.format(layer), shape, numpy_dtype, make)


def identity(config: ModelConfig, dtype: str) -> Iterator[Piece]:
    """Yield the second layer that theirs always has, of a linear projector."""
    if config.projector == "linear":
        D, name, numpy_dtype = config.llm.width, name_table.PROJECTOR + "linear_2.", np.dtype(jnp.dtype(dtype))
        yield Piece(name + "weight", (D, D), numpy_dtype, lambda: np.eye(D))
        yield Piece(name + "bias", (D,), numpy_dtype, lambda: np.zeros(D))


def _beyond_features(config: ModelConfig, source: str, dtype: str) -> Iterator[Piece]:
    """Yield the tower's last blocks, post-norm and SigLIP's head: never run by LLaVA, but asked for by transformers."""
    width, mlp = config.vision.width, config.vision.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        name_table.VISION + "post_layernorm.weight": (width,),
        name_table.VISION + "post_layernorm.bias": (width,),
    }
    for row in name_table.TABLE:
        if row.ours.startswith("vision/layers/"):
            out, inner = (mlp, width) if ".fc1" in row.hf else (width, mlp if ".fc2" in row.hf else width)
            shape = (out, inner) if row.in_dims else (out,)
            shapes |= {row.hf.format(n): shape for n in range(config.vision_layers, config.vision.layers)}
    if config.vision.pooling_head:
        shapes |= _head_shapes(width, mlp)
    if not source:
        print(
            f"export: no source for the tower's last {config.vision.layers - config.vision_layers} block(s) and "
            "post-norm, which LLaVA does not run; fresh values are written for them"
        )
        yield from (_fresh(name, shape, np.dtype(jnp.dtype(dtype))) for name, shape in shapes.items())
    else:
        yield from _copied(source, shapes, np.dtype(jnp.dtype(dtype)))


def _head_shapes(width: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of SigLIP's attention pooling head (transformers' SiglipMultiheadAttentionPoolingHead)."""
    linear = {"attention.out_proj": (width, width), "mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
    shapes: dict[str, tuple[int, ...]] = {"probe": (1, 1, width)}
    shapes |= {"attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,)}
    for name, (out, inner) in linear.items():
        shapes |= {name + ".weight": (out, inner), name + ".bias": (out,)}
    shapes |= {"layernorm.weight": (width,), "layernorm.bias": (width,)}
    return {name_table.VISION + "head." + name: shape for name, shape in shapes.items()}


def _copied(source: str, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> Iterator[Piece]:
    """Yield those tensors of the source folder; bit-equal where its dtype is the export's."""
    given = hf_config.read_config(source, "a CLIP, SigLIP or LLaVA folder")
    tower = "llava" if given.get("model_type") in ("llava", "llava_next") else "clip"
    kind = "original" if is_original(given) else tower
    tensors = open_folder(source)
    names = {name_table.canonical(name, kind): name for name in tensors.names()}
    wrong = [name for name, shape in shapes.items() if name not in names or tensors[names[name]].shape != shape]
    if wrong:
        raise InputError(
            f"{source}: lacks {', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''} in the expected shape; give the "
            "folder the vision tower came from"
        )
    for name, shape in shapes.items():
        yield Piece(name, shape, dtype, lambda name=name: tensors[names[name]].get().astype(dtype))


def _fresh(name: str, shape: tuple[int, ...], dtype: np.dtype) -> Piece:
    if len(shape) > 1:
        return Piece(name, shape, dtype, lambda: np.random.default_rng(0).normal(0.0, 0.02, shape))
    is_scale = "norm" in name and name.endswith("weight")
    return Piece(name, shape, dtype, lambda: np.ones(shape) if is_scale else np.zeros(shape))
