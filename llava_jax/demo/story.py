"""Run the paper end to end at a small size, with the same commands and functions as a real run (`demo`).

Every finished part is recorded in the workdir (parts.json) and skipped the next time; a part that was stopped halfway
resumes by itself where its command can (train, generate).
"""

import dataclasses
import json
import os
import pathlib
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from llava_jax.demo import files, report
from llava_jax.evaluate import exact_match
from llava_jax.io import read_lines, write_json, write_rows
from llava_jax.types import InputError

BACKBONES = pathlib.Path(__file__).parent / "backbones"
CONFIG = "tiny"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the demo is; all other settings of the two stages are in its recipe."""

    vision: str = str(BACKBONES / "clip")
    llm: str = str(BACKBONES / "llama")
    seed: int = 0
    train_scenes: int = 6000
    held_out_scenes: int = 300
    detail_rows: int = 400
    reasoning_rows: int = 400
    pretrain: tuple[str, ...] = (
        "train.steps=540",
        "train.batch_size=16",
        "data.max_length=65",  # the longest caption
        "data.pack=False",
        "optim.lr=1e-2",
        "optim.b2=0.98",
        "train.remat=minimal",
        "train.checkpoint_every=270",
    )
    finetune: tuple[str, ...] = (
        "train.steps=360",
        "train.batch_size=8",
        "data.max_length=128",
        "optim.lr=1e-3",
        "optim.b2=0.98",
        "optim.groups=projector=3e-3",
        "train.remat=minimal",
        "train.checkpoint_every=180",
    )
    answer_batch: int = 64
    answer_tokens: int = 12


@dataclasses.dataclass(frozen=True)
class Condition:
    """One way to answer the held-out questions: its name in tables, a trained model's folder, a questions file."""

    name: str
    model: str
    questions: str


CONDITIONS = {
    "both_stages": Condition("both stages", "finetune", "questions"),
    "shuffled": Condition("shuffled", "finetune", "shuffled"),
    "stage_1_only": Condition("stage 1 only", "pretrain", "questions"),
    "without_stage_1": Condition("without stage 1", "finetune_without_stage_1", "questions"),
    # Stage 1 leaves the decoder as it is, to the bit: without an image its model is the shipped decoder alone.
    "read_as_text": Condition("read as text", "pretrain", "text"),
}
MODELS = tuple(dict.fromkeys(condition.model for condition in CONDITIONS.values()))
CARDS, MISTAKES = 9, 6


def play(story: "Story") -> dict[str, Any]:
    """Run every part in its turn, except those done before; return the content of report.json. Raises InputError."""
    story.part("draw the world", story.draw_world)
    story.part("write instructions", story.write_instructions)
    story.part("stage 1, pretrain", story.pretrain)
    story.part("stage 2, finetune", lambda: story.finetune("finetune", with_stage_1=True))
    story.part("stage 2 without stage 1", lambda: story.finetune("finetune_without_stage_1", with_stage_1=False))
    for model in MODELS:
        names = ", ".join(condition.name for condition in CONDITIONS.values() if condition.model == model)
        story.part(f"answer: {names}", lambda model=model: story.answer(model))
    return story.finish()


