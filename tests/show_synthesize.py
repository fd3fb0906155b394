"""What `synthesize` survives, and what it asks: one command for each show, with numbers as arguments.

    python -m tests.show_synthesize faults --contexts=1000 --kills=20
    python -m tests.show_synthesize real --data=DIR

`faults` runs the command against a server that fails at the rates given, kills it with SIGKILL at random points, and
holds journal and rows against what the server saw. `real` takes DIR/few_shot and the contexts of DIR/*.jsonl (the
published prompts and the 80 images of LLaVA-Bench) and compares requests and verdicts; see test_teacher.py.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

from llava_jax.cli import main as cli
from tests.teacher_server import Faults, TeacherServer, good_answer

RATES = Faults(delay=0.05, busy=0.05, broken=0.05, cut=0.05, garbage=0.05, wrong=0.1, retry_after=0.5)


def write_contexts(path, count):
    """`count` images that no two requests of one kind are alike for."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            captions = [f"Street number {number} in the rain.", "Cars and people on a wet street."]
            box = {"category": "car", "bbox": [0.1, 0.2, 0.5, 0.75]}
            row = {"id": f"{number:06d}", "image": f"{number:06d}.png", "captions": captions, "instances": [box]}
            file.write(json.dumps(row) + "\n")


# Processes of the command, forked from one that has imported what it needs and done nothing else.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(
    ["openai", "llava_jax.cli.main", "llava_jax.synthesize.batch", "llava_jax.synthesize.write"]
)


def run_command(words, said):
    """The command line in a process of its own, which writes what it says into a file."""
    os.environ |= {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "secret-key"}
    with open(said, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = cli.main(words)
    sys.exit(code)


class Killed:
    """Runs of one command against one server, and what has to hold after each of them."""

    def __init__(self, folder, server, contexts, concurrency, attempts):
        self.server, self.output = server, folder / "data.json"
        self.journal = folder / "data.journal.jsonl"
        self.said = folder / "said.txt"
        self.words = [
            *("synthesize", f"--contexts={contexts}", "--kind=all", f"--output={self.output}"),
            *(f"--endpoint={server.url}", "--teacher=served"),
            *(f"--concurrency={concurrency}", f"--attempts={attempts}"),
        ]
        self.kept, self.torn, self.asked_again, self.impatient = b"", 0, [], 0

    def run(self, kill_after=None, pause=0.0):
        """The exit code of one run, or None when it was killed once the server had seen so many requests more."""
        begin = len(self.server.seen)
        done = self.saved()
        process = FRESH.Process(target=run_command, args=(self.words, str(self.said)))
        process.start()
        if kill_after is not None:
            while process.is_alive() and len(self.server.seen) - begin < kill_after:
                time.sleep(0.0005)
            time.sleep(pause)
            process.kill()
        process.join()
        code = None if process.exitcode == -signal.SIGKILL else process.exitcode
        assert code in (None, 0), self.said.read_text(encoding="utf-8")
        self.check(done, begin)
        return code

    def saved(self):
        """(kind, image) of every good answer in the journal, by its whole lines."""
        lines = self.journal.read_bytes().split(b"\n")[:-1] if self.journal.is_file() else []
        rows = [json.loads(line) for line in lines]
        return {(row["kind"], row["id"]) for row in rows if row["text"] == self.expected(row)}

    def expected(self, row):
        return good_answer(row["kind"], f"Street number {int(row['id'])} in the rain.")

    def check(self, done, begin):
        """No saved line changed, nothing asked again after it was saved, nobody came back before Retry-After."""
        content = self.journal.read_bytes() if self.journal.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.torn += whole != content
        assert whole.startswith(self.kept), "a line that was saved has changed or is gone"
        self.kept = whole
        last_busy = {}
        for seen in self.server.seen[begin:]:
            image = f"{int(seen.about[1].split()[2]):06d}"
            if (seen.about[0], image) in done:
                self.asked_again.append((seen.about[0], image))
            busy = last_busy.pop(seen.about, None)
            self.impatient += busy is not None and seen.at - busy < self.server.faults.retry_after
            if seen.fate == "busy":
                last_busy[seen.about] = seen.at


def faults(folder, contexts, kills, concurrency=16, attempts=6, rates=RATES, seed=0):
    """Runs the show and returns its figures; AssertionError where something does not hold."""
    rng, started = random.Random(seed), time.monotonic()
    write_contexts(folder / "contexts.jsonl", contexts)
    with TeacherServer(rates, seed) as server:
        show = Killed(folder, server, folder / "contexts.jsonl", concurrency, attempts)
        for left in range(kills, 0, -1):
            open_images = 3 * contexts - len(show.saved())
            assert show.run(rng.randrange(0, max(1, 2 * open_images // (left + 1))), rng.random() * 0.03) is None
        assert show.run() == 0
        requests = len(server.seen)
        assert show.run() == 0 and len(server.seen) == requests, "a run that had nothing left to ask has asked"
    rows = json.loads(show.output.read_text(encoding="utf-8"))
    journal = [json.loads(line) for line in show.journal.read_bytes().splitlines()]
    good = collections.Counter((row["kind"], row["id"]) for row in journal if row["text"] == show.expected(row))
    fates = collections.Counter(seen.fate for seen in server.seen)
    figures = {
        "images x kinds": 3 * contexts,
        "rows": len(rows),
        "kills": kills,
        "requests": len(server.seen),
        **{f"requests met: {fate}": count for fate, count in sorted(fates.items())},
        "answers in the journal": len(journal),
        "good answers saved twice": sum(count > 1 for count in good.values()),
        "good answers sent and lost in a kill": fates["good"] - sum(good.values()),
        "asked again after its answer was saved": len(show.asked_again),
        "lines torn by a kill and cut off": show.torn,
        "came back before Retry-After": show.impatient,
        "journal has the key": b"secret-key" in show.journal.read_bytes(),
        "seconds": round(time.monotonic() - started, 1),
    }
    assert len(rows) == 3 * contexts == len(good), figures
    assert {(row["id"], len(row["conversations"])) for row in rows} == {
        (f"{number:06d}", turns) for number in range(contexts) for turns in (2, 4)
    }
    assert not show.asked_again and not show.impatient and max(good.values()) == 1, figures
    assert figures["good answers sent and lost in a kill"] <= kills * concurrency, figures
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shows = parser.add_subparsers(dest="show", required=True)
    killed = shows.add_parser("faults")
    for name, value in (("contexts", 1000), ("kills", 20), ("concurrency", 16), ("attempts", 6), ("seed", 0)):
        killed.add_argument(f"--{name}", type=int, default=value)
    for name in ("delay", "busy", "broken", "cut", "garbage", "wrong", "retry_after"):
        killed.add_argument(f"--{name}", type=float, default=getattr(RATES, name))
    shows.add_parser("real").add_argument("--data", required=True, metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.show == "faults":
            rates = Faults(*(getattr(args, name) for name in Faults.__dataclass_fields__))
            figures = faults(
                pathlib.Path(folder), args.contexts, args.kills, args.concurrency, args.attempts, rates, args.seed
            )
        else:
            from tests import test_teacher

            figures = test_teacher.real(pathlib.Path(args.data), pathlib.Path(folder))
    for name, value in figures.items():
        print(f"{name:<42}{value}")


if __name__ == "__main__":
    main()
