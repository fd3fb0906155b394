"""The demo's backbones: what they read, that they are small, that the decoder looks things up, how they are made."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.data.tokenize import load_tokenizer
from llava_jax.demo import backbones, reading, world
from llava_jax.models.attention import angles, rotate
from llava_jax.models.llama import Llama
from llava_jax.models.llava import build
from llava_jax.types import IMAGE_MARK, ModelConfig
from llava_jax.weights import hf

SHIPPED = os.path.join(os.path.dirname(backbones.__file__), "backbones")


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(os.path.join(SHIPPED, "llama"))


def test_every_word_of_the_world_is_one_token(words):
    nouns = (*world.COLOURS, *world.SHAPES, *world.ROWS, *world.COLUMNS, *world.NUMBERS, world.EMPTY, "yes", "no")
    assert {noun: len(words.encode_text(noun)) for noun in nouns} == dict.fromkeys(nouns, 1)


def test_any_text_can_be_written_and_read_back(words):
    text = "Naïve 😀 <tag>\nline two,  spaces"
    assert words.decode(words.encode_text(text)) == text


def test_a_dialogue_trains_on_answers_and_their_ends_only(words):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = world.sample_scene(rng)
        tokens, targets = reading.dialogue(scene, words, rng, reading.MIXED)
        said = [
            words.decode([token for token, _ in group])
            for trained, group in itertools.groupby(zip(tokens, targets, strict=True), key=lambda pair: pair[1])
            if trained
        ]
        answers = {question.answer for question in world.questions(scene, rng)} | {"yes", "no"}
        assert len(tokens) <= reading.LENGTH
        assert all(text in answers or text.endswith(".") for text in said)
        assert (tokens == reading.EOS).sum() == len(said) > 0


def test_a_map_has_one_word_for_each_image_token(words):
    scene = world.sample_scene(np.random.default_rng(0))
    assert sum(len(words.encode_text(word)) for word in world.place_map(scene)) == backbones.CLIP.patches


def test_the_mixture_of_a_field_is_what_the_map_has_there(words):
    rng = np.random.default_rng(0)
    for scene in world.sample_scenes(rng, 50):
        mixed_PW = np.mean([reading.mixtures(scene, rng) for _ in range(30)], axis=0)
        in_map = [[word for word in reading.NOUNS[:10] if word in (t.colour, t.shape)] for t in scene]
        for word_W in mixed_PW.reshape(world.MAP_SIDE, world.MAP_SIDE, -1).transpose(2, 0, 1)[:10]:
            assert {(y // 2, x // 2) for y, x in np.argwhere(word_W > 0)} <= {(t.row, t.column) for t in scene}
        for thing, named in zip(scene, in_map, strict=True):
            block_YXW = mixed_PW.reshape(3, 2, 3, 2, -1)[thing.row, :, thing.column]
            places = [reading.NOUNS.index(word) for word in thing.place.split()]
            assert (block_YXW[..., [reading.NOUNS.index(word) for word in named] + places] > 0).all()


def test_held_out_scenes_are_in_no_training_text_or_image(words):
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng) for _ in range(2000)]
    assert not any(world.is_held_out(scene) for scene in scenes)
    assert not any(world.is_held_out(world.near_miss(scene, rng)) for scene in scenes[:500])
    assert all(world.is_held_out(scene) for scene in world.sample_scenes(rng, 100, held_out=True))


def test_first_heads_start_out_looking_back_by_fixed_distances():
    params = backbones.look_back(nnx.to_pure_dict(nnx.state(Llama(backbones.LLAMA, rngs=nnx.Rngs(0)))))
    tokens_BT = np.random.default_rng(0).integers(3, reading.VOCABULARY, (1, 40))
    x_BTD = params["embed"]["table"][tokens_BT]
    x_BTD /= jnp.sqrt(jnp.square(x_BTD).mean(-1, keepdims=True))
    rope = angles(jnp.arange(40)[None], backbones.LLAMA.rope, backbones.LLAMA.head_dim)
    attn = params["layers"]["attn"]
    q, k = (rotate(jnp.einsum("BTD,DNH->BTNH", x_BTD, attn[name]["kernel"][0]), *rope) for name in "qk")
    scores_NS = jnp.einsum("NH,SNH->NS", q[0, 35], k[0, :36]) / np.sqrt(backbones.LLAMA.head_dim)
    assert (35 - scores_NS.argmax(-1)).tolist() == [1, 2, 3, 4, 6, 7]
    assert jax.nn.softmax(scores_NS, -1).max(-1).min() > 0.8


def test_shipped_backbones_are_small_and_of_the_sizes_written_here():
    files = [os.path.join(root, name) for root, _, names in os.walk(SHIPPED) for name in names]
    assert sum(os.path.getsize(path) for path in files) <= 8 * 2**20
    clip, _ = hf.read_clip(os.path.join(SHIPPED, "clip"), feature_layer=-2, dtype="float32")
    llama, _ = hf.read_llama(os.path.join(SHIPPED, "llama"), dtype="float32")
    assert clip == backbones.CLIP
    assert llama == backbones.LLAMA


@pytest.mark.parametrize("described", ["sentence", "mixtures"])
def test_shipped_decoder_finds_answers_about_scenes_it_never_saw(words, described):
    rng = np.random.default_rng(1)
    _, params = hf.read_llama(os.path.join(SHIPPED, "llama"), dtype="float32")
    graphdef = nnx.split(nnx.eval_shape(lambda: Llama(backbones.LLAMA, rngs=nnx.Rngs(0))))[0]
    tokens_BT, mixtures_BPW, spans = np.zeros((100, 128), np.int32), [], []
    for row, scene in enumerate(world.sample_scenes(rng, 100, held_out=True)):
        question = reading.some_questions(scene, rng)[0]
        text = words.encode_text(world.caption(scene, rng))
        shown = text if described == "sentence" else [IMAGE_MARK] * backbones.CLIP.patches
        mixtures_BPW.append(reading.mixtures(scene, rng))
        asked = [reading.NEWLINE, *words.encode_text(f"{question.text} ASSISTANT:")]
        ids = [reading.BOS, *words.encode_text(f"{reading.SYSTEM} USER:"), *shown, *asked]
        reply = [*words.encode_text(question.answer), reading.EOS]
        tokens_BT[row, : len(ids) + len(reply)] = [*ids, *reply]
        spans.append((len(ids), len(ids) + len(reply)))

    @jax.jit
    def predict(params, tokens_BT, mixtures_BPW):
        return backbones.read(nnx.merge(graphdef, params), words, tokens_BT, mixtures_BPW, 0.0).argmax(-1)

    said_BT = np.asarray(predict(params, tokens_BT, 10 * np.stack(mixtures_BPW)))
    right = [(said_BT[row, a - 1 : b - 1] == tokens_BT[row, a:b]).all() for row, (a, b) in enumerate(spans)]
    assert np.mean(right) >= 0.9


def test_what_is_trained_is_what_a_folder_gives_back(words, tmp_path):
    backbones.train_llama(words, str(tmp_path / "llama"), steps=1, seconds=60, mixed=False)
    backbones.train_clip(words, str(tmp_path / "clip"), steps=1, seconds=60, pool=80)
    clip, vision = hf.read_clip(str(tmp_path / "clip"), feature_layer=-2, dtype="float32")
    llama, llm = hf.read_llama(str(tmp_path / "llama"), dtype="float32")
    _, abstract = build(ModelConfig(clip, llama))
    assert jax.tree.map(np.shape, {"vision": vision, "llm": llm}) == jax.tree.map(
        np.shape, {key: abstract[key] for key in ("vision", "llm")}
    )
