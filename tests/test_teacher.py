"""The teacher behind an endpoint: requests as published, faults survived, nothing paid twice, answers judged."""

import email.utils
import json
import pathlib
import re
import threading
import time

import pytest

from llava_jax import io
from llava_jax.cli.main import main
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.data.validate import verify
from llava_jax.synthesize import batch, endpoint
from llava_jax.synthesize.budget import Budget, BudgetSpent, Prices
from llava_jax.synthesize.context import open_contexts
from llava_jax.synthesize.journal import Journal
from llava_jax.synthesize.kinds import KINDS
from llava_jax.synthesize.teacher import Reply, RequestFailed, read_completion
from llava_jax.synthesize.write import open_job, synthesize
from llava_jax.types import UNPACKED, DataSettings, InputError
from tests import show_synthesize
from tests.teacher_server import Faults, TeacherServer, completion, good_answer

FOLDERS = {"conversation": "conversation", "detail": "detail_description", "reasoning": "complex_reasoning"}
MESSAGES = [{"role": "system", "content": "Look."}, {"role": "user", "content": "Street number 7 in the rain."}]


@pytest.fixture(autouse=True)
def no_waiting_and_no_key(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def contexts(tmp_path):
    show_synthesize.write_contexts(tmp_path / "contexts.jsonl", 12)
    return str(tmp_path / "contexts.jsonl")


def command(contexts, output, *words):
    return main(["synthesize", f"--contexts={contexts}", f"--output={output}", *words])


def asked_of(server, contexts, output, *words):
    return command(contexts, output, f"--endpoint={server.url}", "--teacher=served", *words)


def rows_of(path):
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def lines_of(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


# ---- killed -------------------------------------------------------------------------------------------------------


def test_killed_and_refused_it_ends_complete_and_asks_nothing_twice(tmp_path):
    rates = Faults(delay=0.02, busy=0.06, broken=0.04, cut=0.04, garbage=0.04, wrong=0.1, retry_after=0.3)
    figures = show_synthesize.faults(tmp_path, contexts=40, kills=3, rates=rates)
    assert figures["rows"] == 120 and not figures["journal has the key"]
    for fate in ("busy", "broken", "cut", "garbage", "wrong"):
        assert figures[f"requests met: {fate}"] > 0


def test_half_a_line_is_cut_off_wherever_it_was_torn(tmp_path):
    path = tmp_path / "a.journal.jsonl"
    with Journal(str(path)) as journal:
        for number in range(3):
            journal.append(
                f"key{number}", str(number), "detail", "served", Reply(f"ein Hügel {number}\n", "stop", 3, 4)
            )
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for torn in (second, second + 1, *range(second + 2, len(whole), 25), len(whole) - 1):
        path.write_bytes(whole[:torn])
        with Journal(str(path)) as journal:
            assert len(journal) == 2 and journal.replies("key2") == []
            assert journal.replies("key1") == [Reply("ein Hügel 1\n", "stop", 3, 4)]
            assert (journal.tokens_in, journal.tokens_out) == (6, 8)
            journal.append("key2", "2", "detail", "served", Reply("again"))
            assert journal.replies("key2") == [Reply("again")]
        assert [line["id"] for line in lines_of(path)] == ["0", "1", "2"]
    # What is no answer of ours stays as it is, half a line too.
    for other in (whole.replace(b'"key"', b'"kex"', 1), b"a letter", b'{"id": 1'):
        path.write_bytes(other)
        with pytest.raises(InputError, match="line 1: no saved answer"):
            Journal(str(path))
        assert path.read_bytes() == other


def test_two_processes_cannot_write_one_journal(tmp_path):
    with Journal(str(tmp_path / "j")), pytest.raises(InputError, match="another process"):
        Journal(str(tmp_path / "j"))


# ---- the endpoint -------------------------------------------------------------------------------------------------


def teacher_of(server, key="sk-very-secret", **settings):
    return endpoint.EndpointTeacher(server.url, key, {"model": "served", **settings}, threading.Event())


def test_a_request_is_the_settings_and_the_messages():
    with TeacherServer(Faults()) as server:
        reply = teacher_of(server, max_tokens=9, temperature=0.5).answer(MESSAGES)
    assert reply == Reply(good_answer("", MESSAGES[1]["content"]), "stop", 8, reply.tokens_out)
    (seen,) = server.seen
    assert seen.body == {"model": "served", "messages": MESSAGES, "max_tokens": 9, "temperature": 0.5}
    assert seen.headers["authorization"] == "Bearer sk-very-secret"


@pytest.mark.parametrize("fault", ["busy", "broken", "cut", "garbage"])
def test_what_never_passes_is_given_up_after_all_tries(fault, monkeypatch):
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.01)
    with TeacherServer(Faults(**{fault: 1.0}, retry_after=0.01)) as server:
        teacher = teacher_of(server)
        # The endpoint is known to be one: neither a cut connection nor nonsense is a wrong address.
        teacher._reached = teacher._answered = True
        with pytest.raises(RequestFailed, match=f"no answer after {endpoint.TRIES} tries"):
            teacher.answer(MESSAGES)
    assert len(server.seen) == endpoint.TRIES


@pytest.mark.parametrize(
    "status, body, kind, says",
    [
        (401, {"error": {"message": "no key sk-very-secret"}}, InputError, r"status 401: .*no key \*\*\*; put the key"),
        (404, {"error": {"message": "no model"}}, InputError, "status 404: .*no model; expected an address"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, InputError, "quota is spent: .*pay; "),
        (400, {"error": {"message": "too long"}}, RequestFailed, "status 400: .*too long"),
    ],
)
def test_what_another_try_does_not_change(status, body, kind, says):
    with TeacherServer(Faults()) as server:
        server.refuse = (status, body)
        with pytest.raises(kind, match=says) as error:
            teacher_of(server).answer(MESSAGES)
    assert len(server.seen) == 1 and "secret" not in str(error.value)


def test_an_address_where_nobody_is():
    with TeacherServer(Faults()) as server:
        pass
    with pytest.raises(InputError, match="cannot be reached"):
        teacher_of(server).answer(MESSAGES)


def test_an_address_where_no_endpoint_is(monkeypatch):
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.01)
    with TeacherServer(Faults(garbage=1.0)) as server:
        with pytest.raises(InputError, match="no chat completion .*; expected an address that ends in /v1"):
            teacher_of(server).answer(MESSAGES)
    assert len(server.seen) == endpoint.TRIES_UNREACHED
    # Nonsense among other faults is one of them.
    with TeacherServer(Faults(busy=0.5, garbage=0.5, retry_after=0.01), seed=1) as server:
        with pytest.raises(RequestFailed, match="no answer after"):
            teacher_of(server).answer(MESSAGES)
    fates = [seen.fate for seen in server.seen]
    assert fates[:4] != ["garbage"] * 4 and fates.count("garbage") > 4


