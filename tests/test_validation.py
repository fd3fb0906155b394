"""Rows held out from training: their loss is the model's own, and measuring it changes no number of the training."""

import argparse
import dataclasses
import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax import api
from llava_jax.cli.models import step_of
from llava_jax.data.records import load_records
from llava_jax.data.tokenize import encode_record, load_tokenizer
from llava_jax.evaluate.rouge import rouge_l
from llava_jax.infer import passes
from llava_jax.models import llava
from llava_jax.parallel.sharding import make_mesh
from llava_jax.train import answers, loop, validation
from llava_jax.types import InputError, LoraConfig, Record, Turn
from llava_jax.weights.source import best_step
from tests.test_sharding import TINY
from tests.tiny_run import make_inputs, make_settings, read_metrics, watched_steps

STEPS = 40
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=("attn/q", "attn/o", "mlp/down"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["unpacked", "packed"])
def runs(request, inputs, tmp_path_factory):
    """(settings with held-out rows, workdir of that run, workdir of the same run without them)."""
    how = dict(
        train__steps=STEPS, train__checkpoint_every=0, optim__lr=5e-3, data__max_length=96, data__pack=request.param
    )
    plain = make_settings(inputs, "finetune", **how)
    # Seven rows in batches of four: the last one is not full.
    held_out = dict(data__eval=f"{inputs}/captions.json", train__eval_every=5, train__keep=1, train__keep_best=True)
    measured = make_settings(inputs, "finetune", train__eval_generate=7 if request.param else 3, **held_out, **how)
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    for settings, folder in zip((measured, plain), folders, strict=True):
        loop.train(settings, str(folder))
    return measured, *folders


def without(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith("eval")} for row in rows]


