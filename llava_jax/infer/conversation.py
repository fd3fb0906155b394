"""A conversation that remembers what was said, for Python and notebooks."""

import dataclasses
import html
import os
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from llava_jax.data.images import thumbnail
from llava_jax.infer.engine import Model
from llava_jax.infer.generate import question_message
from llava_jax.types import Sampling

THUMBNAIL = 240  # pixels of the longer side of an image shown in a notebook


class Conversation:
    """Messages with a model; each answer sees all that went before. Shows itself in a notebook."""

    def __init__(self, model: Model, system: str, sampling: Sampling):
        self._model, self._sampling = model, sampling
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, *images: Any) -> str:
        """Return the answer to one more question, about `images` (paths or PIL images) or those shown before."""
        return "".join(self.stream(text, *images))

    def stream(self, text: str, *images: Any) -> Iterator[str]:
        """Yield the answer as it comes; question and answer are remembered once it has ended, or was left.

        Raises InputError for what cannot be asked, and forgets it.
        """
        message, said = question_message(text, images), ""
        pieces = self._model.stream([*self.messages, message], **dataclasses.asdict(self._sampling))
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            # No template can say that nothing was answered.
            if said:
                self.messages += [message, {"role": "assistant", "content": said}]

    def __repr__(self) -> str:
        lines = []
        for message in self.messages:
            text, images = _content(message)
            lines.append(f"{message['role']}: {'<image> ' * len(images)}{text}")
        return "\n".join(lines) or "(nothing said yet)"

    def _repr_html_(self) -> str:
        rows = []
        for message in self.messages:
            text, images = _content(message)
            shown = "".join(map(_shown, images))
            rows.append(
                f'<div style="margin:6px 0"><b>{message["role"]}</b>{shown}'
                f'<div style="white-space:pre-wrap">{html.escape(text)}</div></div>'
            )
        return "".join(rows) or "<i>nothing said yet</i>"


def _content(message: dict[str, Any]) -> tuple[str, Sequence[Any]]:
    if isinstance(message["content"], str):
        return message["content"], ()
    *images, text = message["content"]
    return text["text"], [part["image"] for part in images]


def _shown(image: Any) -> str:
    content = thumbnail(image if isinstance(image, Image.Image) else os.fspath(image), THUMBNAIL)
    return f'<img src="data:image/png;base64,{content}" style="display:block;margin:4px 0">'
