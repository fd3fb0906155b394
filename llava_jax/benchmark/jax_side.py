"""Our side of a benchmark, through the modules that `train`, `generate` and the data pipeline themselves use.

A program, `python -m llava_jax.benchmark.jax_side WORK.json`, that serves turns (`worker.serve`).
"""

import dataclasses
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.benchmark.worker import PICTURE_BATCH, ROW_BATCH, Figures, Turn, clock, fingerprint, serve
from llava_jax.data.images import normalised
from llava_jax.data.packing import plan_batches
from llava_jax.data.pipeline import BatchIterator, make_pipeline
from llava_jax.data.rows import parse_row
from llava_jax.data.tokenize import TextTokenizer, load_tokenizer
from llava_jax.data.validate import check_records
from llava_jax.infer.engine import Engine, IdModel
from llava_jax.infer.generate import Prompt
from llava_jax.infer.placed_model import PlacedModel, place_model
from llava_jax.models.flops import step_flops
from llava_jax.models.layers import stored_as
from llava_jax.models.llava import build, for_answers, init, overlaid
from llava_jax.parallel.sharding import batch_sharding, make_mesh
from llava_jax.settings import settings_from_dict, trainable_pattern
from llava_jax.train.setup import Run, build_run, compile_lowered, first_state
from llava_jax.train.step import TrainState
from llava_jax.types import UNPACKED, Batch, DataSettings, ModelConfig, Record, Sampling, Settings, TrainSettings
from llava_jax.weights import hf
from llava_jax.weights.load import EMBEDDED_TOKENIZER, adapted

READ_AHEAD = 6  # batches that workers may have ready before they are needed
SETTLE = 0.5  # seconds in which workers have read ahead again
PATCHES = 16  # image tokens of an image in the data's rows; the pixels do not depend on it
WORDS = "the a red blue square circle left right of above there is in image and what how many are".split()


def start(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    return {"train": train, "generate": generate, "data": data, "scaling": scaling}[work["job"]](work)


def settings_of(work: Mapping[str, Any]) -> Settings:
    """Return the settings of a run that does this work and nothing else, on one device."""
    data: dict[str, Any] = dict(
        annotations="", images="", template="v1", image_position="front", aspect="pad", **UNPACKED
    )
    optim = dict(lr=work["lr"], groups="", schedule="constant", warmup_ratio=0.0, weight_decay=0.0, clip_norm=0.0)
    train: dict[str, Any] = dict(
        batch_size=work["rows"], steps=1, epochs=1.0, accumulate=1, remat=work["remat"], attention="auto"
    )
    train |= dict(profile=0, log_every=1, checkpoint_every=0, keep=1, loss_norm="global_token")
    train |= dict.fromkeys(("param_dtype", "moment_dtype"), work["param_dtype"])
    train |= {"dtype": work["dtype"], "frozen_dtype": work["dtype"], "compiler_options": work["compiler_options"]}
    values = {
        "stage": work["stage"],
        "seed": 0,
        "model": dict(vision=work["model"], llm=work["model"], projector="mlp2x_gelu", feature_layer=-2),
        "init": dict(model="", projector=""),
        "data": dataclasses.asdict(DataSettings(**data, max_length=work["length"], shuffle=False)),
        "optim": optim | dict(b1=0.9, b2=0.999, eps=1e-8),
        "lora": dict(rank=1, alpha=1.0, dropout=0.0, targets=".*", vision_targets=""),
        "train": dataclasses.asdict(TrainSettings(**train)),
        "mesh": dict(data=1, fsdp=1, tensor=1, fsdp_inner=1),
    }
    return settings_from_dict(values)


def train(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """Return the loss of the first update and a turn of `steps` updates, which measures seconds an update."""
    settings = settings_of(work)
    config = model_config(work)
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = build_run(settings, adapted(settings, config), mesh, steps=10**6, length=work["length"])
        state, frozen = starting_point(work, settings, run)
        batch = jax.device_put(read_batch(work), batch_sharding(mesh))
        lowered = run.step.lower(state, frozen, batch)
        update = compile_lowered(lowered, work["compiler_options"], jax.devices()[0].device_kind)
    seconds = clock(jax.default_backend())

    def updates(count: int) -> float:
        nonlocal state
        for _ in range(count):
            state, metrics = update(state, frozen, batch)
        return float(metrics["loss"])

    def turn() -> dict[str, float]:
        began = seconds()
        updates(work["steps"])
        return {"step": (seconds() - began) / work["steps"], **device_peak()}

    loss = updates(1)
    updates(1)
    flops = step_flops(config, run.state.params, rows=work["rows"], length=work["length"], images=work["rows"])
    return {"loss": loss, "model_flops": flops, **about(config)}, turn


def starting_point(work: Mapping[str, Any], settings: Settings, run: Run) -> tuple[TrainState, Any]:
    """Return (state, frozen parameters) of the model folder, or of random weights drawn on the device."""
    wanted = overlaid(run.frozen, run.state.params)
    if work["weights"]:
        read = hf.read_llava(work["model"], lazy=True)[1]
        params = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), read, wanted)
    else:
        params = init(run.config, settings.seed, wanted)
    return first_state(run, trainable_pattern(settings), params)


