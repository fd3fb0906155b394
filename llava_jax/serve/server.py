"""The HTTP server: OpenAI's chat completions on an engine, its state, and the page that talks with it."""

import asyncio
import contextlib
import functools
import hmac
import json
import os
import queue
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import anyio
import prometheus_client as prometheus
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_jax.data.images import image_size
from llava_jax.infer.engine import End, Failed, Piece
from llava_jax.infer.generate import Prompt, question_message
from llava_jax.io import read_json
from llava_jax.serve import images, protocol
from llava_jax.serve.answer import Answer, Events, Service
from llava_jax.serve.errors import Refused
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.protocol import Ask, ImageAt
from llava_jax.types import ImageBytes, InputError, Sampling

Result = TypeVar("Result")

# Seconds without progress after which a client is given up: sending its body, reading our answer.
BODY_SECONDS, READ_SECONDS = 30, 60
# For all of the headers, all of a body, all of a request's images from other servers.
HEADER_SECONDS, UPLOAD_SECONDS, FETCH_SECONDS = 10, 300, 10
# After SIGTERM: for what runs, then for the engine's thread; together the 30 seconds that Kubernetes waits.
STOP_SECONDS, CLOSE_SECONDS = 25, 3
CONNECTIONS = 1024
# Requests that are read and whose images are decoded at one time; one image may take 200 MB meanwhile.
READERS = 2
PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json", "/")
OPEN_PATHS = ("/health", "/")  # and the files of the page, which hold nothing of the model's
HOST = re.compile(r"(\[[0-9a-f:.]*\]|[^:]*)(?::\d+)?")
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
HERE = os.path.dirname(__file__)


