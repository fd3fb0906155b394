"""A server on a thread for the tests of serve, clients of few lines, and an engine that says what it is told."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image

from llava_jax.infer.engine import End, Failed, Full, Piece
from llava_jax.serve import server
from llava_jax.serve.answer import Service
from llava_jax.serve.protocol import Limits


class Words:
    """An engine that answers with numbered words, one each `seconds`, until the limit or for ever, or with `error`."""

    def __init__(self, seconds: float = 0.0, waiting: int = 64, error: Exception | None = None):
        self.seconds, self.waiting, self.error = seconds, waiting, error
        self.alive, self.queued, self.asked = True, 0, []
        self.slots: set[threading.Event] = set()

    @property
    def running(self) -> int:
        return len(self.slots)

    def submit(self, prompt, sampling, emit, *, stop=(), logprobs=None):
        if self.running >= self.waiting:
            raise Full
        cancelled = threading.Event()
        cancelled.cancel = cancelled.set  # a ticket
        self.asked.append((prompt, sampling, stop, logprobs))
        self.slots.add(cancelled)
        threading.Thread(target=self._answer, args=(prompt, sampling, emit, cancelled), daemon=True).start()
        return cancelled

    def _answer(self, prompt, sampling, emit, cancelled):
        reason, count = "length", 0
        while count < sampling.max_new_tokens and not cancelled.wait(self.seconds) and self.error is None:
            emit(Piece(f"w{count} ", (count,), ()))
            count += 1
        reason = "cancelled" if cancelled.is_set() else "length"
        emit(End(reason, len(prompt.tokens), count) if self.error is None else Failed(self.error))
        self.slots.discard(cancelled)

    def close(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            time.sleep(0.01)
        for slot in list(self.slots):
            slot.set()


@contextlib.contextmanager
def serving(engine: Any, processor: Any, **settings: Any) -> Iterator[int]:
    """Yield the port of a server on `engine`; `settings` are those of Service, `limits` those of Limits."""
    limits = Limits(processor.config.llm.max_positions, **settings.pop("limits", {}))
    run = server.make_server(Service("tiny", engine, processor, limits, **settings))
    bound = server.bind("127.0.0.1", 0)
    thread = threading.Thread(target=run.run, kwargs=dict(sockets=[bound]))
    thread.start()
    while not run.started:
        time.sleep(0.01)
    try:
        yield bound.getsockname()[1]
    finally:
        run.should_exit = True
        thread.join(40)
        assert not thread.is_alive(), "the server did not stop"


def ask(port: int, body: Any = None, path: str = "/v1/chat/completions", method: str = "POST", **headers: str):
    """Return (status, JSON or text, headers) of one request; `body` is JSON's or bytes."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, content, given)
        reply = connection.getresponse()
        text = reply.read().decode()
        is_json = reply.headers.get("content-type", "").startswith("application/json")
        return reply.status, json.loads(text) if is_json else text, reply.headers
    finally:
        connection.close()


def data_url(image: Image.Image | bytes, kind: str = "png") -> str:
    content = image
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, kind)
        content = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def shows(url: str, text: str = "What is this?") -> dict[str, Any]:
    """Return the user's message with one image."""
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
    }


def user(text: str = "What is this?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def body(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": list(messages) or [user()], "max_tokens": 4} | more
