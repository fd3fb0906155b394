"""Teach SmolLM2-135M-Instruct to see the demo's world: `python examples/smollm2/run.py --workdir=W --decoder=D`.

D is the decoder's Hugging Face folder (decoder.py writes one without a network) or its name on the Hub. The projector
is fitted so that the demo's CLIP says in words what is where (projector.py). Then the decoder's attention learns from
conversations about images, among which it rehearses what it says about no image, and its weights halfway and at the
end are averaged. Whatever is done stays done when it is started again.
"""

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from safetensors.numpy import load_file
from scenes import write_world

from llava_jax.data.rows import single_turn
from llava_jax.demo.story import BACKBONES, print_command
from llava_jax.evaluate import exact_match
from llava_jax.io import read_json, read_lines, write_json, write_rows
from llava_jax.types import InputError
from llava_jax.weights.tensors import save_checked

HERE = pathlib.Path(__file__).parent
SCENES = 3000
AVERAGE_EVERY = 100  # updates; about half of the 193, so that two checkpoints are averaged
UNTRAINED = ("data.template=tokenizer", "train.batch_size=1", "train.steps=1")  # whose rate is 0
FINETUNE = (
    "data.template=tokenizer",
    "data.pack=True",
    "train.batch_size=6",
    "optim.lr=2e-4",
    "optim.b2=0.98",
    "train.trainable=llm/layers/attn",
    f"train.checkpoint_every={AVERAGE_EVERY}",
    "train.keep=20",  # every interruption saves one more, and update 100 must still be there in the end
)
ANSWER_TOKENS, GENERAL_TOKENS, REHEARSED_TOKENS = 8, 32, 256


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
    drawn = len(read_json(str(data / "train" / "captions.json"), "captions")["images"])
    if drawn != scenes:
        raise InputError(f"{data} has {drawn} scenes, not the {scenes} of --scenes; name another --workdir")
    conversations, images = str(data / "conversations.json"), str(data / "train" / "images")
    models = (f"model.vision={BACKBONES / 'clip'}", f"model.llm={decoder}")
    train(folder / "untrained", "pretrain", conversations, images, *models, *UNTRAINED)
    general = HERE / "general.jsonl"
    answer(folder / "untrained", general, data, folder / "answers" / "general_before.jsonl", GENERAL_TOKENS)
    instructions, fitted = folder / "instructions.json", folder / "projector.safetensors"
    part(instructions, lambda: write_instructions(folder))
    part(fitted, lambda: python(str(HERE / "projector.py"), str(folder / "untrained"), str(data), str(fitted)))
    start = (f"init.model={folder / 'untrained'}", f"init.projector={fitted}")
    train(folder / "finetune", "finetune", str(instructions), images, *start, *FINETUNE)
    part(folder / "export", lambda: export(folder / "finetune", folder / "export"))
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


def write_instructions(folder: pathlib.Path) -> None:
    """Write the rows of stage finetune: the conversations, and what the decoder itself says to rehearsal.txt.

    Those answers are drawn at temperature 1: on average such draws leave the decoder as it is, while its likeliest
    answers, learned, would make it say them more often still.
    """
    asked, answers = folder / "rehearsal.jsonl", folder / "answers" / "rehearsal.jsonl"
    texts = {str(i): line for i, line in enumerate((HERE / "rehearsal.txt").read_text().splitlines(), 1)}
    write_rows(str(asked), ({"question_id": key, "text": text} for key, text in texts.items()))
    answer(folder / "untrained", asked, folder / "world", answers, REHEARSED_TOKENS, temperature=1)
    rows, cut = read_json(str(folder / "world" / "conversations.json"), "conversations"), 0
    general = "|".join(row["answer"] for _, row in read_lines(str(HERE / "general.jsonl"), "questions"))
    for _, row in read_lines(str(answers), "answers"):
        sentences = whole_sentences(row["text"])
        if sentences and not re.search(rf"\b({general})\b", sentences, re.IGNORECASE):
            key = row["question_id"]
            rows.append(single_turn(f"rehearsal-{key}", None, texts[key], sentences))
        else:
            cut += 1
    write_rows(str(folder / "instructions.json"), rows)
    print(f"{len(texts) - cut} answers are rehearsed; {cut} are not: no whole sentence, or a word of general.jsonl's")


def whole_sentences(text: str) -> str:
    """Return the text up to the end of its last whole sentence, "" where it has none."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else ""


# ---- commands ---------------------------------------------------------------------------------------------------


def train(workdir: pathlib.Path, stage: str, annotations: str, images: str, *settings: str) -> None:
    chosen = (f"data.annotations={annotations}", f"data.images={images}", *settings)
    overrides = [f"--config.{setting}" for setting in chosen]
    command("train", f"--config=tiny:stage={stage}", f"--workdir={workdir}", *overrides)


def export(workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Write a Hugging Face folder with the mean of the weights after every AVERAGE_EVERY updates and after the last.

    The mean of checkpoints (Vaswani et al. 2017, section 6.1) answered more general questions than the last one.
    Raises InputError where one of them is gone.
    """
    last = max(int(each.name) for each in (workdir / "checkpoints").iterdir() if each.name.isdigit())
    steps = [*range(AVERAGE_EVERY, last, AVERAGE_EVERY), last]
    scratch = target.with_name(f"{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    models = [scratch / str(step) / target.name for step in steps]
    for step, model in zip(steps, models, strict=True):
        command("convert", f"--from=orbax:{workdir}", f"--step={step}", f"--to=hf:{model}")
    weights = [load_file(model / "model.safetensors") for model in models]
    mean = {name: sum(each[name] for each in weights) / len(weights) for name in weights[0]}
    save_checked(str(models[-1] / "model.safetensors"), mean)
    if len(steps) > 1:
        with open(models[-1] / "README.md", "a") as card:
            card.write(f"\nThe weights are the mean of those after {' and '.join(map(str, steps))} updates.\n")
    os.replace(models[-1], target)
    shutil.rmtree(scratch)


def answer(
    model: pathlib.Path,
    asked: pathlib.Path,
    data: pathlib.Path,
    answers: pathlib.Path,
    tokens: int,
    temperature: float = 0,
) -> None:
    answers.parent.mkdir(exist_ok=True)
    images = f"--images={data / 'held_out' / 'images'}"
    paths = (f"--questions={asked}", images, f"--answers={answers}")
    how = ("--template=tokenizer", "--batch_size=64", f"--max_new_tokens={tokens}", f"--temperature={temperature}")
    command("generate", f"--model={model}", *paths, *how)


def command(*parts: str) -> None:
    print_command(*parts)
    python("-m", "llava_jax", *parts)


def python(*parts: str) -> None:
    """Run Python with these arguments; a SIGTERM is passed to it, and `train` then saves what it has."""
    defaults = {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages: 13 to 18 % more tokens a second on two cores
    }
    process = subprocess.Popen([sys.executable, *parts], env={**defaults, **os.environ})
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    code = process.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code:
        raise InputError(f"`python {' '.join(parts[:3])}` ended with exit code {code}; see what it says above")


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
