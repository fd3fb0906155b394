"""What `make ecosystem` shows other programs: a trained demo and small random models, and what they answer here.

python -m tests.ecosystem.make_export DIR DEMO     DIR/hf and DIR/llava of the demo trained in DEMO; DIR/FAMILY,
                                                   DIR/*.png, DIR/expected.json and DIR/logits.npz
"""

import json
import os
import pathlib
import sys

import numpy as np
from PIL import Image

import llava_jax
from llava_jax.api import Llava, question
from llava_jax.data.templates import render
from llava_jax.data.tokenize import encode, expand, load_tokenizer
from llava_jax.types import ClipConfig, LlamaConfig, ModelConfig, RopeConfig, Turn
from llava_jax.weights.convert import convert
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.processor import LlavaExtras
from tests.chat_families import write_family
from tests.tiny_llava import sharp_params

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
SIZE, NEW_TOKENS = dict(width=128, mlp_width=256, layers=2, heads=4, kv_heads=2, head_dim=32, max_positions=2048), 16
CLIP = ClipConfig(width=64, mlp_width=128, layers=3, heads=2, image_size=48, patch_size=8)
SIGLIP = ClipConfig(
    width=64,
    mlp_width=128,
    layers=3,
    heads=2,
    image_size=48,
    patch_size=8,
    activation="gelu_pytorch_tanh",
    family="siglip",
)
# name: (decoder, tower, tokenizer and template of the family, how images are fitted). Attention of vLLM on a CPU wants
# heads of 32 or more.
FAMILIES = {
    "llama_3_1": (dict(rope=RopeConfig(5e5)), CLIP, "llama_3_1", "pad"),
    "mistral": (dict(family="mistral", window=64), CLIP, "mistral_v0_3", "crop"),
    "qwen2": (dict(family="qwen2", attention_bias=True), SIGLIP, "qwen_2_5", "squash"),
    "qwen3": (dict(family="qwen3", rope=RopeConfig(1e6)), SIGLIP, "qwen_3", "squash"),
    "next": (dict(family="mistral"), CLIP, "mistral_v0_3", "anyres"),
}


def write_model(folder: str, name: str) -> None:
    """Write a random model of the family with its tokenizer and chat template."""
    decoder, vision, style, aspect = FAMILIES[name]
    source = write_family(pathlib.Path(folder + ".tokenizer"), style)
    tokenizer = load_tokenizer(source)
    llm = LlamaConfig(vocab_size=tokenizer.size, **SIZE | decoder)
    pinpoints = ((48, 96), (96, 48), (96, 96)) if aspect == "anyres" else ()
    image_id = tokenizer.image_token_id(llm.vocab_size)
    config = ModelConfig(vision, llm, image_token_id=image_id, pinpoints=pinpoints)
    write_llava(folder, config, sharp_params(config), LlavaExtras("tokenizer", aspect, tokenizer=source))


def talks(asked: list[dict], turns: int) -> list[tuple[Turn, ...]]:
    """Return conversations of that many exchanges about an image, the last one with a system message."""
    said = [
        tuple(
            turn
            for number in range(turns)
            for turn in (
                Turn("human", ("" if number else "<image>\n") + asked[(first + number) % len(asked)]["text"]),
                Turn("gpt", f"It is {asked[first + number]['answer']}, number {first + number}."),
            )
        )
        for first in range(4)
    ]
    return [*said, (Turn("system", "Answer in one word."), *said[0])]


def trained_rows(model: Llava, asked: list[dict]) -> list[dict]:
    """Return conversations with the ids and the targets that are trained here."""
    tokenizer, rules, rows = model.processor.tokenizer, model.processor.rules, []
    for number, turns in enumerate(talk for count in (1, 2, 3) for talk in talks(asked, count)):
        encoded = encode(render(turns, rules), tokenizer)
        patches = model.config.vision.patches
        ids, targets = expand(encoded.tokens, encoded.targets, model.config.image_token_id, patches, None)
        messages = [{"role": ROLES[turn.speaker], "content": turn.text} for turn in turns]
        rows.append(dict(image=asked[number]["image"], messages=messages, ids=ids.tolist(), targets=targets.tolist()))
    return rows


def answered(folder: str, model: Llava, asked: list[dict]) -> list[dict]:
    """Return the questions with the ids of their prompts and the model's answers; `right` is the true one."""
    paths = [os.path.join(folder, each["image"]) for each in asked]
    answers = model.generate([each["text"] for each in asked], paths, max_new_tokens=NEW_TOKENS)
    return [
        dict(
            image=each["image"],
            text=each["text"],
            right=each["answer"],
            ids=model.processor.prompt(question(each["text"], path)).tokens.tolist(),
            answer=answer,
        )
        for each, path, answer in zip(asked, paths, answers, strict=True)
    ]


def main(folder: str, demo: str) -> None:
    os.makedirs(folder, exist_ok=True)
    for form in ("hf", "llava"):
        convert(f"orbax:{demo}/finetune", f"{form}:{folder}/{form}")
    held_out = pathlib.Path(demo, "world", "held_out")
    lines = (held_out / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) for line in lines[:32]]
    for number, each in enumerate(asked):  # every second image is not square
        image = Image.open(held_out / "images" / each["image"])
        each["image"] = f"{number}.png"
        image.crop((0, 0, image.width, image.height - 16 * (number % 2))).save(os.path.join(folder, each["image"]))
    model = llava_jax.load(f"hf:{folder}/hf")
    expected = dict(rows=trained_rows(model, asked), questions=answered(folder, model, asked), families={})
    prompt = model.processor.prompt(question(asked[0]["text"], os.path.join(folder, asked[0]["image"])))
    tokens, pixels = np.asarray(prompt.tokens)[None], np.asarray(prompt.pixels).transpose(0, 3, 1, 2)
    np.savez(os.path.join(folder, "logits.npz"), ids=tokens, pixels=pixels, logits=model.logits(tokens, pixels))
    for name in FAMILIES:
        write_model(os.path.join(folder, name), name)
        family = llava_jax.load(f"hf:{folder}/{name}")
        expected["families"][name] = answered(folder, family, asked)
    with open(os.path.join(folder, "expected.json"), "w", encoding="utf-8") as file:
        json.dump(expected, file, ensure_ascii=False)
    for name, questions in dict(demo=expected["questions"], **expected["families"]).items():
        answers = {each["answer"] for each in questions}
        print(f"{folder}: {name}, {len(questions)} questions with {len(answers)} different answers")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