class Endpoints:
    """What answers at each path."""

    def __init__(self, service: Service):
        self.service, self.metrics = service, Metrics(service.engine)
        self.readers = anyio.CapacityLimiter(READERS)
        self.description = read_json(os.path.join(HERE, "openapi.json"), "the description of the server")
        self.description["components"]["schemas"]["Request"]["properties"]["model"]["const"] = service.name
        self.model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "llava_jax"}

    async def complete(self, request: Request) -> Response:
        start, service = time.monotonic(), self.service
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("expected Content-Type: application/json", status=415)
        body = await read_body(request, service.limits.body)
        ask = await self.read(protocol.read_ask, body, service.name, service.limits)
        prompt = await self.read(make_prompt, await until_gone(request, fetch_images(ask, service)), service)
        answer = Answer(service, ask, self.metrics, start)
        await self.read(answer.submit, prompt)
        if not ask.stream:
            return reply(await until_gone(request, answer.whole()))
        events = answer.stream()
        return Events(answer, await until_gone(request, anext(events)), events)

    async def read(self, function: Callable[..., Result], *given: Any) -> Result:
        """Return what a function gives that would hold up everybody else, from one of a few threads."""
        return await anyio.to_thread.run_sync(functools.partial(function, *given), limiter=self.readers)

    async def models(self, request: Request) -> Response:
        return reply({"object": "list", "data": [self.model]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.service.name:
            raise Refused("there is no such model", "model", status=404, code="model_not_found")
        return reply(self.model)

    async def health(self, request: Request) -> Response:
        alive = self.service.engine.alive
        return reply({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def figures(self, request: Request) -> Response:
        text = prometheus.generate_latest(self.metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        return reply(self.description)

    async def page(self, request: Request) -> Response:
        return FileResponse(os.path.join(HERE, "page", "index.html"))


def make_app(service: Service) -> ASGIApp:
    """Return the ASGI application; it closes the engine when it is shut down."""
    endpoints = Endpoints(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.engine.close, CLOSE_SECONDS)

    routes = [
        Route("/v1/chat/completions", endpoints.complete, methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.one_model),
        Route("/health", endpoints.health),
        Route("/ready", endpoints.health),
        Route("/metrics", endpoints.figures),
        Route("/openapi.json", endpoints.openapi),
        Route("/", endpoints.page),
        Mount("/page", StaticFiles(directory=os.path.join(HERE, "page"))),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers=dict.fromkeys((Refused, HTTPException, Exception), error_reply),
    )
    app.router.redirect_slashes = False  # it would lead to whatever host a client names
    # Around all of Starlette: as a middleware of its own it would not see the replies to errors that were not foreseen.
    return Guard(app, service, endpoints.metrics)


# ---- replies --------------------------------------------------------------------------------------------------------


def reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON in ASCII: half characters that a client sent can be quoted to it as well."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_reply(_: Request, error: Exception) -> Response:
    """Return what a client is told of an error; of one that we did not foresee, no more than that there was one."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):  # Starlette's own
        reasons = {404: "there is nothing at this path", 405: "this path does not answer to this method"}
        headers = dict(error.headers or {})
        error = Refused(reasons.get(error.status_code, error.detail), status=error.status_code)
    elif not isinstance(error, Refused):
        error = Refused("the server failed on this request; its log says why", status=500)
    headers |= {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status, {})
    return reply(error.content, error.status, headers)


class Guard:
    """Everything that holds for all paths: who may ask, which headers go out, that a reader reads, what is counted."""

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics):
        self.app, self.service, self.metrics = app, service, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                path = scope["path"] if scope["path"] in PATHS else "other"  # nobody may add labels
                self.metrics.requests.labels(path, message["status"]).inc()
            async with asyncio.timeout(READ_SECONDS):
                await send(message)

        request = Request(scope)
        try:
            self.check(request)
        except Refused as error:
            await error_reply(request, error)(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)

    def check(self, request: Request) -> None:
        """Raise Refused for a client without the key, and for one that a name of someone else led here."""
        path, hosts = request.scope["path"], self.service.hosts
        named = HOST.fullmatch(request.headers.get("host", "").lower())
        if hosts and (named is None or named[1].strip("[]") not in hosts):
            raise Refused(f"the server is at {hosts[0]} only", status=421)
        if path in OPEN_PATHS or path.startswith("/page/") or not self.service.key:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.service.key.encode()):
            raise Refused("the API key is missing or wrong", status=401, code="invalid_api_key")


async def until_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of `work`, which is cancelled as soon as the client leaves: then Refused is raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused("the client left", status=499)
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


# ---- from the bytes of a request to a prompt ------------------------------------------------------------------------


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body. Raises Refused where it is larger than `limit`, or does not come.

    A body that is too large is read to its end all the same and thrown away: a client that still sends when the
    connection is closed never sees the reply.
    """
    body, size, more = bytearray(), 0, True
    end = time.monotonic() + UPLOAD_SECONDS
    while more:
        try:
            seconds = min(BODY_SECONDS, max(0, end - time.monotonic()))
            message = await asyncio.wait_for(request.receive(), seconds)
        except TimeoutError:
            break
        if message["type"] == "http.disconnect":
            raise Refused("the client left", status=499)
        body += message["body"]
        size, more = size + len(message["body"]), message["more_body"]
        if size > limit:
            body.clear()
    if size > limit:
        raise Refused(f"the body is larger than {limit:,} bytes", status=413)
    if more:
        raise Refused("the body did not come in time", status=408)
    return bytes(body)


async def fetch_images(ask: Ask, service: Service) -> list[dict[str, Any]]:
    """Return the messages with what lies at http(s) addresses in its place.

    Raises Refused for one that may not be, and where all together are too large or take too long.
    """
    left = service.limits.body

    async def fetched(part: dict[str, Any]) -> dict[str, Any]:
        nonlocal left
        if part["type"] != "image":
            return part
        url, where = part["image"]
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return part
        if scheme not in images.PORTS:
            raise Refused(f"{where}: expected a data: URL of an image", where)
        if not service.remote_images:
            raise Refused(f"{where}: this server fetches no images; give a data: URL", where)
        content = await images.fetch(url, where, left)
        left -= len(content)
        return {"type": "image", "image": ImageBytes(content, where)}

    try:
        async with asyncio.timeout(FETCH_SECONDS):
            return [
                message | {"content": [await fetched(part) for part in message["content"]]} for message in ask.messages
            ]
    except TimeoutError:
        raise Refused(f"images from other servers took more than {FETCH_SECONDS:g} s", "messages") from None


def make_prompt(messages: list[dict[str, Any]], service: Service) -> Prompt:
    """Return what the model is asked. Raises Refused; images are decoded only when all of them are within limits."""
    contents = []
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        if isinstance(part["image"], ImageAt):
            part["image"] = ImageBytes(images.read_data_url(*part["image"]), part["image"].where)
        contents.append(part["image"])
    try:
        sizes = [image_size(content) for content in contents]
        pixels = sum(width * height for width, height in sizes)
        if pixels > service.limits.pixels:
            raise Refused(f"{pixels:,} pixels; at most {service.limits.pixels:,} in one request", "messages")
        return service.processor.prompt(messages)
    except InputError as error:
        # What Pillow says of a damaged file may hold addresses of memory.
        raise Refused(re.sub(r"(truncated or damaged) \(.*\)", r"\1", str(error)), "messages") from None


def warm_up(service: Service) -> None:
    """Answer short questions with and without an image, so that a first client with one like them waits for less.

    This compiles the vision tower, a prefill for each and the decoder. Prompts of other lengths, several at once, more
    room a slot and log-probabilities compile when they are first asked for. Raises what the engine fails with.
    """
    events: queue.Queue[Piece | End | Failed] = queue.Queue()
    # The longest comes first, as more room compiles all anew; what follows starts from the system text that a slot then
    # holds, as the questions of clients do.
    white, black = (Image.new("RGB", (64, 64), color) for color in ("white", "black"))
    for shown in ([white], [], [black]):
        prompt = service.processor.prompt([question_message("?", shown)])
        service.engine.submit(prompt, Sampling(max_new_tokens=2), events.put)
        while not isinstance(event := events.get(), End):
            if isinstance(event, Failed):
                raise event.error


# ---- listening ------------------------------------------------------------------------------------------------------


class Connection(H11Protocol):
    """uvicorn's connection, closed where the headers of a request do not come in time."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.timer = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = None
        elif self.timer is None:
            self.timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().connection_lost(exc)


def make_server(service: Service) -> uvicorn.Server:
    """Return the server, to be run on a socket; on SIGTERM it finishes what runs within 30 seconds."""
    config = uvicorn.Config(
        make_app(service),
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=STOP_SECONDS,
        limit_concurrency=CONNECTIONS,
        log_config=None,  # its own would close the handlers that are there
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    return uvicorn.Server(config)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet. Raises InputError where the address is not to be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host={host} --port={port}: cannot listen there ({reason}); choose another port") from None
    return bound