def test_retry_after_is_a_number_or_a_date():
    assert endpoint.retry_after({"retry-after": "1.5"}) == 1.5
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < endpoint.retry_after({"retry-after": date}) <= 30
    assert endpoint.retry_after({"retry-after": email.utils.formatdate(0)}) == 0
    assert endpoint.retry_after({}) is endpoint.retry_after({"retry-after": "soon"}) is None


@pytest.mark.parametrize("body", [[], {}, {"choices": []}, {"choices": [{"message": {"content": [1]}}]}, "text", None])
def test_no_chat_completion(body):
    with pytest.raises(ValueError, match="choices"):
        read_completion(body)


def test_why_an_answer_ended():
    assert read_completion(json.loads(completion("x", finish="length"))).finish == "length"
    refused = {"choices": [{"message": {"content": None, "refusal": "I cannot"}, "finish_reason": "stop"}]}
    assert read_completion(refused) == Reply("I cannot", "refusal")


def test_an_endpoint_that_refuses_everything_ends_the_run(tmp_path, capsys):
    show_synthesize.write_contexts(tmp_path / "c.jsonl", 40)
    with TeacherServer(Faults()) as server:
        server.refuse = (422, {"error": {"message": "no such field"}})
        assert asked_of(server, tmp_path / "c.jsonl", tmp_path / "o.json", "--kind=detail") == 2
        assert "20 requests in a row failed: refused with status 422" in capsys.readouterr().err
        assert len(server.seen) < 40
        server.refuse = (401, {"error": {"message": "no key"}})
        assert asked_of(server, tmp_path / "c.jsonl", tmp_path / "o.json", "--kind=detail", "--limit=3") == 2
        assert "no key" in capsys.readouterr().err
        server.refuse = None
        assert asked_of(server, tmp_path / "c.jsonl", tmp_path / "o.json", "--kind=detail") == 0
    assert len(rows_of(tmp_path / "o.json")) == 40


