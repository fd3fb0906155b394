"""Settings of a run: checked construction from a nested dict, reading and writing config.json."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from llava_jax.buckets import SCHEME
from llava_jax.io import read_json, write_json
from llava_jax.types import (
    DECODER_LINEARS,
    REMAT_NAMES,
    TOWER_LINEARS,
    WEIGHT_NAMES,
    DataSettings,
    InputError,
    Settings,
)

# What learns where train.trainable is empty, as a pattern of parameter paths. `mid` is LLaVA-OneVision's stage 1.5
# (arXiv 2408.03326, section 4): the whole model, on detailed captions, before it sees instructions.
STAGES = {
    "pretrain": "^projector/",
    "mid": "^(projector|llm|vision)/",
    "finetune": "^(projector|llm)/",
    "lora": "^(projector|lora|vision_lora)/",
}

RANDOM = "random:"  # a tower with random weights, of a named size or of a config file

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "minimal", "full")  # minimal: all of REMAT_NAMES

CHOICES = {
    "stage": tuple(STAGES),
    "model.projector": ("linear", "mlp2x_gelu"),
    "data.image_position": ("front", "keep"),
    "data.aspect": ("pad", "crop", "squash", "anyres"),
    "data.exif": ("apply", "ignore"),
    "data.group_by": ("none", "modality_length"),
    "optim.schedule": ("cosine", "constant", "linear"),
    **dict.fromkeys(("train.dtype", "train.param_dtype", "train.moment_dtype"), DTYPES),
    "train.frozen_dtype": (*DTYPES, "nf4"),
    "train.attention": ("auto", "splash", "cudnn", "xla"),
    "train.loss_norm": ("global_token", "rank_mean"),
}

FROM_0 = (
    "data.pack_length",
    "data.pack_images",
    "data.workers",
    "optim.weight_decay",
    "optim.clip_norm",
    "train.steps",
    "train.epochs",
    "train.profile",
    "train.checkpoint_every",
    "train.vision_blocks",
    "train.eval_every",
    "train.eval_generate",
    "train.watchdog",
    "data.max_rejects",
)
FROM_1 = (
    "train.max_nonfinite",
    "lora.rank",
    "train.batch_size",
    "train.accumulate",
    "train.log_every",
    "train.keep",
    "mesh.fsdp_inner",
)
# key -> (smallest, largest, is the smallest allowed, is the largest allowed)
RANGES = {
    "seed": (0, 2**31, True, False),
    "data.max_length": (2, math.inf, True, False),
    "optim.warmup_ratio": (0, 1, True, True),
    **dict.fromkeys(FROM_0, (0, math.inf, True, False)),
    **dict.fromkeys(FROM_1, (1, math.inf, True, False)),
    **dict.fromkeys(("optim.b1", "optim.b2", "lora.dropout"), (0, 1, True, False)),
    **dict.fromkeys(("optim.lr", "optim.eps", "lora.alpha"), (0, math.inf, False, False)),
}
# Keys that came after runs had been written, and what those runs did. Every config names every key.
EARLIER_RUNS = {
    "data.exif": "ignore",
    "data.exclude": "",
    "data.max_rejects": 0.0,
    "mesh.fsdp_inner": 1,
    "train.trainable": "",
    "train.vision_blocks": 0,
    "data.eval": "",
    "data.eval_images": "",
    "train.eval_every": 0,
    "train.eval_generate": 0,
    "train.keep_best": False,
    "train.wandb": "",
    "train.max_nonfinite": 1,
    "train.watchdog": 3600,
    "lora.vision_targets": "",
}
ABOUT_EVAL = ("data.eval_images", "train.eval_every", "train.eval_generate", "train.keep_best")
# Of this machine or in a bucket; data.annotations also where etils.epath and TFDS reach.
FOLDERS = (
    "model.vision",
    "model.llm",
    "init.model",
    "init.projector",
    "data.images",
    "data.eval_images",
    "data.exclude",
)


def settings_from_dict(values: dict) -> Settings:
    """Return Settings from a nested dict of every key. Raises InputError at the first unknown, absent or wrong one."""
    settings = _build(Settings, values, "")
    for key, value in flatten(dataclasses.asdict(settings)):
        _check_value(key, value)
    _check_mesh(settings)
    train = settings.train
    if train.steps == train.epochs == 0:
        raise InputError("train.steps and train.epochs are both 0: set one of them")
    _check_eval(settings)
    _check_order(settings.data)
    if settings.data.pack and train.loss_norm == "rank_mean":
        raise InputError(
            "train.loss_norm=rank_mean weighs the rows of each device as the original does, and data.pack=True mixes "
            "them: set --config.data.pack=False, or leave loss_norm at global_token"
        )
    parse_groups(settings.optim.groups)
    lora_targets(settings.lora.targets, "llm")
    if settings.lora.vision_targets:
        lora_targets(settings.lora.vision_targets, "vision")
    trainable_pattern(settings)
    if train.frozen_dtype == "nf4" and settings.stage != "lora":
        raise InputError(
            f"train.frozen_dtype=nf4 stores a decoder in four bits that learns through adapters: expected stage=lora, "
            f"or another dtype with stage={settings.stage}"
        )
    return settings


def read_settings(path: str) -> Settings:
    """Return Settings from a config.json as `write_settings` leaves it. Raises InputError, which names the file."""
    values = read_json(path, "the config.json of a training run")
    for key, value in EARLIER_RUNS.items():
        group, name = key.split(".")
        keys = values.get(group) if isinstance(values, dict) else None
        if isinstance(keys, dict):
            keys.setdefault(name, value)
    try:
        return settings_from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write_settings(path: str, settings: Settings) -> None:
    """Write the settings as the nested dict that `read_settings` reads."""
    write_json(path, dataclasses.asdict(settings))


def tower_path(spec: str) -> str:
    """Return the folder or file of a `model.vision` or `model.llm`: FILE of `random:FILE.json`, "" of `random:NAME`."""
    name = spec.removeprefix(RANDOM)
    return "" if spec.startswith(RANDOM) and not name.endswith(".json") else name


def flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested dict as ("a.b", value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two settings differ, with both values."""
    before, now = (dict(flatten(dataclasses.asdict(settings))) for settings in (old, new))
    return {key: (before[key], now[key]) for key in now if now[key] != before[key]}


