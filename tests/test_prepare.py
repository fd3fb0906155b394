"""prepare captions, concepts, scienceqa: questions by seed, the filter's rule by an independent count, exact texts."""

import collections
import json
import random
import re
import sys
import types

import pytest

from llava_jax.cli.main import main
from llava_jax.data.rows import parse_row
from llava_jax.prepare.captions import BRIEF_QUESTIONS, caption_rows, read_captions
from llava_jax.prepare.concepts import Rule, select
from llava_jax.prepare.phrases import builtin_phrases, normalise, spacy_phrases
from llava_jax.prepare.scienceqa import INPUTS, OUTPUTS, convert
from llava_jax.types import InputError
from tests import show_scienceqa


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def load_captions(path):
    refused = []
    return list(read_captions(path, refused)), refused


# ---- captions -------------------------------------------------------------------------------------------------------


def test_captions_of_every_form(tmp_path):
    rows = [{"id": "a", "image": "a.jpg", "caption": " A dog. "}, {"image": "b.jpg", "captions": ["One.", "Two."]}]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    coco = {"images": [{"id": 7, "file_name": "c.jpg"}], "annotations": [{"id": 1, "image_id": 7, "caption": "Sea."}]}
    listed, _ = load_captions(write(tmp_path / "a.json", rows))
    assert [(c.id, c.image, c.text) for c in listed] == [
        ("a", "a.jpg", "A dog."),
        ("b.jpg-0", "b.jpg", "One."),
        ("b.jpg-1", "b.jpg", "Two."),
    ]
    assert load_captions(write(tmp_path / "a.jsonl", lines))[0] == listed
    [only] = load_captions(write(tmp_path / "coco.json", coco))[0]
    assert (only.id, only.image, only.text) == ("1", "c.jpg", "Sea.")
    backwards = "\ufeff" + json.dumps(dict(reversed(coco.items())))
    assert load_captions(write(tmp_path / "coco.json", backwards))[0] == [only]
    with pytest.raises(InputError, match="more text after .* belongs into a .jsonl file"):
        load_captions(write(tmp_path / "coco.json", lines))
    with pytest.raises(InputError, match="not COCO's captions .KeyError.'file_name'. in images"):
        load_captions(write(tmp_path / "coco.json", coco | {"images": [{"id": 7}]}))


