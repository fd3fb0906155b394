"""A judge's reviews: what is asked, what its failures change, what is counted, and reviews that are published."""

import json
import statistics
import threading

import pytest

from llava_jax.cli import main
from llava_jax.evaluate import llava_bench, mmvet, reviews
from llava_jax.evaluate.judge import Judge
from llava_jax.synthesize.teacher import Reply, RequestFailed
from llava_jax.types import InputError
from tests import show_reviews
from tests.test_evaluate import answers, refusal, write


class Scripted:
    """A judge that says what it is told to, and remembers what it was asked; None is no answer at all."""

    name = "scripted"
    settings = {"model": "scripted"}

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def answer(self, messages):
        self.asked.append(messages)
        text = self.texts.pop(0)
        if text is None:
            raise RequestFailed("no answer after 12 tries")
        return Reply(text, tokens_in=1)


def judge(*texts, attempts=2):
    return Judge(Scripted(*texts), threading.Event(), attempts, concurrency=1)


@pytest.fixture
def bench(tmp_path):
    """Files of one question of COCO and one In-the-Wild."""
    rules = {name: {"role": "Assistant", "prompt": f"Rate {name}."} for name in ("conv", "llava_bench_detail")}
    questions = [
        {"question_id": 1, "image": "1.jpg", "text": "What?", "category": "conv"},
        {"question_id": 2, "image": "2.jpg", "text": "Describe.", "category": "detail"},
    ]
    boxes = [{"category": "boat", "bbox": [0.1, 0, 0.5, 1.0]}, {"category": "car", "bbox": [0, 0, 1, 1]}]
    context = [
        {"image": "1.jpg", "captions": ["A boat.", "A quay."], "instances": boxes},
        {"image": "2.jpg", "caption": "A street in the rain."},
    ]
    return [
        write(tmp_path / "q.jsonl", questions),
        write(tmp_path / "c.jsonl", context),
        write(tmp_path / "rules.json", rules),
        [answers(tmp_path, {1: "ref 1", 2: "ref 2"}, "ref.jsonl"), answers(tmp_path, {1: "ours 1", 2: "ours 2"})],
        str(tmp_path / "reviews.jsonl"),
    ]


def test_the_judge_is_asked_as_published(bench):
    who = judge("8 6\nGood.", "10, 5")
    figures = llava_bench.review(*bench, who)
    assert [message["role"] for message in who.teacher.asked[0]] == ["system", "user"]
    assert who.teacher.asked[0][1]["content"] == (
        "[Context]\nA boat.\nA quay.\n\nboat: [0.1, 0, 0.5, 1.0]\ncar: [0, 0, 1, 1]\n\n[Question]\nWhat?\n\n"
        "[Assistant 1]\nref 1\n\n[End of Assistant 1]\n\n[Assistant 2]\nours 1\n\n[End of Assistant 2]\n\n"
        "[System]\nRate conv.\n\n"
    )
    assert who.teacher.asked[1][1]["content"].startswith("[Context]\nA street in the rain.\n\n[Question]\nDescribe.")
    # (6 + 5) / (8 + 10)
    assert figures["overall"]["relative"] == pytest.approx(1100 / 18)
    assert figures["categories"]["llava_bench_detail"]["relative"] == 50.0
    assert figures["judge"]["name"] == "scripted" and len(figures["judge"]["prompt_hash"]) == 16
    assert figures["judge"]["date"].startswith("20")
    row = json.loads(open(bench[-1], encoding="utf-8").readline())
    assert (row["id"], row["question_id"], row["category"], row["tuple"]) == (1, "1", "conv", [8.0, 6.0])


def test_failed_judgings_are_asked_again_then_excluded_and_counted(bench):
    who = judge("I cannot say", "8 6", "ten of ten", "-1 3")
    figures = llava_bench.review(*bench, who)
    assert figures["overall"] == {
        "relative": 75.0,
        "sd": None,
        "reference": 80.0,
        "candidate": 60.0,
        "count": 1,
        "failed": 1,
        "published": pytest.approx(100 * (6 - 1) / (8 - 1)),  # its summary averages (-1, -1) in
    }
    assert {name: figures["judge"][name] for name in ("failed", "unreadable_answers", "unanswered")} == {
        "failed": 1,
        "unreadable_answers": 3,
        "unanswered": 0,
    }
    again = judge()
    assert llava_bench.review(*bench, again) == figures and not again.teacher.asked
    assert reviews.summarise(reviews.read_reviews(bench[-1]))["overall"] == figures["overall"]


def test_judgings_without_an_answer_stay_open(bench):
    figures = llava_bench.review(*bench, judge(None, "8 6"))
    assert figures["judge"]["unanswered"] == 1 and "12 tries" in figures["stopped"]
    assert llava_bench.review(*bench, judge("6 3"))["judge"]["unanswered"] == 0