def parse_groups(text: str) -> list[tuple[re.Pattern, float]]:
    """Return the learning-rate groups of 'pattern=lr,pattern=lr' as (compiled pattern, lr), in order."""
    groups = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        pattern, separator, rate = item.rpartition("=")
        try:
            lr = float(rate)
            compiled = re.compile(pattern)
        except (ValueError, re.error) as error:
            raise InputError(f"optim.groups: {item!r} ({error}), expected 'pattern=lr,pattern=lr'") from error
        if not separator or not pattern or not 0 <= lr < math.inf:
            raise InputError(f"optim.groups: {item!r}, expected 'pattern=lr' with a finite lr of 0 or more")
        groups.append((compiled, lr))
    return groups


def lora_targets(pattern: str, part: str) -> tuple[str, ...]:
    """Return those linear layers of `part` (llm, vision) whose full path (`llm/layers/attn/q`) the pattern matches."""
    key, names = {"llm": ("lora.targets", DECODER_LINEARS), "vision": ("lora.vision_targets", TOWER_LINEARS)}[part]
    paths = {f"{part}/layers/{name}": name for name in names}
    try:
        found = tuple(name for path, name in paths.items() if re.fullmatch(pattern, path))
    except re.error as error:
        raise InputError(f"{key}={pattern!r} is not a regular expression ({error})") from error
    if not found:
        raise InputError(f"{key}={pattern!r} matches none of {', '.join(paths)}: expected a pattern that does")
    return found


