"""The facade: where models come from, what can be asked of them, and what is refused."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llava_jax
from llava_jax import api
from llava_jax.data.images import preprocess
from llava_jax.data.templates import TEMPLATES, render
from llava_jax.data.tokenize import encode
from llava_jax.models import llava
from llava_jax.train.loop import train
from llava_jax.types import IMAGE_MARK, InputError, Sampling, Turn
from llava_jax.weights import hf
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras
from tests.tiny_llava import VOCAB, config, draw_image, model, sharp_params
from tests.tiny_run import make_inputs, make_settings

QUESTIONS = ["What is this?", "Tell me about the two of them.", "Who are you?"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model(str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def shown():
    return [draw_image(0), [draw_image(1), draw_image(2)], None]


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory) -> pathlib.Path:
    base = tmp_path_factory.mktemp("exported")
    tokenizer = str(tmp_path_factory.getbasetemp() / "tokenizer")
    extras = LlavaExtras("v0", image_position="keep", tokenizer=tokenizer)
    write_llava(str(base / "folder"), tiny.config, sharp_params(config()), extras)
    return base / "folder"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    base = tmp_path_factory.mktemp("run")
    make_inputs(base)
    train(make_settings(base, "pretrain", train__steps=1), str(base / "work"))
    return base / "work"


# ---- asking -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_rendered_encoded_and_expanded_as_in_training(tiny):
    prompt = tiny.prompt(api.question("What is this?", draw_image(3)))
    turns = [Turn("human", "<image>\nWhat is this?")]
    marked = encode(render(turns, TEMPLATES["v1"], open_turn=True), tiny.processor.tokenizer).tokens
    at = int(np.flatnonzero(marked == IMAGE_MARK)[0])
    patches = tiny.config.vision.patches
    assert list(prompt.tokens) == [*marked[:at], *[VOCAB] * patches, *marked[at + 1 :]]
    np.testing.assert_array_equal(prompt.pixels, preprocess(draw_image(3), 16, "pad")[None])


def test_generate_equals_single_questions_and_streams(tiny, shown):
    together = tiny.generate(QUESTIONS, shown, max_new_tokens=12)
    assert len(set(together)) == 3 and all(together)
    for text, images, answer in zip(QUESTIONS, shown, together, strict=True):
        assert tiny.generate(text, images, max_new_tokens=12) == [answer]
        pieces = list(tiny.stream(api.question(text, images), max_new_tokens=12))
        assert "".join(pieces) == answer and len(pieces) > 2
    assert tiny.generate(QUESTIONS, shown, max_new_tokens=12, batch_size=2) == together


def test_streamed_text_equals_batched_text_when_drawing(tiny, shown):
    how = dict(max_new_tokens=12, temperature=1.2, top_p=0.9, seed=4)
    answer = tiny.generate(QUESTIONS, shown, **how)[0]
    assert "".join(tiny.stream(api.question(QUESTIONS[0], shown[0]), **how)) == answer


def test_images_change_the_answer(tiny, tmp_path):
    draw_image(1).save(tmp_path / "1.png")
    one, other, path, none = tiny.generate(
        ["What is this?"] * 4, [draw_image(0), draw_image(1), str(tmp_path / "1.png"), None], max_new_tokens=12
    )
    assert other == path and len({one, other, none}) == 3


def test_an_answer_ends_at_the_first_stop_string(tiny, monkeypatch):
    asked = api.question("Who are you?", None)
    free = tiny.generate("Who are you?", max_new_tokens=12)[0]
    stop = free[4:6]
    monkeypatch.setitem(TEMPLATES, "stopping", dataclasses.replace(tiny.processor.rules, stop=(stop,)))
    stopped = api.assemble("tiny", sharp_params(config()), dataclasses.replace(tiny.processor, template="stopping"))
    assert stopped.generate("Who are you?", max_new_tokens=12) == [free[: free.find(stop)].strip()]
    assert "".join(stopped.stream(asked, max_new_tokens=12)) == free[: free.find(stop)].strip()
    # The device stopped there: nothing was drawn in vain.
    ids = next(stopped.engine(1).answers([stopped.prompt(asked)], Sampling(max_new_tokens=12))).ids
    assert tiny.processor.tokenizer.decode(ids).strip() == free[: free.find(stop) + 2]


@pytest.mark.parametrize(
    "messages,message",
    [
        ([dict(role="system", content="x")], "the last one to be the user's"),
        ([dict(role="tool", content="x")], "message 1: role is 'tool', expected 'user'"),
        ([dict(role="user", content="x"), dict(role="user", content="x")], "message 2: role is 'user'"),
        ([dict(role="user", content="x"), dict(role="assistant", content="x")], "the last one to be the user's"),
        ([], "0 messages"),
        ([dict(role="user", content=" ")], "message 1: is empty"),
        ([dict(role="user")], "content is NoneType"),
        ([dict(role="user", content=[dict(type="video")])], "a part is .*expected"),
        ([dict(role="user", content="a <image> b")], "1 <image> in the text for 0 images"),
        (api.question("<image> or <image>?", [draw_image(0)]), "2 <image> in the text for 1 images"),
        ([*api.question("x", None), dict(role="assistant", content="<image>")], "an image in an answer"),
        (api.question("word " * 200, None), "prompt of .* tokens"),
        (api.question("x", "nowhere.png"), "nowhere.png: no such file"),
    ],
)
def test_what_cannot_be_asked(tiny, messages, message):
    with pytest.raises(InputError, match=message):
        tiny.prompt(messages)


def test_wrong_numbers_of_things(tiny):
    with pytest.raises(InputError, match="1 images for 2 prompts"):
        tiny.generate(["a", "b"], [draw_image(0)])
    with pytest.raises(InputError, match="batch_size is 0"):
        tiny.generate("a", batch_size=0)


# ---- logits ---------------------------------------------------------------------------------------------------------


def test_logits_of_either_padding_equal_the_model_on_each_row(tiny, shown):
    prompts = [tiny.prompt(api.question(text, shown)) for text, shown in zip(QUESTIONS, shown, strict=True)]
    longest = max(len(prompt.tokens) for prompt in prompts)
    pixels_BCHW = np.concatenate([prompt.pixels for prompt in prompts]).transpose(0, 3, 1, 2)
    singles = []
    for prompt in prompts:
        images = prompt.pixels.transpose(0, 3, 1, 2) if len(prompt.pixels) else None
        singles.append(tiny.logits(prompt.tokens[None], images)[0])
    whole = nnx.merge(llava.build(config())[0], jax.tree.map(jnp.asarray, sharp_params(config())))
    direct = whole(prompts[1].tokens[None], prompts[1].pixels[None])[0]
    np.testing.assert_allclose(singles[1], direct, atol=1e-5 * np.abs(direct).max())
    for side in ("left", "right"):
        tokens, mask = (np.zeros((3, longest), np.int64) for _ in range(2))
        for row, prompt in enumerate(prompts):
            size = len(prompt.tokens)
            where = slice(longest - size, None) if side == "left" else slice(0, size)
            tokens[row, where], mask[row, where] = prompt.tokens, 1
        logits = tiny.logits(tokens, pixels_BCHW, mask)
        assert logits.dtype == np.float32 and logits.shape == (3, longest, VOCAB)
        for row, whole in enumerate(singles):
            np.testing.assert_allclose(logits[row][mask[row] == 1], whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_score_of_an_answer_is_that_of_its_ids_and_what_ends_it(tiny, shown, images):
    """Derived token by token, each after a prompt that ends before it; an earlier answer does not count."""
    talk = [*api.question("Who?", list(map(draw_image, range(images)))), {"role": "assistant", "content": "I am."}]
    talk += api.question("What is this?", None)
    start, ids = tiny.prompt(talk), tiny.processor.tokenizer.encode_text("A red dog.")
    ids.append(tiny.processor.tokenizer.special_id("</s>"))
    total, greedy, tokens_1T = 0.0, True, np.append(start.tokens, [0] * len(ids))[None]
    for length, token in enumerate(ids, start=len(start.tokens)):
        shown_BCHW = start.pixels.transpose(0, 3, 1, 2) if images else None
        mask_1T = (np.arange(tokens_1T.shape[1]) < length)[None]
        logits_V = tiny.logits(tokens_1T, shown_BCHW, mask_1T)[0, length - 1].astype(np.float64)
        total += logits_V[token] - np.log(np.exp(logits_V).sum())
        greedy &= logits_V.argmax() == token
        tokens_1T[0, length] = token
    logprob, is_greedy = tiny.score(talk, "A red dog.")
    assert logprob == pytest.approx(total, abs=1e-3) and is_greedy == greedy


def test_logits_refuse_images_that_do_not_fit(tiny):
    tokens = np.full((1, 9), VOCAB)
    with pytest.raises(InputError, match=r"image tokens \(id 400\) a row are \[9\] for 2 images; expected 4"):
        tiny.logits(tokens, np.zeros((2, 3, 16, 16)))
    with pytest.raises(InputError, match=r"pixels are \[2, 16, 16, 3\]"):
        tiny.logits(tokens[:, :8], np.zeros((2, 16, 16, 3)))


def test_weights_of_eight_bits(tiny, shown):
    config_of_eight_bits = dataclasses.replace(tiny.config, int8=True)
    small = api.assemble(
        "small", sharp_params(config()), dataclasses.replace(tiny.processor, config=config_of_eight_bits)
    )
    prompt = tiny.prompt(api.question(QUESTIONS[0], shown[0]))
    images = prompt.pixels.transpose(0, 3, 1, 2)
    whole, rounded = (model.logits(prompt.tokens[None], images)[0] for model in (tiny, small))
    error = np.sqrt(np.mean((whole - rounded) ** 2)) / whole.std()
    assert 1e-4 < error < 0.05 and small.about["dtype"] == "float32, int8 weights"
    assert small.generate(QUESTIONS, shown, max_new_tokens=4)
    up = small.params["llm"]["layers"][1]["mlp"]["up"]["kernel"]
    assert up["codes"].dtype == jnp.int8 and np.abs(up["codes"]).max() == 127
    kernel = tiny.params["llm"]["layers"][1]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(up["codes"] * up["scale"][:, None], kernel, atol=np.max(up["scale"]) / 2 + 1e-6)


def test_weights_lie_in_one_buffer_on_a_cpu(tiny):
    found = sorted((leaf.unsafe_buffer_pointer(), leaf.nbytes) for leaf in jax.tree.leaves(tiny.params))
    assert all(0 <= start - (before + size) < 64 for (before, size), (start, _) in itertools.pairwise(found))


# ---- loading --------------------------------------------------------------------------------------------------------


def test_an_exported_folder_says_how_it_is_asked(exported, tiny):
    loaded, bare = llava_jax.load(f"hf:{exported}"), api.load(str(exported), template="v1", dtype="bfloat16")
    about = loaded.about
    assert (about["template"], about["aspect"], about["image_position"]) == ("v0", "crop", "keep")
    assert loaded.name == "folder" and loaded.config.dtype == "float32" and loaded.weights == tiny.weights
    assert bare.about["template"] == "v1" and bare.params["projector"]["linear_1"]["kernel"].dtype == jnp.bfloat16
    asked = dataclasses.replace(tiny.processor, template="v0", aspect="crop", image_position="keep")
    same = api.assemble("same", sharp_params(config()), asked)
    question = ("What is this?", draw_image(0))
    assert loaded.generate(*question, max_new_tokens=8) == same.generate(*question, max_new_tokens=8)


def test_a_workdir_answers_as_it_was_trained(workdir):
    loaded = llava_jax.load(f"orbax:{workdir}")
    assert loaded.about["template"] == "plain" and loaded.name == "work"
    assert isinstance(loaded.generate("<image>", draw_image(0), max_new_tokens=4)[0], str)


def test_sources_that_are_none(tmp_path, workdir, exported):
    (tmp_path / "empty").mkdir()
    for source, message in [
        (f"zip:{tmp_path}", "form 'zip' is not read; expected hf:DIR"),
        (f"{tmp_path}/none", "no folder .*none'; expected hf:DIR"),
        (f"{tmp_path}/empty", "the folder holds none of them"),
        (f"hf:{workdir}", "holds a workdir of train"),
        (f"orbax:{exported}", "holds a config.json without checkpoints/"),
    ]:
        with pytest.raises(InputError, match=message):
            api.load(source)
    with pytest.raises(InputError, match="--vision and --base are for original LLaVA folders; .*is a workdir"):
        api.load(str(workdir), vision=str(tmp_path))
    with pytest.raises(InputError, match="unknown template 'v9'"):
        api.load(str(exported), template="v9")
    with pytest.raises(InputError, match="dtype 'float64' is not known"):
        api.load(str(exported), dtype="float64")


def test_float16_folders_compute_in_bfloat16(exported, tmp_path):
    config = json.loads((exported / "config.json").read_text())
    for stored, dtype in (("float16", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": stored}))
        assert hf.stored_dtype(str(tmp_path)) == dtype


def test_the_package_is_imported_without_jax():
    code = "import sys, llava_jax, llava_jax.data.templates; llava_jax.Sampling; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llava_jax.nothing
