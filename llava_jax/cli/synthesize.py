"""The command synthesize: flags, the teacher they name, the dry run, batch mode."""

import json
import os
import threading
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from llava_jax.cli.endpoint import ENDPOINT, check_costs, check_endpoint, endpoint_flags, open_endpoint
from llava_jax.cli.flags import Named, announce, check_least, check_output
from llava_jax.types import InputError

if TYPE_CHECKING:
    from llava_jax.synthesize.budget import Prices
    from llava_jax.synthesize.journal import Journal
    from llava_jax.synthesize.teacher import Teacher
    from llava_jax.synthesize.write import Job, Written

EMBEDDED = "embedded"
# Next to the output, in place of its suffix.
JOURNAL = ".journal.jsonl"


def synthesize_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--contexts", required=True, metavar="SRC", help="JSONL; COCO's captions*.json, or its folder")
    parser.add_argument("--kind", required=True, choices=("conversation", "detail", "reasoning", "all"))
    output = "written: rows that `train` takes, or FILE.jsonl"
    parser.add_argument("--output", required=True, metavar="FILE.json", help=output)
    parser.add_argument("--prompts", metavar="DIR", help="prompts in place of those that come with the package")
    parser.add_argument("--limit", type=int, default=0, help="only the first images, this many; 0, all (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument("--dry_run", action="store_true", help="print requests (of --limit, else the first) and cost")
    teacher = parser.add_argument_group("the teacher")
    teacher.add_argument("--teacher", default=EMBEDDED, metavar="NAME", help="embedded, or a model of the endpoint")
    teacher.add_argument("--endpoint", metavar="URL", help=ENDPOINT)
    endpoint_flags(parser, teacher, request='{"max_tokens": 2048}', attempts=3)
    batch = parser.add_argument_group("batch mode: the requests as a file, and the file of their answers")
    batch.add_argument("--batch_input", metavar="FILE.jsonl", help="written: the open requests; nothing is asked")
    batch.add_argument("--batch_output", metavar="FILE.jsonl,…", help="joined by id, then the rows are written")


def synthesize_files(args: Namespace) -> tuple[list[Named], list[Named]]:
    """Return the files behind `--contexts` and `--batch_output`, and those that are named after the output."""
    from llava_jax.synthesize.context import context_files
    from llava_jax.synthesize.write import ENDS

    read = [Named("--contexts", path) for path in context_files(args.contexts)]
    read += [Named("--batch_output", path) for path in _batch_files(args)]
    stem = os.path.splitext(args.output)[0]
    return read, [Named("--output", stem + end) for end in (JOURNAL, *ENDS)]


def synthesize(args: Namespace) -> int:
    """Return 0 when every image is settled, 1 when some are still open: the same command continues."""
    settings, prices = _check(args)
    from llava_jax.synthesize import journal, write

    limits = [f"{args.budget_tokens} tokens"] if args.budget_tokens else []
    limits += [f"{args.budget_usd:g} USD"] if args.budget_usd else []
    output = "none, dry run" if args.dry_run else args.output
    request = json.dumps(settings) if args.teacher != EMBEDDED else None
    images = f"the first {args.limit}" if args.limit else "all"
    given = dict(contexts=args.contexts, kind=args.kind, output=output, teacher=args.teacher, endpoint=args.endpoint)
    given |= dict(request=request, prompts=args.prompts, images=images, budget=" and ".join(limits), seed=args.seed)
    announce("synthesize", **given)
    job = write.open_job(
        args.contexts, args.kind, args.prompts, seed=args.seed, limit=args.limit, attempts=args.attempts
    )
    if args.dry_run:
        return _dry_run(args, job, settings, prices)
    path = _journal(args)
    with journal.Journal(path) as answers:
        if len(answers):
            print(f"{path}: {len(answers)} answers saved before are not asked for again", flush=True)
        if args.batch_input:
            return _write_batch(args, job, settings, answers, prices)
        if args.batch_output:
            written = _join_batch(args, job, settings, answers, prices)
        else:
            written = _ask(args, job, settings, answers, prices)
    stem = os.path.splitext(args.output)[0]
    aside = f"; set aside: {stem}.rejected.jsonl" if written.rejected else ""
    print(f"{written}: {args.output}{aside}; data card: {stem}.card.html")
    if written.unanswered:
        print("not complete; the same command continues where this one ended")
    return 1 if written.unanswered else 0


# ---- flags --------------------------------------------------------------------------------------------------------


def _check(args: Namespace) -> "tuple[dict[str, Any], Prices | None]":
    """Return (what a request holds besides messages, prices). Raises InputError for flags that do not go together."""
    check_least(args, 0, "limit", "seed")
    check_costs(args)
    check_output("--output", args.output)
    check_output("--batch_input", args.batch_input)
    batch = args.batch_input or args.batch_output
    if args.batch_input and args.batch_output:
        raise InputError("--batch_input and --batch_output: the one comes after the other; give one of them")
    if args.teacher == EMBEDDED:
        if args.endpoint or batch:
            flag = "--endpoint" if args.endpoint else "batch mode"
            raise InputError(f"{flag} is for another teacher; say which model with --teacher=NAME")
        if args.kind == "all":
            raise InputError("--kind=all: the embedded teacher writes one kind at a time; give one, or --teacher=NAME")
        return {"model": EMBEDDED, "seed": args.seed}, None
    if not args.endpoint and not batch and not args.dry_run:
        raise InputError(f"--teacher={args.teacher} needs --endpoint=URL, as http://localhost:8000/v1")
    return check_endpoint(args, args.teacher, args.request)


def _teacher(args: Namespace, settings: dict[str, Any], stop: threading.Event) -> "Teacher":
    if args.teacher == EMBEDDED:
        from llava_jax.demo.teacher import EmbeddedTeacher

        return EmbeddedTeacher(args.kind, args.seed)
    return open_endpoint(args.endpoint, settings, stop)


def _ask(args: Namespace, job: "Job", settings: dict, answers: "Journal", prices: "Prices | None") -> "Written":
    """Ask what is open; where the journal settles everything, neither a key nor the endpoint is needed."""
    from llava_jax.synthesize import write

    if answers.path:
        # One pass over all contexts: what cannot be read is found before the first answer is paid for.
        coming = write.estimate(job, settings, answers)
        print("\n".join(coming.lines(prices)), flush=True)
        if not coming.requests:
            return write.write_data(job, args.output, args.teacher, settings, answers, prices=prices)
    stop = threading.Event()
    return write.synthesize(
        job,
        args.output,
        _teacher(args, settings, stop),
        answers,
        concurrency=1 if args.teacher == EMBEDDED else args.concurrency,
        tokens=args.budget_tokens,
        money=args.budget_usd,
        prices=prices,
        stop=stop,
        say=lambda line: print(line, flush=True),
    )


# ---- without asking -------------------------------------------------------------------------------------------------


def _journal(args: Namespace) -> str | None:
    """Return where answers are saved; None for the embedded teacher's, which cost nothing and come again the same."""
    return None if args.teacher == EMBEDDED else os.path.splitext(args.output)[0] + JOURNAL


def _dry_run(args: Namespace, job: "Job", settings: dict[str, Any], prices: "Prices | None") -> int:
    """Print the requests of the first --limit images, or the first of each kind, and what all will cost."""
    from llava_jax.synthesize import journal, write

    shown: set[str] = set()
    for task in job.tasks(settings):
        if args.limit or task.kind not in shown:
            print(f"---- {task.kind}, {task.id}{f': not asked, {task.problem}' if task.problem else ''}")
            for message in task.messages:
                print(f"[{message['role']}]\n{message['content']}\n")
        shown.add(task.kind)
    path = _journal(args)
    with journal.Journal(path if path and os.path.isfile(path) else None) as answers:
        print("\n".join(write.estimate(job, settings, answers).lines(prices)))
    return 0


def _write_batch(args: Namespace, job: "Job", settings: dict, answers: "Journal", prices: "Prices | None") -> int:
    from llava_jax.synthesize import batch, budget, write

    print("\n".join(write.estimate(job, settings, answers).lines(prices)), flush=True)
    limit = budget.Budget(args.budget_tokens, args.budget_usd, prices, answers.tokens_in, answers.tokens_out)
    count, files, stopped = batch.write_input(
        args.batch_input, job.tasks(settings), answers, settings, limit, args.attempts
    )
    if not count and not stopped:
        print("no request is open; --batch_output is not needed: the same command without it writes the rows")
        return 0
    if not count:
        raise InputError(f"no request written: {stopped}; give more, or a lower max_tokens in --request")
    print(f"{count} requests: {', '.join(files)}")
    if stopped:
        print(f"not all of them: {stopped}")
    print("for the output: the same command, --batch_output=FILE in its place")
    return 0


def _batch_files(args: Namespace) -> list[str]:
    if not args.batch_output:
        return []
    whole = os.path.exists(args.batch_output)  # a name may hold a comma
    return [args.batch_output] if whole else args.batch_output.split(",")


def _join_batch(args: Namespace, job: "Job", settings: dict, answers: "Journal", prices: "Prices | None") -> "Written":
    from llava_jax.synthesize import batch, write

    joined = batch.join_output(_batch_files(args), job.tasks(settings), answers, args.teacher)
    print(joined, flush=True)
    if joined.foreign and not joined.answers and not joined.failed:
        raise InputError(
            f"--batch_output={args.batch_output}: answers no request of this command; give --contexts, --kind, "
            "--teacher, --prompts and --request as they were for --batch_input"
        )
    return write.write_data(job, args.output, args.teacher, settings, answers, prices=prices, why=joined.failed)