def read_batch(work: Mapping[str, Any]) -> Batch:
    """Return the batch of the file: full rows of one conversation each."""
    with np.load(work["batch"], allow_pickle=False) as arrays:
        tokens_BT, targets_BT, pixels_BNXYC = arrays["tokens"], arrays["targets"], arrays["bytes"]
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    image_mask_BN = np.ones(pixels_BNXYC.shape[:2], bool)
    return Batch(tokens_BT, targets_BT, np.ones_like(tokens_BT), positions_BT, pixels_BNXYC, image_mask_BN)


def model_config(work: Mapping[str, Any]) -> ModelConfig:
    config = hf.read_llava_config(work["model"])[0]
    return dataclasses.replace(config, dtype=work["dtype"], remat=work["remat"])


def generate(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """Return the ids and a turn of greedy answers to a batch of prompts: seconds an id, and to the first one."""
    config = model_config(work)
    # An automaton that never reaches its last state: no id ends an answer.
    never_QV = np.zeros((2, config.llm.vocab_size), np.int32)
    if work["weights"]:
        placed = place_model(hf.read_llava(work["model"], dtype=work["dtype"], lazy=True)[1], config, never_QV)
    else:
        wanted = stored_as(build(config)[1], work["dtype"])
        params = jax.jit(lambda: for_answers(init(config, 0, wanted)))()
        placed = PlacedModel(params, config, jnp.asarray(never_QV))
    batch = read_batch(work)
    prompts = [
        Prompt(tokens_T, normalised(pixels_NXYC, config.vision.pixels))
        for tokens_T, pixels_NXYC in zip(batch.tokens_BT, batch.pixels_BNXYC, strict=True)
    ]
    longest = max(len(prompt.tokens) for prompt in prompts) + work["new_tokens"]
    seconds = clock(jax.default_backend())

    def answer(count: int) -> tuple[float, list[list[int]]]:
        began = seconds()
        # An engine of its own: nothing is known of the prompts from the turn before.
        engine = Engine(IdModel(placed), slots=len(prompts), max_length=longest, waiting=len(prompts))
        ids = [answer.ids for answer in sorted(engine.answers(prompts, Sampling(max_new_tokens=count)))]
        return seconds() - began, ids

    def turn() -> dict[str, float]:
        total, first = answer(work["new_tokens"])[0], answer(1)[0]
        return {"token": total / work["new_tokens"], "first_token": first, **device_peak()}

    answer(1)
    return {"ids": answer(work["new_tokens"])[1], **about(config)}, turn


def data(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """Return the hashes of all images and a turn: images from files to batches, rows from text to packed batches.

    Both go through the pipeline of `train`, in this process.
    """
    seconds = clock("cpu")
    tokenizer = load_tokenizer(EMBEDDED_TOKENIZER)
    images, rows = image_records(work["images"]), text_records(work["rows"])
    folder = os.path.dirname(work["images"][0])
    size = work["size"]

    def image_batches() -> BatchIterator:
        return open_batches(images, folder, tokenizer, PICTURE_BATCH, size)[0]

    def turn() -> dict[str, float]:
        with closing(image_batches()) as batches:
            image_seconds = drain(batches, len(images) // PICTURE_BATCH, seconds)
        packed, tokens = open_batches(rows, folder, tokenizer, ROW_BATCH, size, pack=True)
        with closing(packed) as batches:
            row_seconds = drain(batches, len(rows) // ROW_BATCH, seconds)
        return {"image": image_seconds / len(images), "row": row_seconds / len(rows), "row_tokens": tokens / len(rows)}

    with closing(image_batches()) as batches:
        hashes = [fingerprint(normalised(image)) for batch in batches for image in batch.pixels_BNXYC[:, 0]]
    return {"pixels": hashes, "device": "cpu"}, turn


def scaling(work: Mapping[str, Any]) -> tuple[Figures, Turn]:
    """Return a turn: batches of images from one worker, then from two; wall seconds an image, and their ratio."""
    tokenizer, records = load_tokenizer(EMBEDDED_TOKENIZER), image_records(work["images"])
    folder = os.path.dirname(work["images"][0])
    readers = {
        workers: open_batches(records, folder, tokenizer, PICTURE_BATCH, work["size"], workers=workers, steps=10**5)[0]
        for workers in (1, 2)
    }

    def turn() -> dict[str, float]:
        seconds = {}
        for workers, batches in readers.items():
            drain(batches, READ_AHEAD, time.perf_counter)  # read during the other one's turn
            spent = drain(batches, work["batches"], time.perf_counter)
            seconds[f"workers_{workers}"] = spent / (work["batches"] * PICTURE_BATCH)
            time.sleep(SETTLE)  # its workers read ahead again, which would slow the other one down
        return seconds | {"ratio": seconds["workers_1"] / seconds["workers_2"]}

    turn()
    return {"device": "cpu"}, turn


def open_batches(
    records: list[Record],
    folder: str,
    tokenizer: TextTokenizer,
    batch_size: int,
    image_size: int,
    *,
    pack: bool = False,
    workers: int = 0,
    steps: int = 0,
) -> tuple[BatchIterator, int]:
    """Return the batches that `train` would get of these records, and how many tokens the records have.

    Args:
      records: each comes once, or as often as `steps` batches need.
      folder: of their images.
      tokenizer: as in `train`.
      batch_size: conversations a batch.
      image_size: side of the square the model sees.
      pack, workers: as in DataSettings.
      steps: batches; 0 for each record once.
    """
    how: dict[str, Any] = UNPACKED | dict(pack=pack, workers=workers)
    settings = DataSettings("", folder, "v1", "front", "pad", 2048, shuffle=False, **how)
    checked = check_records(records, settings, tokenizer, patches=PATCHES)
    plan = plan_batches(
        records,
        checked.lengths_A,
        settings,
        slots_A=checked.slots_A,
        batch_size=batch_size,
        row_multiple=1,
        steps=steps or len(records) // batch_size,
        seed=0,
    )
    batches = make_pipeline(
        records,
        settings,
        tokenizer,
        plan,
        image_size=image_size,
        patches=PATCHES,
        image_token_id=tokenizer.size,
    )
    return batches, checked.total("tokens")


def drain(batches: BatchIterator, count: int, seconds: Callable[[], float]) -> float:
    """Return the seconds that the next `count` batches take."""
    began = seconds()
    for _ in range(count):
        next(batches)
    return seconds() - began


def image_records(paths: list[str]) -> list[Record]:
    """Return a record with a short question for each image."""
    return [record(str(n), os.path.basename(path), ["<image>\nWhat is this?", "Yes."]) for n, path in enumerate(paths)]


def text_records(count: int) -> list[Record]:
    """Return records of two exchanges without images, 42 to 102 words each."""
    rng = random.Random(0)
    lengths = ((10, 20, 10, rng.randint(2, 62)) for _ in range(count))
    return [record(str(n), "", [" ".join(rng.choices(WORDS, k=k)) for k in turns]) for n, turns in enumerate(lengths)]


def record(name: str, image: str, texts: list[str]) -> Record:
    turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, texts, strict=False)]
    return parse_row({"id": name, "images": [image] if image else [], "conversations": turns}, name)


def about(config: ModelConfig) -> Figures:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(build(config)[1]))
    return {"device": jax.devices()[0].device_kind, "parameters": parameters, "jax": jax.__version__}


def device_peak() -> dict[str, float]:
    """Return the most memory the accelerator has held; nothing on a CPU."""
    if jax.default_backend() == "cpu":
        return {}
    return {"device_bytes": jax.devices()[0].memory_stats()["peak_bytes_in_use"]}


if __name__ == "__main__":
    # By default jax takes three quarters of a GPU's memory at the start; the other side uses the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    serve(start)
