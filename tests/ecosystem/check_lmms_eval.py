"""Runs where lmms-eval is, next to llava_jax: `python check_lmms_eval.py DIR` scores the model that make_export wrote.

A task of its own over the questions of DIR, whose right answers are the model's own for all but every fourth one, as a
simple and as a chat model: every answer is the one given here, and the score is that of `evaluate exact_match`.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from llava_jax.evaluate.exact_match import score

TASK = """
task: llava_jax_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function local.visual
doc_to_text: !function local.text
doc_to_messages: !function local.messages
doc_to_target: target
process_results: !function local.result
generation_kwargs: {max_new_tokens: 16, temperature: 0, until: ["\\n\\n"]}
metric_list:
  - {metric: exact, aggregation: mean, higher_is_better: true}
"""
FUNCTIONS = """
from PIL import Image

def visual(doc): return [Image.open(doc["image"])]
def text(doc, lmms_eval_specific_kwargs=None): return doc["text"]
def messages(doc, lmms_eval_specific_kwargs=None):
    image, words = {"type": "image", "url": Image.open(doc["image"])}, {"type": "text", "text": doc["text"]}
    return [{"role": "user", "content": [image, words]}]
def result(doc, results): return {"exact": float(results[0].strip().lower() == doc["target"].strip().lower())}
"""


def ours(task: pathlib.Path, lines: list[dict], given: list[str]) -> float:
    """Return the accuracy that `evaluate exact_match` finds."""
    questions = [dict(question_id=n, answer=line["target"], category="all") for n, line in enumerate(lines)]
    answers = [dict(question_id=n, text=text) for n, text in enumerate(given)]
    for name, rows in (("questions.jsonl", questions), ("answers.jsonl", answers)):
        (task / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return score(str(task / "questions.jsonl"), str(task / "answers.jsonl"))["accuracy"]


def main(folder: pathlib.Path) -> None:
    asked = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["questions"]
    with tempfile.TemporaryDirectory() as made:
        task, lines = pathlib.Path(made), []
        for index, each in enumerate(asked):
            target = "no such answer" if index % 4 == 3 else each["answer"]
            lines.append(dict(image=str(folder / each["image"]), text=each["text"], target=target))
        (task / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (task / "local.yaml").write_text(TASK.replace("DATA", str(task / "rows.jsonl")))
        (task / "local.py").write_text(FUNCTIONS)
        for kind, flags in (("chat", ()), ("simple", ("--force_simple",))):
            command = [sys.executable, "-m", "lmms_eval", "--model", "llava_jax", "--tasks", "llava_jax_local"]
            command += ["--model_args", f"pretrained=hf:{folder}/hf", "--include_path", str(task), "--batch_size", "8"]
            command += ["--output_path", str(task / kind), "--log_samples", *flags]
            subprocess.run(command, check=True, cwd=task)
            (results,) = (task / kind).rglob("*_results.json")
            (samples,) = (task / kind).rglob("*_samples_*.jsonl")
            answers = [json.loads(line) for line in samples.read_text().splitlines()]
            answers.sort(key=lambda answer: answer["doc_id"])
            given = [answer["filtered_resps"] for answer in answers]
            assert given == [each["answer"] for each in asked], given
            found = json.loads(results.read_text())["results"]["llava_jax_local"]["exact,none"]
            assert 100 * found == ours(task, lines, given) == 75, found
            print(f"lmms-eval, {kind} model: {len(given)} answers are the same, score {found:.1%}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