def test_answers_before_an_error_are_kept(tmp_path, contexts):
    class Ends(Recorded):
        def answer(self, messages):
            if not self.answers:
                raise InputError("the quota is spent")
            return super().answer(messages)

    path = str(tmp_path / "j.jsonl")
    with Journal(path) as journal, pytest.raises(InputError, match="quota"):
        job = open_job(contexts, "detail")
        synthesize(job, str(tmp_path / "o.json"), Ends([TELL[0]] * 5), journal, say=lambda line: None)
    assert len(lines_of(path)) == 5 and not (tmp_path / "o.json").exists()
    with Journal(path) as journal:
        assert synthesize(job, str(tmp_path / "o.json"), Recorded([TELL[0]] * 7), journal).rows == 12


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_the_budget_is_not_passed_and_the_rest_comes_later(tmp_path, contexts, capsys):
    words = ("--kind=detail", '--request={"max_tokens": 50}', "--price=2,10")
    with TeacherServer(Faults(delay=0.01)) as server:
        assert asked_of(server, contexts, tmp_path / "o.json", *words, "--budget_tokens=3000") == 1
        said = capsys.readouterr().out
        assert "may pass the budget of 3000 tokens" in said and "not complete" in said
        paid = lines_of(tmp_path / "o.journal.jsonl")
        assert 0 < len(paid) == len(rows_of(tmp_path / "o.json")) < 12
        assert sum(line["tokens_in"] + line["tokens_out"] for line in paid) <= 3000
        # What was paid counts the next time, too.
        assert asked_of(server, contexts, tmp_path / "o.json", *words, "--budget_tokens=3000") == 1
        assert len(server.seen) == len(paid)
        assert asked_of(server, contexts, tmp_path / "o.json", *words, "--budget_usd=1") == 0
        assert len(server.seen) == 12 == len(rows_of(tmp_path / "o.json"))


def test_a_budget_counts_what_is_under_way():
    budget = Budget(0, 1.0, Prices(0.0, 1e6 / 100), tokens_in=0, tokens_out=10)
    first = budget.reserve(MESSAGES, {"max_tokens": 60})
    waiting = threading.Thread(target=budget.reserve, args=(MESSAGES, {"max_tokens": 60}))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()  # 10 + 60 + 60 cents would pass the dollar; what the first one costs is not known yet
    budget.settle(first, 5, 20)
    waiting.join(5)
    assert not waiting.is_alive() and budget.money == pytest.approx(0.30)
    with pytest.raises(BudgetSpent, match="1 USD"):
        Budget(0, 1.0, Prices(0.0, 1e4), 0, 50).reserve(MESSAGES, {"max_tokens": 60})


def test_a_dry_run_shows_requests_and_cost_and_asks_nothing(tmp_path, contexts, capsys):
    words = ("--dry_run", "--limit=2", "--price=1000,1000")
    assert command(contexts, tmp_path / "o.json", "--kind=all", "--teacher=m", *words) == 0
    said = capsys.readouterr().out
    assert "6 requests to send, 0 images need none" in said and "USD, at most" in said
    for number in range(2):
        assert said.count(f"[user]\nStreet number {number} in the rain.\n") == 3
    assert "Street number 2" not in said and [path.name for path in tmp_path.iterdir()] == ["contexts.jsonl"]


# ---- batch mode -----------------------------------------------------------------------------------------------------


def test_batch_input_and_output_give_the_rows_of_asking(tmp_path, contexts, capsys):
    words = ("--kind=all", "--teacher=served")
    with TeacherServer(Faults(delay=0.02)) as server:
        assert asked_of(server, contexts, tmp_path / "asked.json", *words, "--concurrency=3") == 0
    assert 1 < server.most_at_once <= 3
    assert command(contexts, tmp_path / "o.json", *words, f"--batch_input={tmp_path / 'in.jsonl'}") == 0
    requests = lines_of(tmp_path / "in.jsonl")
    bodies = {json.dumps(seen.body, sort_keys=True) for seen in server.seen}
    assert {json.dumps(line["body"], sort_keys=True) for line in requests} == bodies and len(bodies) == 36
    assert {(line["method"], line["url"]) for line in requests} == {("POST", "/v1/chat/completions")}
    answers = []
    for number, line in enumerate(reversed(requests)):
        messages = line["body"]["messages"]
        kind = next(seen.about[0] for seen in server.seen if seen.body["messages"] == messages)
        body = json.loads(completion(good_answer(kind, messages[-1]["content"])))
        response = {"status_code": 200 if number else 500, "body": body}
        answers.append({"custom_id": line["custom_id"], "response": response, "error": None})
    answers[1] |= {"response": None, "error": {"code": "batch_expired", "message": "late"}}
    answers.append({"custom_id": "of another file", "response": answers[2]["response"]})
    output = tmp_path / "out.jsonl"
    output.write_text("".join(json.dumps(line) + "\n" for line in answers), encoding="utf-8")
    assert command(contexts, tmp_path / "o.json", *words, f"--batch_output={output}") == 1
    said = capsys.readouterr().out
    assert "34 answers joined, 0 of them known before, 1 lines of other requests, 2 failed (1 status 500" in said
    assert "34 rows" in said and "2 not answered (1 status 500, 1 batch_expired)" in said
    assert command(contexts, tmp_path / "o.json", *words, f"--batch_output={output}") == 1
    assert "34 of them known before" in capsys.readouterr().out
    assert command(contexts, tmp_path / "o.json", *words, f"--batch_input={tmp_path / 'in2.jsonl'}") == 0
    assert [line["custom_id"] for line in lines_of(tmp_path / "in2.jsonl")] == [
        line["custom_id"] for line in requests[-2:]
    ]
    for line, (kind, text) in zip(answers[:2], [("reasoning", 11), ("reasoning", 10)], strict=True):
        body = json.loads(completion(good_answer(kind, f"Street number {text} in the rain.")))
        line |= {"response": {"status_code": 200, "body": body}}
    output.write_text("".join(json.dumps(line) + "\n" for line in answers[:2]), encoding="utf-8")
    assert command(contexts, tmp_path / "o.json", *words, f"--batch_output={output}") == 0
    assert rows_of(tmp_path / "o.json") == rows_of(tmp_path / "asked.json")
    output.write_text('{"custom_id": 1\n', encoding="utf-8")
    assert command(contexts, tmp_path / "o.json", *words, f"--batch_output={output}") == 2


