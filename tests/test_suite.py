"""`evaluate suite` on small folders of all twelve benchmarks: scores as by hand, killed twice, resumed; bad folders."""

import json
import shutil
import sys
import types

import pytest

from llava_jax import api
from llava_jax.cli import main
from llava_jax.evaluate import gqa, report
from llava_jax.infer import batch_generate
from llava_jax.prepare import questions
from tests import bench_files, tiny_llava
from tests.teacher_server import Faults, TeacherServer
from tests.test_images import png_header


def judge_says(kind, text):
    return "0.5" if "Correctness" in text else "10 5\nFuller."


class Answering:
    """In place of `answer_file`: says what the table says, and is killed after so many answers of a run."""

    def __init__(self):
        self.left, self.asked = 1000, []

    def __call__(self, model, questions, images, answers, sampling, *, batch_size, progress):
        rows = batch_generate.read_questions(questions, images)
        name = questions.split("/")[-2]
        path = types.SimpleNamespace(open=lambda mode: open(answers, mode, encoding="utf-8"))
        with path.open("a"):
            pass
        with path.open("r") as file:
            done = [json.loads(line)["prompt"] for line in file]
        for row in rows[len(done) :]:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.asked.append((name, row.id, row.text))
            words = bench_files.ANSWERS[name][0]
            text = next(answer for word, answer in words.items() if word in row.text)
            with path.open("a") as file:
                file.write(json.dumps({"question_id": row.id, "prompt": row.text, "text": text}) + "\n")


@pytest.fixture
def answering(monkeypatch):
    found = Answering()
    monkeypatch.setattr(batch_generate, "answer_file", found)
    about = dict.fromkeys(("template", "aspect", "image_position", "exif", "dtype"), "as trained")
    rest = {"processor": types.SimpleNamespace(rules=types.SimpleNamespace(caption_only=False))}
    model = types.SimpleNamespace(
        name="ours", about=about, template_assumed=False, placed=types.SimpleNamespace(mesh=None), **rest
    )
    monkeypatch.setattr(api, "load", lambda *args, **options: model)
    return found


