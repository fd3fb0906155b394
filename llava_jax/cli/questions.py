"""The commands that write question files from the published files of benchmarks: prepare BENCHMARK."""

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import Any

from llava_jax.cli.flags import Command, announce, check_output
from llava_jax.io import write_rows


def _files_flags(parser: ArgumentParser, source: str) -> None:
    """Add the flags of every benchmark; `source` says what it is published as."""
    parser.add_argument("--source", required=True, metavar="PATH", help=source)
    output = "written: questions that `generate` takes"
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help=output)


def _textvqa_flags(parser: ArgumentParser) -> None:
    _files_flags(parser, "TextVQA_0.5.1_val.json")
    ocr = "TextVQA_Rosetta_OCR_v0.2_val.json: its tokens are shown with each question"
    parser.add_argument("--ocr", metavar="FILE", help=ocr)


def _mmbench_flags(parser: ArgumentParser, example: str) -> None:
    _files_flags(parser, example)
    parser.add_argument("--images", required=True, metavar="DIR", help="written: the images of the table")
    rounds = "ask each question in every order of its options, where the table does not"
    parser.add_argument("--all_rounds", action="store_true", help=rounds)


def _write(args: Namespace, name: str) -> int:
    """Write the questions of one benchmark."""
    from llava_jax.prepare import questions

    check_output("--output", args.output)
    announce(f"prepare {name}", **{flag: value for flag, value in vars(args).items() if flag in FLAGS})
    rows: Iterable[dict[str, Any]]
    if name == "textvqa":
        rows = questions.textvqa_questions(args.source, args.ocr)
    elif name in ("mmbench", "mmbench_cn"):
        chinese = name == "mmbench_cn"
        rows = questions.mmbench_questions(args.source, args.images, chinese=chinese, all_rounds=args.all_rounds)
    else:
        plain = {
            "vqav2": questions.vqav2_questions,
            "vizwiz": questions.vizwiz_questions,
            "gqa": questions.gqa_questions,
            "pope": questions.pope_questions,
            "mme": questions.mme_questions,
            "seed": questions.seed_questions,
            "mmvet": questions.mmvet_questions,
            "llava_bench": questions.llava_bench_questions,
        }
        rows = plain[name](args.source)
    print(f"{write_rows(args.output, rows):,} questions: {args.output}")
    return 0


FLAGS = ("source", "ocr", "images", "all_rounds", "output")


def _command(name: str, title: str, source: str, add_flags: Any = None, more: str = "") -> Command:
    return Command(
        f"{title}'s published files as questions for `generate`, with the published prompt",
        f"llava-jax prepare {name} --source={source}{more} --output={name}.jsonl",
        add_flags or functools.partial(_files_flags, source=source),
        functools.partial(_write, name=name),
        reads=("source", "ocr") if name == "textvqa" else ("source",),
        writes=("images", "output") if name.startswith("mmbench") else ("output",),
    )


MMBENCH, MMBENCH_CN = "mmbench_dev_20230712.tsv", "mmbench_dev_cn_20231003.tsv"
COMMANDS = {
    "prepare vqav2": _command("vqav2", "VQAv2", "v2_OpenEnded_mscoco_test-dev2015_questions.json"),
    "prepare vizwiz": _command("vizwiz", "VizWiz", "test.json"),
    "prepare gqa": _command("gqa", "GQA", "testdev_balanced_questions.json"),
    "prepare textvqa": _command("textvqa", "TextVQA", "TextVQA_0.5.1_val.json", _textvqa_flags),
    "prepare pope": _command("pope", "POPE", "coco"),
    "prepare mme": _command("mme", "MME", "MME_Benchmark_release_version"),
    "prepare mmbench": _command(
        "mmbench", "MMBench", MMBENCH, functools.partial(_mmbench_flags, example=MMBENCH), " --images=mmbench"
    ),
    "prepare mmbench_cn": _command(
        "mmbench_cn",
        "MMBench in Chinese",
        MMBENCH_CN,
        functools.partial(_mmbench_flags, example=MMBENCH_CN),
        " --images=mmbench_cn",
    ),
    "prepare seed": _command("seed", "SEED-Bench", "SEED-Bench.json"),
    "prepare mmvet": _command("mmvet", "MM-Vet", "mm-vet.json"),
    "prepare llava_bench": _command("llava_bench", "LLaVA-Bench", "questions.jsonl"),
}
