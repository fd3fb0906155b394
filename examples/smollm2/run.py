"""Teach SmolLM2-135M-Instruct to see the demo's world: `python examples/smollm2/run.py --workdir=W --decoder=D`.

D is the decoder's Hugging Face folder (decoder.py writes one without a network) or its name on the Hub. The demo's
tower learns to describe scenes with the demo's own small decoder. Then SmolLM2 in three stages: projector and tower
alone, the decoder's attention with them, both on descriptions, and at last conversations about images, among which
the decoder rehearses what it says about no image. Whatever is done stays done when it is started again.
"""

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import words

from llava_jax.data.rows import single_turn
from llava_jax.demo import files, world
from llava_jax.demo.story import BACKBONES, print_command
from llava_jax.evaluate import exact_match
from llava_jax.io import read_json, read_lines, write_json, write_rows
from llava_jax.types import InputError

HERE = pathlib.Path(__file__).parent
SCENES, HELD_OUT_SCENES = 12000, 200
CONVERSATIONS = 1000  # the first scenes have one, all have a description
TOWER = (
    "train.epochs=3",
    "train.batch_size=16",
    "data.max_length=65",
    "data.pack=False",
    "optim.lr=1e-3",
    "optim.b2=0.98",
    "optim.groups=vision=3e-3",
    "train.trainable=projector|vision",
    "train.remat=minimal",
)
PRETRAIN = (
    "train.steps=60",
    "train.batch_size=16",
    "data.max_length=96",
    "data.pack=False",
    "optim.lr=1e-2",
    "optim.b2=0.98",
    "optim.groups=vision=1e-3",
    "train.trainable=projector|vision",
)
MID = (
    "train.steps=250",
    "train.batch_size=8",
    "data.template=tokenizer",
    "data.max_length=128",
    "optim.lr=3e-4",
    "optim.b2=0.98",
    "optim.groups=projector=5e-3,vision=1e-3",
    "train.trainable=projector|vision|llm/layers/attn",
)
FINETUNE = (
    "data.template=tokenizer",
    "data.pack=True",
    "data.max_length=384",
    "data.pack_length=384",
    "train.batch_size=6",
    "optim.lr=2e-4",
    "optim.b2=0.98",
    "train.trainable=projector|llm/layers/attn",
)
ANSWER_TOKENS, GENERAL_TOKENS = 8, 32
# What the decoder is asked before it learns, so that it can rehearse its own answers: nothing that general.jsonl asks.
TOPICS = (
    "a bicycle, a bridge, a library, a guitar, a telescope, a volcano, a garden, a clock, a ship, a candle, "
    "a market, a poem, a desert, a river, a hospital, a teacher, a farmer, a novel, a computer, a battery, "
    "an engine, an orchestra, a museum, a forest, a cloud, an island, a castle, a kitchen, a train, "
    "a passport, "
    "bread, cheese, salt, rice, honey, coffee, cotton, glass, iron, paper, music, history, chemistry, "
    "mathematics, democracy, friendship, sleep, exercise, patience, electricity, gravity, rain, snow, "
    "winter, photosynthesis, evolution, trade, insurance, football, chess"
).split(", ")
ASKED = (
    "What is {}?",
    "Tell me one fact about {}.",
    "Write a short sentence about {}.",
    "Why do people care about {}?",
    "How would you explain {} to a child?",
    "Where do people come across {}?",
    "Who knows a lot about {}?",
    "Which word do you think of first when you hear of {}?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder for everything that is written")
    parser.add_argument("--decoder", required=True, help="folder or Hub name of SmolLM2-135M-Instruct")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes; fewer only to try it")
    args = parser.parse_args()
    try:
        run(args.workdir.absolute(), args.decoder, args.scenes)
    except InputError as error:
        sys.exit(f"error: {error}")


