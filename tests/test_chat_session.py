"""A conversation in the terminal, typed from a file."""

import base64
import io
import json
import os
import pty
import re
import select
import termios
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from llava_jax.infer import inline_image as inline_image_module
from llava_jax.infer.chat import HELP, chat
from llava_jax.infer.inline_image import image_protocol, inline_image
from llava_jax.types import InputError, Sampling
from tests.tiny_llava import draw_image, model

SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model(str(tmp_path_factory.getbasetemp()))


@pytest.fixture
def photo(tmp_path):
    draw_image(0).save(tmp_path / "0.png")
    return str(tmp_path / "0.png")


class Recorder:
    """The model, with the conversations it was asked to continue; answers what it is told, or interrupts."""

    def __init__(self, model, *answers):
        self.model, self.answers, self.asked = model, list(answers), []

    def prompt(self, messages):
        return self.model.prompt(messages)

    def stream(self, messages, **sampling):
        self.asked.append([(m["role"], m["content"]) for m in messages])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        for piece in answer:
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield piece


def talk(model, typed: str, *images: str) -> list[str]:
    output = io.StringIO()
    chat(model, images, io.StringIO(typed), output, SAMPLING)
    shown = output.getvalue()
    assert shown.startswith(HELP)
    return [part.strip() for part in shown[len(HELP) :].split("\n> ")][1:]


def asks(text: str, *images: str) -> tuple:
    parts = [{"type": "image", "image": image} for image in images]
    return ("user", [*parts, {"type": "text", "text": text}])


def test_a_conversation_equals_the_streamed_answers(tiny, photo):
    first, second, end = talk(tiny, "What is this?\nMore?\n", photo)
    messages = [dict(role="user", content=asks("What is this?", photo)[1])]
    assert first == "".join(tiny.stream(messages, max_new_tokens=6)).strip()
    messages += [dict(role="assistant", content=first), dict(role="user", content=asks("More?")[1])]
    assert second == "".join(tiny.stream(messages, max_new_tokens=6)).strip()
    assert end == "" and first != second


def test_history_reset_and_images(tiny, photo, tmp_path):
    draw_image(1).save(tmp_path / "1 1.png")
    other = str(tmp_path / "1 1.png")
    told = Recorder(tiny, ["a"], ["b"], ["c"], ["d"], ["e"])
    talk(told, f"one\ntwo\n\n/image {photo}\n/image {other}\nthree\nfour\n/reset\nfive\n/quit\nsix\n")
    first = [asks("one"), ("assistant", "a"), asks("two")]
    second = [*first, ("assistant", "b"), asks("three", photo, other)]
    assert told.asked == [first[:1], first, second, [*second, ("assistant", "c"), asks("four")], [asks("five")]]


def test_the_first_images_come_again_after_a_reset(tiny, photo):
    told = Recorder(tiny, ["a"], ["b"], ["c"])
    talk(told, "one\ntwo\n/reset\nthree\n", photo, photo)
    assert told.asked[0] == [asks("one", photo, photo)] and told.asked[2] == [asks("three", photo, photo)]
    assert told.asked[1][2] == asks("two")


def test_a_saved_conversation_can_be_asked_again(tiny, photo, tmp_path):
    told = Recorder(tiny, ["a"])
    shown = talk(told, f"one\n/save {tmp_path}/talk.json\n/save {tmp_path}/no/talk.json\n", photo)
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [(m["role"], m["content"]) for m in messages] == [asks("one", photo), ("assistant", "a")]
    assert tiny.prompt([*messages, {"role": "user", "content": "And?"}]).pixels.shape[0] == 1
    assert "2 messages" in shown[1] and shown[2].startswith("error: ") and "cannot be written" in shown[2]


def test_terminals_that_show_images(photo):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(**environment: str) -> str:
        return inline_image(photo, image_protocol(io.StringIO(), Terminal(), environment))

    png = base64.b64decode(
        shown(TERM_PROGRAM="iTerm.app").removeprefix("\x1b]1337;File=inline=1;preserveAspectRatio=1:")[:-2]
    )
    assert Image.open(io.BytesIO(png)).size == draw_image(0).size
    chunks = re.findall(r"\x1b_G(a=T,f=100,q=2,)?m=([01]);([^\x1b]+)\x1b", shown(TERM="xterm-kitty"))
    assert [m for _, m, _ in chunks] == ["0"] and base64.b64decode("".join(chunk for *_, chunk in chunks)) == png
    assert shown(TERM="xterm-256color") == "" == image_protocol(io.StringIO(), io.StringIO(), {"TERM": "xterm-kitty"})


def sixel_pixels(text: str) -> np.ndarray:
    """Draw Sixel with runs as a terminal does; percent, -1 where nothing is drawn."""
    width, height = map(int, re.match(r'\x1bP0;1q"1;1;(\d+);(\d+)', text).groups())
    colours, drawn_YXC, colour, x, y = {}, np.full((height + 5, width, 3), -1), None, 0, 0
    drawing = text[text.index("#") : text.rindex("\x1b")]
    for number, red, green, blue, run, column, move in re.findall(
        r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|(?:!(\d+))?([?-~])|([$-])", drawing
    ):
        if red:
            colours[number] = int(red), int(green), int(blue)
        elif number:
            colour = colours[number]
        elif move:
            x, y = 0, y + 6 * (move == "-")
        else:
            for bit in range(6):
                if ord(column) - 63 >> bit & 1:
                    drawn_YXC[y + bit, x : x + int(run or 1)] = colour
            x += int(run or 1)
    assert (drawn_YXC[height:] == -1).all()
    return drawn_YXC[:height]


