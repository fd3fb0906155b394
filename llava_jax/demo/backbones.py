"""Train the demo's two backbones and its tokenizer again: `python -m llava_jax.demo.backbones --output=DIR`.

They stand in for the published CLIP and Vicuna. The CLIP learns by contrast between images and captions; the LLaMA
learns to read: a description or a map in words, questions about it, answers in it; in a second part most maps mix the
words of a field in one token. Neither ever sees what the demo teaches: image features in place of words.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llava_jax.data.images import preprocess
from llava_jax.data.tokenize import TextTokenizer, load_tokenizer
from llava_jax.demo import reading, world
from llava_jax.models.attention import inverse_frequencies
from llava_jax.models.clip import Clip
from llava_jax.models.layers import LayerNorm, Linear
from llava_jax.models.llama import Llama
from llava_jax.models.llava import merge
from llava_jax.types import IMAGE_MARK, ClipConfig, LlamaConfig
from llava_jax.weights import hf
from llava_jax.weights.hf_config import clip_json, llama_json, write_json
from llava_jax.weights.hf_export import parameter_pieces
from llava_jax.weights.tensors import save_tensors

CLIP = ClipConfig(width=128, mlp_width=512, layers=4, heads=4, image_size=48, patch_size=8)
LLAMA = LlamaConfig(
    vocab_size=reading.VOCABULARY, width=192, mlp_width=512, layers=4, heads=6, kv_heads=6, head_dim=32, tied=True
)
TEXT = LlamaConfig(vocab_size=reading.VOCABULARY, width=128, mlp_width=256, layers=2, heads=4, kv_heads=4, head_dim=32)
CAPTION_LENGTH = 48
Params = dict[str, Any]


def fit(
    params: Params,
    loss_fn: Callable,
    batches: Iterator[tuple],
    steps: int,
    lr: float,
    name: str,
    seconds: float,
    save: Callable[[Params], None],
    mask: Params,
) -> None:
    """Train with AdamW, warmup and cosine decay over `steps` batches; the schedule ends early when `seconds` run out.

    Args:
      params: the start.
      loss_fn: (params, *batch) -> (loss, accuracy).
      batches, steps: what is trained on.
      lr: peak learning rate.
      name: printed with the loss.
      seconds: limit on the time.
      save: called every 250 steps and at the end.
      mask: factors on the updates.
    """
    scale = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, b2=0.98, weight_decay=0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), scale)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: Any, lr: jax.Array, *batch: jax.Array):
        (loss, metric), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *batch)
        state[1].hyperparams["learning_rate"] = lr
        updates, state = optimizer.update(grads, state, params)
        updates = jax.tree.map(jnp.multiply, updates, mask)
        return optax.apply_updates(params, updates), state, loss, metric

    state, started, window = optimizer.init(params), time.monotonic(), []
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - started) / seconds)
        if done >= 1:
            break
        rate = lr * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * done))
        params, state, loss, metric = update(params, state, jnp.float32(rate), *next(batches))
        window.append((float(loss), float(metric)))
        if step % 250 == 249:
            save(jax.device_get(params))
        if step % 50 == 49:
            loss, metric = np.mean(window, axis=0)
            window.clear()
            spent = time.monotonic() - started
            print(f"{name} step {step + 1} loss {loss:.4f} accuracy {metric:.3f} {spent:.0f} s", flush=True)
    save(jax.device_get(params))


class Contrast(nnx.Module):
    """CLIP for training: image and caption towers, both projected to one space, and a temperature."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.vision = Clip(CLIP, CLIP.layers, rngs=rngs)
        self.post_norm = LayerNorm(CLIP.width, CLIP.norm_eps, rngs=rngs)
        self.image = Linear((CLIP.width,), (128,), ("vision_embed",), ("projected",), rngs=rngs)
        self.text = Llama(TEXT, rngs=rngs)
        self.caption = Linear((TEXT.width,), (128,), ("embed",), ("projected",), rngs=rngs)
        self.scale = nnx.Param(jnp.log(1 / 0.07), axes=())

    def __call__(self, pixels_BXYC: jax.Array, tokens_BT: jax.Array, last_B: jax.Array) -> jax.Array:
        """Return similarities float32[B, B], images by captions."""
        images = self.image(self.post_norm(self.vision.hidden(pixels_BXYC)[:, 0]))
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        states = self.text(self.text.embed(tokens_BT), positions_BT)
        captions = self.caption(states[jnp.arange(states.shape[0]), last_B])
        images, captions = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, captions))
        return jnp.exp(jnp.minimum(self.scale[...], jnp.log(100.0))) * images @ captions.T


