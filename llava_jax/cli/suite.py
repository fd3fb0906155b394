"""The command evaluate suite: whatever benchmarks lie in a folder, prepared, answered, scored, in one table."""

import dataclasses
import functools
import glob
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from llava_jax.cli.evaluate import LLAVA_BENCH_REQUEST, MMVET_REQUEST, judge_flags, judge_of, judgings_open
from llava_jax.cli.flags import Command, announce, check_least
from llava_jax.cli.models import SOURCE, companion_flags, load, loading_flags, need_file
from llava_jax.io import read_json, read_lines, write_json, write_rows
from llava_jax.types import InputError, Sampling

if TYPE_CHECKING:
    from llava_jax.evaluate.judge import Judge

Figures = dict[str, Any]
SHORT, LONG = 128, 1024  # tokens of an answer at most, as in the published runs
# The names of the folders, as the published evaluation has them or as the commands are called, in small letters alone.
FOLDERS = {
    "vqav2": "vqav2",
    "gqa": "gqa",
    "vizwiz": "vizwiz",
    "scienceqa": "scienceqa",
    "textvqa": "textvqa",
    "pope": "pope",
    "mme": "mme",
    "mmbench": "mmbench",
    "mmbenchcn": "mmbench_cn",
    "seed": "seed",
    "seedbench": "seed",
    "llavabench": "llava_bench",
    "llavabenchinthewild": "llava_bench",
    "mmvet": "mmvet",
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """One benchmark that was found.

    `questions` yields its rows, `images` is their folder, `longest` the tokens of an answer; `score` takes an answers
    file and the folder of the benchmark's results, and returns None where the figures are a server's or a judge's.
    """

    name: str
    questions: Callable[[], Iterable[dict[str, Any]]]
    images: str
    longest: int
    score: Callable[[str, str], Figures | None]


def suite_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="SRC", help=SOURCE)
    companion_flags(parser)
    loading_flags(parser)
    parser.add_argument("--data", required=True, metavar="DIR", help="a folder with one folder for each benchmark")
    output = "written: questions, answers and figures of each benchmark, and suite.json; a later run resumes"
    parser.add_argument("--output", required=True, metavar="DIR", help=output)
    parser.add_argument("--batch_size", type=int, default=8, help="questions answered at once (8)")
    judge_flags(parser, None, required=False)
    parser.add_argument("--rules", metavar="FILE", help="LLaVA's rule.json; that in the folder of LLaVA-Bench")
    prompt = "MM-Vet's official prompt; that in its folder, prompt.txt"
    parser.add_argument("--mmvet_prompt", metavar="FILE.txt", help=prompt)


def suite(args: Namespace) -> int:
    """Open every file before the first answer, so that one that is damaged is known at once.

    Returns 1 where judgings are still open.
    """
    from llava_jax.evaluate.published import headline

    check_least(args, 1, "batch_size")
    need_file("--rules", args.rules)
    need_file("--mmvet_prompt", args.mmvet_prompt)
    if args.judge:
        judge_of(args, LLAVA_BENCH_REQUEST)  # what its flags lack is known before the first answer
    benches, unknown = find(args)
    names = ", ".join(bench.name for bench in benches)
    announce("evaluate suite", model=args.model, benchmarks=names, not_known=", ".join(unknown), output=args.output)
    for bench in benches:
        folder = os.path.join(args.output, bench.name)
        os.makedirs(folder, exist_ok=True)
        count = write_rows(os.path.join(folder, "questions.jsonl"), bench.questions())
        print(f"{bench.name:<12}{count:>8,} questions", flush=True)
    from llava_jax.infer.batch_generate import answer_file

    model = load(args)
    results: dict[str, float | None] = {}
    unfinished = []
    for bench in benches:
        folder = os.path.join(args.output, bench.name)
        questions, answers = (os.path.join(folder, f"{name}.jsonl") for name in ("questions", "answers"))
        print(f"\n{bench.name}", flush=True)
        sampling = Sampling(max_new_tokens=bench.longest)
        answer_file(model, questions, bench.images, answers, sampling, batch_size=args.batch_size, progress=sys.stdout)
        figures = bench.score(answers, folder)
        if figures is not None:
            write_json(os.path.join(folder, "figures.json"), figures)
            if judgings_open(figures):
                unfinished.append(bench.name)
        results[bench.name] = None if bench.name in unfinished else headline(bench.name, figures)
    images = {bench.name: os.path.abspath(bench.images) for bench in benches}
    write_json(os.path.join(args.output, "suite.json"), {"model": model.name, "results": results, "images": images})
    print(f"\n{results_table(model.name, results)}")
    return 1 if unfinished else 0


