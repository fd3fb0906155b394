"""The same stage trained twice from the same weights on the same batches: our step, and a plain PyTorch loop."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import peers
import torch

from llava_jax.data.images import normalised
from llava_jax.data.packing import plan_batches
from llava_jax.data.pipeline import make_pipeline
from llava_jax.data.records import load_records
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.data.validate import check_records
from llava_jax.models import clip
from llava_jax.models.llava import build, partition
from llava_jax.settings import STAGES, parse_groups
from llava_jax.train import optim, step
from llava_jax.types import Batch, DataSettings, ModelConfig, OptimSettings
from llava_jax.weights import hf, name_table
from llava_jax.weights.load import cut

STEPS = 16
# What learns: the pattern of our paths, how many of the tower's last blocks (0: all), and transformers' names.
LEARNS = {
    "pretrain": (STAGES["pretrain"], 0, r"multi_modal_projector"),
    "finetune": (STAGES["finetune"], 0, r"multi_modal_projector|language_model|lm_head"),
    "mid": (STAGES["mid"], 0, r"."),
    "last block": ("projector|vision", 1, r"multi_modal_projector|vision_tower\.encoder\.layers\.[12]\."),
}


def batches(data: DataSettings, folder: str, config: ModelConfig, batch_size: int) -> list[Batch]:
    """The first STEPS batches as our pipeline encodes them."""
    records, tokenizer = load_records(data.annotations), load_tokenizer(folder)
    checked = check_records(records, data, tokenizer, patches=config.vision.patches)
    sizes = dict(batch_size=batch_size, row_multiple=1, steps=STEPS, seed=3)
    plan = plan_batches(records, checked.lengths_A, data, slots_A=checked.slots_A, **sizes)
    vision, image_id = config.vision, config.image_token_id
    model = dict(image_size=vision.image_size, patches=vision.patches, image_token_id=image_id)
    stream = make_pipeline(records, data, tokenizer, plan, **model)
    taken = list(stream)
    stream.close()
    return taken


def starting_point(folder: str, learns: str) -> tuple[ModelConfig, dict, dict]:
    """(config, what learns, what is frozen) of a case of LEARNS."""
    pattern, blocks, _ = LEARNS[learns]
    config, params, _ = hf.read_llava(folder)
    config = dataclasses.replace(config, learning_blocks=blocks)
    params |= {"vision": cut(params["vision"], build(config)[1]["vision"])}
    if blocks:
        pattern = f"^(?!vision/(?!layers/)).*({pattern})"
    return config, *partition(jax.tree.map(jnp.asarray, params), pattern)


def gradients(folder: str, learns: str, batch: Batch) -> tuple[dict, dict]:
    """(ours, theirs) of one batch, as {our path: array} of everything that learns."""
    config, trainable, frozen = starting_point(folder, learns)
    seen = jax.tree.map(jnp.asarray, batch._replace(rows_BM=None))
    pixels = clip.normalise_batch(seen.pixels_BNXYC, seen.image_mask_BN, config.vision.pixels)
    grad = jax.jit(functools.partial(step.loss_and_grads, config=loss_config(config)))
    found = name_table.flatten(grad(trainable, frozen, seen._replace(pixels_BNXYC=pixels))[1])

    model = peers.load_strict(folder)
    _loss(model, batch).backward()
    whole = dataclasses.replace(config, learning_blocks=0)
    named = {name: value.grad for name, value in model.named_parameters()}
    wanted = peers.in_our_layout(named, build(whole)[1])
    return found, {path: wanted[path][-len(grads) :] if grads.ndim else wanted[path] for path, grads in found.items()}


def loss_config(config: ModelConfig) -> step.LossConfig:
    return step.LossConfig(build(config)[0], dtype="float32", packed=False, loss_norm="global_token", ranks=1)


def ours(folder: str, learns: str, settings: OptimSettings, data: list[Batch]) -> np.ndarray:
    """(loss, gradient norm) of each step, as [STEPS, 2]."""
    config, trainable, frozen = starting_point(folder, learns)
    tx = optim.make_optimizer(settings, STEPS, trainable)
    update = jax.jit(
        functools.partial(
            step.train_step,
            config=loss_config(config),
            tx=tx,
            learning_rate=optim.make_schedule(settings, STEPS),
            pixels=config.vision.pixels,
        )
    )
    state = step.TrainState(jnp.int32(0), trainable, tx.init(trainable))
    curve = []
    for batch in data:
        state, metrics = update(state, frozen, batch._replace(rows_BM=None))
        curve.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(curve)


def theirs(folder: str, learns: str, settings: OptimSettings, data: list[Batch]) -> np.ndarray:
    """The same of a loop over transformers' model with torch.optim.AdamW, cosine after ceil(ratio * STEPS) warmup."""
    model = peers.load_strict(folder)
    tower_lr = next((lr for pattern, lr in parse_groups(settings.groups) if pattern.search("vision/")), settings.lr)
    groups = []
    for name, value in model.named_parameters():
        value.requires_grad = bool(re.search(LEARNS[learns][2], name))
        if value.requires_grad:
            decay = 0.0 if name.endswith("bias") or "norm" in name else settings.weight_decay
            lr = tower_lr if "vision_tower" in name else settings.lr
            groups.append(dict(params=[value], weight_decay=decay, lr=lr))
    trained = [value for group in groups for value in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(settings.b1, settings.b2), eps=settings.eps)
    warmup = math.ceil(settings.warmup_ratio * STEPS)

    def factor(t: int) -> float:
        return t / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * (t - warmup) / (STEPS - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    curve = []
    for batch in data:
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm or math.inf)
        optimizer.step()
        schedule.step()
        curve.append((loss.item(), norm.item()))
    return np.array(curve)


def _loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    tokens = torch.from_numpy(batch.tokens_BT).long()
    patches = model.config.image_seq_length
    images = (batch.tokens_BT == model.config.image_token_index).sum(1) // patches
    pixels = [row[:count] for row, count in zip(batch.pixels_BNXYC, images, strict=True)]
    pixels = normalised(np.concatenate(pixels)).transpose(0, 3, 1, 2).copy()
    logits = model(
        input_ids=tokens,
        attention_mask=torch.from_numpy(batch.segment_ids_BT > 0).long(),
        pixel_values=torch.from_numpy(pixels) if len(pixels) else None,
    ).logits
    labels = torch.where(torch.from_numpy(batch.targets_BT), tokens, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
