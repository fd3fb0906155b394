"""Runs where transformers 4.46.3 is: `python peer_446.py FOLDER …` writes what that version makes of each model folder.

FOLDER/inputs.npz holds input_ids, attention_mask and pixel_values; next to it are written logits_446.npy (float32) and
ids_446.npy, the processor's ids for a question about one image. It fails on a tensor missing or unexpected, and where
ids depend on how a chat is tokenised.
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
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (20, 30), (10, 200, 90))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    whole = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert (
        whole == processor.tokenizer(prompt).input_ids == processor.tokenizer.encode(prompt, add_special_tokens=False)
    )
    ids = processor(images=image, text=prompt, return_tensors="np")["input_ids"][0]
    np.save(folder + "/ids_446.npy", ids)


if __name__ == "__main__":
    assert transformers.__version__ == "4.46.3", transformers.__version__
    assert "qwen3" not in transformers.CONFIG_MAPPING  # what test_families.py leaves out, and no other
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        run(path)
