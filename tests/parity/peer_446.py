"""Runs where transformers 4.46.3 is: `python peer_446.py FOLDER …` writes what that version makes of each model folder.

FOLDER/inputs.npz holds input_ids, attention_mask and pixel_values; next to it are written logits_446.npy (float32) and
ids_446.npy, the processor's ids for FOLDER/prompt.txt with one image. It fails on a tensor missing or unexpected.
"""

import sys

import numpy as np
import torch
import transformers
from PIL import Image


def run(folder: str) -> None:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    with np.load(folder + "/inputs.npz") as saved:
        inputs = {name: torch.from_numpy(saved[name]) for name in saved.files}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    np.save(folder + "/logits_446.npy", logits.numpy())
    with open(folder + "/prompt.txt", encoding="utf-8") as file:
        prompt = file.read()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (20, 30), (10, 200, 90))
    ids = processor(images=image, text=prompt, return_tensors="np")["input_ids"][0]
    np.save(folder + "/ids_446.npy", ids)


if __name__ == "__main__":
    assert transformers.__version__ == "4.46.3", transformers.__version__
    assert "qwen3" not in transformers.CONFIG_MAPPING  # what test_families.py leaves out, and no other
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        run(path)
