"""Runs where TRL is: `python check_trl.py DIR` compares what it trains with what make_export wrote there.

SFT with assistant_only_loss=True and nothing else set: each row has the ids and the targets of a row trained here.
"""

import json
import pathlib
import sys
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image


def parts(messages: list[dict], image: Image.Image) -> list[dict]:
    """Return the messages with the image as a part of its own, as data sets for TRL have them."""
    found = []
    for message in messages:
        text = message["content"].removeprefix("<image>\n")
        shown = [{"type": "image", "text": None}] * (text != message["content"])
        found.append({"role": message["role"], "content": [*shown, {"type": "text", "text": text}]})
    return found


def main(folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["rows"]
    images = [Image.open(folder / row["image"]) for row in expected]
    rows = [
        {"messages": parts(row["messages"], image), "images": [image]}
        for row, image in zip(expected, images, strict=True)
    ]
    with tempfile.TemporaryDirectory() as output:
        args = trl.SFTConfig(
            output_dir=output,
            assistant_only_loss=True,
            max_length=None,
            per_device_train_batch_size=1,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        trainer = trl.SFTTrainer(
            transformers.LlavaForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoProcessor.from_pretrained(folder / "hf"),
        )
        wanted = {(tuple(row["ids"]), tuple(row["targets"])) for row in expected}
        found = set()
        for batch in trainer.get_train_dataloader():
            ids, labels = batch["input_ids"][0], batch["labels"][0]
            assert torch.equal(labels[labels != -100], ids[labels != -100])
            found.add((tuple(ids.tolist()), tuple((labels != -100).tolist())))
        assert found == wanted, f"{len(wanted - found)} of {len(wanted)} rows are trained otherwise"
        loss = trainer.train().training_loss
    print(f"TRL {trl.__version__}: {len(wanted)} rows have the same ids and targets; one step, loss {loss:.3f}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