def test_swap_and_repeats(bench):
    # Each question, repeat by repeat: reference first, then candidate first.
    who = judge("8 6", "6 8", "8 4", "4 8", "10 10", "10 10", "10 5", "5 10")
    figures = llava_bench.review(*bench, who, swap=True, repeats=2)
    first, second = 100 * 32 / 36, 100 * 18 / 36  # repeat 0: (6 + 6 + 10 + 10) / (8 + 8 + 10 + 10); repeat 1 likewise
    assert figures["overall"]["relative"] == pytest.approx((first + second) / 2)
    assert figures["overall"]["sd"] == pytest.approx(statistics.stdev([first, second]))
    assert "[Assistant 1]\nours 1" in who.teacher.asked[1][1]["content"]


def test_files_of_llava_bench_that_do_not_fit(bench, tmp_path):
    questions, context, rules, both, output = bench
    other = write(tmp_path / "c.jsonl", [{"image": "1.jpg", "captions": [], "instances": []}])
    assert "no context of image '2.jpg'" in refusal(llava_bench.review, questions, other, rules, both, output, judge())
    write(tmp_path / "c.jsonl", [{"image": f"{n}.jpg", "caption": "x"} for n in (1, 2)])
    assert "no llava_bench_conv" in refusal(llava_bench.review, questions, context, rules, both, output, judge())
    short = [both[0], answers(tmp_path, {1: "x"}, "short.jsonl")]
    assert "1 of 2 questions" in refusal(llava_bench.review, questions, context, rules, short, output, judge())


def test_a_failing_judge_and_kills_change_nothing(tmp_path):
    rates = show_reviews.Faults(busy=0.1, broken=0.05, cut=0.05, garbage=0.05, wrong=0.1, retry_after=0.01)
    figures = show_reviews.show(tmp_path, questions=6, kills=2, rates=rates)
    assert figures["asked again after the review was saved"] == 0


def test_published_reviews_of_both_layouts(tmp_path, capsys):
    older = [{"question_id": 1, "score": [8.0, 9.0]}, {"question_id": 2, "score": [-1, -1]}]
    path = write(tmp_path / "r.jsonl", older)
    questions = write(tmp_path / "q.jsonl", [{"question_id": n, "category": "math"} for n in (1, 2)])
    words = ["evaluate", "reviews", f"--reviews={path}", f"--questions={questions}"]
    assert main.main([*words, f"--json={tmp_path / 'f.json'}"]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["overall"]["relative"] == 112.5 == figures["categories"]["math"]["relative"]
    assert figures["overall"]["failed"] == 1 and figures["overall"]["published"] == pytest.approx(800 / 7)
    newer = [{"question_id": 1, "category": "conv", "tuple": [10, 5]}]
    assert reviews.summarise(reviews.read_reviews(write(tmp_path / "n.jsonl", newer)))["overall"]["relative"] == 50.0
    twice = write(tmp_path / "n.jsonl", newer * 2)
    assert "line 2: question 1 is reviewed twice" in refusal(reviews.read_reviews, twice)
    with pytest.raises(InputError, match="scores 'x', expected two numbers"):
        reviews.read_reviews(write(tmp_path / "n.jsonl", [{"question_id": 1, "score": "x"}]))


def test_mmvet_scores_by_ability(tmp_path):
    entries = {
        "v1_0": {"question": "x?", "answer": "-1<AND>-5", "imagename": "a.png", "capability": ["ocr", "math"]},
        "v1_1": {"question": "y?", "answer": "a", "imagename": "b.png", "capability": ["ocr"]},
    }
    annotations = write(tmp_path / "mm-vet.json", entries)
    prompt = write(tmp_path / "prompt.txt", "Question | Truth | Prediction | Score\n")
    who = judge("0.5", "1.0 fine", "2.0", "none", "0.2")
    given = answers(tmp_path, {0: "x = -1", 1: "a"})
    figures = mmvet.score(annotations, given, prompt, str(tmp_path / "out.jsonl"), who, repeats=2)
    asked = "Question | Truth | Prediction | Score\nx? | -1 <AND> -5 | x = -1 | "
    assert who.teacher.asked[0] == [{"role": "user", "content": asked}]
    # The first repeat has 0.5 and a failure, after two answers that cannot be read; the second 1.0 and 0.2.
    assert figures["score"] == pytest.approx(55.0) and figures["sd"] == pytest.approx(statistics.stdev([50, 60]))
    assert figures["abilities"] == pytest.approx({"math": 75.0, "ocr": 55.0}) and figures["judge"]["failed"] == 1
