"""The commands that hold no model: prepare verify, synthesize, evaluate exact_match."""

import argparse
import json

from llava_jax.cli_parse import announce
from llava_jax.types import InputError


def verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, metavar="FILE", help="LLaVA's JSON, or JSONL")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder the rows' pictures are relative to")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder of the decoder, or of its tokenizer")
    parser.add_argument("--template", required=True, help="conversation template: plain, v0, v1, llava_llama_2, …")
    parser.add_argument("--image_position", choices=("front", "keep"), default="front", help="as in training (front)")
    parser.add_argument("--max_length", type=int, default=2048, help="as in training, image tokens included (2048)")
    parser.add_argument(
        "--patches", type=int, default=576, help="image tokens of one picture: (size / patch)², 576 for 336 pixels"
    )
    parser.add_argument("--dump", metavar="FILE.jsonl", help="written: ids, targets and supervised text of each row")


def verify(args: argparse.Namespace) -> int:
    for name in ("max_length", "patches"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}={getattr(args, name)}: expected 1 or more")
    from llava_jax.data import verify as checks
    from llava_jax.data.tokenize import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    announce(
        "prepare verify",
        annotations=args.annotations,
        images=args.images,
        tokenizer=args.tokenizer,
        template=f"{args.template}, image position {args.image_position}",
        max_length=f"{args.max_length} tokens, {args.patches} of them for each picture",
        dump=args.dump,
    )
    report = checks.verify(
        args.annotations,
        args.images,
        tokenizer,
        args.template,
        image_position=args.image_position,
        max_length=args.max_length,
        patches=args.patches,
        dump_path=args.dump,
    )
    print("\n".join(checks.report_lines(report)))
    return 1 if report.rejected else 0


def synthesize_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", required=True, metavar="SRC", help="JSONL, or a folder of COCO annotation files")
    parser.add_argument("--kind", required=True, choices=("conversation", "detail", "reasoning"))
    parser.add_argument("--output", required=True, metavar="FILE.json", help="written: rows that `train` takes")
    parser.add_argument("--teacher", choices=("embedded",), default="embedded", help="who writes (embedded)")
    parser.add_argument("--prompts", metavar="DIR", help="prompts in place of those that come with the package")
    parser.add_argument("--limit", type=int, default=0, help="only the first pictures, this many; 0, all (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument("--dry_run", action="store_true", help="print what is asked about the first picture, and stop")


def synthesize(args: argparse.Namespace) -> int:
    for name in ("limit", "seed"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name}={getattr(args, name)}: expected 0 or more")
    from llava_jax.demo.teacher import EmbeddedTeacher
    from llava_jax.synthesize import context, write

    announce(
        "synthesize",
        contexts=args.contexts,
        kind=args.kind,
        output="none, dry run" if args.dry_run else args.output,
        teacher=args.teacher,
        prompts=args.prompts,
        pictures=f"the first {args.limit}" if args.limit else "all",
        seed=args.seed,
    )
    if args.dry_run:
        prompts = write.load_prompts(args.kind, args.prompts)
        for message in write.messages_for(context.load_contexts(args.contexts)[0], args.kind, prompts):
            print(f"[{message['role']}]\n{message['content']}\n")
        return 0
    teacher = EmbeddedTeacher(args.kind, args.seed)
    written = write.synthesize(
        args.contexts,
        args.kind,
        args.output,
        teacher,
        prompts_dir=args.prompts,
        seed=args.seed,
        limit=args.limit,
    )
    print(f"{written}: {args.output}")
    return 0


def exact_match_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, metavar="FILE.jsonl", help="question_id, category, answer a line")
    parser.add_argument("--answers", required=True, metavar="FILE.jsonl", help="as `generate` writes them")
    parser.add_argument("--json", metavar="FILE", help="written: all figures")


def exact_match(args: argparse.Namespace) -> int:
    from llava_jax.evaluate import exact_match as benchmark

    announce("evaluate exact_match", questions=args.questions, answers=args.answers, json=args.json)
    figures = benchmark.score(args.questions, args.answers)
    print(benchmark.table({"exact match": figures}))
    if args.json is not None:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
            file.write("\n")
    return 0
