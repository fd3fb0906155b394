"""Runs where vLLM is, on a CPU: `python check_vllm.py DIR` serves what make_export wrote there and compares answers.

The folders are given with no flag but the precision: vLLM computes what is stored in float32 in bfloat16 otherwise. The
ids of the prompts are those trained and asked here, and greedy answers are the same, for the demo and for a random
model of each family. What the demo answers in bfloat16, with no flag at all, is counted.
"""

import json
import pathlib
import subprocess
import sys

import vllm
from PIL import Image


def compare(folder: pathlib.Path, name: str, questions: list[dict], dtype: str) -> int:
    """Ask one model, check the ids of the prompts, and return how many answers are the same."""
    model = vllm.LLM(str(folder / name), dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=2**28)
    conversations = []
    for asked in questions:
        image = {"type": "image_pil", "image_pil": Image.open(folder / asked["image"])}
        content = [image, {"type": "text", "text": asked["text"]}]
        conversations.append([{"role": "user", "content": content}])
    same = 0
    for asked, given in zip(questions, model.chat(conversations, vllm.SamplingParams(temperature=0)), strict=True):
        assert given.prompt_token_ids == asked["ids"], (asked["text"], given.prompt_token_ids)
        same += given.outputs[0].text.strip() == asked["answer"]
    return same


def main(folder: pathlib.Path, name: str, dtype: str) -> None:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    questions = dict(hf=expected["questions"], **expected["families"])[name]
    same = compare(folder, name, questions, dtype)
    print(
        f"vLLM {vllm.__version__}, {name} in {dtype}: ids of {len(questions)} prompts and {same} answers are the same"
    )
    assert dtype != "float32" or same == len(questions), same


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
    else:  # each model in a process of its own, which gives its memory back
        families = json.loads(pathlib.Path(sys.argv[1], "expected.json").read_text(encoding="utf-8"))["families"]
        for name, dtype in (("hf", "auto"), *((name, "float32") for name in ("hf", *families))):
            subprocess.run([sys.executable, __file__, sys.argv[1], name, dtype], check=True)
