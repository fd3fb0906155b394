"""The commands that hold a model: demo, generate, chat, convert."""

import argparse
import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from llava_jax.cli.flags import announce, check_least
from llava_jax.types import InputError, Sampling

if TYPE_CHECKING:
    from llava_jax.api import Llava

SOURCE = (
    "hf:DIR (a Hugging Face folder), llava:DIR (an original LLaVA one), orbax:DIR (a workdir of train, or what convert "
    "wrote so), peft:DIR (adapters, with --base), or just DIR; DIR may be a name on the Hub, owner/name[@REVISION], or "
    "gs://BUCKET/DIR"
)


BEST = "best"


def demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", default="demo_run", help="folder for everything the demo writes (demo_run)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world and other draws (0)")


def demo(args: argparse.Namespace) -> int:
    from llava_jax.demo import story

    announce("demo", workdir=args.workdir, seed=args.seed)
    story.play(story.Story(args.workdir, story.Sizes(seed=args.seed)))
    return 0


def sampling_flags(parser: argparse.ArgumentParser, max_new_tokens: int = Sampling.max_new_tokens) -> None:
    default = Sampling()
    parser.add_argument("--temperature", type=float, default=default.temperature, help="0 is greedy, the default")
    parser.add_argument("--top_p", type=float, default=default.top_p, help="draw from this share of probability (1)")
    parser.add_argument("--top_k", type=int, default=default.top_k, help="draw from the K likeliest; 0, all (0)")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help=f"longest answer ({max_new_tokens})")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of the draws (0)")
    loading_flags(parser)


def loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add how `load` reads a model to answer with."""
    parser.add_argument("--template", help="conversation template; that of the model, or v1 where it names none")
    tensor = "devices that each copy of the model is split over; 0, as few as can hold it (0)"
    weights = "int8: the kernels of the decoder's blocks in eight bits; in the model's dtype by default"
    parser.add_argument("--weights", default="", metavar="int8", help=weights)
    parser.add_argument("--tensor", type=int, default=0, metavar="N", help=tensor)


def sampling_of(args: argparse.Namespace, beams: int = 1) -> Sampling:
    """Return the sampling of the flags, checked before a model is read. Raises InputError."""
    from llava_jax.infer.sample import check_sampling

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, beams, args.seed)
    check_sampling(sampling)
    return sampling


def said(sampling: Sampling) -> str:
    """Return the sampling in words, for what a command says before it starts."""
    kind = f"beam search with {sampling.beams} beams" if sampling.beams > 1 else "greedy"
    if sampling.temperature > 0:
        kind = f"temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k or 'off'}"
        kind += f", seed {sampling.seed}"
    return f"{kind}, at most {sampling.max_new_tokens} tokens"


def generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="SRC", help=SOURCE)
    companion_flags(parser)
    one = parser.add_argument_group("one question")
    one.add_argument("--image", metavar="FILE", help="the image; none for a question about no image")
    one.add_argument("--prompt", metavar="TEXT", help="the question")
    many = parser.add_argument_group("a file of questions")
    many.add_argument("--questions", metavar="FILE.jsonl", help="lines with question_id, image, text")
    many.add_argument("--images", metavar="DIR", help="folder of the images they name")
    many.add_argument("--answers", metavar="FILE.jsonl", help="written; a half-written one is resumed")
    many.add_argument("--batch_size", type=int, default=8, help="questions answered at once (8)")
    sampling_flags(parser)
    parser.add_argument("--beams", type=int, default=1, help="beam search with this many beams (1, none)")


def generate(args: argparse.Namespace) -> int:
    check_least(args, 1, "batch_size")
    if (args.prompt is None) == (args.questions is None):
        raise InputError("generate needs --prompt (one question) or --questions (a file of them), and not both")
    if args.questions is not None and (args.images is None or args.answers is None):
        raise InputError("--questions needs --images=DIR (the images) and --answers=FILE.jsonl (to be written)")
    if args.questions is not None and args.image is not None:
        raise InputError("--image goes with --prompt; with --questions each line names its image, below --images")
    if args.prompt is not None and (args.images is not None or args.answers is not None):
        raise InputError("--images and --answers go with --questions; one --prompt takes --image")
    sampling = sampling_of(args, args.beams)
    return generate_one(args, sampling) if args.prompt is not None else generate_file(args, sampling)


def generate_one(args: argparse.Namespace, sampling: Sampling) -> int:
    need_file("--image", args.image)
    announce("generate", model=args.model, image=args.image, template=args.template, sampling=said(sampling))
    model = load(args)
    print(model.generate([args.prompt], [args.image], **dataclasses.asdict(sampling))[0])
    return 0


def generate_file(args: argparse.Namespace, sampling: Sampling) -> int:
    from llava_jax.infer.batch_generate import answer_file

    need_file("--questions", args.questions)
    given = dict(model=args.model, questions=args.questions, images=args.images, answers=args.answers)
    announce("generate", **given, template=args.template, sampling=said(sampling), batch_size=args.batch_size)
    model = load(args)
    written = answer_file(
        model, args.questions, args.images, args.answers, sampling, batch_size=args.batch_size, progress=sys.stdout
    )
    print(f"{written} answers written to {args.answers}")
    return 0


def chat_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="SRC", help=SOURCE)
    companion_flags(parser)
    several = "an image to talk about; give the flag again for more, or /image while talking"
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help=several)
    sampling_flags(parser, max_new_tokens=512)


def chat(args: argparse.Namespace) -> int:
    sampling = sampling_of(args)
    from llava_jax.infer import chat as terminal

    for path in args.image:
        need_file("--image", path)
    announce("chat", model=args.model, image=", ".join(args.image), template=args.template, sampling=said(sampling))
    model = load(args)
    terminal.chat(model, args.image, sys.stdin, sys.stdout, sampling)
    return 0


def convert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", required=True, metavar="SRC", help=SOURCE)
    to = "to be written: hf:DIR, orbax:DIR, llava:DIR (the original's layout), projector:FILE.safetensors, peft:DIR"
    parser.add_argument("--to", required=True, metavar="DST", help=to)
    parser.add_argument("--dtype", default="", help="float32 or bfloat16; as the source by default")
    template = "conversation template of the model; the one the source names by default"
    parser.add_argument("--template", default="", metavar="NAME", help=template)
    companion_flags(parser)
    tower = "what a written llava:DIR names its tower by; by default the folder written inside it"
    parser.add_argument("--mm_vision_tower", default="", metavar="NAME", help=tower)
    rows = "a vocabulary of as many rows as the tokenizer has ids, up to the next multiple of N; 1 for not one more"
    parser.add_argument("--pad_vocab", type=int, default=0, metavar="N", help=rows)
    push = "upload what is written to this repository on the Hub, made private where there is none"
    parser.add_argument("--push", default="", metavar="USER/NAME", help=push)
    force = "write also where the exported tokenizer gives other ids than the model was trained on, or weights are NaN"
    parser.add_argument("--force", action="store_true", help=force)


def companion_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision", default="", metavar="DIR", help="the CLIP folder that a llava:DIR only names")
    base = "the model that adapters (peft:DIR, llava:DIR) or a stage-1 llava:DIR belong to, where they only name one"
    parser.add_argument("--base", default="", metavar="DIR", help=base)
    step = (
        "the checkpoint of a workdir of train to take: a number, or best, the smallest eval_loss; the newest by default"
    )
    parser.add_argument("--step", type=checkpoint, metavar="N", help=step)


def checkpoint(text: str) -> int | str:
    """Return what --step names."""
    return text if text == BEST else int(text)


def step_of(args: argparse.Namespace, source: str) -> int | None:
    """Return the checkpoint of --step. Raises InputError where the best one is not known."""
    from llava_jax.weights.source import best_step, split

    return best_step(split(source)[1]) if args.step == BEST else args.step


def convert(args: argparse.Namespace) -> int:
    from llava_jax import hub
    from llava_jax.weights import convert

    source = vars(args)["from"]
    given = dict(dtype=args.dtype, template=args.template, vision=args.vision, base=args.base)
    announce("convert", source=source, target=args.to, **given, push=args.push)
    rest = dict(
        mm_vision_tower=args.mm_vision_tower, step=step_of(args, source), pad_vocab=args.pad_vocab, force=args.force
    )
    if args.push and args.to.startswith("projector:"):
        raise InputError(f"--push={args.push}: uploads a folder and --to={args.to} is a file; use `hf upload`")
    if args.push:
        hub.make_repository(args.push)
    convert.convert(source, args.to, **given, **rest, name=args.push)
    if args.push:
        print(f"pushed to {hub.upload(args.to.partition(':')[2], args.push)}")
    return 0


def load(args: argparse.Namespace) -> "Llava":
    """Read the model of the flags, and say what it is asked with."""
    import llava_jax.api as api
    from llava_jax.parallel.sharding import mesh_sizes

    step = step_of(args, args.model)
    companions = dict(vision=args.vision, base=args.base)
    model = api.load(args.model, args.template, **companions, step=step, tensor=args.tensor, weights=args.weights)
    about = model.about
    announce(
        f"model {model.name}",
        template=about["template"] + (" (assumed)" if model.template_assumed else ""),
        aspect=about["aspect"],
        image_position=about["image_position"],
        exif=about["exif"] + (" (images are turned upright)" if about["exif"] == "apply" else " (images as stored)"),
        dtype=about["dtype"],
        devices=model.placed.mesh and "{data} times {tensor}".format(**mesh_sizes(model.placed.mesh)),
    )
    if model.processor.rules.caption_only:
        print(f"template {about['template']} writes captions: the prompt is not used, only its image\n", flush=True)
    return model


def need_file(flag: str, path: str | None) -> None:
    """Raise InputError when a flag names a file that is not there: known before a model is read."""
    if path is not None and not os.path.isfile(path):
        raise InputError(f"{flag}={path}: no such file; check the path")
