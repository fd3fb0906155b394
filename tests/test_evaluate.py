"""Scorers of the published benchmarks on adversarial tables; every expected value is derived by hand next to it."""

import base64
import json

import openpyxl
import pytest

from llava_jax.cli import main
from llava_jax.evaluate import compare, gqa, mmbench, mme, mmvet, pope, scienceqa, seed, textvqa, vizwiz, vqa, vqav2
from llava_jax.evaluate.answers import table
from llava_jax.prepare import questions
from llava_jax.types import InputError

SHORT = "Answer the question using a single word or phrase."


def write(path, content):
    """Write JSON, JSON Lines or text, by the name."""
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    elif path.suffix == ".json":
        content = json.dumps(content)
    path.write_text(content, encoding="utf-8")
    return str(path)


def answers(folder, texts, name="answers.jsonl"):
    """An answers file: {question_id: text}, or rows."""
    rows = texts if isinstance(texts, list) else [{"question_id": key, "text": text} for key, text in texts.items()]
    return write(folder / name, rows)


def refusal(function, *args, **options):
    with pytest.raises(InputError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what every benchmark shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([{"question_id": "1", "text": "A"}], "1 of 2 questions of .* have no answer, the first 2; .*--missing=wrong"),
        ([{"question_id": 1, "text": "A"}, {"question_id": "1", "text": "B"}], "line 2: question 1 is there twice"),
        ([{"question_id": 3, "text": "A"}], "answers question 3, which .* does not ask"),
        ([{"question_id": 1, "text": None}], "line 1: text is None, expected a text"),
        ([{"question_id": True, "text": "A"}], "line 1: question_id is True"),
        (["A"], "line 1: no question_id"),
        ([], "holds no rows"),
    ],
)
def test_answers_that_do_not_fit_are_refused_by_name(tmp_path, rows, problem):
    questions = write(tmp_path / "q.jsonl", [{"question_id": n, "answer": "a", "category": "open"} for n in (1, 2)])
    with pytest.raises(InputError, match=problem):
        gqa.score(questions, answers(tmp_path, rows))


def test_missing_answers_are_counted_as_wrong_where_asked_to(tmp_path):
    questions = write(tmp_path / "q.jsonl", [{"question_id": n, "answer": "a", "category": "open"} for n in (1, 2)])
    figures = gqa.score(questions, answers(tmp_path, {1: "A."}), "wrong")
    assert (figures["accuracy"], figures["count"], figures["missing"]) == (50.0, 2, 1)


def test_a_table_has_a_row_for_each_group_of_the_same_numbers():
    figures = {"random": {"f1": 0.5, "accuracy": 1.0}, "popular": {"f1": 0.25, "accuracy": 0.0}, "mean_f1": 0.375}
    lines = [line.split() for line in table({**figures, "scores": {"1": 1.0}}).splitlines()]
    assert lines == [
        ["f1", "accuracy"],
        ["random", "0.5000", "1.00"],
        ["popular", "0.2500", "0.00"],
        [],
        ["mean_f1", "0.3750"],
    ]


# ---- VQA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Cat.", "cat"),
        ("a  an the", ""),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("3,000", "3000"),
        ("$5.00", "$5.00"),  # a full stop before a digit stays
        ("5.", "5"),
        ("v1.0.", "v1.0"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes lack: not in the table
        ("couldnt've", "couldn't've"),
        ("it's", "it 's"),
        ("somebody'd", "somebodyd"),  # the published table has it the wrong way round
        ("a/b", "b"),  # the slash becomes a blank, then the article goes
        ("a / b", "b"),
        ("well-known", "well known"),
        ("well - known", "well known"),  # apart: removed, and blanks are joined
        ("what?", "what"),
        ("yes\nno", "yes no"),
        ("Größe, 北京", "größe 北京"),
        ("İ", "i̇"),
        ("", ""),
        (".", ""),
        ("." * 33 + "x", ".x"),  # thirty-two are removed, no more
    ],
)
def test_normaliser_of_evalai(text, normal):
    assert vqa.normalise(text) == normal


