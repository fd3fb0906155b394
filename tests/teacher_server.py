"""An OpenAI-compatible server that delays, refuses, breaks and talks nonsense at given rates, over real HTTP."""

import contextlib
import dataclasses
import http.server
import json
import random
import threading
import time

from llava_jax.synthesize.kinds import KINDS, load_prompts


@dataclasses.dataclass(frozen=True)
class Faults:
    """Shares of the requests that meet each fault; `delay` is the longest an answer takes, in seconds."""

    delay: float = 0.0
    busy: float = 0.0  # 429 with Retry-After
    broken: float = 0.0  # 500
    cut: float = 0.0  # the connection ends in the middle of the answer
    garbage: float = 0.0  # 200 with what is no JSON, or JSON of another kind
    wrong: float = 0.0  # a whole answer whose questions and answers do not alternate
    retry_after: float = 1.0

    def draw(self, rng: random.Random) -> str:
        names = ("busy", "broken", "cut", "garbage", "wrong")
        drawn = rng.random()
        for name in names:
            drawn -= getattr(self, name)
            if drawn < 0:
                return name
        return "good"


@dataclasses.dataclass(frozen=True)
class Seen:
    """One request: when, about what, its fate, its headers and its body."""

    at: float
    about: tuple[str, str]
    fate: str
    headers: dict
    body: dict


def kind_of(messages: list[dict]) -> str:
    """Which of our prompts a request begins with; "" for another one."""
    systems = {load_prompts(kind)[0]["content"]: kind for kind in KINDS}
    return systems.get(messages[0]["content"], "")


def good_answer(kind: str, text: str) -> str:
    """An answer in the layout of its kind that names what was asked, so that rows can be told apart."""
    told = text.splitlines()[0]
    if kind == "detail":
        return f"The scene shows this: {told}"
    blocks = [f"Question:\nWhat is there?\n===\nAnswer:\n{told}"]
    if kind == "conversation":
        blocks.append("Question:\nIs it day?\n===\nAnswer:\nYes, the light says so.")
    return "\n===\n".join(blocks)


def wrong_answer(kind: str, text: str) -> str:
    if kind == "detail":
        return "Question:\nWhat is there?\n===\nAnswer:\nA scene."
    return f"Question:\n{text.splitlines()[0]}\n===\nQuestion:\nWhy?"


class TeacherServer:
    """The server at `url` while the `with` block runs; `seen` has every request in the order of arrival."""

    def __init__(self, faults: Faults, seed: int = 0, answer=good_answer):
        self.faults, self.seen, self.answer = faults, [], answer
        self.at_once = self.most_at_once = 0
        self.refuse: tuple[int, dict] | None = None
        self._rng, self._lock, self._kinds = random.Random(seed), threading.Lock(), {}

    def __enter__(self):
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self):
                with contextlib.suppress(ConnectionError):  # of a client that was killed
                    super().handle()

            def do_POST(self):
                owner._answer(self)

            def log_message(self, *words):
                del words

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler):
        length = int(handler.headers["Content-Length"])
        sent = handler.rfile.read(length)
        if len(sent) < length:  # of a client that was killed while it spoke: it has asked nothing
            handler.close_connection = True
            return
        body = json.loads(sent)
        messages = body["messages"]
        system = messages[0]["content"]
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            if system not in self._kinds:
                self._kinds[system] = kind_of(messages)
            about = (self._kinds[system], messages[-1]["content"])
            fate, wait = self.faults.draw(self._rng), self._rng.random() * self.faults.delay
            self.seen.append(Seen(time.monotonic(), about, fate, headers, body))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(wait)
        with self._lock:
            self.at_once -= 1
        if self.refuse:
            _send(handler, self.refuse[0], json.dumps(self.refuse[1]))
        else:
            self._meet(handler, fate, about, body)

    def _meet(self, handler, fate, about, body):
        if fate == "busy":
            error = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
            _send(handler, 429, json.dumps(error), f"Retry-After: {self.faults.retry_after}\r\n")
            return
        if fate == "broken":
            _send(handler, 500, "oh no", kind="text/plain")
            return
        text = wrong_answer(*about) if fate == "wrong" else self.answer(*about)
        asked = sum(len(message["content"]) for message in body["messages"]) // 4
        whole = completion(text, body["model"], asked)
        if fate == "garbage":
            nonsense = ('{"choices": [', "<html>busy</html>", '{"object": "list", "data": []}', '"text"')
            with self._lock:
                found = self._rng.choice(nonsense)
            _send(handler, 200, found, kind="text/html" if found.startswith("<") else "application/json")
        elif fate == "cut":
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(whole.encode())}\r\n\r\n"
            handler.wfile.write(head.encode() + whole.encode()[: len(whole) // 2])
            handler.close_connection = True
        else:
            _send(handler, 200, whole)


def completion(text: str, model: str = "served", tokens: int = 100, finish: str = "stop") -> str:
    """A chat completion as JSON."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": tokens, "completion_tokens": len(text) // 4, "total_tokens": tokens + len(text) // 4}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"id": "c", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage})


def _send(handler, status, text, more="", kind="application/json"):
    """The whole response in one write: headers and body apart would wait for each other."""
    data = text.encode()
    head = f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{more}\r\n"
    handler.wfile.write(head.encode() + data)
