"""Talk with a model in the terminal, its answer shown as it comes."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, TextIO

from llava_jax.infer.engine import Model
from llava_jax.infer.generate import question_message
from llava_jax.infer.inline_image import image_protocol, inline_image
from llava_jax.io import replacing
from llava_jax.types import InputError, Sampling

HELP = """\
/image PATH  add an image to the next message
/reset       forget the conversation
/save FILE   write the conversation as JSON
/quit        leave (Ctrl-D does, too); Ctrl-C stops an answer"""

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Said:
    """What was said, and the images that come with the next message."""

    messages: Messages
    images: tuple[str, ...]


def chat(model: Model, images: Sequence[str], input: TextIO, output: TextIO, sampling: Sampling | None = None) -> None:
    """Read one message a line from `input` and write the answers to `output` until /quit or the end of `input`.

    `images` come with the first message, and with the first one after /reset. A message that cannot be answered (no
    such image, too long) is told in one line and forgotten; the conversation continues. Only a first image that cannot
    be read raises InputError.
    """
    sampling = sampling or Sampling(max_new_tokens=512)
    start = said = Said([], tuple(images))
    if images:
        _check_images(model, images)
    protocol = image_protocol(input, output)
    for path in images:
        output.write(inline_image(path, protocol))
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
        try:
            if text == "/reset":
                said = start
                print("(a new conversation)", file=output)
            elif text.startswith("/"):
                said = _command(model, text, said, protocol, output)
            elif text:
                said = _turn(model, said, text, sampling, output)
        except InputError as error:
            print(f"error: {error}", file=output)


def _check_images(model: Model, paths: Sequence[str]) -> None:
    model.prompt([question_message("?", paths)])


def _command(model: Model, text: str, said: Said, protocol: str, output: TextIO) -> Said:
    """Return the conversation after a command with an argument. Raises InputError."""
    name, _, argument = text.partition(" ")
    path = os.path.expanduser(argument.strip())
    if name == "/save" and path:
        try:
            with replacing(path) as file:
                json.dump(said.messages, file, ensure_ascii=False, indent=1)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        print(f"({len(said.messages)} messages in {path})", file=output)
        return said
    if name != "/image" or not path:
        raise InputError(f"{text}: no such command; the commands are\n{HELP}")
    _check_images(model, [path])
    output.write(inline_image(path, protocol))
    print(f"({path} comes with the next message)", file=output)
    return dataclasses.replace(said, images=(*said.images, path))


def _turn(model: Model, said: Said, text: str, sampling: Sampling, output: TextIO) -> Said:
    """Return the conversation after one more question; as it was, when there is no answer. Raises InputError."""
    message, answer = question_message(text, said.images), ""
    try:
        for piece in model.stream([*said.messages, message], **dataclasses.asdict(sampling)):
            answer += piece
            output.write(piece)
            output.flush()
    except KeyboardInterrupt:
        output.write(" (stopped)")
    except InputError as error:
        raise InputError(f"{error} (/reset starts a new conversation)") from None
    output.write("\n")
    if not answer:
        # A template has no way to say that nothing was answered, so the question is forgotten with its answer.
        print("(no answer)", file=output)
        return said
    return Said([*said.messages, message, {"role": "assistant", "content": answer}], ())
