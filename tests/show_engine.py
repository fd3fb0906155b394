"""What answering many at a time gains, on a demo's model: a file of questions, and clients that stream.

`python -m tests.show_engine --demo=DIR [--questions=2000] [--clients=64]` on a workdir of `llava-jax demo` prints

- seconds, of the clock and of CPU, a question of a file, one `generate` after the other, each with its image read and
  encoded anew, and through `answer_file`, killed in the middle and resumed; and whether the answers are the same;
- seconds a request of clients that stream at once, and of the same requests one after the other on one slot;
- with `--weights=int8` instead: the share of held-out questions answered exactly by the model and by its weights of
  eight bits, and the error of the logits.
"""

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from llava_jax import api
from llava_jax.evaluate.exact_match import normalise
from llava_jax.infer.batch_generate import answer_file, read_questions
from llava_jax.infer.engine import Engine
from llava_jax.types import Sampling

SHORT, LONG = Sampling(max_new_tokens=12), Sampling(max_new_tokens=64)
SAMPLE = 200  # questions that are asked one at a time


def clock() -> np.ndarray:
    """Return seconds of the clock, and seconds of all cores that this process has used."""
    return np.array([time.monotonic(), time.process_time()])


def shown(seconds: np.ndarray) -> str:
    return f"{seconds[0] * 1e3:.2f} ms ({seconds[1] * 1e3:.2f} of CPU)"


def gain(before: np.ndarray, after: np.ndarray) -> str:
    return "{:.2f} times faster ({:.2f} by CPU)".format(*before / after)


def answered(model, path: str, images: str, answers: str, slots: int) -> None:
    answer_file(model, path, images, answers, SHORT, batch_size=slots, progress=io.StringIO())


def show_file(model, folder: str, count: int, slots: int, source: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        path, images = os.path.join(work, "q.jsonl"), os.path.join(folder, "images")
        with open(os.path.join(folder, "questions.jsonl"), encoding="utf-8") as file:
            lines = file.read().splitlines()
        rows = [json.loads(line) | {"question_id": n} for n, line in zip(range(count), itertools.cycle(lines))]
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        asked = read_questions(path, images)
        single = []
        for question in asked[: SAMPLE + 20]:
            if len(single) == 20:
                began = clock()
            # An engine of its own: nothing is known from the question before.
            engine = Engine(model, slots=1)
            single += [answer.text for answer in engine.answers([model.prompt(question.messages)], SHORT)]
        alone = (clock() - began) / SAMPLE
        began = clock()
        # A model's own engine would stay the one with the most slots that were ever asked for.
        answered(api.load(source), path, images, os.path.join(work, "warm.jsonl"), slots)
        first = (clock() - began)[0]
        model = api.load(source)  # knows none of the images, and finds its programs compiled
        began = clock()
        answered(model, path, images, os.path.join(work, "a.jsonl"), slots)
        together = (clock() - began) / count
        with open(os.path.join(work, "a.jsonl"), encoding="utf-8") as file:
            whole = file.read()
        same = [json.loads(line)["text"] for line in whole.splitlines()][: len(single)] == single
        print(f"a question of {count}: {shown(alone)} alone, {shown(together)} of a file with {slots} slots,")
        print(f"  {gain(alone, together)}, same answers: {same}; {first:.1f} s in all when it compiles first")
        flags = [f"--model={source}", f"--questions={path}", f"--images={images}", f"--answers={work}/killed.jsonl"]
        flags += ["--max_new_tokens=12", f"--batch_size={slots}"]
        command = [sys.executable, "-m", "llava_jax", "generate", *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not os.path.exists(f"{work}/killed.jsonl") or os.path.getsize(f"{work}/killed.jsonl") < len(whole) / 3:
            time.sleep(0.01)
        process.kill()
        process.wait()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        with open(f"{work}/killed.jsonl", encoding="utf-8") as file:
            print(f"  killed in the middle and resumed, same file: {file.read() == whole}")


def show_clients(model, folder: str, count: int, slots: int) -> None:
    images = os.path.join(folder, "images")
    names = sorted(os.listdir(images))[:count]
    ask = "Describe the image in detail."
    prompts = [model.prompt(api.question(ask, os.path.join(images, name))) for name in names]
    alone, engine = [], Engine(model, slots=1)
    for prompt in (prompts[0], *prompts):
        if len(alone) == 1:
            began = clock()
        alone.append("".join(engine.stream(prompt, LONG)))
    one = (clock() - began) / count
    together, first = [""] * count, [0.0] * count
    engine = Engine(model, slots=slots)

    def client(number: int) -> None:
        start = time.monotonic()
        for piece in engine.stream(prompts[number], LONG):
            first[number] = first[number] or time.monotonic() - start
            together[number] += piece

    for _ in range(3):  # who comes when decides the sizes of groups: the first rounds compile
        together, first = [""] * count, [0.0] * count
        threads = [threading.Thread(target=client, args=[number]) for number in range(count)]
        began = clock()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        many = (clock() - began) / count
    print(f"a request: {shown(one)} one after the other, {shown(many)} of {count} clients on {slots} slots,")
    print(f"  {gain(one, many)}, same answers: {together == alone[1:]},")
    print(f"  first text after {sorted(first)[int(0.95 * count)]:.3f} s (95 %)")


def show_int8(model, folder: str, slots: int, source: str) -> None:
    small = api.load(source, weights="int8")
    asked = read_questions(os.path.join(folder, "questions.jsonl"), os.path.join(folder, "images"))
    with open(os.path.join(folder, "questions.jsonl"), encoding="utf-8") as file:
        expected = [normalise(json.loads(line)["answer"]) for line in file]
    prompts = [model.prompt(question.messages) for question in asked]
    for name, one in (("float32", model), ("int8", small)):
        answers = [normalise(answer.text) for answer in sorted(one.engine(slots).answers(prompts, SHORT))]
        correct = sum(given == right for given, right in zip(answers, expected, strict=True))
        print(f"{name}: {100 * correct / len(asked):.2f} % of {len(asked)} answered exactly")
    errors = []
    for prompt in prompts[:50]:
        pixels = prompt.pixels.transpose(0, 3, 1, 2)
        whole, rounded = (one.logits(prompt.tokens[None], pixels)[0, -1] for one in (model, small))
        errors.append(np.sqrt(np.mean((whole - rounded) ** 2)) / whole.std())
    print(f"logits of the first id: root mean square error {100 * np.mean(errors):.2f} % of their spread")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", required=True, help="workdir of a demo")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, nargs="+", default=[32])
    parser.add_argument("--weights", choices=["int8"])
    args = parser.parse_args()
    source, folder = os.path.join(args.demo, "finetune"), os.path.join(args.demo, "world", "held_out")
    model = api.load(source)
    if args.weights:
        show_int8(model, folder, args.slots[0], source)
        return
    for slots in args.slots:
        show_file(model, folder, args.questions, slots, source)
        show_clients(model, folder, args.clients, slots)


if __name__ == "__main__":
    main()