def run(folder: pathlib.Path, decoder: str, scenes: int) -> None:
    """Run every part that is not done, then score, print and write report.json. Raises InputError.

    Exits with 1 where a goal is missed.
    """
    started = time.monotonic()
    data = folder / "world"
    part(data, lambda: write_world(data, scenes))
    drawn = len(read_json(str(data / "descriptions.json"), "descriptions"))
    if drawn != scenes:
        raise InputError(f"{data} has {drawn} scenes, not the {scenes} of --scenes; name another --workdir")
    descriptions, images = str(data / "descriptions.json"), str(data / "train" / "images")
    small = (f"model.vision={BACKBONES / 'clip'}", f"model.llm={BACKBONES / 'llama'}")
    train(folder / "tower", "pretrain", descriptions, images, *small, *TOWER)
    part(folder / "tower_export", lambda: convert(folder / "tower", f"llava:{folder / 'tower_export'}"))
    taught = (f"model.vision={folder / 'tower_export' / 'clip-vision-tower'}", f"model.llm={decoder}")
    train(folder / "pretrain", "pretrain", descriptions, images, *taught, *PRETRAIN)
    # Pretraining leaves the decoder as it is, so that these are the answers of SmolLM2 itself.
    general = HERE / "general.jsonl"
    answer(folder / "pretrain", general, data, folder / "answers" / "general_before.jsonl", GENERAL_TOKENS)
    part(folder / "instructions.json", lambda: write_instructions(folder))
    train(folder / "mid", "mid", descriptions, images, f"init.model={folder / 'pretrain'}", *MID)
    instructions = str(folder / "instructions.json")
    train(folder / "finetune", "finetune", instructions, images, f"init.model={folder / 'mid'}", *FINETUNE)
    part(folder / "export", lambda: convert(folder / "finetune", f"hf:{folder / 'export'}"))
    for name in ("questions", "shuffled"):
        asked, answers = data / "held_out" / f"{name}.jsonl", folder / "answers" / f"{name}.jsonl"
        answer(folder / "export", asked, data, answers, ANSWER_TOKENS)
    answer(folder / "export", general, data, folder / "answers" / "general_after.jsonl", GENERAL_TOKENS)
    report = scored(folder)
    write_json(str(folder / "report.json"), report)
    print_report(report)
    print(f"this start took {(time.monotonic() - started) / 60:.1f} minutes")
    sys.exit(0 if all(goal["met"] for goal in report["goals"]) else 1)


def part(output: pathlib.Path, make: Callable[[], None]) -> None:
    """Make a file or folder unless it is there, which it is only when whole."""
    if output.exists():
        print(f"{output}: there already", flush=True)
    else:
        make()


# ---- data -------------------------------------------------------------------------------------------------------


def write_world(folder: pathlib.Path, scenes: int) -> None:
    """Write scenes, descriptions, conversations and the held-out questions in words that no training question has."""
    partial = folder.with_name("world.partial")
    train, _ = files.split_scenes(0, scenes, HELD_OUT_SCENES)
    # Those of seed 0 were looked at while the recipe was sought.
    _, held_out = files.split_scenes(7, 0, HELD_OUT_SCENES)
    files.write_split(str(partial / "train"), train, seed=1)
    rng = np.random.default_rng(2)
    write_rows(
        str(partial / "descriptions.json"),
        (description_row(number, scene, rng) for number, scene in enumerate(train, 1)),
    )
    captions = files.write_split(str(partial / "held_out"), held_out, seed=3)
    files.write_questions(str(partial / "held_out"), held_out, captions, seed=4)
    reword_held_out(partial / "held_out", np.random.default_rng(5))
    rng = np.random.default_rng(6)
    rows = (conversation(number, scene, rng) for number, scene in enumerate(train[:CONVERSATIONS], 1))
    write_rows(str(partial / "conversations.json"), rows)
    os.replace(partial, folder)


def reword_held_out(folder: pathlib.Path, rng: np.random.Generator) -> None:
    """Put the held-out questions in held-out words, the same ones where the images are shuffled."""
    texts: dict[str, str] = {}
    for name in ("questions", "shuffled"):
        path = str(folder / f"{name}.jsonl")
        rows = [row for _, row in read_lines(path, "questions")]
        for row in rows:
            if row["question_id"] not in texts:
                question = world.Question(row["category"], row["text"], row["answer"])
                texts[row["question_id"]] = words.reworded(question, words.HELD_OUT, rng)
            row["text"] = texts[row["question_id"]]
        write_rows(path, rows)


def description(scene: world.Scene) -> str:
    """Name every thing with its place, row by row: unlike a caption, there is only one way to write it."""
    return f"{world.listed(scene)}."


def description_row(number: int, scene: world.Scene, rng: np.random.Generator) -> dict[str, Any]:
    """Return the row that asks for the scene's description."""
    question = f"<image>\n{rng.choice(words.DESCRIBE)}"
    return single_turn(f"{number:06d}", f"{number:06d}.png", question, description(scene))


