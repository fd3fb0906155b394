"""Runs where another transformers is: `python check_transformers.py DIR` compares it with what make_export wrote there.

The processor's ids are those trained and asked here, however a chat is tokenised, and greedy answers are the same.
"""

import json
import pathlib
import sys

import torch
import transformers
from PIL import Image


def main(folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    processor = transformers.AutoProcessor.from_pretrained(folder / "hf")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "hf", torch_dtype=torch.float32)
    for row in expected["rows"]:
        image = Image.open(folder / row["image"])
        text = processor.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        for special in (True, False):
            ids = processor(images=image, text=text, add_special_tokens=special, return_tensors="pt")["input_ids"]
            assert ids[0].tolist() == row["ids"], (text, special)
    for asked in expected["questions"]:
        content = [{"type": "image"}, {"type": "text", "text": asked["text"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=Image.open(folder / asked["image"]), text=text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == asked["ids"], text
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answer == asked["answer"], (text, answer, asked["answer"])
    rows, answers = len(expected["rows"]), len(expected["questions"])
    print(f"transformers {transformers.__version__}: ids of {rows} conversations and {answers} answers are the same")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
