"""What `make ecosystem` shows other programs: the demo's backbones as a LLaVA, and what is trained and answered here.

python -m tests.ecosystem.make_export DIR     DIR/hf, DIR/*.png and DIR/expected.json
"""

import json
import os
import pathlib
import sys

import numpy as np
from PIL import Image

import llava_jax
from llava_jax.api import question
from llava_jax.data.templates import render
from llava_jax.data.tokenize import encode, expand, load_tokenizer
from llava_jax.models.llava import build
from llava_jax.types import ModelConfig, Turn
from llava_jax.weights import hf, name_table
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras

BACKBONES = pathlib.Path(llava_jax.__file__).parent / "demo" / "backbones"
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30), "orange": (240, 150, 20)}
SHAPES = ("square", "circle", "triangle", "cross")
QUESTIONS = [
    f"A {color} {a} left of a blue {b}. What color is the {a}?" for color in COLOURS for a in SHAPES for b in SHAPES
]
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def write_export(folder: str) -> None:
    """Write the demo's tower and decoder with a random projector, whose answers are words all the same."""
    vision, vision_params = hf.read_clip(str(BACKBONES / "clip"))
    llm, llm_params = hf.read_llama(str(BACKBONES / "llama"))
    tokenizer = load_tokenizer(str(BACKBONES / "llama"))
    config = ModelConfig(vision=vision, llm=llm, image_token_id=tokenizer.image_token_id(llm.vocab_size))
    rng = np.random.default_rng(0)
    shapes = name_table.flatten(build(config)[1]["projector"])
    projector = {path: 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    params = {"vision": vision_params, "llm": llm_params, "projector": name_table.unflatten(projector)}
    extras = LlavaExtras("v1", "pad", tokenizer=str(BACKBONES / "llama"), vision=str(BACKBONES / "clip"))
    write_llava(folder, config, params, extras)


def talks(turns: int) -> list[tuple[Turn, ...]]:
    """Return conversations of that many exchanges about an image, the last one with a system message."""
    said = [
        tuple(
            turn
            for number in range(turns)
            for turn in (
                Turn("human", ("" if number else "<image>\n") + QUESTIONS[(first + number) % len(QUESTIONS)]),
                Turn("gpt", f"It is red, number {first + number}."),
            )
        )
        for first in range(4)
    ]
    return [*said, (Turn("system", "Answer in one word."), *said[0])]


def main(folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    write_export(os.path.join(folder, "hf"))
    model = llava_jax.load("hf:" + os.path.join(folder, "hf"))
    tokenizer, rules = model.processor.tokenizer, model.processor.tokenizer.template("v1")
    rows, asked = [], []
    for number, turns in enumerate(talk for count in (1, 2, 3) for talk in talks(count)):
        encoded = encode(render(turns, rules), tokenizer)
        patches = model.config.vision.patches
        ids, targets = expand(encoded.tokens, encoded.targets, model.config.image_token_id, patches, None)
        messages = [{"role": ROLES[turn.speaker], "content": turn.text} for turn in turns]
        rows.append(dict(image=f"{number}.png", messages=messages, ids=ids.tolist(), targets=targets.tolist()))
        colour = list(COLOURS.values())[number % len(COLOURS)]
        Image.new("RGB", (40 + number, 60), colour).save(os.path.join(folder, f"{number}.png"))
    for number in range(32):
        image, text = rows[number % len(rows)]["image"], QUESTIONS[2 * number]
        path = os.path.join(folder, image)
        ids = model.processor.prompt(question(text, path)).tokens.tolist()
        (answer,) = model.generate(text, path, max_new_tokens=16)
        asked.append(dict(image=image, text=text, ids=ids, answer=answer))
    with open(os.path.join(folder, "expected.json"), "w", encoding="utf-8") as file:
        json.dump(dict(rows=rows, questions=asked), file, ensure_ascii=False)
    answers = {each["answer"] for each in asked}
    print(f"{folder}: {len(rows)} conversations, {len(asked)} questions with {len(answers)} different answers")


if __name__ == "__main__":
    main(sys.argv[1])
