"""Held-out rows of a run: the loss of the weights it has, which changes no number of its training."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llava_jax.data.packing import BatchPlan, steps_for
from llava_jax.data.pipeline import BatchIterator
from llava_jax.data.rows import Rejected
from llava_jax.data.tokenize import TextTokenizer
from llava_jax.data.validate import plan_once
from llava_jax.models.clip import normalise_batch
from llava_jax.models.llava import build
from llava_jax.parallel.distributed import say
from llava_jax.parallel.sharding import batch_sharding, global_batch, replicated
from llava_jax.train.answers import Questions, answer, open_questions
from llava_jax.train.setup import Run, abstract_batch, choose_attention, open_data, read_records
from llava_jax.train.step import LossConfig, Params, batch_ranks, loss_terms
from llava_jax.types import Batch, DataSettings, InputError, ModelConfig, Pixels, Settings
from llava_jax.weights.source import EVAL_LOSS

Evaluated = dict[str, float | int]


class HeldOut(NamedTuple):
    """Batches of held-out rows, each row once, the compiled pass over one of them, and what some of them ask.

    `rows` is the fingerprint of their annotations.
    """

    rows: str
    mesh: Mesh
    batches: BatchPlan
    data: BatchIterator
    nll: jax.stages.Compiled
    questions: Questions | None = None


def open_held_out(
    settings: Settings,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    run: Run,
    on_reject: Callable[[int], Callable[[Rejected, int], None] | None],
) -> HeldOut:
    """Check and open the rows of `data.eval`, and compile the pass. Raises InputError for rows that cannot be used.

    A batch has as many conversations as a microbatch of the training, so that it takes less memory.

    Args:
      settings: of the run.
      config: that of the stage.
      tokenizer: the decoder's.
      run: what is trained.
      on_reject: gives, for so many rows, what `open_data` tells of one that turns out unreadable.
    """
    data = held_out_settings(settings.data)
    say("held out from training:")
    try:
        records, checked = read_records(data, config, tokenizer)
    except InputError as error:
        raise InputError(f"data.eval={data.annotations}: {error}") from None
    if records.mixture is not None:
        raise InputError(f"data.eval={data.annotations}: weights mix rows of training; each held-out row counts once")
    run = run._replace(config=without_dropout(run.config))
    mesh, size = run.mesh, settings.train.batch_size // settings.train.accumulate
    batches = plan_once(
        records,
        checked,
        data,
        batch_size=size,
        row_multiple=batch_ranks(mesh),
        steps=steps_for(len(records), size, 1),
        seed=settings.seed,
    )
    batches = _each_once(batches, len(records))
    graphdef, _ = build(choose_attention(settings.train, run.config, mesh, batches.shape.length))
    loss = LossConfig(graphdef, settings.train.dtype, data.pack, "global_token", batch_ranks(mesh))
    at = jax.tree.map(lambda x: x.sharding, (run.state.params, run.frozen))
    nll = jax.jit(
        partial(summed_nll, config=loss, pixels=config.vision.pixels),
        in_shardings=(*at, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    ).lower(run.state.params, run.frozen, abstract_batch(config, batches.shape, mesh))
    questions = open_questions(settings, data, tokenizer, run, records) if settings.train.eval_generate else None
    tell = on_reject(len(records))
    reader = open_data(data, config, tokenizer, records, batches, mesh, tell)
    return HeldOut(records.fingerprint, mesh, batches, reader, nll.compile(), questions)


def without_dropout(config: ModelConfig) -> ModelConfig:
    """Return the config of the same weights, whose adapters drop nothing and so hold no seeds."""
    lora = config.lora
    return config if lora is None else dataclasses.replace(config, lora=dataclasses.replace(lora, dropout=0.0))


def held_out_settings(data: DataSettings) -> DataSettings:
    """Return the settings with which `data.eval` is read: those of the training, in the order of the file."""
    return dataclasses.replace(
        data, annotations=data.eval, images=data.eval_images or data.images, shuffle=False, group_by="none"
    )


def _each_once(batches: BatchPlan, rows: int) -> BatchPlan:
    """Return the plan without the rows that fill up its last batch from the start of the file."""
    again_UC = np.arange(batches.order_UC.size).reshape(batches.order_UC.shape) >= rows
    return batches.without(again_UC)


def summed_nll(
    params: Params, frozen: Params, batch: Batch, *, config: LossConfig, pixels: Pixels
) -> tuple[jax.Array, jax.Array]:
    """Return the summed negative log-likelihood of a batch's supervised tokens (float32) and their number (int32)."""
    seen = batch._replace(pixels_BNXYC=normalise_batch(batch.pixels_BNXYC, batch.image_mask_BN, pixels))
    total, (_, targets) = loss_terms(params, frozen, seen, None, config)
    return total, targets


def evaluate(held_out: HeldOut, params: Params, frozen: Params, should_stop: Callable[[], bool]) -> Evaluated:
    """Return `eval_loss`, the loss of a supervised token, and `eval_targets`, their number; nothing when told to stop.

    With questions also what `answer` returns. Several processes call this together; each reads its own rows.
    """
    sums: list[Any] = []
    held_out.data.set_state({"batches": 0})
    for _ in range(held_out.batches.steps):
        if should_stop():
            return {}
        batch = global_batch(next(held_out.data), held_out.mesh, held_out.batches.shape.rows)
        sums.append(held_out.nll(params, frozen, batch))
        jax.block_until_ready(sums[-2:-1])  # one batch ahead of the device, as in training
    totals, targets = zip(*jax.device_get(sums), strict=True)
    if sum(targets) == 0:
        raise InputError("data.eval: no token of its rows is supervised, expected at least one; check these rows")
    found = {EVAL_LOSS: float(np.sum(totals, dtype=np.float64)) / sum(targets), "eval_targets": int(sum(targets))}
    if held_out.questions is None:
        return found
    answered = answer(held_out.questions, params, frozen, should_stop)
    return found | answered if answered else {}
