"""The commands that score files of answers: one for each benchmark, a judge's reviews, two runs compared."""

import glob
import os
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_jax.cli.endpoint import ENDPOINT, check_costs, check_endpoint, endpoint_flags, open_endpoint
from llava_jax.cli.flags import Command, Named, announce, check_least, check_output
from llava_jax.io import write_json
from llava_jax.types import InputError

if TYPE_CHECKING:
    from llava_jax.evaluate.judge import Judge

JSON = "written: all figures, and the score of each question"
MISSING = "questions without an answer: refuse, or count them as wrong (refuse)"
OPENAI = "https://api.openai.com/v1"
# As the published reviews were asked for.
LLAVA_BENCH_REQUEST = '{"temperature": 0.2, "max_tokens": 1024}'
MMVET_REQUEST = '{"temperature": 0, "max_tokens": 3}'


# ---- what the commands share ----------------------------------------------------------------------------------------


def _answers_flags(parser: ArgumentParser, missing: bool = True) -> None:
    parser.add_argument("--answers", required=True, metavar="FILE.jsonl", help="as `generate` writes them")
    if missing:
        parser.add_argument("--missing", choices=("refuse", "wrong"), default="refuse", help=MISSING)
    _json_flag(parser)


def _json_flag(parser: ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help=JSON)


def judge_flags(parser: ArgumentParser, request: str | None, *, required: bool = True) -> None:
    """Add the flags of a judge; without a `request` of its own it is asked as each benchmark's is."""
    group = parser.add_argument_group("the judge")
    group.add_argument("--judge", required=required, metavar="NAME", help="a model of the endpoint")
    group.add_argument("--endpoint", default=OPENAI, metavar="URL", help=f"{ENDPOINT} ({OPENAI})")
    group.add_argument("--repeats", type=int, default=1, metavar="N", help="judgings of everything (1)")
    endpoint_flags(parser, group, request=request, attempts=5)


def judge_of(args: Namespace, request: str | None = None) -> "Judge":
    """Return the judge of the flags. Raises InputError for flags that do not go together."""
    from llava_jax.evaluate.judge import Judge

    check_costs(args)
    check_least(args, 1, "repeats")
    settings, prices = check_endpoint(args, args.judge, request or args.request)
    stop = threading.Event()
    return Judge(
        open_endpoint(args.endpoint, settings, stop),
        stop,
        args.attempts,
        args.concurrency,
        tokens=args.budget_tokens,
        money=args.budget_usd,
        prices=prices,
        say=lambda line: print(line, flush=True),
    )


def _begin(args: Namespace, name: str, *flags: str) -> None:
    for flag in ("json", "output", "submission"):
        check_output(f"--{flag}", getattr(args, flag, None))
    announce(f"evaluate {name}", **{flag: getattr(args, flag) for flag in (*flags, "json")})


def _show(args: Namespace, figures: Mapping[str, Any]) -> int:
    """Print the table and write all figures; return 1 where judgings are still open."""
    from llava_jax.evaluate.answers import table

    print(table({name: value for name, value in figures.items() if name != "stopped"}))
    if args.json:
        write_json(args.json, figures)
    return int(judgings_open(figures))


def judgings_open(figures: Mapping[str, Any]) -> bool:
    """Return whether judgings are still open, and say so: the same command continues."""
    open_ones = figures.get("judge", {}).get("unanswered", 0)
    if open_ones:
        print(f"\n{open_ones} judgings have no answer ({figures['stopped']}); the same command asks for them again")
    return bool(open_ones)


# ---- multiple choice ------------------------------------------------------------------------------------------------


def scienceqa_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--problems", required=True, metavar="FILE", help="ScienceQA's problems.json")
    parser.add_argument("--splits", required=True, metavar="FILE", help="ScienceQA's pid_splits.json")
    parser.add_argument("--split", required=True, help="test, val, …")
    parser.add_argument("--gpt4", metavar="FILE", help="JSON, `outputs` of a language-only model: the complement")
    parser.add_argument("--requery", metavar="FILE.jsonl", help="its answers after it saw both: the judge")
    _answers_flags(parser)


