"""The command line: the list of commands, and one way to answer bad input.

A command is described by flags and a function; what it runs is imported only when it runs, so that `--help`
answers at once.
"""

import argparse
import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Sequence

from llava_jax.buckets import SCHEME
from llava_jax.cli import (
    benchmark,
    compile,
    configs,
    data,
    evaluate,
    models,
    prepare,
    questions,
    serve,
    suite,
    synthesize,
    train,
)
from llava_jax.cli.flags import Command, Named, Parser
from llava_jax.cli.train import find_config, load_settings, split_config
from llava_jax.data.sources import split_sources
from llava_jax.io import WRITE_ERRORS, no_room
from llava_jax.parallel.chips import GPU_FRACTION
from llava_jax.settings import nearest, tower_path
from llava_jax.types import InputError

COMMANDS: dict[str, Command] = {
    "demo": Command(
        "play the whole story at a small size on this machine's CPU, in less than ten minutes on two cores",
        "llava-jax demo --workdir=demo_run",
        models.demo_flags,
        models.demo,
        writes=("workdir",),
    ),
    "train": Command(
        "train one stage; it resumes by itself when the workdir holds a checkpoint of the same config",
        "llava-jax train --config=tiny:stage=pretrain --workdir=runs/pretrain --config.optim.lr=1e-3",
        train.train_flags,
        train.train,
        passes="--config",
        writes=("workdir",),
        in_buckets=("workdir",),
    ),
    "configs": Command(
        "list the recipes that come with the package, or copy one to change it",
        "llava-jax configs --copy=llava_v1_5",
        configs.configs_flags,
        configs.configs,
        writes=("to",),
    ),
    "compile": Command(
        "compile the step of `train` ahead of time, for TPUs by name or for what is here: does it fit, how fast is it",
        "llava-jax compile --config=llava_v1_5:size=7b,stage=finetune --topology=v5e:8x8 "
        "--config.model.llm=random:vicuna-7b --config.model.vision=random:clip-l-14-336 --rows=665298",
        compile.compile_flags,
        compile.compile_,
        passes="--config",
        writes=("json", "hlo"),
    ),
    "generate": Command(
        "answer one question about an image, or a whole file of questions in batches",
        'llava-jax generate --model=runs/finetune --image=cat.jpg --prompt="What is this?"',
        models.generate_flags,
        models.generate,
        reads=("model", "vision", "base", "image", "questions", "images"),
        writes=("answers",),
        in_buckets=("model", "vision", "base"),
    ),
    "chat": Command(
        "talk with a model in the terminal, about images or without one",
        "llava-jax chat --model=runs/finetune --image=cat.jpg",
        models.chat_flags,
        models.chat,
        reads=("model", "vision", "base", "image"),
        in_buckets=("model", "vision", "base"),
    ),
    "serve": Command(
        "answer over HTTP: OpenAI's chat completions with images, and a page to chat in a browser",
        "llava-jax serve --model=runs/finetune --port=8000",
        serve.serve_flags,
        serve.serve,
        reads=("model", "vision", "base", "api_key_file"),
        in_buckets=("model", "vision", "base"),
    ),
    "synthesize": Command(
        "write instruction data from captions and boxes with a language-only model",
        "llava-jax synthesize --contexts=annotations/captions_train2017.json --kind=conversation "
        "--output=conversation.json --endpoint=http://localhost:8000/v1 --teacher=my-model --budget_tokens=50000000",
        synthesize.synthesize_flags,
        synthesize.synthesize,
        reads=("prompts",),
        writes=("output", "batch_input"),
        files=synthesize.synthesize_files,
    ),
    "prepare verify": Command(
        "name every row of a data set that cannot be trained, and why (exit code 2); --output writes the others",
        "llava-jax prepare verify --config=tiny:stage=finetune --config.model.vision=CLIP_DIR "
        "--config.model.llm=LLAMA_DIR --config.data.annotations=data.json --config.data.images=images",
        data.verify_flags,
        data.verify,
        passes="--config",
        reads=("annotations", "images", "tokenizer", "vision"),
        writes=("dump", "output"),
        in_buckets=("images", "tokenizer", "vision"),
    ),
    "prepare captions": Command(
        "captions of images as rows of stage 1, each with a brief question drawn by the seed",
        "llava-jax prepare captions --captions=captions_train2017.json --output=captions.json",
        prepare.captions_flags,
        prepare.captions,
        reads=("captions",),
        writes=("output",),
    ),
    "prepare concepts": Command(
        "the captions that the paper's filter keeps: rare noun phrases all, common ones thinned out",
        "llava-jax prepare concepts --captions=cc3m.jsonl --output=cc3m_595k.json --json=phrases.json",
        prepare.concepts_flags,
        prepare.concepts,
        reads=("captions",),
        writes=("output", "json"),
    ),
    "prepare scienceqa": Command(
        "ScienceQA's problems as rows of LLaVA, in the published prompt formats",
        "llava-jax prepare scienceqa --source=scienceqa --split=minival --format=QCM-LEPA --output=minival.json",
        prepare.scienceqa_flags,
        prepare.scienceqa,
        writes=("output",),
        files=prepare.scienceqa_files,
    ),
    "prepare arrayrecord": Command(
        "rows and their images as one TFDS data set of ArrayRecord files, read without TensorFlow",
        "llava-jax prepare arrayrecord --annotations=data.json --images=images --output=packed",
        prepare.arrayrecord_flags,
        prepare.arrayrecord,
        reads=("annotations", "images"),
        writes=("output",),
    ),
    **questions.COMMANDS,
    **evaluate.COMMANDS,
    **suite.COMMANDS,
    "convert": Command(
        "write a model, whatever its form, as a Hugging Face or original LLaVA folder, or its projector alone",
        "llava-jax convert --from=orbax:runs/finetune --to=hf:my-llava",
        models.convert_flags,
        models.convert,
        reads=("from", "vision", "base"),
        writes=("to",),
        in_buckets=("from", "vision", "base"),
    ),
    "benchmark train": Command(
        "seconds an update of both stages, with --peer next to transformers and PyTorch",
        "llava-jax benchmark train --peer --json=train.json",
        benchmark.train_flags,
        benchmark.train,
        reads=("peer_python",),
        writes=("json",),
    ),
    "benchmark generate": Command(
        "tokens a second of greedy answers to prompts with images, and the time to the first and to each further one",
        "llava-jax benchmark generate --peer --json=generate.json",
        benchmark.generate_flags,
        benchmark.generate,
        reads=("peer_python",),
        writes=("json",),
    ),
    "benchmark data": Command(
        "images from file to batch and rows tokenised and packed per CPU second, one worker and two",
        "llava-jax benchmark data --peer --json=data.json",
        benchmark.data_flags,
        benchmark.data,
        reads=("peer_python",),
        writes=("json",),
    ),
}
SHOWN = "backslashreplace"
HELP = ("--help", "-h", "help")


