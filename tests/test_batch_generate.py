"""Questions to answers: fields, order, resuming, and every line that cannot be asked."""

import io
import json

import pytest

from llava_jax import api
from llava_jax.data.images import load_tiles
from llava_jax.infer import batch_generate
from llava_jax.infer.batch_generate import answer_file
from llava_jax.infer.engine import Engine
from llava_jax.types import InputError, Sampling
from tests.tiny_llava import draw_image, model

SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model(str(tmp_path_factory.getbasetemp()))


@pytest.fixture
def asked(tmp_path):
    """A folder with seven questions of several lengths, one without an image, two under one id."""
    for index in range(3):
        draw_image(index).save(tmp_path / f"{index}.png")
    rows = [
        dict(question_id=0, image="0.png", text="What is this?"),
        dict(question_id="b", text="Who are you?"),
        dict(question_id=2, image="1.png", text="Tell me more. " * 8),
        dict(question_id=3, image="2.png", text="What is this?"),
        dict(question_id=3, image="2.png", text="Is it red?", category="conv"),
        dict(question_id=5, image="0.png", text="What is this?"),
        dict(question_id=6, image="1.png", text="<image>\nWhere is it?"),
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(model, folder, name="a.jsonl", sampling=SAMPLING, batch_size=2):
    progress = io.StringIO()
    count = answer_file(
        model,
        str(folder / "q.jsonl"),
        str(folder),
        str(folder / name),
        sampling,
        batch_size=batch_size,
        progress=progress,
    )
    return count, progress.getvalue()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_carry_the_fields_and_equal_single_ones(tiny, asked):
    count, progress = run(tiny, asked)
    rows, questions = lines(asked / "a.jsonl"), lines(asked / "q.jsonl")
    assert count == 7 and "answered 7/7" in progress
    assert [row["question_id"] for row in rows] == [0, "b", 2, 3, 3, 5, 6]
    assert [row["prompt"] for row in rows] == [row["text"] for row in questions]
    for row, question in zip(rows, questions, strict=True):
        assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata", "image_sha256"]
        image = str(asked / question["image"]) if "image" in question else None
        assert row["text"] == tiny.generate(question["text"], image, max_new_tokens=6)[0]
        assert row["model_id"] == "tiny" and row["metadata"]["template"] == "v1"
        assert row["metadata"]["max_new_tokens"] == 6
    assert len({row["answer_id"] for row in rows}) == 7


def test_a_half_written_file_is_resumed(tiny, asked, monkeypatch):
    run(tiny, asked)
    whole = (asked / "a.jsonl").read_bytes()
    kept = whole.split(b"\n")[:3]
    (asked / "half.jsonl").write_bytes(b"\n".join(kept) + b"\n" + whole.split(b"\n")[3][:20])
    count, progress = run(tiny, asked, "half.jsonl")
    assert count == 4 and "3 answered already" in progress
    assert (asked / "half.jsonl").read_bytes() == whole
    count, progress = run(tiny, asked, "half.jsonl")
    assert count == 0 and (asked / "half.jsonl").read_bytes() == whole


def test_what_is_answered_is_on_disk_before_the_next_one_is_asked(tiny, asked):
    class Killed(Exception):
        pass

    class Dying:
        def __getattr__(self, name):
            return getattr(tiny, name)

        def engine(self, slots):
            return Engine(tiny, slots=slots)  # not the one with more slots that another test may have left

        def prompt(self, messages, pixels):
            if lines(asked / "a.jsonl"):
                raise Killed
            return tiny.prompt(messages, pixels)

    with pytest.raises(Killed):
        run(Dying(), asked)
    kept = len(lines(asked / "a.jsonl"))
    count, progress = run(tiny, asked)
    run(tiny, asked, "straight.jsonl")
    assert count == 7 - kept < 7 and f"{kept} answered already" in progress
    assert (asked / "a.jsonl").read_bytes() == (asked / "straight.jsonl").read_bytes()


def test_an_image_is_read_once_for_questions_that_follow_each_other(tiny, asked, monkeypatch):
    rows = [dict(question_id=n, image=f"{name}.png", text=f"What is {n}?") for n, name in enumerate("0110")]
    (asked / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = []
    monkeypatch.setattr(api, "load_tiles", lambda path, *how: read.append(path[-5:]) or load_tiles(path, *how))
    run(tiny, asked)
    assert read == ["0.png", "1.png", "0.png"]
    for row, asked_ in zip(lines(asked / "a.jsonl"), rows, strict=True):
        assert row["text"] == tiny.generate(asked_["text"], str(asked / asked_["image"]), max_new_tokens=6)[0]


def test_an_answer_belongs_to_what_its_image_held(tiny, asked):
    run(tiny, asked)
    draw_image(3).save(asked / "1.png")
    before = (asked / "a.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"a.jsonl line 3: the image of question 2 is not the one that was answered"):
        run(tiny, asked)
    assert (asked / "a.jsonl").read_bytes() == before
    older = [{key: value for key, value in row.items() if key != "image_sha256"} for row in lines(asked / "a.jsonl")]
    (asked / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older[:5]))
    count, progress = run(tiny, asked)
    assert count == 2 and "5 answers of" in progress and "do not say which image" in progress
    assert lines(asked / "a.jsonl")[4:] != older[4:] and lines(asked / "a.jsonl")[:5] == older[:5]


def test_two_processes_do_not_answer_into_one_file(tiny, asked):
    with batch_generate.held_answers(str(asked / "a.jsonl")):
        with pytest.raises(InputError, match="a.jsonl: another process is writing to it"):
            run(tiny, asked)
    assert run(tiny, asked)[0] == 7


def test_an_answers_file_of_something_else_is_left_alone(tiny, asked):
    run(tiny, asked)
    whole = (asked / "a.jsonl").read_bytes()
    with pytest.raises(InputError, match="a.jsonl line 1: answered by .* name another answers file"):
        run(tiny, asked, sampling=Sampling(max_new_tokens=7))
    (asked / "q.jsonl").write_text(json.dumps(dict(question_id=0, image="0.png", text="What is this?")) + "\n")
    with pytest.raises(InputError, match='line 2: question "b" is not in the questions file'):
        run(tiny, asked)
    assert (asked / "a.jsonl").read_bytes() == whole
    questions = (asked / "q.jsonl").read_bytes()
    with pytest.raises(InputError, match="q.jsonl line 1: not an answer"):
        run(tiny, asked, "q.jsonl")
    assert (asked / "q.jsonl").read_bytes() == questions


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"text": "x"}', "line 2: no field question_id;"),
        ("{}", "line 2: no field question_id and text"),
        ('{"question_id": 1, "text": ""}', 'line 2: text is ""'),
        ('{"question_id": 1, "text": 3}', "line 2: text is 3"),
        ('{"question_id": 1, "text": "x", "image": 3}', "line 2: image is a number"),
        ('{"question_id": 1, "text": "x", "image": "no.png"}', "line 2: no image .*no.png"),
        ('{"question_id": 1, "text": "x", "image": "q.jsonl"}', "line 2: image .*q.jsonl: not an image"),
        ('{"question_id": 1, "text": "<image> x"}', "line 2: .*1 <image> in the text for 0 images"),
        ('{"question_id": 1, "text": "' + "long " * 200 + '"}', "line 2: prompt of .* tokens"),
    ],
)
def test_bad_questions_are_named(tiny, asked, line, message):
    good = json.dumps(dict(question_id=0, image="0.png", text="What is this?"))
    (asked / "q.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match="q.jsonl " + message):
        run(tiny, asked)


def test_no_answer_is_written_before_the_last_question_was_looked_at(tiny, asked):
    rows = [dict(question_id=n, text="What is this?" if n < 9 else "long " * 200) for n in range(10)]
    (asked / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="q.jsonl line 10: prompt of .* tokens"):
        run(tiny, asked, batch_size=1)
    assert not lines(asked / "a.jsonl")


def test_questions_may_begin_with_a_byte_order_mark(asked):
    before = batch_generate.read_questions(str(asked / "q.jsonl"), str(asked))
    (asked / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + (asked / "q.jsonl").read_bytes())
    assert batch_generate.read_questions(str(asked / "q.jsonl"), str(asked)) == before


def test_no_questions(asked):
    with pytest.raises(InputError, match="no such file"):
        batch_generate.read_questions(str(asked / "none.jsonl"), str(asked))
    (asked / "q.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no rows"):
        batch_generate.read_questions(str(asked / "q.jsonl"), str(asked))
