"""The commands that make data sets: prepare captions, concepts, scienceqa, arrayrecord."""

import argparse
import os

from llava_jax.cli.flags import Named, announce, check_least, check_output
from llava_jax.io import write_json, write_rows
from llava_jax.types import InputError


def captions_flags(parser: argparse.ArgumentParser) -> None:
    caption_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions, and of where the image stands (0)")


def caption_flags(parser: argparse.ArgumentParser) -> None:
    captions = "JSON or JSONL of image and caption, or COCO's captions"
    parser.add_argument("--captions", required=True, metavar="FILE", help=captions)
    parser.add_argument("--output", required=True, metavar="FILE", help="written: rows of stage 1, JSON or JSONL")


def captions(args: argparse.Namespace) -> int:
    check_least(args, 0, "seed")
    check_output("--output", args.output)
    from llava_jax.prepare.captions import caption_rows, read_captions

    announce("prepare captions", captions=args.captions, output=args.output, seed=args.seed)
    refused: list[str] = []
    written = write_rows(args.output, caption_rows(read_captions(args.captions, refused), args.seed))
    print("".join(f"refused: {one}\n" for one in refused), end="")
    print(f"{written:,} rows of stage 1, {len(refused):,} captions refused: {args.output}")
    return 0


def concepts_flags(parser: argparse.ArgumentParser) -> None:
    caption_flags(parser)
    parser.add_argument("--min_count", type=int, default=3, help="a phrase in fewer captions is dropped (3)")
    parser.add_argument("--cap", type=int, default=100, help="captions a phrase may choose (100)")
    parser.add_argument("--case", choices=("lower", "keep"), default="lower", help="Dog and dog are one phrase (lower)")
    parser.add_argument("--articles", choices=("drop", "keep"), default="drop", help="a dog and the dog are one (drop)")
    pooled = "above the cap, draw from all captions of a phrase, or count those chosen before towards the cap (draw)"
    parser.add_argument("--pooled", choices=("draw", "count"), default="draw", help=pooled)
    parser.add_argument("--finder", choices=("builtin", "spacy"), default="builtin", help="of noun phrases (builtin)")
    parser.add_argument("--spacy_model", default="en_core_web_sm", help="for --finder=spacy (en_core_web_sm)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws and of the questions (0)")
    parser.add_argument("--json", metavar="FILE", help="written: the counts, and each phrase in the order of its turn")


def concepts(args: argparse.Namespace) -> int:
    check_least(args, 1, "min_count", "cap")
    check_least(args, 0, "seed")
    check_output("--output", args.output)
    check_output("--json", args.json)
    from llava_jax.prepare import phrases
    from llava_jax.prepare.captions import caption_rows, read_captions
    from llava_jax.prepare.concepts import Rule, select

    finder = phrases.builtin_phrases if args.finder == "builtin" else phrases.spacy_phrases(args.spacy_model)
    rule = Rule(args.min_count, args.cap, args.case, args.articles, args.pooled, args.seed)
    announce(
        "prepare concepts",
        captions=args.captions,
        output=args.output,
        finder=args.finder if args.finder == "builtin" else f"spaCy, {args.spacy_model}",
        rule=f"phrases in {rule.min_count} captions or more, rarest first, at most {rule.cap} captions each",
        counted=f"case {rule.case}, articles {rule.articles}, captions chosen before: {rule.pooled}",
        seed=rule.seed,
        json=args.json,
    )
    refused: list[str] = []
    found = list(read_captions(args.captions, refused))
    selection = select([one.text for one in found], finder, rule)
    write_rows(args.output, caption_rows((found[index] for index in selection.kept), args.seed))
    if args.json:
        write_json(args.json, {"refused": len(refused), **selection.figures()})
    print("".join(f"refused: {one}\n" for one in refused), end="")
    print("\n".join(selection.lines()))
    print(f"{len(selection.kept):,} rows of stage 1, {len(refused):,} captions refused: {args.output}")
    return 0


def scienceqa_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="DIR", help="folder of problems.json and pid_splits.json")
    parser.add_argument("--split", required=True, help="a split of pid_splits.json: train, val, test, minival, …")
    parser.add_argument("--output", required=True, metavar="FILE", help="written: rows that `train` takes")
    parser.add_argument("--format", help="prompt format: QCM-LEA, QCM-LEPA, CQM-A, … (QCM-LEA)")
    as_questions = "write questions for `generate`, as LLaVA-1.5 is asked them, in place of rows"
    parser.add_argument("--questions", action="store_true", help=as_questions)
    subset, newlines = "problems with an image, or without (all)", "of lecture and solution; escape: as \\n (keep)"
    parser.add_argument("--subset", choices=("all", "image", "text"), default="all", help=subset)
    parser.add_argument("--newlines", choices=("keep", "escape"), default="keep", help=newlines)


def scienceqa_files(args: argparse.Namespace) -> tuple[list[Named], list[Named]]:
    from llava_jax.prepare.scienceqa import FILES

    return [Named("--source", os.path.join(args.source, name)) for name in FILES], []


def scienceqa(args: argparse.Namespace) -> int:
    from llava_jax.prepare.questions import scienceqa_questions
    from llava_jax.prepare.scienceqa import convert, formats

    check_output("--output", args.output)
    if args.questions and args.format:
        raise InputError(f"--questions and --format={args.format}: questions have a format of their own; give one")
    prompt_format = args.format or "QCM-LEA"
    formats(prompt_format)
    split, shown = f"{args.split}, {args.subset}", "questions" if args.questions else prompt_format
    announce(
        "prepare scienceqa", source=args.source, split=split, format=shown, newlines=args.newlines, output=args.output
    )
    if args.questions:
        rows = list(scienceqa_questions(args.source, args.split, args.subset))
    else:
        rows = convert(args.source, args.split, prompt_format, subset=args.subset, newlines=args.newlines)
    write_rows(args.output, rows)
    print(f"{len(rows):,} rows, {sum('image' in row for row in rows):,} with an image: {args.output}")
    return 0


def arrayrecord_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, metavar="SRC", help="rows, as data.annotations names them")
    parser.add_argument("--images", default="", metavar="DIR", help="folder the rows' images are relative to")
    parser.add_argument("--output", required=True, metavar="DIR", help="written: DIR/llava_rows/1.0.0")
    parser.add_argument("--split", default="train", help="name of the split (train)")
    parser.add_argument("--shards", type=int, default=0, help="files to write; 0: by size (0)")


def arrayrecord(args: argparse.Namespace) -> int:
    check_least(args, 0, "shards")
    from llava_jax.prepare.arrayrecord import write

    given = dict(annotations=args.annotations, images=args.images, output=args.output, split=args.split)
    announce("prepare arrayrecord", **given, shards=args.shards or "by size")
    folder, rows = write(args.annotations, args.images, args.output, split=args.split, shards=args.shards)
    print(f"{rows:,} rows: {folder} (data.annotations of `train`; tfds.data_source reads it as well)")
    return 0
