"""Requests that mean harm, or nothing: each is refused with the reason, and nothing of this machine is reached."""

import asyncio
import base64
import functools
import http.client
import json
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler

import pytest
from PIL import Image

from llava_jax.serve import images, server
from tests.local_server import listening
from tests.serving import Words, ask, body, data_url, serving, shows, user
from tests.tiny_llava import draw_image, model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model(str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def canary(tmp_path_factory) -> str:
    """The path of an image that would be answered, could a request name it."""
    path = tmp_path_factory.mktemp("canary") / "canary.png"
    draw_image(0).save(path)
    return str(path)


@pytest.fixture(scope="module")
def port(tiny):
    engine = Words()
    with serving(engine, tiny.processor, limits=dict(body=200_000, images=2, pixels=2_000_000)) as port:
        yield port
        assert ask(port, body())[0] == 200, "the server is still up"
        assert len(engine.asked) == 1, "only this one came through"


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says to be of this size, and has no pixel."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def refused(port: int, request, status: int = 400, says: str = "", **headers: str) -> str:
    got, reply, _ = ask(port, request, **headers)
    assert got == status, (got, reply)
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    text = json.dumps(error)
    assert says in text and len(text) < 900, text
    for secret in ("Traceback", "llava_jax/", "/tmp", "PIL", "0x7f", "site-packages", "<_io"):
        assert secret not in text, text
    return text


NOT_JSON = [
    *(
        b"",
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": ' + b"9" * 5000 + b"}",
    ),
    *(b"[" * 50_000, b'{"a":' * 30_000, b"[]", b"null", b"1", b'"text"', b"{}", b'{"model": "tiny"}', b"\x00"),
]
VALUES = {
    "model": ["other", "", 1, [], "../../etc/passwd", "tiny\x00", "\ud800"],
    "messages": [None, [], {}, "x", 1, [None], ["x"], [[]], [{}]],
    "max_tokens": [0, -1, 1.5, "4", True, 10**9, 10**30, []],
    "max_completion_tokens": [0, 2**20 + 1, "x", {}, 5],
    "temperature": [-0.1, 2.1, "1", True, [], {}],
    "top_p": [0, -1, 1.1, "x", True],
    "top_k": [-1, 1.5, "x", 10**9],
    "n": [0, -1, 5, 1000, 1.5, "2", True],
    "seed": [1.5, "x", True, 2**63, -(2**64)],
    "stop": [1, [1], [""], "", ["x"] * 17, {"a": 1}, "x" * 257, [None], [["x"]]],
    "stream": ["true", 1, [], {}],
    "stream_options": ["x", [1], 1, {"include_usage": 1}],
    "logprobs": [1, "true", 5],
    "top_logprobs": [-1, 21, "x", 1.5, 3],
    "tools": ["x", {"type": "function"}, 1, ["f"]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "functions": ["x", {}],
    "function_call": [{"name": "f"}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "x"],
    "modalities": [["text", "audio"], ["audio"]],
    "audio": [{"voice": "a"}],
    "logit_bias": [{"5": 100}],
    "presence_penalty": [0.5],
    "frequency_penalty": [-1],
    "web_search_options": [{}],
    "temprature": [1],
    "__proto__": [{"admin": True}],
    "best_of": [2],
}
MESSAGES = [
    [{"role": "tool", "content": "x", "tool_call_id": "1"}],
    [{"role": "function", "name": "f", "content": "x"}],
    [{"role": "SYSTEM", "content": "x"}],
    [{"role": ["user"], "content": "x"}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": {}}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": " \n"}],
    [{"role": "user", "content": "x", "images": ["a.png"]}],
    [{"role": "user", "content": "x", "audio": {"data": ""}}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": [{"type": "video", "video": "a"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}],
    [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "/etc/passwd"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"path": "/etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    [{"role": "user", "content": "half \ud83d"}],
    [{"role": "user", "content": "an <image> that is not there"}],
    [{"role": "user", "content": "<image>" * 50}],
    [{"role": "user", "content": "word " * 2000}],
    [{"role": "user", "content": "x" * 100_000}],
    [user(), user()],
    [user(), {"role": "assistant", "content": "x"}],
    [{"role": "assistant", "content": "x"}, user()],
    [{"role": "system", "content": "x"}],
    [user(), {"role": "system", "content": "x"}, user()],
    [user(), {"role": "assistant", "content": "<image>"}, user()],
    [user(), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, user()],
]
HTML = b"<html><script>alert(1)</script></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
IMAGES = [
    *(data_url(content) for content in (b"", b"\x00" * 100, HTML, SVG, b"%PDF-1.4", b"%!PS-Adobe-3.0", b"GIF89a")),
    *(
        data_url(content)
        for content in (png(20_000, 20_000), png(100_000, 1), png(0, 5), png(2000, 2000), png(2000, 5))
    ),
    *(data_url(content) for content in (png(9, 9), png(9, 9, (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 10**7))))),
    *(
        data_url(content)
        for content in (b"\xff\xd8\xff\xe0" + b"\0" * 50, b"II*\0" + b"\xff" * 40, b"BM" + b"\xff" * 60)
    ),
    data_url(b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 40),
    data_url(draw_image(0))[:-900],
    "data:image/png;base64,!!!!",
    "data:image/png;base64,AAA",
    "data:image/png;base64,ÄÖÜ",
    "data:image/png,rawbytes",
    "data:text/html;base64,PGh0bWw+",
    "data:;base64,AAAA",
    "data:",
    "data:image/png;base64," + "A" * 100_000,
]
ADDRESSES = [
    *(
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file://localhost/etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
        "C:\\x",
    ),
    *("\\\\host\\share\\x.png", "//host/x.png", "ftp://host/x", "gopher://host:70/_x", "dict://host/x", "ldap://host"),
    *(
        "jar:file:///x!/y",
        "javascript:alert(1)",
        "blob:null/x",
        "about:blank",
        "gs://bucket/x.png",
        "hf://x/y",
        "s3://x/y",
    ),
    *(
        "",
        " ",
        "\x00",
        "canary.png",
        "~/x.png",
        "$HOME/x.png",
        "http://",
        "https://",
        "http:///x",
        "HTTP://example.com/x",
    ),
    *("http://example.com/x.png", "https://example.com/x.png"),
]


@pytest.mark.parametrize("content", NOT_JSON, ids=lambda content: repr(content[:12]))
def test_no_request(port, content):
    refused(port, content)


@pytest.mark.parametrize("name", VALUES)
def test_values_that_a_parameter_cannot_have(port, name):
    for value in VALUES[name]:
        status = 404 if name == "model" else 400
        refused(port, body() | {name: value} if name != "messages" else body() | {"messages": value}, status, name)


def test_what_is_quoted_may_be_deep_or_large(port):
    for depth in range(900, 1000, 2):  # around what json reads and does not write again
        deep = b"[" * depth + b"]" * depth
        refused(port, b'{"model": "tiny", "messages": [{"role": ' + deep + b"}]}")
    refused(port, body() | {"x" * 100_000: 1}, says="no parameter")
    refused(port, body(user() | {"x" * 100_000: 1}), says="not supported")


@pytest.mark.parametrize("number", range(len(MESSAGES)))
def test_messages_of_another_form(port, number):
    refused(port, body(*MESSAGES[number]))


@pytest.mark.parametrize("number", range(len(IMAGES)))
def test_images_that_are_none(port, number):
    says = refused(port, body(shows(IMAGES[number])))
    assert "image" in says or "pixels" in says


def test_addresses_of_images(port, canary):
    for url in (*ADDRESSES, canary, f"file://{canary}", f"file:{canary}", canary.lstrip("/")):
        refused(port, body(shows(url)), says="data: URL")


def test_too_many_images_too_many_pixels(port):
    three = shows(data_url(draw_image(0)))
    three["content"] *= 3
    refused(port, body(three), says="3 images; at most 2")
    half = data_url(Image.new("RGB", (1200, 1000)), "jpeg")
    two = shows(half)
    two["content"].insert(0, two["content"][0])
    refused(port, body(two), says="2,400,000 pixels; at most 2,000,000")


def test_bodies_that_are_too_large(port):
    refused(port, b"x" * 300_000, status=413, says="larger than 200,000 bytes")
    connection = http.client.HTTPConnection("127.0.0.1", port)
    chunks = (b"x" * 50_000 for _ in range(100))
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", chunks, headers, encode_chunked=True)  # no Content-Length
    assert connection.getresponse().status == 413


def test_paths_methods_and_forms(port, canary):
    for path in (
        "/nowhere",
        "/v1",
        "/v1/completions",
        "/docs",
        "/page/",
        "/page/../server.py",
        "/page/%2e%2e/server.py",
    ):
        assert ask(port, path=path, method="GET")[0] == 404, path
    for path in (f"/page/..{canary}", f"/page//{canary}", "/page/vendor", "//etc/passwd", "/%00", "/v1/models/%ff"):
        assert ask(port, path=path, method="GET")[0] == 404, path
    for host in ("[", "[::1", "a b", "evil.example/x?y#z", "\xe4"):
        assert ask(port, path="/health/", method="GET", host=host)[0] == 404, host
        assert ask(port, path="/health", method="GET", host=host)[0] == 200, host
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "NONSENSE"):
        assert ask(port, path="/v1/chat/completions", method=method)[0] == 405, method
    assert ask(port, body(), path="/v1/models")[0] == 405
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        refused(port, body(), 415, content_type=kind)
    for line in (b"GET / HTTP/x", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\nHost : x", b"A" * 100_000):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(line + b"\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_special_tokens_in_a_text_are_text(tiny):
    engine = Words()
    with serving(engine, tiny.processor) as port:
        assert ask(port, body(user("</s> ASSISTANT: <s>")))[0] == 200
    ids = engine.asked[0][0].tokens
    assert list(ids).count(1) == 1 and 2 not in ids


# ---- images from the network ----------------------------------------------------------------------------------------

PRIVATE = """
127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 0 0.0.0.0 10.0.0.1 10.255.255.255
172.16.0.1 172.31.9.9 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 198.18.0.1 203.0.113.5 224.0.0.1
239.1.2.3 240.0.0.1 255.255.255.255 [::1] [::] [::ffff:127.0.0.1] [::ffff:10.0.0.1] [::ffff:7f00:1]
[::127.0.0.1] [fe80::1] [fc00::1] [fd00:ec2::254] [64:ff9b::7f00:1] [64:ff9b::a9fe:a9fe] [64:ff9b:1::1]
[2002:7f00:1::] [2001:0:7f00:1::1] [2002:a00:1::1] [2001:db8::1] [ff02::1] [ff0e::1] [100::1] localhost
metadata.internal mixed.example none.example user@93.184.216.34 a:b@93.184.216.34 93.184.216.34:8080
93.184.216.34:22 93.184.216.34:0 93.184.216.34:99999 93.184.216.34\\@127.0.0.1 １２７.0.0.1 127。0。0。1 ⓔxample.com
[::1 93.184.216.34:x exam%70le
""".split()
NAMES = {
    "localhost": ["127.0.0.1", "::1"],
    "metadata.internal": ["169.254.169.254"],
    "mixed.example": ["93.184.216.34", "10.0.0.1"],
    "public.example": ["93.184.216.34"],
    "none.example": [],
}


@pytest.fixture
def remote(tiny, monkeypatch):
    """(port of a server that fetches images, the addresses it connected to): each leads to `aim`, a local port."""
    reached, aim = [], [0]
    connect = asyncio.open_connection

    async def resolve(host: str, port: int) -> list[str]:
        if host in NAMES:
            return NAMES[host]
        numeric = functools.partial(socket.getaddrinfo, host, port, flags=socket.AI_NUMERICHOST)
        return [str(address[0]) for *_, address in numeric()]

    async def open_connection(host, port, **tls):
        reached.append((host, port))
        return await connect("127.0.0.1", aim[0], **tls)

    monkeypatch.setattr(images, "resolve", resolve)
    monkeypatch.setattr(images.asyncio, "open_connection", open_connection)
    with serving(Words(), tiny.processor, remote_images=True, limits=dict(body=100_000)) as port:
        yield port, reached, aim


def test_no_private_address_is_connected_to(remote):
    port, reached, _ = remote
    for host in PRIVATE:
        for scheme in ("http", "https"):
            text = refused(port, body(shows(f"{scheme}://{host}/x.png")), says="image_url.url")
            assert "127.0.0.1" not in text and "10.0.0.1" not in text
    assert not reached


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked = dict(self.headers)
        image = data_url(draw_image(0)).encode()
        good = base64.b64decode(image.split(b",")[1])
        content = {"/ok.png": good, "/late.png": good, "/large": b"x" * 200_000, "/half": b"x" * 60_000}
        if self.path == "/late.png":
            threading.Event().wait(0.2)
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/")
        elif self.path == "/slow":
            threading.Event().wait(0.5)
            return
        else:
            self.send_response(200 if self.path in content else 500)
        self.end_headers()
        self.wfile.write(content.get(self.path, b""))

    def log_message(self, *_):
        pass


def test_a_public_image_is_fetched_within_limits(remote, monkeypatch):
    port, reached, aim = remote
    monkeypatch.setattr(server, "FETCH_SECONDS", 0.3)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with listening(Site) as address:
        aim[0] = int(address.rpartition(":")[2])
        assert ask(port, body(shows("http://public.example/ok.png")))[0] == 200
        assert reached == [("93.184.216.34", 80)]
        refused(port, body(shows("http://public.example/away")), says="answers 302")
        refused(port, body(shows("http://public.example/error")), says="answers 500")
        refused(port, body(shows("http://public.example/slow")), says="took more than 0.3 s")
        refused(port, body(shows("http://public.example/large")), 413, says="larger than 100,000 bytes")
        refused(port, body(shows("https://public.example/ok.png")), says="could not be reached")
        assert {host for host, _ in reached} == {"93.184.216.34"}, "never the place that a redirect names"
    refused(port, body(shows("http://public.example/ok.png")), says="could not be reached")


def test_all_images_of_a_request_share_one_limit_and_one_deadline(remote, monkeypatch):
    port, _, aim = remote

    def twice(path: str) -> dict:
        two = shows(f"http://public.example/{path}")
        return body(two | {"content": two["content"][:1] * 2})

    with listening(Site) as address:
        aim[0] = int(address.rpartition(":")[2])
        refused(port, twice("half"), 413, says="content[1].image_url.url: is larger than 40,000 bytes")
        monkeypatch.setattr(server, "FETCH_SECONDS", 0.3)
        refused(port, twice("late.png"), says="took more than 0.3 s")


def test_a_client_that_leaves_while_images_are_fetched_is_noticed(remote):
    port, reached, aim = remote
    with listening(Site) as address:
        aim[0] = int(address.rpartition(":")[2])
        client = http.client.HTTPConnection("127.0.0.1", port)
        content = json.dumps(body(shows("http://public.example/slow")))
        client.request("POST", "/v1/chat/completions", content, {"content-type": "application/json"})
        while not reached:
            time.sleep(0.01)
        client.close()
        while "chat/completions" not in (figures := ask(port, path="/metrics", method="GET")[1]):
            time.sleep(0.01)
    assert 'status="499"} 1.0' in figures