def test_a_batch_joins_what_it_can_and_counts_the_same_words_again(tmp_path, contexts, capsys):
    words = ("--kind=detail", "--teacher=m", "--limit=2", "--attempts=2")
    output = tmp_path / "out.jsonl"

    def round_trip(name, *texts):
        """What is said when the open requests are answered with these texts; None is a body that is no completion."""
        assert command(contexts, tmp_path / "o.jsonl", *words, f"--batch_input={tmp_path / name}") == 0
        bodies = [[] if text is None else json.loads(completion(text)) for text in texts]
        lines = [
            {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}}
            for line, body in zip(lines_of(tmp_path / name), bodies, strict=True)
        ]
        output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        code = command(contexts, tmp_path / "o.jsonl", *words, f"--batch_output={output},{output}")
        return code, capsys.readouterr()

    code, said = round_trip("1.jsonl", None, "")
    assert code == 2 and "2 answers joined, 1 of them known before, 0 lines of other requests, 2 failed" in said.out
    assert "no answer that can be used yet (2 no chat completion)" in said.err
    code, said = round_trip("2.jsonl", "Rain.", "")
    assert code == 0 and "1 rows, 2 turns, 1 rejected (1 empty reply)" in said.out
    assert f"set aside: {tmp_path}/o.rejected.jsonl" in said.out
    assert command(contexts, tmp_path / "o.jsonl", *words, "--teacher=n", f"--batch_output={output}") == 2
    assert "answers no request of this command; give --contexts" in capsys.readouterr().err
    # A name that ends in .jsonl is written as lines.
    assert [line["id"] for line in lines_of(tmp_path / "o.jsonl")] == ["000000"]


def test_a_batch_keeps_the_budget_and_writes_nothing_over(tmp_path, contexts, capsys):
    words = ("--kind=detail", "--teacher=m", '--request={"max_tokens": 50}', f"--batch_input={tmp_path / 'in.jsonl'}")
    assert command(contexts, tmp_path / "o.json", *words, "--budget_tokens=50") == 2
    assert "no request written: the next answer may pass the budget of 50 tokens" in capsys.readouterr().err
    assert command(contexts, tmp_path / "o.json", *words, "--budget_tokens=4000") == 0
    said = capsys.readouterr().out
    assert "12 requests to send" in said and "not all of them: the next answer may pass the budget" in said
    lines = lines_of(tmp_path / "in.jsonl")
    assert 0 < len(lines) < 12 and len(lines) * 50 < 4000
    before = (tmp_path / "in.jsonl").read_bytes()
    assert command(contexts, tmp_path / "o.json", *words) == 2
    assert "in.jsonl: is there already" in capsys.readouterr().err
    assert (tmp_path / "in.jsonl").read_bytes() == before
    for flags in ([f"--output={contexts}"], [f"--batch_input={contexts}"]):
        assert command(contexts, tmp_path / "o.json", *words, *flags) == 2
        assert "names another file of this command" in capsys.readouterr().err
    assert len(lines_of(contexts)) == 12


