"""The peer: the same work by transformers and PyTorch, in the Python that has them. No module of ours imports this.

A program, `python llava_jax/benchmark/peer.py WORK.json`: llava_jax itself need not be installed there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from worker import PICTURE_BATCH, Figures, Turn, clock, fingerprint, serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What trains in each stage, by the names of LlavaForConditionalGeneration.
PARTS = {
    "pretrain": ("multi_modal_projector",),
    "finetune": ("multi_modal_projector", "language_model", "lm_head"),
}


def start(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    return {"train": train, "generate": generate, "data": data}[work["job"]](work)


def load(work: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """Load the model of the folder, or one of its size with random weights where it holds no weights."""
    if work["weights"]:
        model = LlavaForConditionalGeneration.from_pretrained(
            work["model"], trust_remote_code=False, dtype=dtype, attn_implementation="sdpa"
        )
        return model.to(DEVICE)
    config = LlavaConfig.from_pretrained(work["model"], trust_remote_code=False)
    with torch.device(DEVICE):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")


def train(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """Return the loss of the first update and a turn of `steps` updates, which measures seconds an update."""
    model = load(work, getattr(torch, work["param_dtype"])).train()
    trained = []
    for name, value in model.named_parameters():
        value.requires_grad = any(part in name.split(".") for part in PARTS[work["stage"]])
        if value.requires_grad:
            trained.append(value)
    optimizer = torch.optim.AdamW(trained, lr=work["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    if work["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    forward = torch.compile(model) if work["compiled"] else model
    with np.load(work["batch"], allow_pickle=False) as arrays:
        tokens = torch.from_numpy(arrays["tokens"]).long().to(DEVICE)
        labels = torch.from_numpy(np.where(arrays["targets"], arrays["tokens"], -100)).long().to(DEVICE)
        pixels = torch.from_numpy(arrays["pixels"][:, 0].transpose(0, 3, 1, 2).copy()).to(DEVICE, model.dtype)

    def update() -> torch.Tensor:
        # Rows are full, so no mask is given: sdpa then takes its causal kernel.
        loss = forward(input_ids=tokens, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    seconds = clock(DEVICE)

    def turn() -> dict[str, float]:
        began = seconds()
        for _ in range(work["steps"]):
            loss = update()
        loss.item()
        return {"step": (seconds() - began) / work["steps"], **device_peak()}

    loss = update().item()
    update().item()
    return {"loss": loss, **about(model)}, turn


def generate(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """Return the ids and a turn of greedy answers to a batch of prompts: seconds an id, and to the first one."""
    model = load(work, getattr(torch, work["dtype"])).eval()
    with np.load(work["batch"], allow_pickle=False) as arrays:
        tokens = torch.from_numpy(arrays["tokens"]).long().to(DEVICE)
        pixels = torch.from_numpy(arrays["pixels"][:, 0].transpose(0, 3, 1, 2).copy()).to(DEVICE, model.dtype)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(tokens)
    seconds = clock(DEVICE)

    @torch.inference_mode()
    def answer(count: int) -> tuple[float, list[list[int]]]:
        began = seconds()
        ids = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
        )
        return seconds() - began, ids[:, tokens.shape[1] :].tolist()

    def turn() -> dict[str, float]:
        total, first = answer(work["new_tokens"])[0], answer(1)[0]
        return {"token": total / work["new_tokens"], "first_token": first, **device_peak()}

    return {"ids": answer(work["new_tokens"])[1], **about(model)}, turn


def data(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """Return the hashes of all images and a turn that reads them into batches; seconds an image.

    Every image is decoded, padded to a square, put through CLIPImageProcessor and into the batches of a DataLoader that
    reads in this process, as ours does.
    """
    from PIL import Image
    from torch.utils.data import DataLoader
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = work["size"]
    process = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    background = tuple(int(255 * mean) for mean in process.image_mean)

    def pixels(path: str) -> torch.Tensor:
        image = Image.open(path).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), background)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return process(square, return_tensors="pt")["pixel_values"][0]

    seconds = clock("cpu")

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(work["images"])

        def __getitem__(self, index: int) -> torch.Tensor:
            return pixels(work["images"][index])

    def turn() -> dict[str, float]:
        began = seconds()
        for _ in DataLoader(Images(), batch_size=PICTURE_BATCH):
            pass
        return {"image": (seconds() - began) / len(work["images"])}

    hashes = [fingerprint(pixels(path).numpy().transpose(1, 2, 0)) for path in work["images"]]
    return {"pixels": hashes, "device": "cpu"}, turn


def about(model: torch.nn.Module) -> Figures:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    parameters = sum(value.numel() for value in model.parameters())
    return {"device": name, "parameters": parameters, "torch": torch.__version__}


def device_peak() -> dict[str, float]:
    """Return the most memory the accelerator has held; nothing on a CPU."""
    return {"device_bytes": torch.cuda.max_memory_allocated()} if DEVICE == "cuda" else {}


if __name__ == "__main__":
    serve(start)