def test_all_twelve_are_scored_as_by_hand_after_two_kills(tmp_path, answering, capsys):
    bench_files.write_all(tmp_path / "data")
    (tmp_path / "data" / "notes").mkdir()
    words = ["evaluate", "suite", "--model=ours", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    with TeacherServer(Faults(), answer=judge_says) as server:
        words += ["--judge=served", f"--endpoint={server.url}"]
        for answering.left in (9, 13):
            assert main.main(words) == 130
        answering.left = 1000
        assert main.main(words) == 0
        out = capsys.readouterr().out
        requests = len(server.seen)
        assert main.main(words) == 0 and len(server.seen) == requests == 2
    assert len(answering.asked) == len(set(answering.asked)) == 30
    found = json.loads((tmp_path / "out" / "suite.json").read_text(encoding="utf-8"))
    assert found["results"] == pytest.approx({name: score for name, (_, score) in bench_files.ANSWERS.items()})
    table = [line.split() for line in out.splitlines()[-4:]]
    assert table[1] == ["ours", *(f"{score:.1f}" for _, score in bench_files.ANSWERS.values())]
    assert table[2][2:] == "78.5 62.0 50.0 66.8 58.2 85.9 1510.7 64.3 58.3 58.6 65.4 31.1".split()
    assert "not known       notes" in out
    submission = json.loads((tmp_path / "out" / "vizwiz" / "submission.json").read_text(encoding="utf-8"))
    assert submission == [{"image": "VizWiz_val_0.jpg", "answer": "unanswerable"}]
    text = report.report([str(tmp_path / "out")], examples=2)
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert "src=" not in text and "http" not in text and text.count("<polygon") == 3
    said = {(one["bench"], one["question"].split("\n")[0]): one for one in data["examples"]}
    assert len(data["examples"]) == 20 and all(one["answers"][0]["score"] is not None for one in data["examples"])
    assert said["textvqa", "What brand is it?"]["answers"] == [{"text": "the Nokia", "score": 0.9, "review": None}]
    assert said["llava_bench", "Describe the scene."]["answers"][0]["review"] == "10 5\nFuller."
    assert said["gqa", "Is it left?"]["image"].startswith("data:image/jpeg;base64,")
    assert report.groups_of(json.loads((tmp_path / "out" / "mme" / "figures.json").read_text())) == {
        "color": 200.0,
        "numerical_calculation": 50.0,
        "posters": 50.0,
    }
    asked = {(name, key): text for name, key, text in answering.asked}
    short = "Answer the question using a single word or phrase."
    assert asked["textvqa", "a7"] == f"Which year?\nReference OCR token: NOKIA, 1999\n{short}"
    assert asked["vizwiz", "VizWiz_val_0.jpg"] == (
        f"What can is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{short}"
    )
    assert asked["mme", "color/a.png"] == f"Is it blue?\n{short}"
    assert asked["mmbench_cn", 1] == "哪种动物?\nA. 猫\nB. 狗\n请直接回答选项字母。"
    letter = "Answer with the option's letter from the given choices directly."
    assert asked["seed", "5"] == f"What do you see?\nA. 1\nB. 2\nC. 3\nD. 4\n{letter}"
    assert asked["scienceqa", "2"] == f"Context: N/A\nQuestion: Which noun?\nOptions: (A) x (B) y\n{letter}"


def test_a_model_answers_the_suite(tmp_path, monkeypatch, capsys):
    """Of one question, whose right answer becomes what the model says: it is not answered again."""
    bench_files.write_all(tmp_path / "all")
    shutil.copytree(tmp_path / "all" / "gqa", tmp_path / "data" / "gqa")
    model = tiny_llava.model(str(tmp_path))
    monkeypatch.setattr(api, "load", lambda *args, **options: model)
    path, out = tmp_path / "data" / "gqa" / "data" / "testdev_balanced_questions.json", tmp_path / "out"
    entries = {"1": json.loads(path.read_text())["1"]}
    words = ["evaluate", "suite", "--model=tiny", f"--data={tmp_path / 'data'}", f"--output={out}"]
    for score in (0.0, 100.0):
        bench_files.dump(path, entries)
        assert main.main(words) == 0
        assert json.loads((out / "suite.json").read_text())["results"] == {"gqa": score}
        answer = json.loads((out / "gqa" / "answers.jsonl").read_text())
        entries["1"]["answer"] = gqa.normalise(answer["text"])
    assert answer["prompt"] == "Is it left?\nAnswer the question using a single word or phrase." and answer["text"]
    assert "1 questions, 1 answered already" in capsys.readouterr().out


def test_without_a_judge_the_figures_of_judges_stay_open(tmp_path, answering, capsys):
    bench_files.write_all(tmp_path / "all")
    for name in ("mm-vet", "pope"):
        shutil.copytree(tmp_path / "all" / name, tmp_path / "data" / name)
    words = ["evaluate", "suite", "--model=ours", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    assert main.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-3].split() == ["ours", "75.0", "-"]
    assert json.loads((tmp_path / "out" / "mmvet" / "submission.json").read_text()) == {"v1_0": "12"}


def test_open_judgings_leave_a_dash_within_one_budget_for_all(tmp_path, answering, capsys):
    bench_files.write_all(tmp_path / "all")
    for name in ("llava-bench-in-the-wild", "mm-vet"):
        shutil.copytree(tmp_path / "all" / name, tmp_path / "data" / name)
    words = ["evaluate", "suite", "--model=ours", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    with TeacherServer(Faults(), answer=lambda *asked: f"{judge_says(*asked)} {'x' * 5000}") as server:
        words += ["--judge=served", f"--endpoint={server.url}"]
        # LLaVA-Bench's longest answer passes the first budget; the second has room for it, but not after MM-Vet's.
        for budget, asked, found in ((100, 1, [None, 50.0]), (1300, 1, [None, 50.0]), (0, 2, [50.0, 50.0])):
            assert main.main([*words, f"--budget_tokens={budget}"]) == int(None in found)
            out = capsys.readouterr().out
            assert len(server.seen) == asked and ("1 judgings have no answer (the next" in out) == (None in found)
            results = json.loads((tmp_path / "out" / "suite.json").read_text())["results"]
            assert list(results.values()) == found


def both_languages(data, split="TEST"):
    """Put MMBench's tables of both languages, under their newer names, into both of its folders."""
    english, chinese = data / "mmbench" / f"MMBench_{split}_EN.tsv", data / "mmbench_cn" / f"MMBench_{split}_CN.tsv"
    (data / "mmbench" / "mmbench_dev_20230712.tsv").rename(english)
    (data / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv").rename(chinese)
    shutil.copy(english, data / "mmbench_cn")
    shutil.copy(chinese, data / "mmbench")


def test_each_language_of_mmbench_is_found_next_to_the_other(tmp_path, answering):
    bench_files.write_all(tmp_path / "all")
    both_languages(tmp_path / "all", "DEV")
    for name in ("mmbench", "mmbench_cn"):
        shutil.copytree(tmp_path / "all" / name, tmp_path / "data" / name)
    assert main.main(["evaluate", "suite", "--model=ours", f"--data={tmp_path / 'data'}", f"--output={tmp_path}"]) == 0
    expected = {name: bench_files.ANSWERS[name][1] for name in ("mmbench", "mmbench_cn")}
    assert json.loads((tmp_path / "suite.json").read_text())["results"] == expected


@pytest.mark.parametrize(
    "break_it, problem",
    [
        (lambda data: shutil.rmtree(data), "holds no benchmark"),
        (lambda data: (data / "gqa" / "data" / "testdev_balanced_questions.json").unlink(), "gqa: no testdev_balanced"),
        (lambda data: (data / "seed").mkdir(), "seed and seed_bench are both seed"),
        (both_languages, "MMBench_TEST_CN.tsv and MMBench_TEST_EN.tsv all fit *.tsv; leave one of them"),
        (lambda data: (data / "scienceqa" / "pid_splits.json").write_text("{}"), "--split=test: not in"),
        (lambda data: (data / "MME" / "MME_Benchmark_release_version" / "color" / "a.png").unlink(), "a.txt: no image"),
    ],
)
def test_folders_that_do_not_fit_are_named_before_the_first_answer(tmp_path, answering, capsys, break_it, problem):
    bench_files.write_all(tmp_path / "data")
    break_it(tmp_path / "data")
    words = ["evaluate", "suite", "--model=ours", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    assert main.main(words) == 2 and not answering.asked
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_a_judge_that_cannot_be_asked_is_known_before_the_first_answer(tmp_path, answering, capsys, monkeypatch):
    bench_files.write_all(tmp_path / "data")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = ["evaluate", "suite", "--model=ours", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    for more, problem in (([], "needs a key"), ([f"--rules={tmp_path / 'none.json'}"], "no such file")):
        assert main.main([*words, "--judge=gpt", *more]) == 2 and not answering.asked
        assert problem in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_report_says_why_an_image_is_not_shown(tmp_path):
    files = {"huge.png": png_header(20_000, 20_000), "broken.png": png_header(8, 8), "no.png": None}
    for name, content in files.items():
        if content:
            (tmp_path / name).write_bytes(content)
    bench_files.dump(tmp_path / "suite.json", {"model": "m", "results": {"gqa": 0}, "images": {"gqa": str(tmp_path)}})
    asked = [{"question_id": name, "image": name, "text": "What?"} for name in files]
    bench_files.dump(tmp_path / "gqa" / "questions.jsonl", [*asked, {"question_id": "none", "text": "What?"}])
    said = [{"question_id": name, "prompt": "What?", "text": "x"} for name in files]
    bench_files.dump(tmp_path / "gqa" / "answers.jsonl", said)
    text = report.report([str(tmp_path)], examples=4)
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    reasons = ("more than 64 megapixels", "truncated or damaged", "no such file", "No image.")
    for one, reason in zip(data["examples"], reasons, strict=True):
        assert reason in one["problem"] and "image" not in one


@pytest.mark.parametrize(
    "name",
    [
        "vqav2/v2_mscoco_val2014_annotations.json",
        *(f"llava-bench-in-the-wild/{name}" for name in ("context.jsonl", "answers_gpt4.jsonl", "rule.json")),
        "mm-vet/prompt.txt",
    ],
)
def test_files_for_the_scores_are_opened_before_the_first_answer(tmp_path, answering, capsys, name):
    bench_files.write_all(tmp_path / "data")
    (tmp_path / "data" / name).write_bytes(b"\xff\n")
    words = ["evaluate", "suite", "--model=ours", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    assert main.main([*words, "--judge=served", "--endpoint=http://localhost:1/v1"]) == 2 and not answering.asked
    assert name in capsys.readouterr().err


def test_what_writes_a_spreadsheet_is_needed_before_the_first_answer(tmp_path, answering, capsys, monkeypatch):
    bench_files.write_all(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    words = ["evaluate", "suite", "--model=ours", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    assert main.main(words) == 2 and not answering.asked
    assert 'pip install "llava-jax[evaluate]"' in capsys.readouterr().err


def test_prepare_writes_questions(tmp_path, capsys):
    bench_files.write_all(tmp_path)
    source = tmp_path / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv"
    words = ["prepare", "mmbench_cn", f"--source={source}", f"--images={tmp_path / 'images'}", "--all_rounds"]
    assert main.main([*words, f"--output={tmp_path / 'q.jsonl'}"]) == 0 and "2 questions" in capsys.readouterr().out
    rows = [json.loads(line) for line in open(tmp_path / "q.jsonl", encoding="utf-8")]
    assert [(row["question_id"], row["image"], row["text"].split("\n")[1]) for row in rows] == [
        (1, "1.jpg", "A. 猫"),
        (1000001, "1.jpg", "A. 狗"),
    ]
    plain = list(questions.textvqa_questions(str(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"), None))
    assert plain[0]["text"].startswith("What brand is it?\nAnswer the question")
    words = ["prepare", "scienceqa", f"--source={tmp_path / 'scienceqa'}", "--split=test", "--questions"]
    assert main.main([*words, f"--output={tmp_path / 'q.jsonl'}"]) == 0
    assert main.main([*words, "--format=CQM-A", f"--output={tmp_path / 'q.jsonl'}"]) == 2