@pytest.mark.parametrize(
    "people, prediction, share",
    [
        (["nokia"] * 3 + ["samsung"] * 7, "nokia", 0.9),  # left out thrice: 2/3; else 1: (3 * 2/3 + 7) / 10
        (["nokia"] * 3 + ["samsung"] * 7, "samsung", 1.0),
        (["nokia"] * 2 + ["samsung"] * 8, "nokia", 0.6),  # (2 * 1/3 + 8 * 2/3) / 10
        (["nokia"] * 1 + ["samsung"] * 9, "nokia", 0.3),  # (1 * 0 + 9 * 1/3) / 10
        (["nokia"] * 10, "motorola", 0.0),
    ],
)
def test_agreement_leaves_each_person_out_once(people, prediction, share):
    assert vqa.agreement(prediction, people) == pytest.approx(share, abs=1e-12)


def vqa_annotation(key, people, kind="other"):
    return {"question_id": key, "answer_type": kind, "answers": [{"answer": one, "answer_id": 1} for one in people]}


def test_vqav2_accuracy_and_submission(tmp_path):
    entries = [
        vqa_annotation(1, ["2"] * 10, "number"),  # all agree: compared as written, and "two" was submitted as 2
        vqa_annotation(2, ["the net"] * 10),  # all agree: as written, and the submission has no article
        vqa_annotation(3, ["the net"] * 3 + ["a ball"] * 7),  # they differ: both sides are normalised
        vqa_annotation(4, ["yes"] * 9 + ["no"], "yes/no"),
    ]
    annotations = write(tmp_path / "v2.json", {"annotations": entries})
    given = answers(tmp_path, {1: "Two", 2: "The net.", 3: "net", 4: "No."})
    figures = vqav2.score(annotations, given)
    assert figures["scores"] == pytest.approx({"1": 1.0, "2": 0.0, "3": 0.9, "4": 0.3})
    assert figures["accuracy"] == pytest.approx(55.0)
    assert figures["types"] == pytest.approx({"number": 100.0, "other": 45.0, "yes/no": 30.0})
    questions = write(tmp_path / "q.jsonl", [{"question_id": key} for key in (4, 5, 1, 2, 3)])
    rows, empty = vqav2.submission(questions, given)
    assert empty == 1 and rows[:3] == [
        {"question_id": 4, "answer": "no"},
        {"question_id": 5, "answer": ""},
        {"question_id": 1, "answer": "2"},
    ]
    assert vqav2.submission(None, given)[0][0] == {"question_id": 1, "answer": "2"}
    twice = write(tmp_path / "v2.json", {"annotations": entries[:1] * 2})
    assert "annotation 1: question 1 is there twice" in refusal(vqav2.score, twice, given)
    entries[0]["answers"].pop()
    with pytest.raises(InputError, match="annotation 0: 9 answers, expected the texts of 10 people"):
        vqav2.score(write(tmp_path / "v2.json", {"annotations": entries}), given)


def test_vizwiz_accuracy_and_submission(tmp_path):
    people = [{"answer": "unanswerable"}] * 8 + [{"answer": "soup"}] * 2
    entries = [{"image": "v_0.jpg", "question": "What?", "answer_type": "unanswerable", "answers": people}]
    given = answers(tmp_path, {"v_0.jpg": "Unanswerable."})
    assert vizwiz.score(write(tmp_path / "val.json", entries), given)["accuracy"] == 100.0
    questions = write(tmp_path / "q.jsonl", [{"question_id": "v_0.jpg", "image": "v_0.jpg"}])
    expected = [{"image": "v_0.jpg", "answer": "unanswerable"}]
    assert vizwiz.submission(questions, given) == expected == vizwiz.submission(None, given)
    twice = write(tmp_path / "val.json", entries * 2)
    assert "question 1: image v_0.jpg is there twice" in refusal(vizwiz.score, twice, given)


