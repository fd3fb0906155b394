"""Requests that come and go: streaming, cancelling, stop strings, probabilities, the queue, errors, devices."""

import dataclasses
import queue
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from llava_jax import api
from llava_jax.infer import engine as engines
from llava_jax.infer.engine import Closed, End, Engine, Failed, Full, Piece
from llava_jax.infer.generate import Inputs, empty_slots
from llava_jax.types import InputError, Sampling
from tests import fast_compile
from tests.tiny_llava import assembled, config, draw_image, model

GREEDY = Sampling(max_new_tokens=24)
QUESTIONS = ["What is this?", "Who are you?", "Tell me about it.", "Where is it?"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model(str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def prompts(tiny):
    shown = [draw_image(0), None, [draw_image(0), draw_image(1)], draw_image(2)]
    return [tiny.prompt(api.question(text, images)) for text, images in zip(QUESTIONS, shown, strict=True)]


@pytest.fixture(scope="module")
def whole(tiny, prompts) -> list[str]:
    return [answer.text for answer in sorted(Engine(tiny, slots=4).answers(prompts, GREEDY))]


class Reader:
    """What a client is given."""

    def __init__(self):
        self.events, self._queue = [], queue.SimpleQueue()

    def emit(self, event):
        self._queue.put(event)

    def next(self):
        self.events.append(self._queue.get(timeout=60))
        return self.events[-1]

    def all(self) -> "Reader":
        while not isinstance(self.next(), End | Failed):
            pass
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def ids(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Piece) for token in event.ids]


def ask(engine, prompt, sampling=GREEDY, **how) -> tuple[Reader, engines.Ticket]:
    reader = Reader()
    return reader, engine.submit(prompt, sampling, reader.emit, **how)


def test_clients_that_stream_at_once_get_their_own_answers(tiny, prompts, whole):
    engine, texts = Engine(tiny, slots=4), {}

    def client(number: int) -> None:
        texts[number] = "".join(engine.stream(prompts[number % 4], GREEDY))

    threads = [threading.Thread(target=client, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[number] for number in range(12)] == whole * 3
    assert engine.running == engine.queued == 0 and engine.alive


def test_pieces_and_their_end(tiny, prompts, whole):
    reader = ask(Engine(tiny, slots=4), prompts[0])[0].all()
    assert reader.text == whole[0] and len(reader.events[0].ids) == 1 and len(reader.events) > 4
    assert reader.events[-1] == End("length", len(prompts[0].tokens), 24)


def test_stop_strings_of_a_request(tiny, prompts, whole):
    stop, engine = whole[0][3:5], Engine(tiny, slots=4)
    (stopped, _), (other, _) = ask(engine, prompts[0], stop=[stop]), ask(engine, prompts[3])
    assert stopped.all().text == whole[0][: whole[0].find(stop)].rstrip() and other.all().text == whole[3]
    assert stopped.events[-1].reason == "stop" and stopped.events[-1].completion_tokens == len(stopped.ids) < 24
    with pytest.raises(InputError, match="stop: a string is empty"):
        ask(engine, prompts[0], stop=[""])


def test_a_cancelled_answer_frees_its_slot(tiny, prompts, whole):
    engine = Engine(tiny, slots=1)
    # Its first id holds the engine until the others are there.
    ready, long = threading.Event(), Reader()
    ticket = engine.submit(prompts[0], Sampling(max_new_tokens=300), lambda event: (ready.wait(60), long.emit(event)))
    waiting, dropped = ask(engine, prompts[1])[0], ask(engine, prompts[2])
    dropped[1].cancel()
    ticket.cancel()
    ready.set()
    assert long.all().events[-1].reason == "cancelled" and len(long.ids) < 20
    assert waiting.all().text == whole[1] and dropped[0].all().events == [End("cancelled", len(prompts[2].tokens), 0)]


def test_a_full_queue_and_a_closed_engine(tiny, prompts, whole):
    engine, ready = Engine(tiny, slots=1, waiting=1), threading.Event()
    reader = Reader()
    engine.submit(prompts[0], GREEDY, lambda event: (ready.wait(60), reader.emit(event)))
    end = time.monotonic() + 60
    while engine.queued and time.monotonic() < end:
        pass
    second = ask(engine, prompts[1])[0]
    try:
        with pytest.raises(Full, match="1 requests wait already, and no more than 1 may"):
            ask(engine, prompts[2])
    finally:
        ready.set()  # or the engine's thread waits at each event, and Python for it
    engine.close(60)
    assert reader.all().text == whole[0] and second.all().text == whole[1] and not engine.alive
    with pytest.raises(Closed):
        ask(engine, prompts[0])


def test_closing_cancels_what_takes_too_long(tiny, prompts):
    engine = Engine(tiny, slots=1)
    reader = ask(engine, prompts[0], Sampling(max_new_tokens=300))[0]
    reader.next()
    engine.close(0)
    assert reader.all().events[-1].reason == "cancelled"


def test_probabilities_are_those_of_the_whole_forward(tiny, prompts):
    engine, warm = Engine(tiny, slots=4), dataclasses.replace(GREEDY, temperature=0.9, max_new_tokens=6, seed=3)
    (asked, _), (other, _) = ask(engine, prompts[0], warm, logprobs=3), ask(engine, prompts[3])
    ids = asked.all().ids
    images = prompts[0].pixels.transpose(0, 3, 1, 2)
    logits = tiny.logits(np.concatenate([prompts[0].tokens, ids])[None], images)[0, len(prompts[0].tokens) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    found = [entry for event in asked.events[:-1] for entry in event.logprobs]
    assert [entry.id for entry in found] == ids
    np.testing.assert_allclose([entry.logprob for entry in found], expected[np.arange(6), ids], atol=1e-4)
    for entry, row in zip(found, expected, strict=True):
        assert [token for token, _ in entry.top] == list(np.argsort(-row)[:3])
        np.testing.assert_allclose([logprob for _, logprob in entry.top], np.sort(row)[::-1][:3], atol=1e-4)
    assert not any(event.logprobs for event in other.all().events[:-1])
    with pytest.raises(InputError, match="logprobs is 21; expected 0 to 20"):
        ask(engine, prompts[0], logprobs=21)


@pytest.mark.parametrize("program", ["admit", "draw_first", "encode_images"])
def test_an_error_of_the_device_ends_what_it_concerns_and_the_engine_survives(
    tiny, prompts, whole, monkeypatch, program
):
    engine, failing, working = Engine(tiny, slots=4), [True], getattr(engines, program)

    def fails_once(*args, **how):
        if failing.pop() if failing else False:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return working(*args, **how)

    monkeypatch.setattr(engines, program, fails_once)
    assert "out of memory" in str(ask(engine, prompts[0])[0].all().events[-1].error)
    # The same image again, which was not encoded, and a question without any.
    assert engine.alive and ask(engine, prompts[0])[0].all().text == whole[0]
    assert ask(engine, prompts[1])[0].all().text == whole[1]


def watched_pool(monkeypatch) -> tuple[list[int], list[int]]:
    """Make pools for two images; return how many images each call encodes from now on, and the size of its pool."""
    encoded, sizes, encode = [], [], engines.encode_images

    def noted(params, pool, pixels, entries, **how):
        encoded.append(len(pixels))
        sizes.append(len(pool))
        return encode(params, pool, pixels, entries, **how)

    monkeypatch.setattr(engines, "POOL_IMAGES", 2)
    monkeypatch.setattr(engines, "encode_images", noted)
    return encoded, sizes


def test_an_image_is_encoded_once_and_old_ones_give_way(tiny, prompts, whole, monkeypatch):
    encoded, _ = watched_pool(monkeypatch)
    engine = Engine(tiny, slots=1)
    for index in (0, 0, 2, 0):
        assert "".join(engine.stream(prompts[index], GREEDY)) == whole[index]
    assert encoded == [1, 1]
    assert "".join(engine.stream(prompts[3], GREEDY)) == whole[3]  # in place of image 1, used longest ago
    assert "".join(engine.stream(prompts[0], GREEDY)) == whole[0] and encoded == [1, 1, 1]
    assert "".join(engine.stream(prompts[2], GREEDY)) == whole[2] and encoded == [1, 1, 1, 1]


def test_prompts_of_more_and_more_images_meet_few_sizes_of_the_pool(tiny, monkeypatch):
    asked = [tiny.prompt(api.question(QUESTIONS[0], [draw_image(n) for n in range(count)])) for count in range(1, 6)]
    alone = [answer.text for answer in sorted(Engine(tiny, slots=4).answers(asked, GREEDY))]
    _, sizes = watched_pool(monkeypatch)
    engine = Engine(tiny, slots=1)
    assert ["".join(engine.stream(prompt, GREEDY)) for prompt in asked] == alone
    assert set(sizes) == {2, 4, 8}


def test_what_a_prefix_takes_is_the_prompts_length_not_the_slots(tiny):
    def temporary(size: int) -> int:
        like = jax.eval_shape(lambda: empty_slots(config=tiny.config, rows=4, size=size))
        row_R = np.zeros(4, np.int32)
        inputs = Inputs(np.zeros((4, 16), np.int32), row_R, None, row_R, row_R)
        program = engines.admit.lower(tiny.placed.params, like, None, inputs, row_R, config=tiny.config, size=64)
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 1.1 * temporary(128)


def test_a_prompt_that_begins_as_an_earlier_one_starts_from_it(tiny, monkeypatch):
    starts, admit = [], engines.admit

    def watched(params, slots, pool, inputs, *args, **how):
        starts.append(0 if inputs.start_B is None else int(inputs.start_B[0]))
        return admit(params, slots, pool, inputs, *args, **how)

    monkeypatch.setattr(engines, "admit", watched)
    asked = api.question("What is this?", draw_image(0))
    more = [*asked, {"role": "assistant", "content": "Red."}, *api.question("Where?", None)]
    conversations = [asked, api.question("Who?", draw_image(0)), api.question("What is this?", draw_image(1)), more]
    prompts, engine = [tiny.prompt(messages) for messages in conversations], Engine(tiny, slots=2)
    found = ["".join(engine.stream(prompt, GREEDY)) for prompt in prompts]
    first, alike, other, longer = starts
    image = int(np.argmax(prompts[0].tokens == tiny.config.image_token_id))
    assert first == 0 and alike >= image + tiny.config.vision.patches and image - 8 < other <= image
    assert longer > len(prompts[0].tokens) - 32
    assert found == ["".join(Engine(tiny, slots=1).stream(prompt, GREEDY)) for prompt in prompts]
    starts.clear()
    together = [answer.text for answer in sorted(Engine(tiny, slots=8).answers(prompts, GREEDY))]
    # The first alone, for what follows to start from it.
    assert together == found and starts[0] == 0 and all(starts[1:])


def test_a_process_that_ends_meanwhile_waits_for_the_answer(tmp_path):
    code = f"""
from tests import test_engine
test_engine.leave({str(tmp_path)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=fast_compile.environment(), capture_output=True, text=True, timeout=150
    )
    assert (done.returncode, done.stdout.split()) == (0, ["leaving", "End"]), done.stderr[-3000:]


def leave(folder: str) -> None:
    """Return with the first words of an answer, while the engine makes the others."""
    first, left, asked = threading.Event(), threading.Event(), model(folder)

    def emit(event):
        first.set()
        left.wait(60)
        if not isinstance(event, Piece):
            print(type(event).__name__)

    Engine(asked, slots=1).submit(asked.prompt(api.question(QUESTIONS[1], None)), GREEDY, emit)
    assert first.wait(60)
    print("leaving")
    left.set()


# ---- several devices -------------------------------------------------------------------------------------------------

WIDE = config(heads=8, kv_heads=4, head_dim=8)


def test_eight_devices_give_the_answers_of_one(tmp_path):
    """Rows over two, weights over four."""
    code = f"""
from tests import test_engine
test_engine.answer_on_devices({str(tmp_path)!r})
"""
    env = fast_compile.environment(devices=8)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def answer_on_devices(folder: str) -> None:
    """Compare meshes with the first device alone."""
    shown = [draw_image(0), None, [draw_image(0), draw_image(1)]]
    expected, devices = None, jax.devices()
    for count, tensor in ((1, 1), (8, 4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_, count=count: devices[:count])
            asked = assembled(folder, WIDE, tensor)
        found = asked.generate(QUESTIONS[:3], shown, temperature=0.8, max_new_tokens=8)
        assert len(set(found)) == 3
        expected = expected or found
        assert found == expected, (count, tensor)
        kernel = asked.params["llm"]["layers"][0]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size * tensor == kernel.size
    with pytest.raises(InputError, match=r"tensor=8: expected one of \[1, 2, 4\], .* 8 devices and 4 attention heads"):
        assembled(folder, WIDE, 8)