def test_training_is_the_same_to_the_last_bit(runs):
    _, measured, plain = runs
    rows = read_metrics(measured)
    assert [row["step"] for row in rows if "eval_loss" in row] == list(range(4, STEPS, 5))
    assert without(rows) == read_metrics(plain) and len(rows) == STEPS
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"])
    assert best_step(str(measured)) == best["step"] + 1
    assert {path.name for path in (measured / "checkpoints").iterdir()} == {str(best["step"] + 1), str(STEPS)}
    ours, theirs = (api.load(f"orbax:{folder}").params for folder in (measured, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_loss_is_that_of_the_models_logits_on_each_row_once(runs, inputs):
    """Derived row by row from the logits of the saved model."""
    settings, measured, _ = runs
    model, tokenizer = api.load(f"orbax:{measured}"), load_tokenizer(str(inputs / "llm"))
    total, count = 0.0, 0
    for record in load_records(f"{inputs}/captions.json"):
        patches = model.config.vision.patches
        tokens, targets = encode_record(record, settings.data, tokenizer, model.config.image_token_id, patches)
        shown = model.processor.prompt(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": f"{inputs}/images/{record.images[0]}"},
                        {"type": "text", "text": "?"},
                    ],
                }
            ]
        ).pixels
        logits_TV = model.logits(tokens[None], shown.transpose(0, 3, 1, 2))[0].astype(np.float64)
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        places = np.flatnonzero(targets[1:])
        total -= logprobs_TV[places, tokens[places + 1]].sum()
        count += len(places)
    last = read_metrics(measured)[-1]
    assert last["eval_targets"] == count
    assert last["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_answers_are_those_of_the_saved_model(runs, inputs):
    """The references of the first three rows are short, those of all seven are not."""
    settings, measured, _ = runs
    last = read_metrics(measured)[-1]
    assert last["eval_answers"] == settings.train.eval_generate
    if settings.data.pack:
        assert 0 < last["eval_rouge_l"] <= 100
        return
    rows = json.loads((inputs / "captions.json").read_text())[:3]
    images = [f"{inputs}/images/{row['image']}" for row in rows]
    said = api.load(f"orbax:{measured}").generate(["<image>"] * 3, images, max_new_tokens=32)
    right = [
        answer.rstrip(".") == row["conversations"][1]["value"][:-1] for answer, row in zip(said, rows, strict=True)
    ]
    assert last["eval_exact_match"] == pytest.approx(100 * sum(right) / 3) and any(right)


@pytest.mark.parametrize("changes", [{}, dict(lora=LORA), dict(lora=LORA, nf4=True)], ids=["all", "lora", "qlora"])
def test_answers_run_on_the_weights_that_are_trained(changes):
    config = dataclasses.replace(TINY, **changes)
    # Adapters begin with no effect.
    params = jax.tree.map(lambda x: x if x.dtype == jnp.uint8 else x + 0.01, llava.init(config, 0))
    whole = nnx.merge(llava.build(config)[0], params).llm
    by_block = llava.unstacked_model(config, answers.copied_for_answers(llava.split_parts(params), config)).llm
    x_BTD = jax.random.normal(jax.random.key(1), (2, 5, TINY.llm.width))
    positions_BT = jnp.broadcast_to(jnp.arange(5), (2, 5))
    hidden_BTD, cache = passes.prefill(by_block, x_BTD[:, :4], positions_BT[:, :4], jnp.ones((2, 4), jnp.int32))
    last_B1D = passes.extend(by_block, x_BTD[:, 4:], passes.widened(cache, 5))[0]
    got_BTD, want_BTD = jnp.concatenate([hidden_BTD, last_B1D], axis=1), whole(x_BTD, positions_BT)
    np.testing.assert_allclose(got_BTD, want_BTD, atol=1e-5)
    np.testing.assert_allclose(passes.logits(by_block, got_BTD), whole.logits(want_BTD), atol=1e-4)


def test_the_best_checkpoint_stays_and_is_known_after_a_kill(inputs, tmp_path, monkeypatch):
    killed = KeyboardInterrupt
    losses = iter([math.inf, math.nan, 1.0, killed, 2.0, killed, 3.0, 4.0])

    def measure(*_):
        found = next(losses)
        if found is killed:
            raise found
        return {"eval_loss": found, "eval_targets": 1}

    def train(rows: str) -> None:
        loop.train(make_settings(inputs, "pretrain", data__eval=f"{inputs}/{rows}", **how), str(tmp_path))

    def kept() -> set[str]:
        return {path.name for path in (tmp_path / "checkpoints").iterdir()}

    monkeypatch.setattr(loop, "evaluate", measure)
    monkeypatch.setattr(loop, "compile_step", watched_steps(loop.compile_step)[0])
    how = dict(train__steps=6, train__checkpoint_every=2, train__eval_every=1, train__keep_best=True, train__keep=1)
    how |= dict(data__max_length=32)
    args, run = argparse.Namespace(step="best"), f"orbax:{tmp_path}"
    with pytest.raises(killed):
        train("captions.json")
    assert kept() == {"3"}  # not the one before it, whose loss is no number
    with pytest.raises(killed):
        train("captions.json")
    assert kept() == {"3", "4"} and step_of(args, run) == 3
    others = json.loads((inputs / "captions.json").read_text())[1:]
    (inputs / "others.json").write_text(json.dumps(others))
    train("others.json")  # whose losses are compared with one another alone
    assert next(losses, "all used") == "all used"
    assert kept() == {"5", "6"} and step_of(args, run) == 5
    with pytest.raises(InputError, match="no checkpoint says the loss"):
        step_of(args, str(inputs / "llava"))


@pytest.mark.parametrize("template", ["v0", "v0_mmtag", "qwen", "llama_3", "v1", "plain"])
def test_a_question_is_asked_as_generate_asks_it(inputs, template):
    """Where the headers of a template are trained, too, and with what comes before and after the question."""
    settings = make_settings(inputs, "finetune", data__template=template, data__eval="-", train__eval_generate=1)
    llava = api.load(f"{inputs}/llava")
    tokenizer = llava.processor.tokenizer
    config = dataclasses.replace(llava.config, llm=dataclasses.replace(llava.config.llm, max_positions=512))
    run = types.SimpleNamespace(config=config, mesh=make_mesh(settings.mesh))
    question, image = "<image>" if template == "plain" else "What is\n<image>", f"{inputs}/images/0.png"
    turns = [Turn("human", question), Turn("gpt", " A red square.\n")]
    ask = [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "image", "image": image}]}]
    if template != "plain":
        # An answer that is not trained is part of the question, and later images are not.
        turns = [Turn("human", "Hello!"), Turn("gpt", "Hi.", False), *turns, Turn("human", "<image>"), Turn("gpt", "?")]
        ask = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}, *ask]
    record = Record("a", ("0.png", "1.png")[: 1 + (template != "plain")], tuple(turns))
    asked = answers.open_questions(settings, settings.data, tokenizer, run, [record])
    processor = dataclasses.replace(llava.processor, config=config, template=template)
    np.testing.assert_array_equal(asked.prompts[0].tokens, processor.tokens(ask))
    assert asked.references == ["A red square."] and len(asked.prompts[0].pixels) == 1
    assert asked.limit > len(tokenizer.encode_text("A red square."))