def test_captions_that_cannot_be_used_are_named(tmp_path):
    bad = {
        '{"image": "a.jpg", "caption": " "}': "caption 'a.jpg' is ' ', expected text",
        '{"caption": "x"}': "image is None",
        "{": "not JSON",
        '{"image": "a.jpg", "caption": "a <image>"}': "<image> inside an answer",
        '{"image": "../a.jpg", "caption": "x"}': "'../a.jpg' leaves the images folder",
        '{"image": "a.jpg", "caption": "x \\ud83d"}': "lone surrogate",
        '{"image": "a.jpg", "captions": "x"}': "captions is 'x', expected a list",
    }
    path = write(tmp_path / "a.jsonl", "\n".join([*bad, '{"id": null, "image": "a.jpg", "caption": "Good."}']))
    found, refused = load_captions(path)
    assert [(one.id, one.text) for one in found] == [("a.jpg", "Good.")]
    assert [str(one)[:6] for one in refused] == [f"line {number}" for number in range(1, 8)]
    for one, reason in zip(refused, bad.values(), strict=True):
        assert reason in one
    (tmp_path / "c.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="c.jsonl: no caption in it.*line 1: not JSON"):
        load_captions(str(tmp_path / "c.jsonl"))
    coco = {"images": [], "annotations": [{"image_id": 7, "caption": "Sea."}]}
    with pytest.raises(InputError, match="the first of 1 refused: annotation 0: image is None"):
        load_captions(write(tmp_path / "coco.json", coco))
    with pytest.raises(InputError, match="no caption in it.*line 1"):
        load_captions(write(tmp_path / "b.jsonl", "\n".join(bad)))


def test_questions_are_drawn_by_seed_and_id_alone(tmp_path):
    captions, _ = load_captions(write(tmp_path / "a.json", [{"image": f"{n}.jpg", "caption": "x"} for n in range(300)]))
    rows = list(caption_rows(captions, seed=3))
    assert list(caption_rows(captions[::-1], seed=3)) == rows[::-1]
    assert list(caption_rows(captions, seed=4)) != rows
    asked = [row["conversations"][0]["value"] for row in rows]
    assert {text.replace("<image>", "").strip() for text in asked} == set(BRIEF_QUESTIONS)
    assert 100 < sum(text.startswith("<image>\n") for text in asked) < 200
    assert all(parse_row(row, "row").images for row in rows)


def test_captions_command(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.json", [{"image": "a.jpg", "caption": "A dog."}, {"image": "b.jpg", "caption": ""}])
    assert main(["prepare", "captions", f"--captions={path}", f"--output={tmp_path}/o.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "refused: row 1: caption 'b.jpg' is ''" in said and "1 rows of stage 1, 1 captions refused" in said
    [line] = (tmp_path / "o.jsonl").read_text().splitlines()
    assert parse_row(json.loads(line), "row").turns[1].text == "A dog."
    with monkeypatch.context() as patch:
        patch.setattr("llava_jax.cli.flags.os.access", lambda path, mode: path != str(tmp_path))
        assert main(["prepare", "captions", f"--captions={path}", f"--output={tmp_path}/new.json"]) == 2
        assert "new.json: cannot be written; choose a folder that can" in capsys.readouterr().err
    before = (tmp_path / "a.json").read_text()
    assert main(["prepare", "captions", f"--captions={path}", f"--output={path}"]) == 2
    assert "names another file of this command" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_text() == before
    assert main(["prepare", "captions", f"--captions={tmp_path}/none.json", f"--output={tmp_path}/o.json"]) == 2
    assert main(["prepare", "captions", f"--captions={tmp_path}/none.jsonl", f"--output={tmp_path}/o.json"]) == 2


# ---- concepts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("A red car parked on the road.", ["A red car", "the road"]),
        ("Two dogs are running next to a T-shirt, and 3 cats", ["Two dogs", "a T-shirt", "3 cats"]),
        ("the man's hat; a woman with her dog", ["the man's hat", "a woman", "her dog"]),
        ("3 of the 4", []),
        ("größe und Café", ["größe und Café"]),
    ],
)
def test_builtin_phrases(text, phrases):
    assert list(builtin_phrases([text])) == [phrases]


def test_phrases_are_counted_as_the_flags_say():
    assert normalise("The  Red Dog", case="lower", articles="drop") == "red dog"
    assert normalise("The Red Dog", case="keep", articles="keep") == "The Red Dog"
    assert normalise("the", case="lower", articles="drop") == ""


def generated_captions(count: int) -> list[str]:
    """Captions of one to three things, of which a few are everywhere and most are rare."""
    rng = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(4000)]
    things = rng.choices(range(4000), weights, k=3 * count)
    colours = ("red", "old", "tall")
    parts = [f"{rng.choice(('a', 'The'))} {colours[thing % 3]} thing{thing}" for thing in things]
    return [" on ".join(parts[start : start + 1 + start // 3 % 3]) for start in range(0, 3 * count, 3)]


@pytest.fixture(scope="module")
def hundred_thousand():
    """Captions; what our finder finds in each; and the phrases of each by the words themselves, without our finder."""
    texts = generated_captions(100_000)
    phrases = [set(re.findall(r"(?:red|old|tall) thing\d+", text)) for text in texts]
    return texts, list(builtin_phrases(texts)), phrases


@pytest.mark.parametrize("pooled", ["draw", "count"])
def test_concept_filter_keeps_the_rule_on_100_000_captions(pooled, hundred_thousand):
    texts, found_by_ours, phrases = hundred_thousand
    selection = select(texts, lambda given: iter(found_by_ours), Rule(pooled=pooled))
    counts = collections.Counter(phrase for found in phrases for phrase in found)
    assert {one.phrase: one.captions for one in selection.taken} == {p: n for p, n in counts.items() if n >= 3}
    assert [one.phrase for one in selection.taken] == sorted(
        (p for p, n in counts.items() if n >= 3), key=lambda p: (counts[p], p)
    )
    assert all(one.chosen == min(one.captions, 100) and one.new <= one.chosen for one in selection.taken)
    assert sum(one.new for one in selection.taken) == len(selection.kept) == len(set(selection.kept))
    kept = collections.Counter(phrase for index in selection.kept for phrase in phrases[index])
    assert all(kept[phrase] == n for phrase, n in counts.items() if 3 <= n <= 100)
    assert all(kept[phrase] >= 100 for phrase, n in counts.items() if n > 100)
    assert selection.without_phrase == 0 and len(selection.kept) < 90_000
    frequent = selection.taken[-1]
    assert frequent.captions > 10_000 and (frequent.new == 0) == (pooled == "count")


def test_concepts_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)  # as where it is not installed
    captions = [{"image": f"{n}.jpg", "caption": f"A dog on thing{n // 2}"} for n in range(8)]
    paths = [write(tmp_path / "a.json", captions), str(tmp_path / "o.json"), str(tmp_path / "p.json")]
    words = ["prepare", "concepts", *(f"--{k}={v}" for k, v in zip(("captions", "output", "json"), paths, strict=True))]
    assert main([*words, "--min_count=2", "--cap=3", "--pooled=count"]) == 0
    figures = json.loads((tmp_path / "p.json").read_text())
    assert [one["phrase"] for one in figures["taken"]] == ["thing0", "thing1", "thing2", "thing3", "dog"]
    assert figures["taken"][-1] == {"phrase": "dog", "captions": 8, "chosen": 3, "new": 0}
    assert len(json.loads((tmp_path / "o.json").read_text())) == 8 == figures["kept_captions"]
    assert main([*words, "--min_count=9"]) == 2
    assert main([*words, "--finder=spacy"]) == 2
    errors = capsys.readouterr().err
    assert "the most frequent one in 8" in errors and "spaCy" in errors


def test_phrases_of_spacy_are_its_noun_chunks(monkeypatch):
    """The face we use of spaCy, which the tests do not install: a pipeline by name, its chunks in order."""

    def document(text):
        chunks = [types.SimpleNamespace(text=chunk) for chunk in text.split(" on ")]
        return types.SimpleNamespace(noun_chunks=chunks)

    def load(model, exclude):
        if model == "none":
            raise OSError("E050")
        pipe_names = ["tagger", "parser"] if model == "en_core_web_sm" else ["tagger"]
        pipe = lambda texts, batch_size: map(document, texts)  # noqa: E731
        return types.SimpleNamespace(pipe_names=pipe_names, pipe=pipe)

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    assert list(spacy_phrases("en_core_web_sm")(["A dog on the sofa", "Rain"])) == [["A dog", "the sofa"], ["Rain"]]
    with pytest.raises(InputError, match="--spacy_model=none: spaCy has no such model: python -m spacy download none"):
        spacy_phrases("none")
    with pytest.raises(InputError, match="--spacy_model=blank: has no parser"):
        spacy_phrases("blank")


# ---- scienceqa ------------------------------------------------------------------------------------------------------

PROBLEMS = {
    "1": {
        "question": "Which is  harder?",
        "choices": ["wood", "silk"],
        "answer": 1,
        "hint": "",
        "image": None,
        "lecture": "Hard things\nscratch {soft} ones.",
        "solution": "Answer: look.",
    },
    "2": {
        "question": "What is it?",
        "choices": ["a cat", "a dog", "an owl"],
        "answer": 2,
        "hint": "Figure: a bird.",
        "image": "image.png",
        "lecture": "",
        "solution": "",
    },
}


@pytest.fixture
def problems(tmp_path):
    write(tmp_path / "problems.json", PROBLEMS)
    write(tmp_path / "pid_splits.json", {"train": ["2", "1"], "minival": ["1"], "lost": ["1", "9"]})
    return str(tmp_path)


def texts(row):
    return [turn["value"] for turn in row["conversations"]]


def test_scienceqa_formats(problems):
    def both(prompt_format):
        return [texts(row) for row in convert(problems, "train", prompt_format)]

    imaged, plain = convert(problems, "train", "QCM-LEA")
    assert [imaged["id"], imaged["image"], plain["id"]] == ["2", "2/image.png", "1"] and "image" not in plain
    # Exactly as the converter leaves them: without what is empty, two blanks made one, "Answer: " taken out everywhere.
    asked = "What is it?\nContext: Figure: a bird.\nOptions: (A) a cat (B) a dog (C) an owl\n<image>"
    assert texts(imaged) == [asked, " The answer is C."]  # three blanks, one pass
    asked = "Which is harder?\nContext: N/A\nOptions: (A) wood (B) silk"
    reply = "Hard things\nscratch {soft} ones. look. The answer is B."
    assert texts(plain) == [asked, reply]
    assert both("QCM-LEPA")[0][1] == "###\nANSWER: C."
    lepa = "LECTURE: Hard things\nscratch {soft} ones.\nSOLUTION: Answer: look.\n###\nANSWER: B."
    assert both("QCM-LEPA")[1][1] == lepa
    asked = "Context: Figure: a bird.\nQuestion: What is it?\nOptions: (A) a cat (B) a dog (C) an owl\n<image>"
    assert both("CQM-A")[0] == [asked, "The answer is C."]
    assert both("QCM-ALE")[0][1] == "The answer is C." and both("QCMLE-A")[0][0].endswith("(C) an owl\n<image>")
    # The converter's AL gives the solution, its AE the lecture.
    assert both("QCM-AL")[1][1] == "The answer is B. BECAUSE: look."
    assert both("QCM-AE")[1][1] == "The answer is B. BECAUSE: Hard things\nscratch {soft} ones."
    escaped = convert(problems, "minival", "QCM-LA", newlines="escape")
    assert texts(escaped[0])[1] == "Hard things\\nscratch {soft} ones. The answer is B."
    for given in INPUTS:
        for asked in OUTPUTS:
            assert all(parse_row(row, "row") for row in convert(problems, "train", f"{given}-{asked}"))


def test_scienceqa_equals_the_rule_written_anew(problems, monkeypatch, capsys):
    assert show_scienceqa.show(problems, "train") == 0
    assert "QCM-LEPA: 2 rows, 0 different" in capsys.readouterr().out
    monkeypatch.setattr(show_scienceqa, "expected", lambda problem, _: [problem["question"], "The answer is C."])
    assert show_scienceqa.show(problems, "train") == 6


def test_scienceqa_subsets_and_what_is_refused(problems, tmp_path, capsys):
    assert [row["id"] for row in convert(problems, "train", "QCM-A", subset="image")] == ["2"]
    assert [row["id"] for row in convert(problems, "train", "QCM-A", subset="text")] == ["1"]
    words = ["prepare", "scienceqa", f"--source={problems}", f"--output={tmp_path}/o.json"]
    assert main([*words, "--split=train"]) == 0
    assert [row["id"] for row in json.loads((tmp_path / "o.json").read_text())] == ["2", "1"]
    for flags, reason in (
        (["--split=minval"], "did you mean minival?"),
        (["--split=lost"], "1 ids of split lost are not in problems.json, the first '9'"),
        (["--split=train", "--format=QCM"], "expected INPUT-OUTPUT"),
        (["--split=minival", "--subset=image"], "no problem of subset image"),
    ):
        assert main([*words, *flags]) == 2
        assert reason in capsys.readouterr().err
    write(tmp_path / "pid_splits.json", {"train": "1"})
    with pytest.raises(InputError, match="pid_splits.json: train is '1', expected a list of ids"):
        convert(problems, "train", "QCM-A")
    write(tmp_path / "pid_splits.json", {"train": ["1"]})
    write(tmp_path / "problems.json", {"1": PROBLEMS["1"] | {"answer": 2}, "2": PROBLEMS["2"]})
    with pytest.raises(InputError, match="problem '1': answer is 2, expected the index of one of 2"):
        convert(problems, "train", "QCM-A")


# ---- arrayrecord ----------------------------------------------------------------------------------------------------


def test_arrayrecord_refuses_names_and_shards_that_tfds_would_fail_at(tmp_path, capsys):
    said = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    path = write(tmp_path / "a.json", [{"id": "1", "conversations": said}])
    words = ["prepare", "arrayrecord", f"--annotations={path}", f"--output={tmp_path}/o"]
    for flag, reason in (("--split=all", "--split=all: expected a name"), ("--shards=2", "more than the 1 rows")):
        assert main([*words, flag]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "o").exists()