def test_textvqa_finds_the_question_in_prompts_with_and_without_ocr(tmp_path):
    data = [
        {"image_id": "aa", "question": "what brand is it?", "answers": ["Nokia"] * 3 + ["samsung"] * 7},
        {"image_id": "aa", "question": "how many bars?", "answers": ["three"] * 10},
    ]
    annotations = write(tmp_path / "val.json", {"data": data})
    rows = [
        {"question_id": "aa", "prompt": f"How many bars?\n{SHORT}", "text": "3."},
        {
            "question_id": "aa",
            "prompt": f"What brand is it?\nReference OCR token: NOKIA, 3G\n{SHORT}",
            "text": "the nokia",
        },
    ]
    figures = textvqa.score(annotations, answers(tmp_path, rows))
    assert figures["accuracy"] == pytest.approx(95.0) and figures["count"] == 2
    rows[1]["prompt"] = f"What model is it?\n{SHORT}"
    assert "answers question aa | what model is it?" in refusal(textvqa.score, annotations, answers(tmp_path, rows))
    del rows[1]["prompt"]
    assert "line 2: no prompt" in refusal(textvqa.score, annotations, answers(tmp_path, rows))
    data[0]["answers"].append("nokia")
    rows.pop()
    other = write(tmp_path / "val.json", {"data": data})
    assert "11 answers, expected the texts of 10" in refusal(textvqa.score, other, answers(tmp_path, rows), "wrong")
    twice = write(tmp_path / "val.json", {"data": [data[1], {**data[1], "question": "How many bars?"}]})
    problem = "question 1: question aa | how many bars? is there twice, expected each once"
    assert problem in refusal(textvqa.score, twice, answers(tmp_path, rows))
    assert problem in refusal(lambda: list(questions.textvqa_questions(twice, None)))


# ---- yes and no -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, yes",
    [
        ("Yes", True),
        ("no", False),
        ("No, there is none", False),
        ("NO", True),  # no word of the rule
        ("There is not", False),
        ("Yes. There is no dog", True),  # the first sentence counts
        ("It is notable", True),
        ("no\nYes", True),  # only blanks part words
        ("", True),
    ],
)
def test_pope_reads_the_first_sentence(text, yes):
    assert pope.says_yes(text) is yes


@pytest.fixture
def pope_files(tmp_path):
    folder = tmp_path / "coco"
    folder.mkdir()
    labels = [("cat", "yes"), ("dog", "yes"), ("car", "no"), ("bus", "no")]
    rows, questions = [], []
    for name, label in labels:
        rows.append({"question_id": 1, "image": "1.jpg", "text": f"Is there a {name}?", "label": label})
    for split in ("adversarial", "random"):
        write(folder / f"coco_pope_{split}.jsonl", rows)
        (folder / f"coco_pope_{split}.jsonl").rename(folder / f"coco_pope_{split}.json")
        for number, row in enumerate(rows):
            text = f"{row['text']}\n{SHORT}"
            questions.append({"question_id": f"{split[0]}{number}", "image": "1.jpg", "text": text, "category": split})
    return folder, questions


def test_pope_figures_by_split(tmp_path, pope_files):
    folder, questions = pope_files
    texts = {"a0": "Yes", "a1": "No", "a2": "Yes", "a3": "No"} | {f"r{n}": "No" for n in range(4)}
    figures = pope.score(str(folder), write(tmp_path / "q.jsonl", questions), answers(tmp_path, texts))
    # adversarial: one each of true and false positives and negatives; random: never yes.
    assert figures["adversarial"] == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    assert figures["random"] == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    assert figures["mean_f1"] == 0.25
    assert [figures["scores"][key] for key in ("a0", "a1", "a2", "a3")] == [1.0, 0.0, 0.0, 1.0]