def results_table(model: str, results: dict[str, float | None]) -> str:
    """Return the model's row next to the published ones, a column a benchmark that was run."""
    from llava_jax.evaluate.answers import aligned
    from llava_jax.evaluate.published import BENCHMARKS, ROWS

    lines = [("", *(BENCHMARKS[name][0] for name in results))]
    lines.append((model, *("-" if value is None else f"{value:.1f}" for value in results.values())))
    for title, values in ROWS.items():
        published = dict(zip(BENCHMARKS, values, strict=True))
        lines.append((title, *(f"{published[name]:.1f}" for name in results)))
    return aligned(lines)


# ---- what lies in the folder ----------------------------------------------------------------------------------------


def find(args: Namespace) -> tuple[list[Bench], list[str]]:
    """Return (the benchmarks of the data folder in the order of the table, folders of another name).

    Raises InputError where there is none, or one lacks a file.
    """
    from llava_jax.evaluate.published import BENCHMARKS

    inside = sorted(os.listdir(args.data)) if os.path.isdir(args.data) else []
    folders, unknown = {}, []
    for entry in inside:
        if os.path.isdir(os.path.join(args.data, entry)):
            name = FOLDERS.get(re.sub(r"[^a-z0-9]", "", entry.lower()))
            if name is None:
                unknown.append(entry)
            elif name in folders:
                raise InputError(f"--data={args.data}: {folders[name]} and {entry} are both {name}; leave one of them")
            else:
                folders[name] = entry
    if not folders:
        expected = "expected folders such as vqav2, gqa, scienceqa, pope, MME, llava-bench-in-the-wild"
        raise InputError(f"--data={args.data}: holds no benchmark; {expected}")
    finders = {
        "vqav2": _vqav2,
        "gqa": _gqa,
        "vizwiz": _vizwiz,
        "scienceqa": _scienceqa,
        "textvqa": _textvqa,
        "pope": _pope,
        "mme": _mme,
        "mmbench": functools.partial(_mmbench, args=args, name="mmbench"),
        "mmbench_cn": functools.partial(_mmbench, args=args, name="mmbench_cn"),
        "seed": _seed,
        "llava_bench": functools.partial(_llava_bench, args=args),
        "mmvet": functools.partial(_mmvet, args=args),
    }
    return [finders[name](os.path.join(args.data, folders[name])) for name in BENCHMARKS if name in folders], unknown


def _file(folder: str, *patterns: str) -> str:
    """Return the file of the first pattern that has one, in capitals or not; "" where none has.

    Raises InputError for a pattern with several: which of them is meant cannot be told.
    """
    for pattern in patterns:
        either = "".join(f"[{mark.lower()}{mark.upper()}]" if mark.isalpha() else mark for mark in pattern)
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), either)))
        if len(paths) > 1:
            names = " and ".join(os.path.relpath(path, folder) for path in paths)
            raise InputError(f"{folder}: {names} all fit {pattern}; leave one of them")
        if paths:
            return paths[0]
    return ""


def _needed(folder: str, *patterns: str) -> str:
    path = _file(folder, *patterns)
    if not path:
        raise InputError(f"{folder}: no {' or '.join(patterns)} in it; expected the published file")
    return path


def _images(folder: str, *names: str) -> str:
    """Return the first of the folders that is there, or the benchmark's own."""
    return next((path for name in names if os.path.isdir(path := os.path.join(folder, name))), folder)