def alternatives(pattern: str) -> list[str]:
    """Return the alternatives of a regular expression that stand outside its brackets."""
    parts: list[str] = []
    for text in pattern.split("|"):
        if parts and not _compiles(parts[-1]):  # the | before this one stands inside
            parts[-1] += f"|{text}"
        else:
            parts.append(text)
    return parts


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def trainable_pattern(settings: Settings) -> re.Pattern:
    """Return what is found in the path of every parameter that learns.

    Raises InputError where `train.trainable` is no regular expression, or finds everything by an empty alternative.
    """
    train = settings.train
    text = train.trainable or STAGES[settings.stage]
    try:
        found = re.compile(text)
    except re.error as error:
        raise InputError(f"train.trainable={text!r} is not a regular expression ({error})") from error
    if "" in alternatives(text):
        raise InputError(f"train.trainable={text!r}: an empty alternative finds every parameter, expected none")
    if not train.vision_blocks:
        return found
    # Gradients stop where the tower's blocks that learn begin: nothing before them can learn.
    return re.compile(f"^(?!vision/(?!layers/)).*?(?:{text})")


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"config key {prefix.rstrip('.') or 'config'}: expected a group of keys, got {values!r}")
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise InputError(f"unknown config key {prefix}{name}{nearest(name, tuple(hints))}")
    missing = [name for name in hints if name not in values]
    if missing:
        raise InputError(f"config key {prefix}{missing[0]} is absent: every key must be given")
    return cls(**{name: _convert(kind, values[name], f"{prefix}{name}") for name, kind in hints.items()})


def _convert(kind: type, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{key}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"config key {key}: expected {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def nearest(name: str, known: tuple[str, ...]) -> str:
    """Return `: did you mean X?`, or the list of what exists, for the end of an error line."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f": expected one of {', '.join(known)}"


def _check_value(key: str, value: Any) -> None:
    if key in FOLDERS and "://" in value and (SCHEME not in value or value.startswith(RANDOM)):
        raise InputError(f"config key {key}={value}: expected a folder of this machine, or one at {SCHEME}…")
    if key in CHOICES and value not in CHOICES[key]:
        raise InputError(f"config key {key}: expected one of {', '.join(CHOICES[key])}, got {value!r}")
    names = ("minimal", *REMAT_NAMES, *WEIGHT_NAMES)
    if key == "train.remat" and value not in REMATS and not set(value.split("+")) <= set(names):
        raise InputError(
            f"config key {key}: expected one of {', '.join(REMATS)}, or names of {', '.join(names)} "
            f"joined by '+', got {value!r}"
        )
    if key in RANGES:
        low, high, low_in, high_in = RANGES[key]
        if not ((value >= low if low_in else value > low) and (value <= high if high_in else value < high)):
            bounds = f"{'[' if low_in else '('}{low}, {high}{']' if high_in else ')'}"
            raise InputError(f"config key {key}: expected a number in {bounds}, got {value!r}")


def _check_eval(settings: Settings) -> None:
    """Raise InputError for a key about held-out rows where there are none."""
    values = dict(flatten(dataclasses.asdict(settings)))
    given = [key for key in ABOUT_EVAL if values[key]]
    if given and not settings.data.eval:
        raise InputError(
            f"{given[0]}={values[given[0]]} is about the rows of data.eval, which is empty: name them, or leave it out"
        )


def _check_order(data: DataSettings) -> None:
    if data.group_by != "none" and (data.pack or not data.shuffle):
        other = "data.pack=True" if data.pack else "data.shuffle=False"
        change = "--config.data.pack=False" if data.pack else "--config.data.shuffle=True"
        raise InputError(f"data.group_by={data.group_by} and {other} each order the rows: set {change}")
    if not data.pack and (data.pack_length or data.pack_images):
        raise InputError(
            f"data.pack_length={data.pack_length} and data.pack_images={data.pack_images} say how rows are packed: "
            "set --config.data.pack=True, or both to 0"
        )


def _check_mesh(settings: Settings) -> None:
    # Whether fsdp_inner divides fsdp is known once that has its number: sharding.make_mesh.
    sizes = {name: getattr(settings.mesh, name) for name in ("data", "fsdp", "tensor")}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(f"config key mesh.{name}: expected 1 or more devices, or -1 for what is left, got {size}")
    if list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh {sizes}: at most one axis can be -1 (what is left), set the others")