def test_sixel_draws_the_image(tmp_path):
    few = draw_image(0).quantize(100).convert("RGB")  # a terminal has 256 colours
    few.save(tmp_path / "few.png")
    drawn_YXC = sixel_pixels(inline_image(str(tmp_path / "few.png"), "sixel"))
    assert np.abs(drawn_YXC - np.asarray(few) / 2.55).max() <= 0.5


@pytest.fixture
def terminal():
    """A terminal's keyboard, and what a program reads from and writes to."""
    keyboard, screen = pty.openpty()
    with open(screen, closefd=False) as input, open(screen, "w") as output:
        yield keyboard, input, output
    os.close(keyboard)


def read_soon(descriptor: int) -> bytes:
    return os.read(descriptor, 64) if select.select([descriptor], [], [], 60)[0] else b""


@pytest.mark.parametrize(
    ("reply", "protocol"),
    [
        (b"\x1b[?62;4;22c", "sixel"),
        (b"\x1b[?62;14c", ""),
        (b"\x1b[?4;6c", ""),  # its class
        (b"Describe it.\x1b[?62;4c", "sixel"),  # typed before it replied
    ],
)
def test_a_terminal_says_whether_it_has_sixel(terminal, monkeypatch, reply, protocol):
    keyboard, input, output = terminal
    monkeypatch.setattr(inline_image_module, "REPLY_SECONDS", 60)
    before = termios.tcgetattr(input)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(lambda: (read_soon(keyboard), os.write(keyboard, reply))[0])
        assert image_protocol(input, output, {"TERM": "xterm-256color"}) == protocol
        assert asked.result() == b"\x1b[c"
    assert termios.tcgetattr(input) == before


def test_a_terminal_that_says_nothing_shows_nothing(terminal, monkeypatch):
    keyboard, input, output = terminal
    monkeypatch.setattr(inline_image_module, "REPLY_SECONDS", 0.01)
    assert image_protocol(input, output, {"TERM": "vt100"}) == ""
    assert read_soon(keyboard) == b"\x1b[c"


def test_what_was_typed_ahead_is_kept_and_nothing_asked(terminal):
    keyboard, input, output = terminal
    os.write(keyboard, b"ahead\n")
    assert read_soon(keyboard) == b"ahead\r\n", "its echo: it has arrived"
    assert image_protocol(input, output, {"TERM": "xterm-256color"}) == ""
    assert not select.select([keyboard], [], [], 0)[0], "no question"
    assert read_soon(input.fileno()) == b"ahead\n"


def test_an_interrupted_answer_stays_in_the_conversation(tiny):
    told = Recorder(tiny, ["par", "tial", KeyboardInterrupt], ["b"])
    shown = talk(told, "one\ntwo\n")
    assert shown[0] == "partial (stopped)"
    assert told.asked[1] == [asks("one"), ("assistant", "partial"), asks("two")]


def test_an_interrupt_at_the_prompt_does_not_end_the_chat(tiny):
    class Keyboard(io.StringIO):
        interrupted = False

        def readline(self):
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return super().readline()

    told, output = Recorder(tiny, ["a"]), io.StringIO()
    chat(told, (), Keyboard("one\n"), output, SAMPLING)
    assert "Ctrl-D or /quit leaves" in output.getvalue() and len(told.asked) == 1


def test_errors_are_one_line_and_the_chat_goes_on(tiny, photo, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    told = Recorder(tiny, ["a"], InputError("too long"), ["c"])
    shown = talk(told, f"one\n/image {tmp_path}/none.png\n/image {tmp_path}/bad.png\n/image\n/what\ntwo\nthree\n")
    assert "none.png: no such file" in shown[1] and "\n" not in shown[1]
    assert "bad.png: not an image" in shown[2] and "\n" not in shown[2]
    assert shown[3].startswith("error: /image: no such command") and shown[4].startswith("error: /what")
    assert shown[5] == "error: too long (/reset starts a new conversation)"
    assert told.asked[2] == [asks("one"), ("assistant", "a"), asks("three")]


def test_a_conversation_that_grows_too_long_is_told(tiny):
    shown = talk(tiny, "word " * 200 + "\nshort\n")
    assert shown[0].startswith("error: prompt of ") and shown[1] and not shown[1].startswith("error")


def test_an_empty_answer_is_forgotten(tiny):
    told = Recorder(tiny, [], ["b"])
    assert talk(told, "one\ntwo\n")[0] == "(no answer)"
    assert told.asked[1] == [asks("two")]


def test_a_first_image_that_is_none_ends_at_once(tiny, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        talk(tiny, "one\n", str(tmp_path / "none.png"))