def scienceqa(args: Namespace) -> int:
    from llava_jax.evaluate import scienceqa as benchmark

    _begin(args, "scienceqa", "problems", "splits", "split", "answers", "gpt4", "requery")
    paths = dict(gpt4_path=args.gpt4, requery_path=args.requery)
    return _show(args, benchmark.score(args.problems, args.splits, args.split, args.answers, args.missing, **paths))


def mmbench_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, metavar="FILE.tsv", help="the published table of a split")
    parser.add_argument("--submission", metavar="FILE.xlsx", help="written: what the server takes")
    parser.add_argument("--all_rounds", action="store_true", help="questions are those of `prepare … --all_rounds`")
    _answers_flags(parser)


def mmbench(args: Namespace) -> int:
    from llava_jax.evaluate import mmbench as benchmark

    _begin(args, "mmbench", "annotations", "answers", "submission")
    if args.submission:
        rows = benchmark.write_submission(args.submission, args.annotations, args.answers, args.missing)
        print(f"{rows:,} rows: {args.submission}")
        if not benchmark.has_answers(benchmark.read_annotations(args.annotations)):
            return 0
    return _show(args, benchmark.score(args.annotations, args.answers, args.missing, args.all_rounds))


def seed_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, metavar="FILE", help="SEED-Bench.json")
    parser.add_argument("--submission", metavar="FILE.jsonl", help="written: what the leaderboard takes")
    _answers_flags(parser)


def seed(args: Namespace) -> int:
    from llava_jax.evaluate import seed as benchmark
    from llava_jax.io import write_rows

    _begin(args, "seed", "annotations", "answers", "submission")
    if args.submission:
        write_rows(args.submission, benchmark.submission(args.annotations, args.answers))
    return _show(args, benchmark.score(args.annotations, args.answers, args.missing))


# ---- short answers --------------------------------------------------------------------------------------------------


def vqa_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--questions", metavar="FILE.jsonl", help="as `prepare` writes them: all of --submission")
    parser.add_argument("--annotations", metavar="FILE", help="of a split whose answers are published (val)")
    parser.add_argument("--submission", metavar="FILE", help="written: what the server takes")
    _answers_flags(parser)


def vqav2(args: Namespace) -> int:
    from llava_jax.evaluate import vqav2 as benchmark

    _begin(args, "vqav2", "questions", "annotations", "answers", "submission")
    _check_vqa(args)
    if args.submission:
        rows, empty = benchmark.submission(args.questions, args.answers)
        write_json(args.submission, rows)
        print(f"{len(rows):,} answers, {empty:,} of them empty for want of one: {args.submission}")
    return _show(args, benchmark.score(args.annotations, args.answers, args.missing)) if args.annotations else 0


def vizwiz(args: Namespace) -> int:
    from llava_jax.evaluate import vizwiz as benchmark

    _begin(args, "vizwiz", "questions", "annotations", "answers", "submission")
    _check_vqa(args)
    if args.submission:
        rows = benchmark.submission(args.questions, args.answers)
        write_json(args.submission, rows)
        print(f"{len(rows):,} answers: {args.submission}")
    return _show(args, benchmark.score(args.annotations, args.answers, args.missing)) if args.annotations else 0


def _check_vqa(args: Namespace) -> None:
    if not args.submission and not args.annotations:
        raise InputError("expected --submission=FILE, or --annotations=FILE of a split whose answers are published")
    if args.questions and not args.submission:
        raise InputError("--questions is for --submission, which then holds every question of the split")
    if args.json and not args.annotations:
        raise InputError(f"--json={args.json}: there are no figures without --annotations")


def gqa_flags(parser: ArgumentParser) -> None:
    questions = "testdev_balanced_questions.json, or as `prepare gqa` writes them"
    parser.add_argument("--questions", required=True, metavar="FILE", help=questions)
    _answers_flags(parser)


def gqa(args: Namespace) -> int:
    from llava_jax.evaluate import gqa as benchmark

    _begin(args, "gqa", "questions", "answers")
    return _show(args, benchmark.score(args.questions, args.answers, args.missing))