def _vqav2(folder: str) -> Bench:
    from llava_jax.evaluate import vqav2
    from llava_jax.prepare.questions import vqav2_questions

    annotations = _file(folder, "*val2014_annotations.json")
    splits = ("val2014",) if annotations else ("test-dev2015", "test2015")
    source = _needed(folder, *(f"*OpenEnded*{split}_questions.json" for split in splits))

    if annotations:
        vqav2.read_list(annotations, "annotations")

    def score(answers: str, results: str) -> Figures | None:
        rows, _ = vqav2.submission(os.path.join(results, "questions.jsonl"), answers)
        write_json(os.path.join(results, "submission.json"), rows)
        return vqav2.score(annotations, answers) if annotations else None

    images = _images(folder, "val2014" if annotations else "test2015", "images")
    return Bench("vqav2", functools.partial(vqav2_questions, source), images, SHORT, score)


def _gqa(folder: str) -> Bench:
    from llava_jax.evaluate import gqa
    from llava_jax.prepare.questions import gqa_questions

    source = _needed(folder, "testdev_balanced_questions.json", "*/testdev_balanced_questions.json")
    images = _images(folder, "images", "data/images")
    return Bench(
        "gqa", functools.partial(gqa_questions, source), images, SHORT, lambda answers, _: gqa.score(source, answers)
    )


def _vizwiz(folder: str) -> Bench:
    from llava_jax.evaluate import vizwiz
    from llava_jax.prepare.questions import vizwiz_questions

    source = _needed(folder, "val.json", "test.json")
    split = os.path.splitext(os.path.basename(source))[0]

    def score(answers: str, results: str) -> Figures | None:
        rows = vizwiz.submission(os.path.join(results, "questions.jsonl"), answers)
        write_json(os.path.join(results, "submission.json"), rows)
        return vizwiz.score(source, answers) if split == "val" else None

    images = _images(folder, split, "images")
    return Bench("vizwiz", functools.partial(vizwiz_questions, source), images, SHORT, score)


def _scienceqa(folder: str) -> Bench:
    from llava_jax.evaluate import scienceqa
    from llava_jax.prepare.questions import scienceqa_questions

    problems, splits = (_needed(folder, name) for name in ("problems.json", "pid_splits.json"))
    questions = functools.partial(scienceqa_questions, folder, "test")
    images = _images(folder, "images/test", "test", "images")
    return Bench(
        "scienceqa",
        questions,
        images,
        LONG,
        lambda answers, _: scienceqa.score(problems, splits, "test", answers),
    )


def _textvqa(folder: str) -> Bench:
    from llava_jax.evaluate import textvqa
    from llava_jax.prepare.questions import textvqa_questions

    source = _needed(folder, "TextVQA_0.5.1_val.json")
    ocr = _file(folder, "TextVQA_Rosetta_OCR_*_val.json") or None
    images = _images(folder, "train_images", "images")
    questions = functools.partial(textvqa_questions, source, ocr)
    return Bench("textvqa", questions, images, SHORT, lambda answers, _: textvqa.score(source, answers))


def _pope(folder: str) -> Bench:
    from llava_jax.evaluate import pope
    from llava_jax.prepare.questions import pope_questions

    source = _images(folder, "coco")

    def score(answers: str, results: str) -> Figures | None:
        return pope.score(source, os.path.join(results, "questions.jsonl"), answers)

    images = _images(folder, "val2014", "images")
    return Bench("pope", functools.partial(pope_questions, source), images, SHORT, score)


def _mme(folder: str) -> Bench:
    from llava_jax.evaluate import mme
    from llava_jax.prepare.questions import mme_questions

    source = _images(folder, "MME_Benchmark_release_version")

    def score(answers: str, results: str) -> Figures | None:
        return mme.score(os.path.join(results, "questions.jsonl"), answers)

    return Bench("mme", functools.partial(mme_questions, source), source, SHORT, score)


