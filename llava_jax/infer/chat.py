"""Talk with a model in the terminal, its answer shown as it comes."""

import dataclasses
from typing import Any, TextIO

from llava_jax.infer.engine import Model
from llava_jax.infer.generate import question_message
from llava_jax.types import InputError, Sampling

HELP = """\
/image PATH  show an image and start a new conversation about it
/reset       forget the conversation, keep the image
/quit        leave (Ctrl-D does, too); Ctrl-C stops an answer"""


def chat(model: Model, image: str | None, input: TextIO, output: TextIO, sampling: Sampling | None = None) -> None:
    """Read one message a line from `input` and write the answers to `output` until /quit or the end of `input`.

    A message that cannot be answered (no such image, too long) is told in one line and forgotten; the
    conversation continues. Only a first `image` that cannot be read raises InputError.
    """
    sampling = sampling or Sampling(max_new_tokens=512)
    if image is not None:
        _check_image(model, image)
    messages: list[dict[str, Any]] = []
    print(HELP, file=output)
    while True:
        try:
            output.write("\n> ")
            output.flush()
            line = input.readline()
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=output)
            continue
        text = line.strip()
        if text == "/quit":
            return
        if not line:
            output.write("\n")
            return
        if text.startswith("/"):
            image, messages = _command(model, text, image, messages, output)
        elif text:
            shown = [] if image is None or messages else [image]
            messages = _turn(model, messages, question_message(text, shown), sampling, output)


def _check_image(model: Model, path: str) -> None:
    model.prompt([question_message("?", [path])])


def _command(
    model: Model, text: str, image: str | None, messages: list[dict[str, Any]], output: TextIO
) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the image and the conversation after a command."""
    name, _, argument = text.partition(" ")
    if name == "/reset" and not argument:
        print("(a new conversation)", file=output)
        return image, []
    path = argument.strip()
    if name != "/image" or not path:
        print(f"error: {text}: no such command; the commands are\n{HELP}", file=output)
        return image, messages
    try:
        _check_image(model, path)
    except InputError as error:
        print(f"error: {error}", file=output)
        return image, messages
    print(f"(a new conversation about {path})", file=output)
    return path, []


def _turn(
    model: Model, messages: list[dict[str, Any]], message: dict[str, Any], sampling: Sampling, output: TextIO
) -> list[dict[str, Any]]:
    """Return the conversation after one more question; as it was, when the question cannot be answered."""
    said = ""
    try:
        for piece in model.stream([*messages, message], **dataclasses.asdict(sampling)):
            said += piece
            output.write(piece)
            output.flush()
    except KeyboardInterrupt:
        output.write(" (stopped)")
    except InputError as error:
        print(f"error: {error} (/reset starts a new conversation)", file=output)
        return messages
    output.write("\n")
    if not said:
        # A template has no way to say that nothing was answered, so the question is forgotten with its answer.
        print("(no answer)", file=output)
        return messages
    return [*messages, message, {"role": "assistant", "content": said}]