class Story:
    """The parts of the demo, in one workdir."""

    def __init__(self, workdir: str, sizes: Sizes):
        self.sizes = sizes
        self.folder = pathlib.Path(workdir).absolute()
        self.world = self.folder / "world"
        for spec in (sizes.vision, sizes.llm):
            if not spec.startswith("random:") and not os.path.isfile(os.path.join(spec, "config.json")):
                make = f"make it again with python -m llava_jax.demo.backbones --output={BACKBONES}"
                raise InputError(f"{spec}: the demo's backbone is not there; {make}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._done: dict[str, float] = {}
        self._peak, self._number = 0, 0
        self._read_parts()

    def _read_parts(self) -> None:
        path = self.folder / "parts.json"
        if not path.is_file():
            if any(self.folder.iterdir()):
                raise InputError(f"--workdir={self.folder}: is not empty and holds no demo; name another folder")
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["sizes"] != json.loads(json.dumps(dataclasses.asdict(self.sizes))):
            other = "holds a demo of other sizes; remove the folder or name another one"
            raise InputError(f"--workdir={self.folder}: {other}")
        self._done, self._peak = content["seconds"], content["peak_memory_bytes"]

    def part(self, name: str, action: Callable[[], None]) -> None:
        """Run one part and record that it is done, or print that it was done before."""
        self._number += 1
        total = 5 + len(MODELS)
        if name in self._done:
            print(f"[{self._number}/{total}] {name}: done before, in {self._done[name]:.1f} s", flush=True)
            return
        print(f"\n[{self._number}/{total}] {name}", flush=True)
        started = time.monotonic()
        action()
        self._done[name] = time.monotonic() - started
        self._peak = max(self._peak, peak_memory())
        sizes = dataclasses.asdict(self.sizes)
        content = {"sizes": sizes, "seconds": self._done, "peak_memory_bytes": self._peak}
        write_json(str(self.folder / "parts.json"), content)
        print(f"  {self._done[name]:.1f} s", flush=True)

    def draw_world(self) -> None:
        sizes = self.sizes
        train, held_out = files.split_scenes(sizes.seed, sizes.train_scenes, sizes.held_out_scenes)
        captions = files.write_split(str(self.world / "train"), train, sizes.seed + 1)
        rows = files.write_caption_rows(str(self.world / "captions.json"), captions, sizes.seed + 2)
        print(f"  {len(train)} training scenes, {rows} captions for stage 1: {self._relative(self.world / 'train')}")
        captions = files.write_split(str(self.world / "held_out"), held_out, sizes.seed + 3)
        asked = files.write_questions(str(self.world / "held_out"), held_out, captions, sizes.seed + 4)
        kinds = ", ".join(f"{count} {kind}" for kind, count in asked.items())
        print(f"  {len(held_out)} held-out scenes, not among the training scenes; questions: {kinds}")

    def write_instructions(self) -> None:
        limits = {"conversation": 0, "detail": self.sizes.detail_rows, "reasoning": self.sizes.reasoning_rows}
        rows = []
        for kind, limit in limits.items():
            output = self.world / f"{kind}.json"
            self.command(
                "synthesize",
                f"--contexts={self._relative(self.world / 'train')}",
                f"--kind={kind}",
                "--teacher=embedded",
                f"--output={self._relative(output)}",
                f"--seed={self.sizes.seed}",
                f"--limit={limit}",
            )
            rows += json.loads(output.read_text(encoding="utf-8"))
        write_rows(str(self.world / "instructions.json"), rows)
        print(f"  {len(rows)} rows for stage 2: {self._relative(self.world / 'instructions.json')}")

    def pretrain(self) -> None:
        self._train("pretrain", "pretrain", "captions.json", self.sizes.pretrain)

    def finetune(self, name: str, with_stage_1: bool) -> None:
        start = [f"init.projector={self._relative(self.folder / 'pretrain')}"] if with_stage_1 else []
        self._train(name, "finetune", "instructions.json", [*self.sizes.finetune, *start])

    def _train(self, name: str, stage: str, annotations: str, settings: Sequence[str]) -> None:
        chosen = [
            f"model.vision={self._relative(self.sizes.vision)}",
            f"model.llm={self._relative(self.sizes.llm)}",
            f"data.annotations={self._relative(self.world / annotations)}",
            f"data.images={self._relative(self.world / 'train' / 'images')}",
            f"seed={self.sizes.seed}",
            *settings,
        ]
        overrides = [f"--config.{setting}" for setting in chosen]
        workdir = f"--workdir={self._relative(self.folder / name)}"
        self.command("train", f"--config={CONFIG}:stage={stage}", workdir, *overrides)

    def answer(self, model: str) -> None:
        """Answer the questions of a model's conditions by one command: starting one takes as long as 600 answers."""
        held_out, folder = self.world / "held_out", self.folder / "answers"
        asked, answers = folder / f"{model}_questions.jsonl", folder / f"{model}_answers.jsonl"
        keys = [key for key, condition in CONDITIONS.items() if condition.model == model]
        folder.mkdir(exist_ok=True)
        rows = []
        for key in keys:
            for _, row in read_lines(str(held_out / f"{CONDITIONS[key].questions}.jsonl"), "questions"):
                rows.append({**row, "question_id": f"{key}/{row['question_id']}"})
        write_rows(str(asked), rows)
        self.command(
            "generate",
            f"--model={self._relative(self.folder / model)}",
            f"--questions={self._relative(asked)}",
            f"--images={self._relative(held_out / 'images')}",
            f"--answers={self._relative(answers)}",
            "--template=v1",
            f"--batch_size={self.sizes.answer_batch}",
            f"--max_new_tokens={self.sizes.answer_tokens}",
        )
        answered = [(*row["question_id"].split("/"), row) for _, row in read_lines(str(answers), "answers")]
        for key in keys:
            own = ({**row, "question_id": name} for group, name, row in answered if group == key)
            write_rows(str(folder / f"{key}.jsonl"), own)

    def command(self, *words: str) -> None:
        """Run one of our commands in a process of its own, so that its memory is released."""
        print_command(*words)
        defaults = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),  # five of the commands run the same program
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # it reports at every start that there is no torch
        }
        environment = {**defaults, **os.environ}
        code = subprocess.run([sys.executable, "-m", "llava_jax", *words], env=environment).returncode
        if code:
            raise InputError(f"demo: `llava-jax {words[0]}` ended with exit code {code}; see what it says above")

    def _relative(self, path: str | os.PathLike[str]) -> str:
        """Return a path as the commands get it: relative to the current folder where it is inside."""
        text, here = os.fspath(path), pathlib.Path.cwd()
        below = os.path.isabs(text) and pathlib.Path(text).is_relative_to(here)
        return os.path.relpath(text, here) if below else text

    def finish(self) -> dict[str, Any]:
        """Score the answers, write report.json and report.html, print the table and the command for a chat."""
        results = {key: {"name": condition.name, **self._score(key)} for key, condition in CONDITIONS.items()}
        chat = self._chat_command()
        content = {
            "goals": goals(results),
            "results": results,
            "parts": [{"name": name, "seconds": seconds} for name, seconds in self._done.items()],
            "total_seconds": sum(self._done.values()),
            "peak_memory_bytes": self._peak,
            "data": self._data(),
            "chat": chat,
        }
        page = report.page(content, self._charts(), *self._cards())
        (self.folder / "report.html").write_text(page, encoding="utf-8")
        write_json(str(self.folder / "report.json"), content)
        print("\nExact match on held-out scenes, percent\n")
        print(exact_match.table({result["name"]: result for result in results.values()}))
        print()
        for goal in content["goals"]:
            state = "met   " if goal["met"] else "MISSED"
            print(f"{state} {goal['name']}: {goal['value']:.1f} {goal['unit']} ({goal['needed']})")
        print(f"\n{content['total_seconds']:.0f} s in total; peak memory of a process {self._peak / 2**30:.1f} GiB")
        print(f"report: {self._relative(self.folder / 'report.html')}\n\nchat with it:\n  {chat}", flush=True)
        return content

    def _score(self, key: str) -> dict[str, Any]:
        questions = self.world / "held_out" / f"{CONDITIONS[key].questions}.jsonl"
        return exact_match.score(str(questions), str(self.folder / "answers" / f"{key}.jsonl"))

    def _chat_command(self) -> str:
        image = self.world / "held_out" / "images" / f"{self.sizes.held_out_scenes:06d}.png"
        words = ["chat", f"--model={self._relative(self.folder / 'finetune')}", f"--image={self._relative(image)}"]
        return f"{self._relative(sys.executable)} -m llava_jax {shlex.join(words)}"

    def _data(self) -> dict[str, int]:
        def rows(name: str) -> int:
            return len(json.loads((self.world / name).read_bytes()))

        return {
            "train_scenes": self.sizes.train_scenes,
            "held_out_scenes": self.sizes.held_out_scenes,
            "caption_rows": rows("captions.json"),
            "instruction_rows": rows("instructions.json"),
        }

    def _charts(self) -> dict[str, dict[str, list[float]]]:
        def losses(folder: str) -> list[float]:
            return [row["loss"] for _, row in read_lines(str(self.folder / folder / "metrics.jsonl"), "metrics")]

        second = {"after stage 1": losses("finetune"), "without stage 1": losses("finetune_without_stage_1")}
        return {
            "Stage 1: the projector learns from captions": {"pretrain": losses("pretrain")},
            "Stage 2: projector and decoder learn from instructions": second,
        }

    def _cards(self) -> tuple[list[report.Card], list[report.Card]]:
        """Return (the first held-out scenes, the first ones with a wrong answer), as answered after both stages."""
        answered = read_lines(str(self.folder / "answers" / "both_stages.jsonl"), "answers")
        texts = {row["question_id"]: row["text"] for _, row in answered}
        answers: dict[str, list[report.Answer]] = {}
        for _, row in read_lines(str(self.world / "held_out" / "questions.jsonl"), "questions"):
            text = texts.get(row["question_id"], "")
            correct = exact_match.normalise(text) == exact_match.normalise(row["answer"])
            answer = report.Answer(row["category"], row["text"], text, row["answer"], correct)
            answers.setdefault(row["image"], []).append(answer)
        wrong = [image for image, group in answers.items() if not all(answer.correct for answer in group)]
        return self._draw_cards(list(answers)[:CARDS], answers), self._draw_cards(wrong[:MISTAKES], answers)

    def _draw_cards(self, images: list[str], answers: dict[str, list[report.Answer]]) -> list[report.Card]:
        folder = self.world / "held_out" / "images"
        return [report.Card(image, (folder / image).read_bytes(), tuple(answers[image])) for image in images]


