"""Thousands of questions to a demo's model: whatever interrupts it and however it is split, the answers stay the same.

`python -m tests.show_questions --demo=DIR --work=WORK [--questions=5000]` on a workdir of `llava-jax demo` draws new
scenes with questions into WORK, answers each alone (an engine of its own), and compares with that

- `generate`, killed twice (SIGKILL) and resumed;
- `generate` on eight fake devices, each of four copies of the model split over two (the demo's six heads divide by no
  more).

What is answered in WORK already is not answered again. Exit code 1 where an answer differs.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from llava_jax.demo import files
from llava_jax.infer.batch_generate import read_questions
from llava_jax.io import read_lines, write_rows

SEED = 10_000  # of other scenes than the demo's
ANSWER = "--max_new_tokens=12"


def write_questions(work: pathlib.Path, count: int) -> None:
    _, scenes = files.split_scenes(SEED, 0, count // 4)
    files.write_questions(str(work), scenes, files.write_split(str(work), scenes, SEED + 1), SEED + 2)
    rows = [row for _, row in read_lines(str(work / "questions.jsonl"), "questions")]
    write_rows(str(work / "questions.jsonl"), rows[:count])


def answer_alone(model: str, work: pathlib.Path) -> None:
    from llava_jax import api
    from llava_jax.infer.engine import Engine
    from llava_jax.types import Sampling

    loaded, said, began = api.load(model), [], time.monotonic()
    for question in read_questions(str(work / "questions.jsonl"), str(work / "images")):
        # An engine of its own: nothing is known from the question before.
        engine = Engine(loaded, slots=1)
        (answer,) = engine.answers([loaded.prompt(question.messages)], Sampling(max_new_tokens=12))
        said.append(answer.text)
    print(f"{len(said)} questions one at a time: {time.monotonic() - began:.0f} s", flush=True)
    (work / "alone.json").write_text(json.dumps(said))


def generate(model: str, work: pathlib.Path, name: str, *flags: str, devices: int = 1) -> subprocess.Popen:
    path = [f"--model={model}", f"--questions={work}/questions.jsonl", f"--images={work}/images"]
    path += [f"--answers={work}/{name}.jsonl", ANSWER, *flags]
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen([sys.executable, "-m", "llava_jax", "generate", *path], stdout=subprocess.DEVNULL, env=env)


def lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", required=True, help="workdir of a demo")
    parser.add_argument("--work", required=True, type=pathlib.Path, help="written")
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    model, work, batch = os.path.join(args.demo, "finetune"), args.work, f"--batch_size={args.batch_size}"
    if not (work / "questions.jsonl").exists():
        write_questions(work, args.questions)
    if not (work / "alone.json").exists():
        answer_alone(model, work)
    alone = json.loads((work / "alone.json").read_text())

    def same(name: str) -> bool:
        said = [row["text"] for _, row in read_lines(str(work / f"{name}.jsonl"), "answers")]
        differ = sum(ours != theirs for ours, theirs in zip(said, alone, strict=True))
        print(f"  {len(said)} answers, {differ} other than alone", flush=True)
        return not differ

    began, killed = time.monotonic(), work / "killed.jsonl"
    for share in (1 / 3, 2 / 3):
        process = generate(model, work, "killed", batch)
        while process.poll() is None and lines(killed) < share * len(alone):
            time.sleep(0.005)
        process.kill()
        print(f"process ended with {process.wait()}, {lines(killed)} answers written", flush=True)
    code = generate(model, work, "killed", batch).wait()
    print(f"killed twice and resumed: {time.monotonic() - began:.0f} s, exit code {code}")
    right = same("killed")
    began = time.monotonic()
    code = generate(model, work, "split", batch, "--tensor=2", devices=8).wait()
    print(f"4 x 2 devices: {time.monotonic() - began:.0f} s, exit code {code}")
    return 0 if same("split") and right else 1


if __name__ == "__main__":
    sys.exit(main())