def test_pope_refuses_annotations_of_another_version(tmp_path, pope_files):
    folder, questions = pope_files
    given = answers(tmp_path, {row["question_id"]: "yes" for row in questions})
    path = tmp_path / "q.jsonl"
    swapped = [questions[1], questions[0], *questions[2:]]
    assert "expected questions and annotations of one release" in refusal(
        pope.score, str(folder), write(path, swapped), given
    )
    short = answers(tmp_path, {row["question_id"]: "yes" for row in questions[1:]})
    assert "4 annotations of split adversarial and 3 questions" in refusal(
        pope.score, str(folder), write(path, questions[1:]), short
    )
    popular = [{**questions[0], "category": "popular"}, *questions[1:]]
    assert "has category 'popular'" in refusal(pope.score, str(folder), write(path, popular), given)
    assert "no coco_pope_SPLIT.json in it" in refusal(pope.score, str(tmp_path), write(path, questions), given)


@pytest.mark.parametrize(
    "text, said",
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Nope", "no"),
        ("None", "no"),
        (" Yes", "yes"),
        ("Eyes", "yes"),
        ("I say yes", "other"),
        ("Know", "no"),
        ("", "other"),
    ],
)
def test_mme_reads_four_letters(text, said):
    assert mme.verdict(text) == said


def test_mme_counts_images_with_both_right(tmp_path):
    rows, given = [], []
    for category, image, texts in (
        ("count", "a", ("Yes", "No")),
        ("count", "b", ("Yes", "Yes")),
        ("OCR", "c", ("yes, it is", "Not")),
        ("code_reasoning", "d", ("", "No")),
    ):
        for question, answer, text in (("One?", "Yes", texts[0]), ("Two?", "No", texts[1])):
            row = {"question_id": f"{category}/{image}.png", "image": f"{image}.png", "text": f"{question}\n{SHORT}"}
            rows.append({**row, "category": category, "answer": answer})
            given.append({"question_id": row["question_id"], "prompt": row["text"], "text": text})
    questions = write(tmp_path / "q.jsonl", rows)
    figures = mme.score(questions, answers(tmp_path, given[::-1]))
    # count: 3 of 4 right, one image of two: 75 + 50. OCR: 100 + 100. code_reasoning: 50 + 0.
    assert figures["categories"]["count"] == {"accuracy": 75.0, "accuracy_plus": 50.0, "score": 125.0}
    assert (figures["perception"], figures["cognition"]) == (325.0, 50.0)
    unknown = write(tmp_path / "q.jsonl", [{**row, "category": "counting"} for row in rows])
    assert "no category 'counting' in MME" in refusal(mme.score, unknown, answers(tmp_path, given))
    write(tmp_path / "q.jsonl", rows[1:])
    assert "1 questions about a.png, expected two" in refusal(mme.score, questions, answers(tmp_path, given[1:]))
    write(tmp_path / "q.jsonl", [{key: row[key] for key in row if key != "answer"} for row in rows])
    assert "no answer" in refusal(mme.score, questions, answers(tmp_path, given))


# ---- multiple choice ------------------------------------------------------------------------------------------------


def test_seed_takes_the_letter_and_nothing_else(tmp_path):
    shared = {"choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "question": "How many?"}
    kinds = [("1", "image", 1, "A"), ("2", "image", 2, "B"), (3, "image", 2, "C"), ("4", "video", 3, "D")]
    questions = [
        {**shared, "question_id": key, "data_id": "x", "data_type": kind, "question_type_id": number, "answer": letter}
        for key, kind, number, letter in kinds
    ]
    names = {"Scene": 1, "Counting": 2, "Action": 3}
    annotations = write(tmp_path / "seed.json", {"questions": questions, "question_type": names})
    given = answers(tmp_path, {1: "A", 2: "B.", 3: "C", 4: " D"})  # numbers for texts; "B." and " D" are wrong
    figures = seed.score(annotations, given)
    assert (figures["all"], figures["image"], figures["video"]) == (50.0, pytest.approx(200 / 3), 0.0)
    assert figures["types"] == {"Action": 0.0, "Counting": 50.0, "Scene": 100.0}
    assert seed.submission(annotations, given)[2] == {"question_id": 3, "prediction": "C"}
    questions[3]["question_type_id"] = 9
    other = write(tmp_path / "seed.json", {"questions": questions, "question_type": names})
    assert "question 3: data_type 'video', question_type_id 9" in refusal(seed.score, other, given)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("A", "A"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("C", None),  # there are two options
        ("A dog", None),  # an article, not a letter
        ("Dog.", "B"),
        ("cat and dog", None),
        ("", None),
    ],
)
def test_mmbench_reads_letters_and_options(text, letter):
    assert mmbench.option_of(text, ["Cat", "dog"]) == letter


