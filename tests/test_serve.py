"""The server: OpenAI's client on it, and what a client can do to it."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import openai
import pytest

from llava_jax import api
from llava_jax.cli import main as cli
from llava_jax.cli import serve
from llava_jax.infer.engine import End, Engine, Piece, TokenLogprobs
from llava_jax.serve import server
from llava_jax.serve.answer import Service
from llava_jax.serve.protocol import Limits
from llava_jax.types import Sampling
from tests.serving import Words, ask, body, data_url, serving, shows, user
from tests.tiny_llava import draw_image, model

TWO = [
    shows(data_url(draw_image(0))),
    {"role": "assistant", "content": "A thing."},
    shows(data_url(draw_image(1)), "And this?"),
]
OURS = [
    *api.question("What is this?", draw_image(0)),
    {"role": "assistant", "content": "A thing."},
    *api.question("And this?", draw_image(1)),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model(str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(tiny, slots=2)


@pytest.fixture(scope="module")
def port(tiny, engine):
    with serving(engine, tiny.processor) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def words(tiny, **settings):
    """A server on an engine of words."""
    engine = Words(**{key: settings.pop(key) for key in ("seconds", "waiting", "error") if key in settings})
    return engine, serving(engine, tiny.processor, **settings)


# ---- OpenAI's client ------------------------------------------------------------------------------------------------


def test_a_conversation_about_two_images_is_answered_as_from_python(tiny, engine, client):
    expected = "".join(engine.stream(tiny.prompt(OURS), Sampling(max_new_tokens=12)))
    how = dict(model="tiny", messages=TWO, max_tokens=12)
    whole = client.chat.completions.create(**how)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == tiny.length(OURS) and whole.usage.completion_tokens == 12
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage and len(chunks) > 5

    async def asked() -> list[str]:
        many = openai.AsyncOpenAI(base_url=client.base_url, api_key="none")
        reply = await many.chat.completions.create(**how)
        stream = await many.chat.completions.create(**how, stream=True)
        return [reply.choices[0].message.content, "".join([c.choices[0].delta.content or "" async for c in stream])]

    assert asyncio.run(asked()) == [expected] * 2


def test_stops_and_logprobs(tiny, engine, client):
    greedy = "".join(engine.stream(tiny.prompt(OURS), Sampling(max_new_tokens=12)))
    how = dict(model="tiny", messages=TWO, max_completion_tokens=12)
    stopped = client.chat.completions.create(**how, stop=[greedy[3:5]]).choices[0]
    assert stopped.message.content.strip() == greedy[: greedy.find(greedy[3:5])].strip()
    assert stopped.finish_reason == "stop"
    scored = client.chat.completions.create(**how, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(scored) == 12 and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in scored)
    assert "".join(token.token for token in scored).strip() == greedy
    assert scored[0].top_logprobs[0].token == scored[0].token


def test_bytes_of_half_a_character_are_not_known(tiny):
    engine, served = words(tiny)

    def submit(prompt, sampling, emit, **_):
        ids = tiny.processor.tokenizer.encode_text("é#")[-3:]
        emit(Piece("é#", tuple(ids), tuple(TokenLogprobs(token, -1.0, ((token, -1.0),)) for token in ids)))
        emit(End("length", 1, 3))
        return SimpleNamespace(cancel=lambda: None)

    engine.submit = submit
    with served as port:
        found = ask(port, body(logprobs=True, top_logprobs=1))[1]["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in found] == [None, None, [35]]
    assert [token["top_logprobs"][0]["bytes"] for token in found] == [None, None, [35]]


@pytest.mark.parametrize("stream", [True, False])
def test_choices_and_what_the_engine_is_asked(tiny, stream):
    engine, served = words(tiny)
    with served as port:
        how = dict(
            n=3, seed=-1, temperature=0.7, top_p=0.9, top_k=5, stop="x", max_tokens=None, max_completion_tokens=2
        )
        # As Open WebUI asks: with tools that the model may call, and need not.
        how |= dict(tools=[{"type": "function", "function": {"name": "get_time"}}], tool_choice="auto")
        how |= dict(functions=[{"name": "get_time"}])
        status, reply, _ = ask(port, body(**how, stream=stream, user="me", response_format={"type": "text"}))
    assert status == 200
    assert [asked[1] for asked in engine.asked] == [
        Sampling(2, 0.7, top_p=0.9, top_k=5, seed=seed) for seed in (2**32 - 1, 0, 1)
    ]
    assert {asked[2:] for asked in engine.asked} == {(("x",), None)}
    if not stream:
        assert [choice["message"]["content"] for choice in reply["choices"]] == ["w0 w1 "] * 3
        assert reply["usage"]["completion_tokens"] == 6
    else:
        chunks = [json.loads(event[6:]) for event in reply.split("\n\n")[:-2]]
        texts = ["", "", ""]
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
        assert texts == ["w0 w1 "] * 3


def test_models_state_and_figures(port, client):
    assert [found.id for found in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("other")
    assert ask(port, path="/health", method="GET")[0] == 200 and ask(port, path="/ready", method="GET")[0] == 200
    client.chat.completions.create(model="tiny", messages=[user()], max_tokens=2)
    ask(port, path="/nowhere", method="GET")
    figures = ask(port, path="/metrics", method="GET")[1]
    assert "nowhere" not in figures and 'path="other",status="404"' in figures
    assert "llava_queued 0.0" in figures and 'status="200"' in figures and "llava_first_token_seconds_count" in figures
    assert set(ask(port, path="/openapi.json", method="GET")[1]["paths"]) >= {"/v1/chat/completions", "/health"}


# ---- clients that leave, wait, or are too many ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_a_second(tiny, stream):
    engine, served = words(tiny, seconds=0.02)
    with served as port:
        connection = socket.create_connection(("127.0.0.1", port))
        content = json.dumps(body(stream=stream, max_tokens=500)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        if stream:
            assert b"200 OK" in connection.recv(1000)
        wait(lambda: engine.running == 1)
        connection.close()
        wait(lambda: engine.running == 0, seconds=1)


def wait(true, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def test_a_full_queue_says_when_to_come_back(tiny):
    engine, served = words(tiny, seconds=0.02, waiting=1)
    with served as port:
        first = threading.Thread(target=ask, args=(port, body(max_tokens=20)))
        first.start()
        wait(lambda: engine.running == 1)
        status, reply, headers = ask(port, body())
        assert status == 429 and headers["retry-after"] == "1" and reply["error"]["type"] == "rate_limit_error"
        first.join()
        # Of several choices none is left running where one finds no place.
        assert ask(port, body(n=2))[0] == 429
        wait(lambda: engine.running == 0)
        assert ask(port, body())[0] == 200


def test_an_answer_that_takes_too_long_and_an_engine_that_fails(tiny):
    engine, served = words(tiny, seconds=0.02, timeout=0.2)
    with served as port:
        assert ask(port, body(max_tokens=400))[0] == 504
        late = ask(port, body(max_tokens=400, stream=True))[1]
        assert '"content": "w0 "' in late and '"type": "server_error"' in late and "[DONE]" not in late
        wait(lambda: engine.running == 0)
    engine, served = words(tiny, error=RuntimeError("secret of the device"))
    with served as port:
        for stream in (False, True):
            status, reply, _ = ask(port, body(stream=stream))
            assert status == 500 and reply["error"]["type"] == "server_error" and "secret" not in str(reply)
        engine.alive = False
        assert ask(port, path="/health", method="GET")[0] == 503


def test_an_error_that_was_not_foreseen_is_guarded_and_counted(tiny):
    engine, served = words(tiny)
    engine.submit = None
    with served as port:
        status, reply, headers = ask(port, body())
        assert status == 500 and "its log says why" in reply["error"]["message"]
        assert headers["x-content-type-options"] == "nosniff" and "content-security-policy" in headers
        assert 'status="500"} 1.0' in ask(port, path="/metrics", method="GET")[1]


def test_both_kinds_of_question_are_answered_before_the_first_client(tiny):
    engine = Words()
    server.warm_up(Service("tiny", engine, tiny.processor, Limits(512)))
    assert [len(prompt.pixels) for prompt, *_ in engine.asked] == [1, 0, 1]


def test_slow_clients_are_closed(tiny, monkeypatch):
    for name in ("HEADER_SECONDS", "BODY_SECONDS"):
        monkeypatch.setattr(server, name, 0.2)
    _, served = words(tiny)
    with served as port:
        for half in (b"", b"POST / HT", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(half)
            assert connection.recv(100) == b"", "closed without a word"
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head + b"Content-Length: 50\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


# ---- who may ask ----------------------------------------------------------------------------------------------------


def test_the_key_is_asked_everywhere_but_for_health_and_the_page(tiny):
    _, served = words(tiny, key="secret-key")
    with served as port:
        for path in ("/v1/models", "/metrics", "/ready", "/openapi.json", "/nowhere"):
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-key"}):
                status, reply, _ = ask(port, path=path, method="GET", **given)
                assert status == 401 and reply["error"]["code"] == "invalid_api_key", path
        assert ask(port, body())[0] == 401
        assert ask(port, path="/v1/models", method="GET", authorization="Bearer secret-key")[0] == 200
        assert ask(port, body(), authorization="Bearer secret-key")[0] == 200
        for path in ("/health", "/", "/page/app.js"):
            assert ask(port, path=path, method="GET")[0] == 200


def test_a_page_of_another_site_gets_nothing(tiny):
    _, served = words(tiny, hosts=("localhost", "127.0.0.1"))
    with served as port:
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "[::1", "[", "a:b:c", "@"):
            assert ask(port, path="/v1/models", method="GET", host=host)[0] == 421, host
        for host in (f"localhost:{port}", "LOCALHOST", f"127.0.0.1:{port}"):
            assert ask(port, path="/v1/models", method="GET", host=host)[0] == 200, host
        status, _, headers = ask(port, body(), content_type="text/plain", origin="http://evil.example")
        assert status == 415 and "access-control-allow-origin" not in headers
        status, _, headers = ask(port, path="/", method="GET")
        assert status == 200 and headers["content-security-policy"].startswith("default-src 'self'")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_ends_what_runs_on_sigterm_and_exits_with_0(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(serve, "load", lambda args: tiny)
    (tmp_path / "key").write_text("secret-key\n")
    found, replies = socket.create_server(("127.0.0.1", 0)), []
    port = found.getsockname()[1]
    found.close()

    head = {"authorization": "Bearer secret-key"}
    running = threading.Thread(target=lambda: replies.append(ask(port, body(max_tokens=300), **head)))

    def client() -> None:
        try:
            wait(lambda: _answers(port), seconds=60)
            running.start()
            wait(lambda: "llava_running 1.0" in ask(port, path="/metrics", method="GET", **head)[1])
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    other = threading.Thread(target=client)
    other.start()
    try:
        assert cli.main(["serve", "--model=tiny", f"--port={port}", "--slots=2", f"--api_key_file={tmp_path}/key"]) == 0
    finally:
        other.join()
        running.join()
        signal.signal(signal.SIGTERM, before)
    assert replies[0][0] == 200 and replies[0][1]["usage"]["completion_tokens"] == 300
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out


def service_of(flags, tiny, monkeypatch):
    """What the command would serve, without a server."""
    services, bind = [], server.bind

    def make_server(service):
        services.append(service)
        return SimpleNamespace(run=lambda sockets: sockets[0].close())

    monkeypatch.setattr(serve, "load", lambda args: tiny)
    monkeypatch.setattr(server, "bind", lambda host, port: bind("127.0.0.1", port))
    monkeypatch.setattr(server, "warm_up", lambda service: None)
    monkeypatch.setattr(server, "make_server", make_server)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert cli.main(["serve", "--model=tiny", "--port=0", *flags]) == 0
    monkeypatch.undo()
    return services[0]


@pytest.mark.parametrize("host", ["127.0.0.2", "0:0:0:0:0:0:0:1"])
def test_the_address_that_the_command_prints_is_answered(host, tiny, monkeypatch, capsys):
    hosts = service_of([f"--host={host}"], tiny, monkeypatch).hosts
    printed = capsys.readouterr().out.split("http://")[1].strip()
    _, served = words(tiny, hosts=hosts)
    with served as port:
        assert ask(port, path="/health", method="GET", host=printed)[0] == 200
        assert ask(port, path="/health", method="GET", host="evil.example")[0] == 421


def test_a_key_is_one_line_that_clients_can_send(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(serve.KEY, " secret-key\n")
    assert service_of([], tiny, monkeypatch).key == "secret-key"
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    assert cli.main(["serve", "--model=nowhere", f"--api_key_file={tmp_path}/key"]) == 2
    assert f"--api_key_file={tmp_path}/key: the key holds" in capsys.readouterr().err
    for key in ("schlüssel", "two\nlines"):
        monkeypatch.setenv(serve.KEY, key)
        assert cli.main(["serve", "--model=nowhere"]) == 2
        assert f"{serve.KEY}: the key holds a letter" in capsys.readouterr().err


def _answers(port: int) -> bool:
    try:
        return ask(port, path="/health", method="GET")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--host=0.0.0.0"], "other machines could ask; give a key"),
        (["--host=192.0.2.1", "--insecure"], "cannot listen there"),
        (["--port=70000"], "cannot listen there"),
        (["--slots=0"], "--slots=0: expected 1 or more"),
        (["--api_key_file=nowhere"], "--api_key_file=nowhere: no such file"),
    ],
)
def test_what_the_command_refuses_before_a_model_is_read(flags, message, capsys):
    assert cli.main(["serve", "--model=nowhere", *flags]) == 2
    assert message in capsys.readouterr().err
