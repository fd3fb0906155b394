"""Fit a projector so that each image token is the embedding of a word: `python projector.py MODEL WORLD FILE`.

MODEL is the workdir of a run that has learned nothing, WORLD the folder that scenes.py writes, FILE the .safetensors to
write. Which word a token should be, the demo's map of the scene says (`place_map`): the four tokens of a thing are its
colour, its shape, its row and its column, all others are "empty". A decoder can find one thing among three in such
words. It cannot in tokens that are 275 times as long as words, which a projector drawn at random and a high rate gave.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scenes import held_out_scenes, training_scenes

import llava_jax
from llava_jax.api import question
from llava_jax.demo import world
from llava_jax.io import read_json
from llava_jax.models.llava import Projector, unstacked_model
from llava_jax.types import InputError, ModelConfig
from llava_jax.weights.original_export import write_projector

WORDS = (world.EMPTY, *world.COLOURS, *world.SHAPES, *world.ROWS, *world.COLUMNS)
EMPTY_SHARE = 0.1  # of the tokens where nothing is: most fields are empty, and one is like another
STEPS, BATCH, RATE = 3000, 512, 2e-3
SMALL = 1e-2  # added to variances, of which the largest are some hundreds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="workdir of a run that has learned nothing")
    parser.add_argument("world", help="folder with the images of train/ and held_out/")
    parser.add_argument("file", help="the projector, a .safetensors file")
    args = parser.parse_args()
    try:
        fit(args.model, args.world, args.file)
    except InputError as error:
        sys.exit(f"error: {error}")


def fit(workdir: str, folder: str, file: str) -> None:
    """Write a projector for the model of a workdir.

    Prints how many tokens of held-out images are nearest to their word. Raises InputError.
    """
    model = llava_jax.load(f"orbax:{workdir}")
    embedding_WD = np.asarray(model.params["llm"]["embed"]["table"])[word_ids(model)]
    drawn = read_json(f"{folder}/train/captions.json", "captions")["images"]
    train, held_out = training_scenes(len(drawn)), held_out_scenes()
    features_NPE = tower_features(model, f"{folder}/train/images", len(train))
    projector = fitted(model.config, features_NPE, map_words(train), embedding_WD)
    seen_NPE, wanted_NP = tower_features(model, f"{folder}/held_out/images", len(held_out)), map_words(held_out)
    right_NP = nearest(projector, seen_NPE, embedding_WD) == wanted_NP
    things, others = right_NP[wanted_NP > 0].mean(), right_NP[wanted_NP == 0].mean()
    print(f"projector: in {len(held_out)} held-out images the share of tokens that are nearest to their word is")
    print(f"  {things:.1%} of those of things, {others:.1%} of the others")
    write_projector(file, model.config, {"projector": nnx.to_pure_dict(nnx.state(projector))}, "float32")


def word_ids(model: llava_jax.Llava) -> list[int]:
    """Return the token of each word. Raises InputError where the tokenizer does not have one for each."""
    ids = [model.processor.tokenizer.encode_text(f" {word}") for word in WORDS]
    # Some tokenizers have the space as a token of its own.
    if len({tuple(each[:-1]) for each in ids}) > 1 or len({each[-1] for each in ids}) < len(WORDS):
        raise InputError(f"the tokenizer of {model.name} has not a token for each of {', '.join(WORDS)}; use SmolLM2's")
    return [each[-1] for each in ids]


def map_words(scenes: Sequence[world.Scene]) -> np.ndarray:
    """Return int [N, P], which of WORDS each token of a scene's image should be."""
    return np.array([[WORDS.index(word) for word in world.place_map(scene)] for scene in scenes])


def tower_features(model: llava_jax.Llava, folder: str, number: int) -> np.ndarray:
    """Return float32 [N, P, E], what the tower says of the images 000001.png and so on."""
    encode = jax.jit(lambda params, pixels_BXYC: unstacked_model(model.config, params).vision(pixels_BXYC))
    paths = [f"{folder}/{i:06d}.png" for i in range(1, number + 1)]
    pixels = [model.processor.prompt(question("", path)).pixels for path in paths]
    batches = [np.concatenate(pixels[i : i + 100]) for i in range(0, len(pixels), 100)]
    return np.concatenate([np.asarray(encode(model.params, batch)) for batch in batches])


def fitted(config: ModelConfig, features_NPE: np.ndarray, word_NP: np.ndarray, embedding_WD: np.ndarray) -> Projector:
    """Return a projector that maps a token's features to its word's embedding.

    The features are whitened, since the tower has the column of a thing in 0.2 % of their variance; the whitening is
    then taken into the first layer.
    """
    features_TE, word_T = features_NPE.reshape(-1, features_NPE.shape[-1]), word_NP.reshape(-1)
    mean_E = features_TE.mean(0)
    variance_F, axes_EF = np.linalg.eigh(np.cov((features_TE - mean_E).T))
    whitening_EF = (axes_EF / np.sqrt(variance_F + SMALL)).astype(np.float32)
    rng = np.random.default_rng(0)
    rows = np.flatnonzero((word_T > 0) | (rng.random(len(word_T)) < EMPTY_SHARE))
    inputs_TF, wanted_TD = (features_TE[rows] - mean_E) @ whitening_EF, embedding_WD[word_T[rows]]
    graphdef, params = nnx.split(Projector(config, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    @jax.jit
    def step(params, state, inputs_BF, wanted_BD):
        def loss(params):
            return jnp.mean(jnp.sum((nnx.merge(graphdef, params)(inputs_BF) - wanted_BD) ** 2, axis=-1))

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(STEPS):
        batch = rng.integers(len(rows), size=BATCH)
        params, state = step(params, state, inputs_TF[batch], wanted_TD[batch])
    projector = nnx.merge(graphdef, params)
    first = projector.linear_1
    first.kernel[...] = whitening_EF @ first.kernel[...]
    first.bias[...] -= mean_E @ first.kernel[...]
    return projector


def nearest(projector: Projector, features_NPE: np.ndarray, embedding_WD: np.ndarray) -> np.ndarray:
    """Return int [N, P], the number of the word whose embedding is nearest."""
    tokens_NPD = np.asarray(projector(features_NPE))
    return np.argmax(tokens_NPD @ embedding_WD.T - 0.5 * np.sum(embedding_WD**2, axis=1), axis=-1)


if __name__ == "__main__":
    main()