HEADER = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit\n"
IMAGE = base64.b64encode(b"image").decode()


def mmbench_row(index, options, answer, hint=""):
    cells = [index, '"Which, of\nthese?"', hint, *options, *[""] * (4 - len(options)), answer, "ocr", IMAGE]
    return "\t".join(map(str, [*cells, "web", "perception", "", "dev"])) + "\n"


def test_mmbench_wants_every_order_right_and_writes_the_spreadsheet(tmp_path):
    rows = mmbench_row(7, ["cat", "dog"], "A") + mmbench_row(1000007, ["dog", "cat"], "B")
    rows += mmbench_row(8, ["1", "2", "nan"], "B", "Look.") + mmbench_row(1000008, ["2", "1"], "A")
    path = write(tmp_path / "dev.tsv", HEADER + rows)
    given = answers(tmp_path, {7: "A", 1000007: "A", 8: "B", 1000008: "=2"})
    figures = mmbench.score(path, given)
    # 7: right, then wrong: no. 8: right, then "=2", which names no option: no. Two of four rows.
    assert (figures["accuracy"], figures["single"], figures["count"], figures["unread"]) == (0.0, 50.0, 2, 1)
    figures = mmbench.score(path, answers(tmp_path, {7: "A", 1000007: "cat", 8: "B", 1000008: "B"}))
    assert figures["accuracy"] == 50.0 and figures["categories"] == {"ocr": 50.0}
    given = answers(tmp_path, {7: "A", 1000007: "A", 8: "B", 1000008: "=2"})
    assert mmbench.write_submission(str(tmp_path / "dev.xlsx"), path, given) == 4
    sheet = openpyxl.load_workbook(tmp_path / "dev.xlsx").active
    cells = [[cell.value for cell in row] for row in sheet.iter_rows()]
    assert cells[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert cells[4] == [1000008, "Which, of\nthese?", "2", "1", None, None, "=2", "A", "dev"]
    assert sheet["G5"].data_type == "s"


def test_mmbench_turns_the_options_itself(tmp_path):
    path = write(tmp_path / "dev.tsv", HEADER + mmbench_row(7, ["cat", "dog", "cow"], "B"))
    rows = mmbench.read_annotations(path, all_rounds=True)
    assert [(key, row["A"], row["answer"]) for key, row in rows.items()] == [
        ("7", "cat", "B"),
        ("1000007", "dog", "A"),
        ("2000007", "cow", "C"),
    ]
    given = answers(tmp_path, {7: "B", 1000007: "A", 2000007: "C"})
    assert mmbench.score(path, given, all_rounds=True)["accuracy"] == 100.0
    turned = write(tmp_path / "turned.tsv", HEADER + mmbench_row(1000007, ["cat", "dog"], "B"))
    assert "leave out --all_rounds" in refusal(mmbench.read_annotations, turned, all_rounds=True)
    without = write(tmp_path / "no.tsv", "index\tquestion\n1\tWhat?\n")
    assert "no column A and B and C and D" in refusal(mmbench.score, without, given)
    for answer in ("F", "C", "AB"):
        wrong = write(tmp_path / "wrong.tsv", HEADER + mmbench_row(7, ["cat", "dog"], answer))
        for all_rounds in (False, True):
            problem = refusal(mmbench.read_annotations, wrong, all_rounds=all_rounds)
            assert f"index 7: answer is '{answer}', expected one of AB" in problem
    test = write(tmp_path / "test.tsv", HEADER + mmbench_row(7, ["cat", "dog"], ""))
    assert "has no answers; give --submission" in refusal(mmbench.score, test, given)


PROBLEMS = {
    "1": ("natural science", "grade2", "a hint", "1.png", 0),
    "2": ("social science", "grade6", "", "2.png", 1),
    "3": ("language science", "grade7", "", None, 1),
    "4": ("language science", "grade12", "a hint", None, 2),
}


@pytest.fixture
def science(tmp_path):
    problems = {
        key: {
            "question": "Which?",
            "choices": ["x", "y", "z"],
            "hint": hint,
            "image": image,
            "lecture": "",
            "solution": "",
            "answer": answer,
            "subject": subject,
            "grade": grade,
        }
        for key, (subject, grade, hint, image, answer) in PROBLEMS.items()
    }
    splits = {"test": ["1", "2", "3", "4"], "val": ["5"]}
    return write(tmp_path / "problems.json", problems), write(tmp_path / "splits.json", splits), "test"


@pytest.mark.parametrize(
    "text, letter",
    [
        ("A", "A"),
        ("b", None),
        ("B. because", "B"),
        ("B.", None),  # neither alone nor before a blank
        ("The answer is C.", "C"),
        ("The answer is C", None),  # the rule wants one character more
        ("The answer is C, The answer is C.", None),  # said twice
        ("the answer is C.", None),
        ("F", None),
        ("", None),
        ("The answer is É.", None),
    ],
)
def test_scienceqa_reads_the_letter_as_published(text, letter):
    assert scienceqa.letter(text) == letter


def test_scienceqa_columns_agree_with_a_count_of_their_own(tmp_path, science):
    texts = {"1": "A", "2": "So. The answer is B.", "3": "A. no", "4": "none"}
    figures = scienceqa.score(*science, answers(tmp_path, texts))
    assert (figures["correct"], figures["count"], figures["unread"]) == (2, 4, 1)
    right = {"1", "2"}
    conditions = {
        "NAT": lambda subject, *_: subject[0] == "n",
        "SOC": lambda subject, *_: subject[0] == "s",
        "LAN": lambda subject, *_: subject[0] == "l",
        "TXT": lambda subject, grade, hint, *_: hint != "",
        "IMG": lambda subject, grade, hint, image, *_: image is not None,
        "NO": lambda subject, grade, hint, image, *_: hint == "" and image is None,
        "G1-6": lambda subject, grade, *_: int(grade[5:]) < 7,
        "G7-12": lambda subject, grade, *_: int(grade[5:]) > 6,
        "Avg": lambda *_: True,
    }
    for column, holds in conditions.items():
        inside = {key for key, facts in PROBLEMS.items() if holds(*facts)}
        assert figures["columns"][column] == 100 * len(inside & right) / len(inside), column
    assert "(it is of split val)" in refusal(scienceqa.score, *science, answers(tmp_path, {"5": "A"}))


def test_scienceqa_ensembles(tmp_path, science):
    ours = answers(tmp_path, {"1": "A", "2": "A", "3": "none", "4": "C"})  # right: 1, 4; 3 names nothing
    says = {"1": "B", "2": "B", "3": "none", "4": "none"}  # GPT-4: right: 2; 3 and 4 name nothing
    gpt4 = write(tmp_path / "gpt4.json", {"outputs": {key: f"The answer is {text}." for key, text in says.items()}})
    again = write(tmp_path / "again.jsonl", [{"question_id": "1", "text": "The answer is A."}])
    figures = scienceqa.score(*science, ours, gpt4_path=gpt4, requery_path=again)
    # Complement: 1 B (wrong), 2 B (right), 3 nothing, 4 ours C (right); the third of three choices may be drawn.
    assert (figures["complement"]["correct"], figures["complement"]["ours"]) == (2, 2)
    assert figures["complement"]["expected"] == pytest.approx(2 + 1 / 3)
    # Judge: 1 A (right), the others ours: 2 A (wrong), 3 nothing, 4 C (right).
    assert (figures["judge"]["correct"], figures["judge"]["ours"]) == (2, 3)
    assert figures["upper_bound"] == 75.0
    assert "needs --gpt4=FILE" in refusal(scienceqa.score, *science, ours, requery_path=again)
    short = write(tmp_path / "short.json", {"outputs": {"1": "A"}})
    assert "no text for 3 problems, the first 2" in refusal(scienceqa.score, *science, ours, gpt4_path=short)


def test_mmvet_submission(tmp_path):
    entry = {"question": "Q", "answer": "a<OR>b", "imagename": "v1_0.png", "capability": ["ocr"]}
    annotations = write(tmp_path / "mm-vet.json", {"v1_0": entry, "v1_1": entry})
    texts = mmvet.submission(annotations, answers(tmp_path, {0: "x", "v1_1": "y"}))
    assert texts == {"v1_0": "x", "v1_1": "y"}


def test_gqa_reads_its_own_questions(tmp_path):
    entries = {
        "10": {"question": "Is it?", "imageId": "7", "answer": "yes", "types": {"structural": "verify"}},
        "11": {"question": "What?", "imageId": "7", "answer": "t-shirt", "types": {"structural": "query"}},
    }
    figures = gqa.score(write(tmp_path / "q.json", entries), answers(tmp_path, {10: "Yes..", 11: "T-shirt ."}))
    assert figures["types"] == {"binary": 100.0, "open": 0.0}  # full stops at the end go, a blank before them stays


def test_commands_print_a_table_and_write_all_figures(tmp_path, capsys):
    questions = write(tmp_path / "q.jsonl", [{"question_id": 1, "answer": "a", "category": "open"}])
    words = ["evaluate", "gqa", f"--questions={questions}", f"--answers={answers(tmp_path, {1: 'A'})}"]
    assert main.main([*words, f"--json={tmp_path / 'figures.json'}"]) == 0
    assert ["accuracy", "100.00"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["accuracy"] == 100.0 and figures["scores"] == {"1": 1.0}
    assert main.main([*words, f"--json={questions}"]) == 2
    assert "names another file of this command" in capsys.readouterr().err


# ---- two runs -------------------------------------------------------------------------------------------------------


def figures_of(folder, name, scores):
    return write(folder / f"{name}.json", {"scores": {str(n): score for n, score in enumerate(scores)}})


def test_compare_two_runs(tmp_path, capsys):
    a = figures_of(tmp_path, "a", [1, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    b = figures_of(tmp_path, "b", [1, 0, 1, 1, 1, 1, 1, 0, 0, 1])
    found = compare.compare(a, b)
    assert (found["a"], found["b"], found["difference"]) == (30.0, 70.0, 40.0)
    # One question for a alone, five for b: twice the chance of at most one of six, 2 * (1 + 6) / 64.
    assert (found["only_a"], found["only_b"]) == (1, 5) and found["p_mcnemar"] == pytest.approx(14 / 64)
    # A resample's mean is that of ten draws of -100 (1 of 10), 0 (4 of 10) and 100 (5 of 10): variance 4400 / 10.
    assert found["low"] < 40 - 1.8 * 21 + 5 and 75 <= found["high"] <= 85 and 0.02 < found["p_bootstrap"] < 0.16
    same = compare.compare(a, a)
    assert (same["difference"], same["p_bootstrap"], same["p_mcnemar"]) == (0.0, 1.0, 1.0)
    soft = compare.compare(a, figures_of(tmp_path, "soft", [0.3] * 10))
    assert "p_mcnemar" not in soft
    assert compare.mcnemar(400, 600) == pytest.approx(2.7e-10, rel=0.1)
    assert "has no score of 9, which" in refusal(compare.compare, a, figures_of(tmp_path, "short", [1] * 9))
    assert main.main(["evaluate", "compare", a, b]) == 0 and "p_mcnemar" in capsys.readouterr().out
    assert main.main(["evaluate", "compare", a, b, f"--json={a}"]) == 2
