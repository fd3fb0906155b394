"""Compare the export's answers in transformers with ours: `.venv-parity/bin/python …/check_transformers.py W`.

W is the workdir of run.py. Needs torch. Compares the first --questions held-out answers and all general ones; exits
with 1 where any differs.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import torch
from PIL import Image
from run import ANSWER_TOKENS, GENERAL_TOKENS, HERE
from transformers import AutoProcessor, LlavaForConditionalGeneration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--questions", type=int, default=100, help="how many of the held-out questions")
    args = parser.parse_args()
    export, held_out, answers = args.workdir / "export", args.workdir / "world" / "held_out", args.workdir / "answers"
    processor = AutoProcessor.from_pretrained(export)
    model = LlavaForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
    seen = read_lines(held_out / "questions.jsonl")[: args.questions]
    groups = [(seen, answers / "questions.jsonl", ANSWER_TOKENS)]
    groups.append((read_lines(HERE / "general.jsonl"), answers / "general_after.jsonl", GENERAL_TOKENS))
    different = 0
    for questions, ours, tokens in groups:
        texts = {row["question_id"]: row["text"] for row in read_lines(ours)}
        for row in questions:
            image = Image.open(held_out / "images" / row["image"]) if "image" in row else None
            theirs = answer(processor, model, row["text"], image, tokens)
            if theirs != texts[row["question_id"]]:
                different += 1
                print(f"{row['question_id']}: {texts[row['question_id']]!r} here, {theirs!r} in transformers")
        print(f"{len(questions)} questions of {ours.name} compared")
    print(f"{different} answers differ")
    sys.exit(1 if different else 0)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(processor: Any, model: Any, text: str, image: Image.Image | None, tokens: int) -> str:
    """Return the greedy answer to one question, by the chat template of the export."""
    content = [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
