"""The answer to one request: from the events of the engine to what the client reads."""

import asyncio
import dataclasses
import functools
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llava_jax.api import Processor, token_texts
from llava_jax.infer.engine import Closed, End, Engine, Failed, Full, Piece, Ticket
from llava_jax.infer.generate import Prompt
from llava_jax.serve.errors import Refused
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.protocol import Ask, Limits, choice, usage
from llava_jax.types import InputError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Service:
    """What is served, and how: `key` is asked of every client ("" asks for none), `hosts` are the names a client may
    call the server by (none: any), `timeout` is the longest a request may take in seconds."""

    name: str
    engine: Engine
    processor: Processor
    limits: Limits
    key: str = ""
    hosts: tuple[str, ...] = ()
    remote_images: bool = False
    timeout: float = 300


class Answer:
    """The choices of one request while the engine works on them."""

    def __init__(self, service: Service, ask: Ask, metrics: Metrics, start: float):
        self.service, self.ask, self.metrics, self.start = service, ask, metrics, start
        self.base = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
        self.prompt_tokens = self.completion_tokens = 0
        self.begun = False
        self.queue: asyncio.Queue[tuple[int, Piece | End | Failed]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.tickets: list[Ticket] = []

    def submit(self, prompt: Prompt) -> None:
        """Hand the prompt to the engine, once a choice, on any thread. Raises Refused where it takes none."""

        def emit(index: int, event: Piece | End | Failed) -> None:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

        try:
            for index in range(self.ask.choices):
                sampling = dataclasses.replace(self.ask.sampling, seed=(self.ask.sampling.seed + index) % 2**32)
                to, how = functools.partial(emit, index), self.ask
                ticket = self.service.engine.submit(prompt, sampling, to, stop=how.stop, logprobs=how.logprobs)
                self.tickets.append(ticket)
        except (Full, Closed, InputError) as error:
            self.cancel()
            raise _of_engine(error) from None

    def cancel(self) -> None:
        """Free the slots; nothing happens to choices that have ended."""
        for ticket in self.tickets:
            ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Piece | End]]:
        """Yield what the engine tells of the choices until all have ended. Raises Refused where one cannot end."""
        left, end = self.ask.choices, self.start + self.service.timeout
        while left:
            try:
                # Once in a while it is looked up whether there still is an engine to wait for.
                async with asyncio.timeout(min(max(end - time.monotonic(), 0), 2)):
                    index, event = await self.queue.get()
            except TimeoutError:
                if not self.service.engine.alive:
                    raise Refused("the engine has stopped", status=503) from None
                if time.monotonic() > end:
                    raise Refused(f"not answered within {self.service.timeout:g} s", status=504) from None
                continue
            if isinstance(event, Failed):
                raise _of_engine(event.error)
            if isinstance(event, End):
                if event.reason == "cancelled":
                    raise Refused("the server is stopping", status=503)
                left -= 1
                self.prompt_tokens = event.prompt_tokens
                self.completion_tokens += event.completion_tokens
            elif event.ids and not self.begun:
                self.begun = True
                self.metrics.first.observe(time.monotonic() - self.start)
            yield index, event
        self.metrics.whole.observe(time.monotonic() - self.start)
        self.metrics.tokens.labels("prompt").inc(self.prompt_tokens)
        self.metrics.tokens.labels("completion").inc(self.completion_tokens)

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer, as OpenAI's chat.completion."""
        count = self.ask.choices
        texts, logprobs, reasons = [""] * count, [[] for _ in range(count)], [""] * count
        try:
            async for index, event in self.events():
                if isinstance(event, End):
                    reasons[index] = event.reason
                else:
                    texts[index] += event.text
                    logprobs[index] += self._logprobs(event)
        finally:
            self.cancel()
        choices = [
            choice(index, "message", {"role": "assistant", "content": text}, self._content(found), reason)
            for index, (text, found, reason) in enumerate(zip(texts, logprobs, reasons, strict=True))
        ]
        return self.base | {
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(self.prompt_tokens, self.completion_tokens),
        }

    async def stream(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events, OpenAI's chat.completion.chunk.

        Raises Refused only in place of the first one: later, the refusal itself is the last event.
        """
        begun: set[int] = set()
        held = ""
        try:
            async for index, event in self.events():
                if index not in begun:
                    begun.add(index)
                    held += self._chunk([choice(index, "delta", {"role": "assistant", "content": ""}, None, None)])
                if isinstance(event, End):
                    held += self._chunk([choice(index, "delta", {}, None, event.reason)])
                elif event.text or event.logprobs:
                    logprobs = self._content(self._logprobs(event))
                    held += self._chunk([choice(index, "delta", {"content": event.text}, logprobs, None)])
                # What the engine has told meanwhile goes out in one piece: a packet costs more than a token.
                if self.queue.empty() and held:
                    yield held
                    held = ""
            used = usage(self.prompt_tokens, self.completion_tokens)
            yield held + (self._chunk([], used) if self.ask.include_usage else "") + "data: [DONE]\n\n"
        except Refused as error:
            if not begun:
                raise
            yield f"{held}data: {json.dumps(error.content)}\n\n"
        finally:
            self.cancel()

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> str:
        more = {"usage": used} if self.ask.include_usage else {}
        return f"data: {json.dumps(self.base | {'object': 'chat.completion.chunk', 'choices': choices} | more)}\n\n"

    def _content(self, logprobs: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self.ask.logprobs is None else {"content": logprobs, "refusal": None}

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            [text] = token_texts(self.service.processor.tokenizer, [token])
            known = "\ufffd" not in text  # half a character
            return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}

        return [
            one(found.id, found.logprob) | {"top_logprobs": [one(*other) for other in found.top]}
            for found in piece.logprobs
        ]


def _of_engine(error: Exception) -> Refused:
    if isinstance(error, InputError):
        return Refused(str(error), "messages")
    if isinstance(error, Full):
        return Refused("the server is busy; try again", status=429, code="rate_limit_exceeded")
    if isinstance(error, Closed):
        return Refused("the server is stopping", status=503)
    log.error("a request failed on the device", exc_info=error)
    return Refused("the model failed on this request; the server's log says why", status=500)


class Events(StreamingResponse):
    """An answer as server-sent events; when its client leaves, in whatever moment, the slot is freed."""

    def __init__(self, answer: Answer, first: str, rest: AsyncIterator[str]):
        self.answer = answer

        async def events() -> AsyncIterator[str]:
            yield first
            async for event in rest:
                yield event

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second is for nginx
        super().__init__(events(), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()