def textvqa_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, metavar="FILE", help="TextVQA_0.5.1_val.json")
    _answers_flags(parser)


def textvqa(args: Namespace) -> int:
    from llava_jax.evaluate import textvqa as benchmark

    _begin(args, "textvqa", "annotations", "answers")
    return _show(args, benchmark.score(args.annotations, args.answers, args.missing))


def pope_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, metavar="DIR", help="POPE's coco_pope_SPLIT.json")
    parser.add_argument("--questions", required=True, metavar="FILE.jsonl", help="as `prepare pope` writes them")
    _answers_flags(parser)


def pope(args: Namespace) -> int:
    from llava_jax.evaluate import pope as benchmark

    _begin(args, "pope", "annotations", "questions", "answers")
    return _show(args, benchmark.score(args.annotations, args.questions, args.answers, args.missing))


def mme_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, metavar="FILE.jsonl", help="as `prepare mme` writes them")
    _answers_flags(parser)


def mme(args: Namespace) -> int:
    from llava_jax.evaluate import mme as benchmark

    _begin(args, "mme", "questions", "answers")
    return _show(args, benchmark.score(args.questions, args.answers, args.missing))


# ---- open answers, which a judge reads ------------------------------------------------------------------------------


def llava_bench_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, metavar="FILE.jsonl", help="question_id, image, text, category")
    context = "image and its caption, or captions and instances"
    parser.add_argument("--context", required=True, metavar="FILE.jsonl", help=context)
    parser.add_argument("--rules", required=True, metavar="FILE", help="LLaVA's rule.json")
    answers = "twice: the reference's, then the candidate's"
    parser.add_argument("--answers", required=True, action="append", metavar="FILE.jsonl", help=answers)
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="written: the reviews")
    parser.add_argument("--swap", action="store_true", help="judge each pair in the other order as well")
    _json_flag(parser)
    judge_flags(parser, LLAVA_BENCH_REQUEST)


def llava_bench(args: Namespace) -> int:
    from llava_jax.evaluate import llava_bench as benchmark

    if len(args.answers) != 2:
        raise InputError("--answers: expected two, the reference's file and then the candidate's")
    _begin(args, "llava_bench", "questions", "context", "rules", "answers", "judge", "endpoint", "repeats", "output")
    return _show(
        args,
        benchmark.review(
            args.questions,
            args.context,
            args.rules,
            args.answers,
            args.output,
            judge_of(args),
            swap=args.swap,
            repeats=args.repeats,
        ),
    )


def journal_files(args: Namespace) -> tuple[list[Named], list[Named]]:
    """Return no file that is read, and the journal that is named after the output."""
    from llava_jax.evaluate.judge import journal_of

    return [], [Named("--output", journal_of(args.output))] if args.output else []


def reviews_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--reviews", required=True, metavar="FILE.jsonl", help="with `tuple` or `score` a line")
    parser.add_argument("--questions", metavar="FILE.jsonl", help="for the categories of reviews that name none")
    _json_flag(parser)


def reviews(args: Namespace) -> int:
    from llava_jax.evaluate import reviews as summary

    _begin(args, "reviews", "reviews", "questions")
    return _show(args, summary.summarise(summary.read_reviews(args.reviews, args.questions)))


def mmvet_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, metavar="FILE", help="mm-vet.json")
    parser.add_argument("--submission", metavar="FILE", help="written: what the official evaluator takes")
    parser.add_argument("--prompt", metavar="FILE.txt", help="the official evaluator's prompt; for --judge")
    parser.add_argument("--output", metavar="FILE.jsonl", help="written: the judgings")
    _answers_flags(parser, missing=False)
    judge_flags(parser, MMVET_REQUEST, required=False)