def overview(group: str = "") -> str:
    """Return what `llava-jax` alone prints: each command with its one line; with a group (`prepare`), only its own."""
    names = [name for name in COMMANDS if name.startswith(group)]
    lines = [f"  {name:<22}{COMMANDS[name].summary}" for name in names]
    usage = f"usage: llava-jax {group}{'TOOL' if group else 'COMMAND'} [--flag=value …]"
    return "\n".join([usage, "", *lines, "", "llava-jax COMMAND --help shows its flags and an example."])


def split_name(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return (command, its arguments), for commands of one word and of two. Raises InputError with the nearest name."""
    word, *rest = argv
    if word in COMMANDS:
        return word, rest
    tools = tuple(name.split()[1] for name in COMMANDS if name.startswith(f"{word} "))
    if not tools:
        words = tuple(dict.fromkeys(name.split()[0] for name in COMMANDS))
        raise InputError(f"no command {word!r}{nearest(word, words)}")
    if not rest or rest[0] not in tools:
        given = f", got {rest[0]!r}" if rest else ""
        raise InputError(f"{word} needs the name of a tool{given}{nearest(rest[0] if rest else '', tools)}")
    return f"{word} {rest[0]}", rest[1:]


def split_passed(argv: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """Return (arguments `prefix` and `prefix.…`, as `--flag=value` however they were written; the others)."""
    passed, ours, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        flag = word.split("=", 1)[0]
        if flag != prefix and not flag.startswith(f"{prefix}."):
            ours.append(word)
        elif "=" in word or not rest or rest[0].startswith("--"):
            passed.append(word)
        else:
            passed.append(f"{word}={rest.pop(0)}")
    return passed, ours


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code. Raises InputError."""
    if not argv or argv[0] in HELP:
        print(overview())
        return 0
    if len(argv) == 2 and argv[1] in HELP and argv[0] not in COMMANDS:
        split_name([argv[0], *(name.split()[1] for name in COMMANDS if name.startswith(f"{argv[0]} "))])
        print(overview(f"{argv[0]} "))
        return 0
    name, rest = split_name(argv)
    command = COMMANDS[name]
    parser = Parser(f"llava-jax {name}", command.summary, command.example)
    command.add_flags(parser)
    passed, ours = split_passed(rest, command.passes) if command.passes else ([], rest)
    args = parser.parse(ours, [command.passes] if command.passes else [])
    args.passed = passed
    args.settings = functools.cache(lambda: load_settings(passed))  # a config file runs once
    read, written = command.files(args)
    outputs = named(args, command.writes)
    check_paths(named(args, command.reads) + read, outputs + written, args, command.in_buckets)
    try:
        return command.run(args)
    except WRITE_ERRORS as error:
        if not no_room(error):
            raise
        name = getattr(error, "filename", None) or " and ".join(map(str, outputs)) or "output"
        raise InputError(f"{name}: cannot be written ({no_room(error)}); make room, run again") from error


def take_any_text() -> None:
    """Let the terminal show what its encoding lacks as escapes, and leave bytes it cannot decode to the command."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, SHOWN), (sys.stderr, SHOWN)):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 bad input (one line on stderr), 130 interrupted, 141 no one reads our output.

    `train` leaves by SystemExit(42) after SIGTERM, once its state is saved, and by 43 and 44 where it is stuck or has
    lost another process.
    """
    # transformers warns on stderr that there is no torch; we use its tokenizers only, and stderr is for our one line.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Read when jax first meets a GPU; it takes 75 % otherwise, and what `compile` finds to fit would not.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_FRACTION))
    take_any_text()
    given = sys.argv[1:] if argv is None else argv
    try:
        with train.leaving_on_sigterm() if given and given[0] == "train" else contextlib.nullcontext():
            return run(given)
    except InputError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough; without this the interpreter complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno is None:  # of a check of ours, not of the system
            raise
        name = error.filename or "a file or a connection"
        print(f"error: {name}: {error.strerror}", file=sys.stderr)
        return 2


# ---- what a command reads and writes ---------------------------------------------------------------------------------


# gs://…, with the form of a model or without.
ADDRESS = re.compile(r"(?:(?:hf|llava|orbax|projector|peft):)?[A-Za-z][A-Za-z0-9+.-]+://.*", re.DOTALL)
# The only input that is read from wherever etils.epath reaches.
FROM_ANYWHERE = "annotations"


def named(args: argparse.Namespace, flags: Sequence[str]) -> list[Named]:
    """Return the paths of those flags that are given, the several of `--annotations` and of a repeated flag apart."""
    found = []
    for flag in flags:
        given = getattr(args, flag)
        for path in given if isinstance(given, list) else filter(None, [given]):
            paths = [source.path for source in split_sources(path)] if flag == FROM_ANYWHERE else [path]
            found += [Named(f"--{flag}", path) for path in paths]
    return found


def check_paths(
    inputs: Sequence[Named], outputs: Sequence[Named], args: argparse.Namespace, in_buckets: Sequence[str] = ()
) -> None:
    """Raise InputError for a file to be written that the command also reads, or writes twice, and for a bucket.

    The flags `in_buckets` may name one.

    Links are followed, and files that have two names are known by either. Of a folder that is read every file counts
    that is not JSON Lines; what an output folder may hold is the command's own business. The config file and folders
    that the `--config` words of `args` name are inputs as well.
    """
    for path in (*inputs, *outputs):
        if not ADDRESS.fullmatch(path.path) or path.flag == f"--{FROM_ANYWHERE}":
            continue
        if path.flag.removeprefix("--") not in in_buckets:
            raise InputError(f"{path}: buckets are not read or written here; give a folder of this machine")
        if SCHEME not in path.path:
            raise InputError(f"{path}: expected a folder of this machine, or one at {SCHEME}…")
    files = [output for output in outputs if not os.path.isdir(output.path)]
    read = [*inputs, *(_files_of_run(args) if files else ())]
    for index, output in enumerate(files):
        for other in [*read, *files[:index]]:
            if _same(output.path, other.path):
                raise InputError(f"{output}: names another file of this command, too ({other}); give another name")


def _files_of_run(args: argparse.Namespace) -> list[Named]:
    """Return the config file and what it names."""
    if not args.passed:
        return []
    settings = args.settings()
    spec = next(word for word in args.passed if word.startswith("--config="))
    model, init, data = settings.model, settings.init, settings.data
    named = {
        "--config": find_config(split_config(spec)[0]),
        "model.vision": tower_path(model.vision),
        "model.llm": tower_path(model.llm),
        "init.model": init.model.rpartition(":")[2],
        "init.projector": init.projector,
        "data.images": data.images,
    }
    annotations = [Named("data.annotations", source.path) for source in split_sources(data.annotations)]
    return [Named(flag, path) for flag, path in named.items() if path] + annotations


def _same(path: str, other: str) -> bool:
    """Return whether writing `path` changes the file `other`, or a file of that folder."""
    real = os.path.realpath(path)
    if os.path.isdir(other):
        inside = real.startswith(os.path.realpath(other) + os.sep)
        return inside and os.path.isfile(path) and not real.endswith(".jsonl")
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return real == os.path.realpath(other)
