"""The command prepare verify."""

import argparse
import math
import os
from typing import Any

from llava_jax.cli.flags import announce, check_least
from llava_jax.data.rows import parse_images
from llava_jax.data.sources import FORMS
from llava_jax.io import write_rows
from llava_jax.settings import CHOICES
from llava_jax.types import UNPACKED, ClipConfig, DataSettings, InputError, ModelConfig

# The flags that a config answers in their place.
SINGLE = ("annotations", "images", "tokenizer", "template", "image_position", "max_length", "vision", "patches")
NEEDED = ("annotations", "tokenizer", "template")


def verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dump", metavar="FILE.jsonl", help="written: ids, targets and supervised text of each row")
    output = "written: the rows that can be trained, as they are; the others are then named and no error"
    parser.add_argument("--output", metavar="FILE.json", help=output)
    parser.add_argument_group("what `train` would read").description = (
        "--config=FILE[:arg]      as for `train`, with its --config.KEY=VALUE; the rows, their images, template,\n"
        "                         tokenizer and lengths are then those of that run"
    )
    single = parser.add_argument_group("or, without a config")
    single.add_argument("--annotations", metavar="SRC", help="rows, as data.annotations names them")
    single.add_argument("--images", metavar="DIR", help="folder the rows' image paths are relative to")
    single.add_argument("--tokenizer", metavar="DIR", help="folder of the decoder, or of its tokenizer")
    single.add_argument("--template", help="conversation template: plain, v0, v1, llava_llama_2, …")
    single.add_argument("--image_position", choices=CHOICES["data.image_position"], help="as in training (front)")
    single.add_argument("--max_length", type=int, help="as in training, image tokens included (2048)")
    single.add_argument("--vision", metavar="DIR", help="CLIP folder; its config.json says what an image takes")
    single.add_argument("--patches", type=int, help="the same as a number: image tokens of one image (576)")


def verify(args: argparse.Namespace) -> int:
    data, folder, config, patches = model_of_run(args) if args.passed else model_of_flags(args)
    from llava_jax.data import validate
    from llava_jax.data.records import recognised
    from llava_jax.data.tiles import tiling
    from llava_jax.data.tokenize import check_vocabulary, load_tokenizer

    tokenizer = load_tokenizer(folder)
    if config is not None:
        check_vocabulary(tokenizer, config, folder)
    tiles = tiling(config) if config is not None and config.pinpoints else None
    announce(
        "prepare verify",
        config=" ".join(args.passed),
        annotations=data.annotations,
        images=data.images,
        tokenizer=folder,
        template=f"{data.template}, image position {data.image_position}",
        max_length=f"{data.max_length} tokens, {patches} of them for each {'image' if tiles is None else 'tile'}",
        dump=args.dump,
        output=args.output,
    )
    rows, checked = validate.verify(data, tokenizer, patches=patches, tiling=tiles, dump_path=args.dump)
    print("\n".join([*recognised(data.annotations, rows), *validate.report_lines(checked, data.max_length)]))
    if args.output:
        bad = {rejected.row for rejected in checked.rejected}
        write_rows(args.output, (as_json(rows.decoded(row), row) for row in range(len(rows)) if row not in bad))
        print(f"wrote {args.output}: {checked.kept} rows, without {len(bad)}")
        return 0
    if checked.rejected:
        count = f"{len(checked.rejected)} of {checked.rows} rows of {data.annotations} cannot be trained"
        more = " (the first of them)" if len(checked.rejected) > 1 else ""
        raise InputError(f"{count}: {checked.rejected[0]}{more}; fix or remove them")
    if config is not None:
        checked.require_fit(data.annotations, config.llm.max_positions)
    checked.require_order(rows, data)
    return 0


def as_json(row: dict[str, Any], index: int) -> dict[str, Any]:
    """Return a row that JSON can hold. Raises InputError for one that brings its images along."""
    if any(isinstance(image, bytes) for image in parse_images(row)):
        raise InputError(f"row {index} brings its images along, which JSON cannot hold; leave out --output")
    return row


Model = tuple[DataSettings, str, ModelConfig | None, int]


def model_of_run(args: argparse.Namespace) -> Model:
    """Return (data settings, tokenizer folder, model, tokens of an image or tile) of the run that `--config` describes.

    How many devices there will be is not known here: of the batch is checked what the config says of them.
    """
    given = [f"--{name}" for name in SINGLE if getattr(args, name) is not None]
    if given:
        raise InputError(f"{' and '.join(given)} next to --config: give the --config.KEY=VALUE that `train` gets")
    settings = args.settings()
    if not settings.data.annotations:
        raise InputError(f"data.annotations is empty: expected {FORMS}")
    from llava_jax.data.packing import check_batch_size
    from llava_jax.weights.load import model_spec, with_template

    settings = with_template(settings)
    devices = math.prod(max(size, 1) for size in (settings.mesh.data, settings.mesh.fsdp))
    check_batch_size(settings.train.batch_size, devices * settings.train.accumulate, settings.data.pack)
    spec = model_spec(settings)
    return settings.data, spec.tokenizer, spec.config, spec.config.vision.patches


def model_of_flags(args: argparse.Namespace) -> Model:
    """Return the same of the single flags, which show an image as one square; no model where they name none."""
    missing = [f"--{name}" for name in NEEDED if getattr(args, name) is None]
    if missing:
        needs = "prepare verify needs --config=FILE[:arg], or else"
        raise InputError(f"{needs} {' and '.join(missing)} next to the others")
    check_least(args, 1, "max_length", "patches")
    if args.vision is not None and args.patches is not None:
        raise InputError("--vision and --patches both say what an image takes; give one of them")
    position, length = args.image_position or "front", args.max_length or 2048
    images = args.images or ""
    data = DataSettings(args.annotations, images, args.template, position, "pad", length, shuffle=False, **UNPACKED)
    from llava_jax.settings import RANDOM
    from llava_jax.weights.load import vision_config
    from llava_jax.weights.source import local_folder

    vision = vision_config(local_folder(args.vision or f"{RANDOM}clip-l-14-336", "--vision"))
    tokenizer = local_folder(args.tokenizer, "--tokenizer")
    return data, tokenizer, model_of(tokenizer, vision), args.patches or vision.patches


def model_of(folder: str, vision: ClipConfig) -> ModelConfig | None:
    """Return a model with the decoder whose config.json lies in the tokenizer's folder; None where none lies there."""
    from llava_jax.data.tokenize import load_tokenizer
    from llava_jax.weights.hf_config import DECODERS, read_json
    from llava_jax.weights.load import llm_config

    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path) or read_json(path).get("model_type") not in DECODERS:
        return None
    llm = llm_config(folder)
    return ModelConfig(vision, llm, image_token_id=load_tokenizer(folder).image_token_id(llm.vocab_size))