def mmvet(args: Namespace) -> int:
    from llava_jax.evaluate import mmvet as benchmark

    if not args.submission and not args.judge:
        raise InputError("expected --submission=FILE for the official evaluator, or --judge=NAME")
    if args.judge and not (args.prompt and args.output):
        raise InputError(f"--judge={args.judge} needs --prompt=FILE.txt and --output=FILE.jsonl next to it")
    _begin(args, "mmvet", "annotations", "answers", "submission", "prompt", "judge", "output")
    if args.submission:
        texts = benchmark.submission(args.annotations, args.answers)
        write_json(args.submission, texts)
        print(f"{len(texts):,} answers: {args.submission}")
    if not args.judge:
        return 0
    who = judge_of(args)
    figures = benchmark.score(args.annotations, args.answers, args.prompt, args.output, who, repeats=args.repeats)
    return _show(args, figures)


def exact_match_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, metavar="FILE.jsonl", help="question_id, category, answer a line")
    _answers_flags(parser, missing=False)


def exact_match(args: Namespace) -> int:
    from llava_jax.evaluate import exact_match as benchmark

    _begin(args, "exact_match", "questions", "answers")
    benchmark.evaluate(args.questions, args.answers, args.json)
    return 0


# ---- runs next to each other ----------------------------------------------------------------------------------------


def compare_flags(parser: ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="figures of one run, as --json=FILE of `evaluate BENCHMARK` wrote them")
    parser.add_argument("b", metavar="B", help="figures of another on the same questions")
    _json_flag(parser)


def compare(args: Namespace) -> int:
    from llava_jax.evaluate import compare as comparison

    _begin(args, "compare", "a", "b")
    return _show(args, comparison.compare(args.a, args.b))


def report_flags(parser: ArgumentParser) -> None:
    runs = "what `evaluate suite --output=DIR` wrote; one, or several to be seen next to each other"
    parser.add_argument("--runs", required=True, nargs="+", metavar="DIR", help=runs)
    parser.add_argument("--output", required=True, metavar="FILE.html", help="written: the page")
    parser.add_argument("--examples", type=int, default=40, help="questions of each benchmark to browse (40)")


def report_files(args: Namespace) -> tuple[list[Named], list[Named]]:
    """Return the files of the runs that the page is made of."""
    found = [os.path.join(glob.escape(run), "**", "*.json*") for run in args.runs]
    return [Named("--runs", path) for pattern in found for path in glob.glob(pattern, recursive=True)], []


def report(args: Namespace) -> int:
    from llava_jax.evaluate import report as pages
    from llava_jax.io import replacing

    check_least(args, 0, "examples")
    if len(args.runs) > 4 or len(set(map(os.path.realpath, args.runs))) < len(args.runs):
        raise InputError(f"--runs: {', '.join(args.runs)}; expected at most 4 folders, each once")
    check_output("--output", args.output)
    announce("evaluate report", runs=", ".join(args.runs), output=args.output)
    text = pages.report(args.runs, args.examples)
    with replacing(args.output) as file:
        file.write(text)
    print(f"{len(text) / 2**20:.1f} MiB: {args.output}")
    return 0


def _scorer(name: str, summary: str, flags: str, add_flags: Any, run: Any, reads: str, writes: str = "json") -> Command:
    example = f"llava-jax evaluate {name} {flags} --answers=answers.jsonl --json=figures.json"
    return Command(summary, example, add_flags, run, reads=tuple(reads.split()), writes=tuple(writes.split()))