def _mmbench(folder: str, args: Namespace, name: str) -> Bench:
    from llava_jax.evaluate import mmbench
    from llava_jax.prepare.questions import mmbench_questions

    chinese = name == "mmbench_cn"
    patterns = ("*dev_cn*.tsv", "*cn*.tsv", "*.tsv") if chinese else ("*dev_2*.tsv", "*dev_en*.tsv", "*.tsv")
    source = _needed(folder, *patterns)
    mmbench.new_book()  # what it needs is installed
    images = os.path.join(args.output, name, "images")

    def score(answers: str, results: str) -> Figures | None:
        mmbench.write_submission(os.path.join(results, "submission.xlsx"), source, answers)
        return mmbench.score(source, answers) if mmbench.has_answers(mmbench.read_annotations(source)) else None

    questions = functools.partial(mmbench_questions, source, images, chinese=chinese, all_rounds=False)
    return Bench(name, questions, images, LONG, score)


def _seed(folder: str) -> Bench:
    from llava_jax.evaluate import seed
    from llava_jax.prepare.questions import seed_questions

    source = _needed(folder, "SEED-Bench.json")

    def score(answers: str, results: str) -> Figures | None:
        write_rows(os.path.join(results, "submission.jsonl"), seed.submission(source, answers))
        return seed.score(source, answers)

    return Bench("seed", functools.partial(seed_questions, source), folder, SHORT, score)


def _reviews(results: str) -> str:
    return os.path.join(results, "reviews.jsonl")


def _judge(args: Namespace, request: str, other: str) -> "Judge":
    """Return the judge of a benchmark, which shares the suite's budget with another one's."""
    return dataclasses.replace(judge_of(args, request), sharing=[_reviews(os.path.join(args.output, other))])


def _llava_bench(folder: str, args: Namespace) -> Bench:
    from llava_jax.evaluate import llava_bench
    from llava_jax.evaluate.answers import read_rows
    from llava_jax.prepare.questions import llava_bench_questions

    source, context, reference = (
        _needed(folder, name) for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
    )
    list(read_lines(context, "an object with image and caption"))
    read_rows(reference, ("text",))
    rules = args.rules or (_needed(folder, "rule.json") if args.judge else "")
    if args.judge:
        read_json(rules, "rules by category")

    def score(answers: str, results: str) -> Figures | None:
        if not args.judge:
            return None
        who, both = _judge(args, LLAVA_BENCH_REQUEST, "mmvet"), [reference, answers]
        return llava_bench.review(source, context, rules, both, _reviews(results), who, repeats=args.repeats)

    images = _images(folder, "images")
    return Bench("llava_bench", functools.partial(llava_bench_questions, source), images, LONG, score)


def _mmvet(folder: str, args: Namespace) -> Bench:
    from llava_jax.evaluate import mmvet
    from llava_jax.prepare.questions import mmvet_questions

    source = _needed(folder, "mm-vet.json")
    prompt = args.mmvet_prompt or (_needed(folder, "prompt.txt") if args.judge else "")
    if args.judge:
        mmvet.read_prompt(prompt)

    def score(answers: str, results: str) -> Figures | None:
        write_json(os.path.join(results, "submission.json"), mmvet.submission(source, answers))
        if not args.judge:
            return None
        who = _judge(args, MMVET_REQUEST, "llava_bench")
        return mmvet.score(source, answers, prompt, _reviews(results), who, repeats=args.repeats)

    images = _images(folder, "images")
    return Bench("mmvet", functools.partial(mmvet_questions, source), images, LONG, score)


COMMANDS = {
    "evaluate suite": Command(
        "prepare, answer and score the benchmarks of a folder, in one table next to LLaVA-1.5's",
        "llava-jax evaluate suite --model=runs/finetune --data=benchmarks --output=results",
        suite_flags,
        suite,
        reads=("model", "vision", "base", "data", "rules", "mmvet_prompt"),
        writes=("output",),
        in_buckets=("model", "vision", "base"),
    )
}