def print_command(*words: str) -> None:
    """Print one of our commands as it can be typed, one argument a line where there are many."""
    quoted = [shlex.quote(word) for word in words]
    between = " " if len(" ".join(quoted)) < 100 else " \\\n      "
    print("  $ llava-jax " + between.join(quoted), flush=True)


def goals(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the demo has to show, each goal with its measured value (percent, or points between two of them)."""
    both, shuffled = results["both_stages"]["accuracy"], results["shuffled"]["accuracy"]
    one, without = results["stage_1_only"]["accuracy"], results["without_stage_1"]["accuracy"]
    text = results["read_as_text"]["accuracy"]
    measured = (
        ("correct after both stages", both, "%", both >= 85, "85 % or more"),
        ("better than with shuffled images", both - shuffled, "points", both - shuffled >= 30, "30 points or more"),
        ("better than after stage 1 only", both - one, "points", both > one, "more than 0"),
        ("better than without stage 1", both - without, "points", both > without, "more than 0"),
        ("correct when the decoder reads the scene as text", text, "%", text >= 95, "95 % or more"),
    )
    names = ("name", "value", "unit", "met", "needed")
    return [dict(zip(names, row, strict=True)) for row in measured]


def peak_memory() -> int:
    """Return the bytes of the largest process so far, of this one and those it has started."""
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kilobytes * (1 if sys.platform == "darwin" else 1024)
