"""What a judge's failures and kills change in `evaluate llava_bench`: nothing; and no review is paid for twice.

    python -m tests.show_reviews --questions=60 --kills=10

The command asks a server that fails at the rates of `RATES`, is killed with SIGKILL at random points, and ends with the
figures of one that asks a server without a fault.
"""

import argparse
import collections
import json
import pathlib
import random
import signal
import tempfile
import time

from tests.show_synthesize import FRESH, run_command
from tests.teacher_server import Faults, TeacherServer

RATES = Faults(delay=0.05, busy=0.1, broken=0.05, cut=0.05, garbage=0.05, wrong=0.1, retry_after=0.05)
CATEGORIES = ("conv", "detail", "complex")


def write_bench(folder, questions):
    """LLaVA-Bench with so many questions: (flags that name its files, what is asked about each)."""
    rules = {name: {"role": "Assistant", "prompt": f"Rate {name}."} for name in CATEGORIES}
    (folder / "rule.json").write_text(json.dumps(rules), encoding="utf-8")
    box = {"category": "car", "bbox": [0.1, 0.2, 0.5, 0.75]}
    rows = collections.defaultdict(list)
    for number in range(questions):
        image, category = f"{number}.jpg", CATEGORIES[number % 3]
        rows["questions"].append({"question_id": number, "image": image, "text": f"Q{number}?", "category": category})
        rows["context"].append({"image": image, "captions": [f"Street {number}.", "Rain."], "instances": [box]})
        rows["reference"].append({"question_id": number, "text": f"reference {number}"})
        rows["candidate"].append({"question_id": number, "text": f"candidate {number}"})
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    files = {"questions": "questions", "context": "context"}
    flags = [f"--{flag}={folder / name}.jsonl" for flag, name in files.items()]
    flags += [f"--answers={folder / name}.jsonl" for name in ("reference", "candidate")]
    return ["evaluate", "llava_bench", *flags, f"--rules={folder / 'rule.json'}"]


def scores(kind, text):
    """A review that depends on what is asked alone, however often; the reference gets more."""
    rng = random.Random(text)
    first, second = rng.randint(6, 10), rng.randint(3, 8)
    pair = (first, second) if text.index("reference") < text.index("candidate") else (second, first)
    return f"{pair[0]} {pair[1]}\nThe first is fuller."


def judged(text):
    """What a request is about: its question, and which answer came first."""
    return text.split("[Question]\n")[1].split("\n")[0], text.index("reference") < text.index("candidate")


def show(folder, questions, kills, rates=RATES, seed=0):
    """Run the show and return its figures; AssertionError where something does not hold."""
    rng, started = random.Random(seed), time.monotonic()
    words = [*write_bench(folder, questions), "--judge=served", "--swap", "--attempts=8"]
    results = {}
    with TeacherServer(Faults(), answer=scores) as server:
        results["plain"] = run(folder, "plain", words, server)
        assert results["plain"] == 0, (folder / "said.txt").read_text(encoding="utf-8")
    with TeacherServer(rates, seed, answer=scores) as server:
        asked_again, done = [], set()
        for left in range(kills, -1, -1):
            begin = len(server.seen)
            after = rng.randrange(0, max(1, 2 * (2 * questions - len(done)) // (left + 1))) if left else None
            code = run(folder, "faulty", words, server, after)
            assert code == (None if left else 0), (folder / "said.txt").read_text(encoding="utf-8")
            asked_again += [seen for seen in server.seen[begin:] if judged(seen.about[1]) in done]
            done = saved(folder / "faulty.journal.jsonl")
        requests = len(server.seen)
        assert run(folder, "faulty", words, server) == 0 and len(server.seen) == requests
    plain, faulty = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("plain", "faulty"))
    for figures in (plain, faulty):
        unread = figures["judge"].pop("unreadable_answers")
    fates = collections.Counter(seen.fate for seen in server.seen)
    assert not asked_again and plain == faulty, (asked_again[:1], plain, faulty)
    return {
        "judgings": 2 * questions,
        "kills": kills,
        "requests": requests,
        **{f"requests met: {fate}": count for fate, count in sorted(fates.items())},
        "answers that could not be read": unread,
        "asked again after the review was saved": len(asked_again),
        "relative score, with and without failures": plain["overall"]["relative"],
        "seconds": round(time.monotonic() - started, 1),
    }


def run(folder, name, words, server, kill_after=None):
    """The exit code of one run, or None when it was killed once the server had seen so many requests more."""
    begin = len(server.seen)
    words = [*words, f"--endpoint={server.url}", f"--output={folder / name}.jsonl", f"--json={folder / name}.json"]
    process = FRESH.Process(target=run_command, args=(words, str(folder / "said.txt")))
    process.start()
    if kill_after is not None:
        while process.is_alive() and len(server.seen) - begin <= kill_after:
            time.sleep(0.0005)
        process.kill()
    process.join()
    return None if process.exitcode == -signal.SIGKILL else process.exitcode


def saved(journal):
    """What every review is about that is whole in the journal and can be read."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["text"][0].isdigit()]
    return {(f"Q{row['id']}?", "swapped" not in row["kind"]) for row in rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("questions", 60), ("kills", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in show(pathlib.Path(temporary), given.questions, given.kills, seed=given.seed).items():
            print(f"{name:<44}{value}")