COMMANDS = {
    "evaluate exact_match": _scorer(
        "exact_match",
        "score a file of answers by exact match, for each type of question and over all",
        "--questions=questions.jsonl",
        exact_match_flags,
        exact_match,
        "questions answers",
    ),
    "evaluate scienceqa": _scorer(
        "scienceqa",
        "ScienceQA: accuracy by subject, context and grade, alone and with a language-only model",
        "--problems=problems.json --splits=pid_splits.json --split=test",
        scienceqa_flags,
        scienceqa,
        "problems splits answers gpt4 requery",
    ),
    "evaluate vqav2": _scorer(
        "vqav2",
        "VQAv2: the server's file, and the official accuracy of a split with published answers",
        "--annotations=v2_mscoco_val2014_annotations.json",
        vqa_flags,
        vqav2,
        "questions annotations answers",
        "submission json",
    ),
    "evaluate vizwiz": _scorer(
        "vizwiz",
        "VizWiz: the server's file, and the official accuracy of a split with published answers",
        "--annotations=val.json",
        vqa_flags,
        vizwiz,
        "questions annotations answers",
        "submission json",
    ),
    "evaluate gqa": _scorer(
        "gqa",
        "GQA: accuracy over all questions, binary and open ones",
        "--questions=testdev_balanced_questions.json",
        gqa_flags,
        gqa,
        "questions answers",
    ),
    "evaluate textvqa": _scorer(
        "textvqa",
        "TextVQA: agreement with ten people, of prompts with or without OCR tokens",
        "--annotations=TextVQA_0.5.1_val.json",
        textvqa_flags,
        textvqa,
        "annotations answers",
    ),
    "evaluate pope": _scorer(
        "pope",
        "POPE: objects that are not there; accuracy, precision, recall, F1 and share of yes by split",
        "--annotations=coco --questions=pope.jsonl",
        pope_flags,
        pope,
        "annotations questions answers",
    ),
    "evaluate mme": _scorer(
        "mme",
        "MME: perception and cognition, accuracy and accuracy+ by category",
        "--questions=mme.jsonl",
        mme_flags,
        mme,
        "questions answers",
    ),
    "evaluate mmbench": _scorer(
        "mmbench",
        "MMBench: circular evaluation, and the server's spreadsheet",
        "--annotations=mmbench_dev_20230712.tsv",
        mmbench_flags,
        mmbench,
        "annotations answers",
        "submission json",
    ),
    "evaluate mmbench_cn": _scorer(
        "mmbench_cn",
        "MMBench in Chinese: circular evaluation, and the server's spreadsheet",
        "--annotations=mmbench_dev_cn_20231003.tsv",
        mmbench_flags,
        mmbench,
        "annotations answers",
        "submission json",
    ),
    "evaluate seed": _scorer(
        "seed",
        "SEED-Bench: accuracy over all, on images, on videos and by type",
        "--annotations=SEED-Bench.json",
        seed_flags,
        seed,
        "annotations answers",
        "submission json",
    ),
    "evaluate mmvet": Command(
        "MM-Vet: the official evaluator's file, and a judge's score by ability",
        "llava-jax evaluate mmvet --annotations=mm-vet.json --answers=answers.jsonl --submission=mmvet.json",
        mmvet_flags,
        mmvet,
        reads=("annotations", "answers", "prompt"),
        writes=("submission", "output", "json"),
        files=journal_files,
    ),
    "evaluate llava_bench": Command(
        "LLaVA-Bench: a judge scores the candidate's answers next to the reference's",
        "llava-jax evaluate llava_bench --questions=questions.jsonl --context=context.jsonl --rules=rule.json "
        "--answers=answers_gpt4.jsonl --answers=answers.jsonl --output=reviews.jsonl --judge=my-judge "
        "--endpoint=http://localhost:8000/v1",
        llava_bench_flags,
        llava_bench,
        reads=("questions", "context", "rules", "answers"),
        writes=("output", "json"),
        files=journal_files,
    ),
    "evaluate reviews": Command(
        "summarise a judge's reviews: 100 * mean(candidate) / mean(reference), over all and by category",
        "llava-jax evaluate reviews --reviews=reviews.jsonl --json=figures.json",
        reviews_flags,
        reviews,
        reads=("reviews", "questions"),
        writes=("json",),
    ),
    "evaluate compare": Command(
        "two runs on the same questions: paired bootstrap of the difference, McNemar's test",
        "llava-jax evaluate compare before.json after.json",
        compare_flags,
        compare,
        reads=("a", "b"),
        writes=("json",),
    ),
    "evaluate report": Command(
        "one HTML page about runs of `evaluate suite`: table, radar, bars, answers to browse",
        "llava-jax evaluate report --runs results/before results/after --output=report.html",
        report_flags,
        report,
        writes=("output",),
        files=report_files,
    ),
}