def test_more_requests_than_a_batch_takes_go_into_further_files(tmp_path, contexts, monkeypatch, capsys):
    monkeypatch.setattr(batch, "MAX_REQUESTS", 5)
    path = tmp_path / "in.jsonl"
    assert command(contexts, tmp_path / "o.json", "--kind=detail", "--teacher=m", f"--batch_input={path}") == 0
    assert "12 requests" in capsys.readouterr().out
    files = [path, tmp_path / "in-2.jsonl", tmp_path / "in-3.jsonl"]
    assert [len(lines_of(file)) for file in files] == [5, 5, 2]
    numbers = [line["body"]["messages"][-1]["content"].split()[2] for file in files for line in lines_of(file)]
    assert numbers == [str(number) for number in range(12)]


# ---- requests as published ------------------------------------------------------------------------------------------


def reference(folder, path, kind):
    """The requests by the rule alone: system, worked examples, query; read with nothing of ours."""
    folder = pathlib.Path(folder) / FOLDERS[kind]

    def text(name):
        return (folder / name).read_bytes().decode()

    examples = []
    for name in sorted(file.name for file in folder.glob("*_caps.txt")):
        examples.append({"role": "user", "content": text(name)})
        examples.append({"role": "assistant", "content": text(name.replace("caps", "conv"))})
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        query = list(row["captions"])
        if kind != "conversation" and row["instances"]:
            query += ["", *(f"{thing['category']}: {thing['bbox']}" for thing in row["instances"])]
        system = {"role": "system", "content": text("system_message.txt")}
        yield [system, *examples, {"role": "user", "content": "\n".join(query)}]


def requests_equal(folder, contexts, tmp_path):
    """How many requests of the batch file are those of the rule, byte for byte; AssertionError at the first other."""
    count = 0
    for kind in KINDS:
        written = tmp_path / f"{kind}.jsonl"
        words = (f"--kind={kind}", "--teacher=gpt-4", f"--prompts={folder}", f"--batch_input={written}")
        assert command(contexts, tmp_path / f"{kind}.json", *words) == 0
        sent = [json.dumps(line["body"]["messages"]).encode() for line in lines_of(written)]
        ruled = [json.dumps(messages).encode() for messages in reference(folder, contexts, kind)]
        assert sent == ruled
        count += len(sent)
    return count