def clip_batches(tokenizer: TextTokenizer, rows: int, pool: int, seed: int) -> Iterator[tuple]:
    """Yield images and captions where every scene comes with a near miss of itself, to be told apart."""
    rng = np.random.default_rng(seed)
    scenes = [scene for first in world.sample_scenes(rng, pool) for scene in (first, world.near_miss(first, rng))]
    pixels = np.stack([preprocess(world.draw(scene, rng)[0], CLIP.image_size, "crop") for scene in scenes])
    while True:
        first = 2 * rng.choice(pool, size=rows // 2, replace=False)
        index = np.stack([first, first + 1], axis=1).reshape(-1)
        tokens_BT = np.zeros((rows, CAPTION_LENGTH), np.int32)
        last_B = np.zeros(rows, np.int32)
        for row, scene in enumerate(index):
            ids = tokenizer.encode_text(world.caption(scenes[scene], rng))[:CAPTION_LENGTH]
            tokens_BT[row, : len(ids)], last_B[row] = ids, len(ids) - 1
        yield pixels[index], tokens_BT, last_B


def train_clip(tokenizer: TextTokenizer, folder: str, steps: int, seconds: float, pool: int = 10000) -> None:
    graphdef, state = nnx.split(Contrast(rngs=nnx.Rngs(0)))

    def loss_fn(params: Params, *batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(*batch)
        labels = jnp.arange(logits.shape[0])
        loss = optax.softmax_cross_entropy_with_integer_labels
        accuracy = (logits.argmax(1) == labels).mean()
        return (loss(logits, labels).mean() + loss(logits.T, labels).mean()) / 2, accuracy

    batches = clip_batches(tokenizer, rows=128, pool=pool, seed=1)
    params = nnx.to_pure_dict(state)
    mask = jax.tree.map(jnp.ones_like, params)
    fit(params, loss_fn, batches, steps, 1e-3, "clip", seconds, lambda p: save_clip(p, folder), mask)


def save_clip(params: Params, folder: str) -> None:
    """Write a Hugging Face CLIPVisionModel folder in bfloat16, its last block and post-norm included."""
    tensors = named_tensors({"vision": params["vision"]}, "vision_tower.")
    for theirs, ours in (("weight", "scale"), ("bias", "bias")):
        tensors[f"vision_model.post_layernorm.{theirs}"] = np.asarray(params["post_norm"][ours]).astype(jnp.bfloat16)
    config = clip_json(CLIP) | dict(architectures=["CLIPVisionModel"], projection_dim=128)
    save_folder(folder, config, tensors)


def masked_nll_rows(logits_BTV: jax.Array, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each row's summed nll (float32[B]) and number of targets (int32[B]) by the definition, from all logits.

    For rows of one conversation; a target never lies outside the vocabulary: image slots and padding are no targets.
    """
    labels = jnp.where(targets_BT[:, 1:], tokens_BT[:, 1:], 0)
    logits = logits_BTV[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = jnp.where(targets_BT[:, 1:], jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
    return nll.sum(-1), targets_BT[:, 1:].sum(-1, dtype=jnp.int32)


def train_llama(tokenizer: TextTokenizer, folder: str, steps: int, seconds: float, mixed: bool) -> None:
    """Train the decoder from a fresh start on words, or the one in `folder` further on maps of mixtures."""
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def loss_fn(
        params: Params, tokens_BT: jax.Array, targets_BT: jax.Array, mixtures_BPW: jax.Array, noise_BPD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits = read(nnx.merge(graphdef, params), tokenizer, tokens_BT, mixtures_BPW, noise_BPD)
        nll_B, count_B = masked_nll_rows(logits, tokens_BT, targets_BT)
        answers_BT = tokens_BT == reading.EOS
        first = targets_BT[:, 1:] & ~targets_BT[:, :-1] & answers_BT.any(1, keepdims=True)
        accuracy = ((logits[:, :-1].argmax(-1) == tokens_BT[:, 1:]) & first).sum() / first.sum()
        # Rows weigh the same: a dialogue has fewer targets than a retelling, and each of them is worth more.
        return (nll_B / count_B).mean(), accuracy

    if mixed:
        params = jax.tree.map(jnp.asarray, hf.read_llama(folder, dtype="float32")[1])
        lr, seed, repetitions, shares = 1.5e-3, 4, 0, reading.MIXED
    else:
        params = look_back(nnx.to_pure_dict(state))
        lr, seed, repetitions, shares = 2e-3, 2, 150, reading.WORDS_ONLY
    batches = reading.batches(tokenizer, 32, seed, repetitions, shares, LLAMA.width)
    mask = look_back_mask(params)
    fit(params, loss_fn, batches, steps, lr, "llama", seconds, lambda p: save_llama(p, folder), mask)


def read(
    llama: Llama, tokenizer: TextTokenizer, tokens_BT: jax.Array, mixtures_BPW: jax.Array, noise_BPD: jax.Array
) -> jax.Array:
    """Return logits of rows whose image tokens are the mixtures of word embeddings of `reading.mixtures`, and noise."""
    nouns_W = jnp.array([tokenizer.encode_text(noun)[0] for noun in reading.NOUNS])
    is_image_BT = tokens_BT == IMAGE_MARK
    x_BTD = llama.embed(jnp.where(is_image_BT, 0, tokens_BT))
    x_BTD = merge(x_BTD, mixtures_BPW @ llama.embed(nouns_W) + noise_BPD, is_image_BT)
    return llama.logits(llama(x_BTD, jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)))


DISTANCES = (1, 2, 3, 4, 6, 7)
CONSTANT = 0.5


def look_back(params: Params) -> Params:
    """Set the first layer's heads to look 1, 2, 3, 4, 6 and 7 tokens back.

    What belongs together is that far apart (in sentences, and in maps and images of six fields a row). Without this
    start the heads and the search that uses them wait for each other, and the decoder only guesses. A constant in the
    first embedding dimension gives query and key a fixed direction; RoPE turns the offset between the two into an
    attention peak at that distance.
    """
    peak, fast, spread = 12.0, 6, 0.05
    params["embed"]["table"] = params["embed"]["table"].at[:, 0].set(CONSTANT)
    seen = CONSTANT / np.sqrt((spread**2 * (LLAMA.width - 1) + CONSTANT**2) / LLAMA.width)
    size = np.sqrt(peak * np.sqrt(LLAMA.head_dim)) / seen
    frequencies = inverse_frequencies(LLAMA.rope, LLAMA.head_dim)[:fast]
    half = LLAMA.head_dim // 2
    attn = params["layers"]["attn"]
    for name in ("q", "k"):
        attn[name]["kernel"] = attn[name]["kernel"].at[0].set(0.0)
    for head, distance in enumerate(DISTANCES):
        query, key = np.zeros((2, LLAMA.head_dim), np.float32)
        query[:fast] = size
        key[:fast] = size * np.cos(distance * frequencies)
        key[half : half + fast] = size * np.sin(distance * frequencies)
        attn["q"]["kernel"] = attn["q"]["kernel"].at[0, 0, head].set(query)
        attn["k"]["kernel"] = attn["k"]["kernel"].at[0, 0, head].set(key)
    return params


def look_back_mask(params: Params) -> Params:
    """Return 1 where a parameter may change and 0 where that would move the peaks of `look_back`."""
    mask = jax.tree.map(jnp.ones_like, params)
    mask["embed"]["table"] = mask["embed"]["table"].at[:, 0].set(0.0)
    mask["layers"]["attn_norm"]["scale"] = mask["layers"]["attn_norm"]["scale"].at[0].set(0.0)
    for name in ("q", "k"):
        kernel = mask["layers"]["attn"][name]["kernel"]
        mask["layers"]["attn"][name]["kernel"] = kernel.at[0].set(0.0)
    return mask


def save_llama(params: Params, folder: str) -> None:
    """Write a Hugging Face LlamaForCausalLM folder in bfloat16 (the tokenizer is there already)."""
    config = llama_json(LLAMA) | dict(bos_token_id=reading.BOS, eos_token_id=reading.EOS)
    save_folder(folder, config, named_tensors({"llm": params}, "language_model."))


def named_tensors(params: Params, prefix: str) -> dict[str, np.ndarray]:
    """Return the parameters in bfloat16 under Hugging Face's names (without `prefix`) and in its layouts."""
    return {piece.name.removeprefix(prefix): piece.array() for piece in parameter_pieces(params, "bfloat16")}


def save_folder(folder: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    os.makedirs(folder, exist_ok=True)
    write_json(folder, "config.json", config | dict(dtype="bfloat16", torch_dtype="bfloat16"))
    save_tensors(os.path.join(folder, "model.safetensors"), tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder that gets clip/ and llama/")
    parser.add_argument("--only", choices=("tokenizer", "clip", "llama"), help="train one and keep the others")
    parser.add_argument("--clip_minutes", type=float, default=60)
    parser.add_argument("--llama_minutes", type=float, default=120)
    parser.add_argument("--steps", type=int, default=20000, help="at most this many steps each")
    parser.add_argument("--resume", action="store_true", help="only the second part of the LLaMA in --output")
    args = parser.parse_args()
    clip, llama = os.path.join(args.output, "clip"), os.path.join(args.output, "llama")
    if args.only in (None, "tokenizer"):
        reading.make_tokenizer(llama)
    tokenizer = load_tokenizer(llama)
    if args.only in (None, "clip"):
        train_clip(tokenizer, clip, args.steps, 60 * args.clip_minutes)
    if args.only in (None, "llama"):
        for mixed in (True,) if args.resume else (False, True):
            train_llama(tokenizer, llama, args.steps, 30 * args.llama_minutes, mixed)


if __name__ == "__main__":
    main()