def test_rouge_l_by_hand():
    # "a b c d" and "b a c": two words in order in both.
    assert rouge_l("A b, c d.", "b a c") == pytest.approx(2 * 2 / 7)
    assert (rouge_l("", "a"), rouge_l("a", ""), rouge_l("a dog", "A dog!")) == (0, 0, 1)


def test_a_signal_cuts_a_pass_short(monkeypatch):
    seen = []

    class Data:
        def set_state(self, state):
            self.batches = iter("abc"[state["batches"] :])

        def __next__(self):
            return next(self.batches)

    def nll(params, frozen, batch):
        seen.append(batch)
        return 2.0, 1

    monkeypatch.setattr(validation, "global_batch", lambda batch, mesh, rows: batch)
    plan = types.SimpleNamespace(steps=3, shape=types.SimpleNamespace(rows=1))
    held_out = validation.HeldOut("", None, plan, Data(), nll)
    assert validation.evaluate(held_out, {}, {}, lambda: len(seen) == 2) == {}
    assert seen == ["a", "b"]
    # The next pass begins with the first batch.
    assert validation.evaluate(held_out, {}, {}, lambda: False) == {"eval_loss": 2.0, "eval_targets": 3}


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(train__eval_every=5), "data.eval, which is empty"),
        (dict(data__eval_images="somewhere"), "data.eval, which is empty"),
        (dict(train__keep_best=True), "data.eval, which is empty"),
        (dict(train__eval_generate=5), "data.eval, which is empty"),
        (dict(data__eval="nowhere.json"), "nowhere.json"),
        (dict(data__eval="{0}/captions.json", train__eval_generate=8), "data.eval has 7 rows"),
        (dict(data__eval="{0}/captions.json:0.5,{0}/rows.json:0.5"), "each held-out row counts once"),
        (dict(data__eval="{0}/broken.json"), "broken.json: 1 of 1 rows cannot be trained"),
    ],
)
def test_bad_held_out_rows_are_one_line_before_the_first_update(inputs, tmp_path, changes, says):
    (inputs / "broken.json").write_text(
        json.dumps(
            [
                {
                    "id": "a",
                    "image": "no.png",
                    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dog."}],
                }
            ]
        )
    )
    changes = {key: value.format(inputs) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(InputError, match=says):
        loop.train(make_settings(inputs, "finetune", **changes), str(tmp_path / "run"))


def test_a_held_out_row_that_turns_out_unreadable_is_left_out_and_said_or_loses_no_update(inputs, tmp_path, capsys):
    rows = json.loads((inputs / "captions.json").read_text())[:3]
    rows[1]["image"] = "cut.png"
    whole = (inputs / "images" / "0.png").read_bytes()
    (inputs / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (inputs / "cut.json").write_text(json.dumps(rows))
    # Adapters with dropout: a pass drops nothing.
    how = dict(data__eval=f"{inputs}/cut.json", train__eval_every=2, train__eval_generate=1, lora__dropout=0.1)
    loop.train(make_settings(inputs, "lora", data__max_rejects=1.0, **how), str(tmp_path / "run"))
    assert capsys.readouterr().err.count("left out row 1") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row] == [1, 3]
    with pytest.raises(InputError, match="cut.png"):
        loop.train(make_settings(inputs, "lora", data__max_rejects=0.0, **how), str(tmp_path / "strict"))
    assert [row["step"] for row in read_metrics(tmp_path / "strict")] == [0, 1]
    assert (tmp_path / "strict" / "checkpoints" / "2").is_dir()