def conversation(number: int, scene: world.Scene, rng: np.random.Generator) -> dict[str, Any]:
    """Return one row: at most one question of each kind, in words for training, then the scene's description.

    No thing is asked about twice: after "Where is the red circle?" nobody needs the image to know the circle's colour.
    """
    questions, asked, told = world.questions(scene, rng), [], set()
    # Presence first: where no thing is taken yet, yes is as likely as no.
    for kind in ("presence", *rng.permutation(["colour", "shape", "position", "count"])):
        group = [each for each in questions if each.kind == kind and words.about(each) not in told]
        if group:
            asked.append(group[rng.integers(len(group))])
            told.add(words.about(asked[-1]))
    pairs = [(words.reworded(asked[i], words.TRAINED, rng), asked[i].answer) for i in rng.permutation(len(asked))]
    pairs.append((str(rng.choice(words.DESCRIBE)), description(scene)))
    turns = []
    for text, answer in pairs:
        turns.append({"from": "human", "value": text if turns else f"<image>\n{text}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": f"{number:06d}", "image": f"{number:06d}.png", "conversations": turns}


def write_instructions(folder: pathlib.Path) -> None:
    """Write the rows of stage finetune: the conversations, and what the decoder says about TOPICS by itself."""
    asked, answers = folder / "rehearsal.jsonl", folder / "answers" / "rehearsal.jsonl"
    texts = {f"{i}-{j}": ask.format(topic) for i, topic in enumerate(TOPICS) for j, ask in enumerate(ASKED)}
    write_rows(str(asked), ({"question_id": key, "text": text} for key, text in texts.items()))
    answer(folder / "pretrain", asked, folder / "world", answers, GENERAL_TOKENS)
    rows, cut = read_json(str(folder / "world" / "conversations.json"), "conversations"), 0
    for _, row in read_lines(str(answers), "answers"):
        sentences = whole_sentences(row["text"])
        if sentences:
            key = row["question_id"]
            rows.append(single_turn(f"rehearsal-{key}", None, texts[key], sentences))
        else:
            cut += 1
    write_rows(str(folder / "instructions.json"), rows)
    print(f"{len(texts) - cut} answers are rehearsed; {cut} are left out, which had not ended their first sentence")


def whole_sentences(text: str) -> str:
    """Return the text up to the end of its last whole sentence, "" where it has none."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else ""


# ---- commands ---------------------------------------------------------------------------------------------------


def train(workdir: pathlib.Path, stage: str, annotations: str, images: str, *settings: str) -> None:
    chosen = (f"data.annotations={annotations}", f"data.images={images}", *settings)
    overrides = [f"--config.{setting}" for setting in chosen]
    command("train", f"--config=tiny:stage={stage}", f"--workdir={workdir}", *overrides)


def convert(workdir: pathlib.Path, target: str) -> None:
    command("convert", f"--from=orbax:{workdir}", f"--to={target}")


def answer(model: pathlib.Path, asked: pathlib.Path, data: pathlib.Path, answers: pathlib.Path, tokens: int) -> None:
    answers.parent.mkdir(exist_ok=True)
    images = f"--images={data / 'held_out' / 'images'}"
    paths = (f"--questions={asked}", images, f"--answers={answers}")
    how = ("--template=tokenizer", "--batch_size=64", f"--max_new_tokens={tokens}")
    command("generate", f"--model={model}", *paths, *how)


def command(*parts: str) -> None:
    """Run one of our commands; a SIGTERM is passed to it, and `train` then saves what it has."""
    print_command(*parts)
    defaults = {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages: 13 to 18 % more tokens a second on two cores
    }
    process = subprocess.Popen([sys.executable, "-m", "llava_jax", *parts], env={**defaults, **os.environ})
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    code = process.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code:
        raise InputError(f"`llava-jax {parts[0]}` ended with exit code {code}; see what it says above")


# ---- figures ----------------------------------------------------------------------------------------------------


def scored(folder: pathlib.Path) -> dict[str, Any]:
    """Return exact match with the images of the questions and with shuffled ones, general answers, and the goals."""
    results = {}
    for name in ("questions", "shuffled"):
        asked, answers = folder / "world" / "held_out" / f"{name}.jsonl", folder / "answers" / f"{name}.jsonl"
        results[name] = exact_match.score(str(asked), str(answers))
    general = {when: general_answers(folder / "answers" / f"general_{when}.jsonl") for when in ("before", "after")}
    right = {when: sum(row["right"] for row in rows) for when, rows in general.items()}
    own, shuffled = (results[name]["accuracy"] for name in ("questions", "shuffled"))
    measured = (
        ("held-out questions answered right, percent", own, 85),
        ("points over shuffled images", own - shuffled, 40),
        ("general questions answered right", right["after"], right["before"]),
    )
    goals = [{"name": name, "value": value, "wanted": least, "met": value >= least} for name, value, least in measured]
    return {"goals": goals, "results": results, "general": general}


def general_answers(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return question, text and whether the text has the right word, for each question of general.jsonl."""
    texts = {row["question_id"]: row["text"] for _, row in read_lines(str(path), "answers")}
    rows = []
    for _, row in read_lines(str(HERE / "general.jsonl"), "questions"):
        text = texts[row["question_id"]]
        right = re.search(rf"\b({row['answer']})\b", text, re.IGNORECASE) is not None
        rows.append({"question": row["text"], "text": text, "right": right})
    return rows


def print_report(report: dict[str, Any]) -> None:
    print("\nExact match on held-out scenes, asked in words that were not trained, percent\n")
    print(exact_match.table({"own image": report["results"]["questions"], "shuffled": report["results"]["shuffled"]}))
    print("\nWithout an image, before and after\n")
    for before, after in zip(report["general"]["before"], report["general"]["after"], strict=True):
        print(f"{before['question']}\n  {before['text']}\n  {after['text']}{'' if after['right'] else '   (wrong)'}")
    print()
    for goal in report["goals"]:
        print(f"{'met   ' if goal['met'] else 'MISSED'} {goal['name']}: {goal['value']:.4g} ({goal['wanted']} wanted)")


if __name__ == "__main__":
    main()