def test_requests_of_a_published_folder_are_its_bytes(tmp_path):
    for kind, name in FOLDERS.items():
        (tmp_path / "seeds" / name).mkdir(parents=True)
        (tmp_path / "seeds" / name / "system_message.txt").write_bytes(b"  Look at it.\n\nThen\tspeak. ")
        for number in (1, 0, 10):
            for end in ("caps", "conv"):
                text = f"{kind} {number} {end}\r\nwith “marks”  \n\n é"
                (tmp_path / "seeds" / name / f"{number:03d}_{end}.txt").write_bytes(text.encode())
    things = [{"category": "potted plant", "bbox": [0.0, 0.1 + 0.2, 0.5, 1.0]}]
    things[0]["bbox"][1] = 0.3
    rows = [
        {"id": f"{n}", "image": f"{n}.jpg", "captions": [f"Straße {n}.", "two"], "instances": things * (n % 3)}
        for n in range(80)
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert requests_equal(tmp_path / "seeds", path, tmp_path) == 240


# ---- answers judged -------------------------------------------------------------------------------------------------

EXCHANGE = "Question:\nWhy do they wait?\n===\nAnswer:\nThe light is red."
# (answer, how it ended, why it cannot be used: "" where it can), for each kind.
TALK = (
    (EXCHANGE, "stop", ""),
    (f"{EXCHANGE}\n===\nQuestion:\nWhere?\n===\nAnswer:\nAt the corner.\n\nIt is wet.", "stop", ""),
    (f"\n {EXCHANGE}\n", "stop", ""),
    ("Question: How many?\n===\nAnswer: 2, at 0.5 m from each other (see [1]).", "stop", ""),
    (EXCHANGE.replace("\n", "\r\n"), "stop", ""),
    ("Question:\nWhat does the caption under the photo read?\n===\nAnswer:\nIt reads “rain”.", "stop", ""),
    (f"<think>\nCaptions say:\n===\n</think>\n\n{EXCHANGE}", "stop", ""),
    ("", "stop", "empty reply"),
    ("They wait.", "stop", "text outside a Question or Answer block"),
    (f"Here it is:\n{EXCHANGE}", "stop", "text outside a Question or Answer block"),
    (f"{EXCHANGE}\n===\nQuestion:\nWhere?", "stop", "question without an answer"),
    ("Question:\nWhy?\n===\nQuestion:\nWhere?\n===\nAnswer:\nThere.", "stop", "question without an answer"),
    ("Answer:\nThere.\n===\nQuestion:\nWhere?", "stop", "answer without a question"),
    ("Question:\nWhy?\nAnswer:\nSo.", "stop", "no === between two blocks"),
    ("Question:\nWhy?\n===\nAnswer:\n", "stop", "empty answer"),
    (f"{EXCHANGE}\n===\n", "stop", "empty block"),
    ("Question:\nWhat is in <image>?\n===\nAnswer:\nRain.", "stop", "the placeholder <image> in the text"),
    (EXCHANGE.replace("The light", "The light at [0.1, 0.25, 0.3, 0.4]"), "stop", "box coordinates in the text"),
    (EXCHANGE.replace("The light", "The light (0.1, 0.25)"), "stop", "box coordinates in the text"),
    (EXCHANGE.replace("The light is red", "The caption says so"), "stop", "speaks of captions or boxes"),
    (EXCHANGE.replace("The light", "According to the captions, the light"), "stop", "speaks of captions or boxes"),
    (EXCHANGE.replace("red", "red by its bounding box"), "stop", "speaks of captions or boxes"),
    (EXCHANGE.replace("Why", "Based on the provided information, why"), "stop", "speaks of captions or boxes"),
    (EXCHANGE.replace("The light", "In one of the captions the light"), "stop", "speaks of captions or boxes"),
    (EXCHANGE, "length", "cut off at the limit of tokens"),
    (EXCHANGE, "content_filter", "held back by a filter"),
    ("I cannot help with that.", "refusal", "refused"),
    (EXCHANGE + " \ud83d", "stop", "half a character in the text"),
)
TELL = (
    ("Two people wait at a corner. It rains.\n\nA car passes, 1.5 m (5 feet) away.", "stop", ""),
    (" A sign with a caption in Spanish hangs over the door. ", "stop", ""),
    ("One of the captions on the poster is in Spanish, in the boxes lie apples.", "stop", ""),
    ("Rain is seen.</think>It rains.", "stop", ""),
    ("<think>It rains, as I see", "stop", "thoughts without an end"),
    ("The sentences do not agree on the rain.", "stop", "speaks of captions or boxes"),
    ("", "stop", "empty reply"),
    (EXCHANGE, "stop", "blocks where a description was asked for"),
    ("A car at 0.12, 0.3, 0.45, 0.5 passes.", "stop", "box coordinates in the text"),
    ("A car [0.12, 0.3, 0.45, 1.0] passes.", "stop", "box coordinates in the text"),
    ("As mentioned in the second sentence, it rains.", "stop", "speaks of captions or boxes"),
    ("The image <image> shows rain.", "stop", "the placeholder <image> in the text"),
    ("Two people wait at", "length", "cut off at the limit of tokens"),
)
RECORDED = {
    "conversation": TALK,
    "detail": TELL,
    # A reasoning answer is one exchange.
    "reasoning": tuple(
        (text, end, "more than one question" if not why and text.count("Question:") > 1 else why)
        for text, end, why in TALK
    ),
}


class Recorded:
    """Answers with a list, in its order."""

    name, settings = "recorded", {"model": "recorded"}

    def __init__(self, answers):
        self.answers = list(answers)

    def answer(self, messages):
        text, finish, _ = self.answers.pop(0)
        return Reply(text, finish, 10, 5)


def verdicts_hold(contexts, tmp_path):
    """How many rows are accepted and rejected, all as RECORDED says; AssertionError where one is not."""
    counts = {"accepted": 0, "rejected": 0}
    images = list(open_contexts(str(contexts)))
    for kind, recorded in RECORDED.items():
        given = [recorded[number % len(recorded)] for number in range(len(images))]
        output = tmp_path / f"{kind}.json"
        with Journal(None) as journal:
            job = open_job(str(contexts), kind, attempts=1)
            written = synthesize(job, str(output), Recorded(given), journal)
        expected = [(picture.id, why) for picture, (_, _, why) in zip(images, given, strict=True)]
        assert [row["id"] for row in rows_of(output)] == [name for name, why in expected if not why]
        aside = lines_of(tmp_path / f"{kind}.rejected.jsonl")
        assert [(line["id"], line["reason"]) for line in aside] == [pair for pair in expected if pair[1]]
        raw = [text for text, _, why in given if why]
        assert [line["replies"][0]["text"] for line in aside] == raw
        assert (written.rows, sum(written.rejected.values())) == (len(images) - len(raw), len(raw))
        counts["accepted"] += written.rows
        counts["rejected"] += len(raw)
    return counts


def real(data, tmp_path):
    """Both shows on the published prompts and images in `data`; the figures, or AssertionError."""
    (path,) = data.glob("*.jsonl")
    requests = requests_equal(data / "few_shot", path, tmp_path)
    return {"requests equal to the rule": requests, **verdicts_hold(path, tmp_path)}


def test_recorded_answers_are_judged_as_the_table_says(tmp_path):
    show_synthesize.write_contexts(tmp_path / "c.jsonl", 80)
    counts = verdicts_hold(tmp_path / "c.jsonl", tmp_path)
    assert counts == {"accepted": 65, "rejected": 175}
    card = (tmp_path / "conversation.card.txt").read_text(encoding="utf-8")
    figures = dict(re.findall(r"^(\w[\w ]*?)  +(\S.*)$", card, re.MULTILINE))
    aside = [TALK[number % len(TALK)] for number in range(80)]
    leaks = sum(why.startswith(("box", "speaks")) for _, _, why in aside)
    assert figures["images"] == "80" and figures["leaks among them"] == str(leaks)
    assert figures["rejected of them"] == f"{sum(bool(why) for _, _, why in aside) / 80:.1%}"
    assert re.search(r"conversation: questions begin with\n +\d+  why do they", card)
    page = (tmp_path / "conversation.card.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "speaks of captions or boxes" in page
    assert not re.search(r"(src|href)=|url\(|@import|<script|<link", page)
    # What was accepted can be trained.
    tokenizer = load_tokenizer("llava_jax/demo/backbones/llama")
    for kind in KINDS:
        rows, template = str(tmp_path / f"{kind}.json"), "v1"
        settings = DataSettings(rows, str(tmp_path), template, "front", "pad", 2048, shuffle=False, **UNPACKED)
        _, checked = verify(settings, tokenizer, patches=576, look=lambda path: None)
        assert checked.rejected == () and checked.kept > 10


def test_a_bad_answer_is_asked_for_again_and_then_set_aside(tmp_path, contexts):
    class Stubborn:
        name, settings = "stubborn", {}

        def answer(self, messages):
            return Reply("no" if "number 3 " in messages[-1]["content"] else EXCHANGE)

    for attempts in (2, 2, 4):
        path = str(tmp_path / "j.jsonl")
        with Journal(path) as journal:
            job = open_job(contexts, "conversation", attempts=attempts)
            written = synthesize(job, str(tmp_path / "o.json"), Stubborn(), journal)
        assert str(written).startswith("11 rows, 22 turns, 1 rejected (1 text outside")
        assert len(lines_of(path)) == 11 + attempts  # of the second run nothing was asked
        (aside,) = lines_of(tmp_path / "o.rejected.jsonl")
        assert aside["id"] == "000003" and [reply["text"] for reply in aside["replies"]] == ["no"] * attempts


def test_kinds_with_the_same_prompts_have_answers_of_their_own(tmp_path, contexts):
    for name in FOLDERS.values():
        (tmp_path / "same" / name).mkdir(parents=True)
        (tmp_path / "same" / name / "system_message.txt").write_text("Look.", encoding="utf-8")
    tasks = list(open_job(contexts, "all", str(tmp_path / "same")).tasks({}))
    assert len(tasks) == 36 == len({task.key for task in tasks})


def test_what_training_could_not_read_is_set_aside_unasked(tmp_path, capsys):
    rows = [{"id": f"{n}", "image": f"{n}.png", "captions": ["Rain."]} for n in range(4)]
    rows[3]["captions"] = ["Rain \ud83d"]
    rows[1]["image"], rows[2]["id"] = "../1.png", "0"
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with Journal(None) as journal:
        job = open_job(str(path), "detail", attempts=1)
        written = synthesize(job, str(tmp_path / "o.json"), Recorded([TELL[0]]), journal)
    assert written.rows == 1
    assert [line["reason"][:30] for line in lines_of(tmp_path / "o.rejected.jsonl")] == [
        "its row: image: '../1.png' lea",
        "id seen before in the contexts",
        "its row: conversations[1]: lon",
    ]
    assert command(path, tmp_path / "o.json", "--kind=detail", "--teacher=m", "--dry_run", "--limit=4") == 0
    assert "Rain \\ud83d" in capsys.readouterr().out


# ---- COCO at full size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_lists_of_a_large_object(tmp_path, monkeypatch, piece):
    for name in ("PIECE", "SCANNED"):
        monkeypatch.setattr(io, name, piece)
    content = {"info": {"list": [5]}, "none": [], "list": [1, 22.5, 'a"]b', [3], {"k": "é"}], "end": None}
    path = tmp_path / "o.json"
    path.write_text("\ufeff" + json.dumps(content, indent=2), encoding="utf-8")
    assert list(io.elements(str(path), "list.item", "lists")) == content["list"]
    assert list(io.elements(str(path), "none.item", "lists")) == []
    assert list(io.elements(str(path), "end.item", "lists")) == []
    for text in ("", "[1]", '{"a": [1, 2', '{"a": 1} 2', '{"a" 1}', "{1: 2}", '{"a": [1 2]}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="o.json: (not JSON: .*; )?expected lists"):
            list(io.elements(str(path), "a.item", "lists"))


def test_one_of_several_coco_files_by_name(tmp_path):
    for year in (2014, 2017):
        image = {"id": 1, "file_name": f"{year}.jpg", "width": 10, "height": 10}
        captions = {"annotations": [{"image_id": 1, "caption": "Rain."}], "images": [image]}
        box = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 5, 10], "segmentation": [[1.5] * 50]}
        instances = {"categories": [{"id": 3, "name": "car"}], "annotations": [box], "images": [image]}
        for name, content in (("captions", captions), ("instances", instances)):
            (tmp_path / f"{name}_train{year}.json").write_text(json.dumps(content), encoding="utf-8")
    (context,) = list(open_contexts(str(tmp_path / "captions_train2017.json")))
    assert context.id == "2017" and context.instances[0].box == (0, 0, 0.5, 1)
    with pytest.raises(InputError, match="name one of them, as .*captions_train2014.json"):
        list(open_contexts(str(tmp_path)))
    (tmp_path / "instances_train2017.json").unlink()
    with pytest.raises(InputError, match="no .*instances_train2017.json next to it"):
        list(open_contexts(str(tmp_path / "captions_train2017.json")))


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["--teacher=m"], "--teacher=m needs --endpoint=URL"),
        (["--endpoint=http://x/v1"], "--endpoint is for another teacher"),
        (["--batch_input=b"], "batch mode is for another teacher"),
        (["--teacher=m", "--batch_input=a", "--batch_output=b"], "give one of them"),
        (["--teacher=m", "--endpoint=http://u/v1", "--request=[1]"], "expected a JSON object"),
        (["--teacher=m", "--endpoint=http://u/v1", "--request={"], "not JSON"),
        (["--teacher=m", "--endpoint=http://u/v1", '--request={"stream": true}'], "without messages, model, stream, n"),
        (["--teacher=m", "--endpoint=http://u/v1", '--request={"max_tokens": "9"}'], "max_tokens is '9'"),
        (["--teacher=m", "--endpoint=http://u/v1", "--price=1"], "expected IN,OUT"),
        (["--teacher=m", "--endpoint=http://u/v1", "--budget_usd=1"], "needs --price"),
        (["--teacher=m", "--endpoint=http://u/v1", "--concurrency=0"], "expected 1 to 1024"),
        (["--teacher=m", "--endpoint=http://u/v1", "--budget_tokens=-1"], "expected 0 or more"),
        (["--teacher=m", "--endpoint=localhost:8000/v1"], "--endpoint=localhost:8000/v1: no address"),
        (["--teacher=m", "--endpoint=http://localhost:99999/v1"], "no address, expected one such as http://"),
        (["--teacher=m", "--endpoint=http://[::1/v1"], "no address"),
        (["--teacher=m", "--endpoint=https://api.openai.com/v1"], "put it in the environment as OPENAI_API_KEY"),
    ],
)
def test_flags_that_do_not_go_together(words, says, tmp_path, contexts, capsys):
    assert command(contexts, tmp_path / "o.json", "--kind=detail", *words) == 2
    assert says in capsys.readouterr().err


