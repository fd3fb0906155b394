"""Fit the projector of a model that has not learned, so that each image token is the embedding of a word.

Which word an image token should be, the demo's map says (`place_map`): the four tokens of a thing are its colour, its
shape, its row and its column, all others "empty". A decoder finds one thing among three in such words at once; in
tokens that a projector drawn at random and its high rate make 300 times as long as words, it does not.
"""

import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

import llava_jax
from llava_jax.api import question
from llava_jax.demo import world
from llava_jax.models.llava import unstacked_model

WORDS = (world.EMPTY, *world.COLOURS, *world.SHAPES, *world.ROWS, *world.COLUMNS)
EMPTY_SHARE = 0.1  # of the tokens where nothing is: most fields are empty, and one is like another
STEPS, BATCH, RATE = 3000, 512, 2e-3
HELD_OUT = 10  # every tenth image shows how good the fit is


def fit(workdir: pathlib.Path, images: str, scenes: Sequence[world.Scene], file: str) -> None:
    """Write a projector (.safetensors, as mm_projector.bin names its tensors) for the model of a workdir.

    `images` has a file 000001.png for the first of the scenes and so on. Prints how many tokens of held-out images are
    nearest to their word.
    """
    model = llava_jax.load(f"orbax:{workdir}")
    features_NPE = tower_features(model, [f"{images}/{i:06d}.png" for i in range(1, len(scenes) + 1)])
    tokens_W = [model.processor.tokenizer.encode_text(f" {word}")[-1] for word in WORDS]  # SmolLM2 has one for each
    embedding_WD = np.asarray(model.params["llm"]["embed"]["table"])[tokens_W]
    word_NP = np.array([[WORDS.index(word) for word in world.place_map(scene)] for scene in scenes])
    is_held_out_N = np.arange(len(scenes)) % HELD_OUT == 0
    layers = fitted(features_NPE[~is_held_out_N], word_NP[~is_held_out_N], embedding_WD)
    right = nearest(layers, features_NPE[is_held_out_N], embedding_WD) == word_NP[is_held_out_N]
    is_thing = word_NP[is_held_out_N] > 0
    print(f"projector: {right[is_thing].mean():.1%} of the tokens of things are nearest to their word, ", end="")
    print(f"{right[~is_thing].mean():.1%} of the empty ones, in {is_held_out_N.sum()} held-out images", flush=True)
    tensors = {f"model.mm_projector.{name}": np.ascontiguousarray(value) for name, value in layers.items()}
    save_file(tensors, f"{file}.partial")
    os.replace(f"{file}.partial", file)


def tower_features(model: "llava_jax.Llava", paths: Sequence[str]) -> np.ndarray:
    """Return float32 [N, P, E], what the tower says of each image."""
    encode = jax.jit(lambda params, pixels_BXYC: unstacked_model(model.config, params).vision(pixels_BXYC))
    pixels = [model.processor.prompt(question("", path)).pixels for path in paths]
    batches = [np.concatenate(pixels[i : i + 100]) for i in range(0, len(pixels), 100)]
    return np.concatenate([np.asarray(encode(model.params, batch)) for batch in batches])


def fitted(features_NPE: np.ndarray, word_NP: np.ndarray, embedding_WD: np.ndarray) -> dict[str, np.ndarray]:
    """Return weights and biases, [out, in], of two layers that map a token's features to its word's embedding.

    The features are whitened, since the tower has the column of a thing in 0.2 % of their variance; the whitening is
    then taken into the first layer.
    """
    features_TE, word_T = features_NPE.reshape(-1, features_NPE.shape[-1]), word_NP.reshape(-1)
    mean_E = features_TE.mean(0)
    variance_F, axes_EF = np.linalg.eigh(np.cov((features_TE - mean_E).T))
    whitening_EF = (axes_EF / np.sqrt(variance_F + 1e-2)).astype(np.float32)
    rng = np.random.default_rng(0)
    rows = np.flatnonzero((word_T > 0) | (rng.random(len(word_T)) < EMPTY_SHARE))
    inputs_TF, wanted_TD = (features_TE[rows] - mean_E) @ whitening_EF, embedding_WD[word_T[rows]]
    F, D = whitening_EF.shape[1], embedding_WD.shape[1]
    params = {
        "0.weight": rng.normal(size=(D, F), scale=F**-0.5),
        "0.bias": np.zeros(D),
        "2.weight": rng.normal(size=(D, D), scale=0.1 * D**-0.5),
        "2.bias": np.zeros(D),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    @jax.jit
    def step(params, state, inputs_BF, wanted_BD):
        loss = lambda params: jnp.mean(jnp.sum((apply(params, inputs_BF) - wanted_BD) ** 2, axis=-1))  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(STEPS):
        batch = rng.integers(len(rows), size=BATCH)
        params, state = step(params, state, inputs_TF[batch], wanted_TD[batch])
    layers = jax.tree.map(np.asarray, params)
    weight_DE = layers["0.weight"] @ whitening_EF.T
    return layers | {"0.weight": weight_DE, "0.bias": layers["0.bias"] - weight_DE @ mean_E}


def apply(layers: dict[str, jax.Array], inputs_BF: jax.Array) -> jax.Array:
    """Return [..., D], what LLaVA's mlp2x_gelu makes of features."""
    hidden_BD = jax.nn.gelu(inputs_BF @ layers["0.weight"].T + layers["0.bias"], approximate=False)
    return hidden_BD @ layers["2.weight"].T + layers["2.bias"]


def nearest(layers: dict[str, np.ndarray], features_NPE: np.ndarray, embedding_WD: np.ndarray) -> np.ndarray:
    """Return int [N, P], the number of the word whose embedding is nearest."""
    tokens_NPD = np.asarray(apply(jax.tree.map(jnp.asarray, layers), features_NPE))
    return np.argmax(tokens_NPD @ embedding_WD.T - 0.5 * np.sum(embedding_WD**2, axis=1), axis=-1)