def test_a_key_that_is_none(tmp_path, contexts, capsys, monkeypatch):
    words = ("--kind=detail", "--teacher=m", "--endpoint=http://127.0.0.1:9/v1")
    for key in ("sk-ä", "sk-1\nsk-2"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert command(contexts, tmp_path / "o.json", *words) == 2
        said = capsys.readouterr().err
        assert "the key in OPENAI_API_KEY holds a letter that no key has" in said and "sk-" not in said
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")
    with TeacherServer(Faults()) as server:
        assert asked_of(server, contexts, tmp_path / "o.json", "--kind=detail", "--limit=1") == 0
    assert server.seen[0].headers["authorization"] == "Bearer sk-1"
    # What is settled is written again without a key that could be used, and nobody is asked.
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ä")
    assert command(contexts, tmp_path / "o.json", *words, "--limit=1", "--teacher=served") == 0
    assert "0 requests to send, 1 images need none" in capsys.readouterr().out


def test_a_name_that_no_disk_takes(tmp_path, contexts, capsys):
    name = "x" * 260 + ".json"
    assert command(contexts, tmp_path / name, "--kind=detail", "--teacher=m", "--endpoint=http://u/v1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("File name too long")


def test_the_embedded_teacher_writes_one_kind_at_a_time(tmp_path, contexts, capsys):
    assert command(contexts, tmp_path / "o.json", "--kind=all") == 2
    assert "one kind at a time" in capsys.readouterr().err
