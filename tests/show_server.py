"""Load `serve` with many streaming clients: `make load MODEL=SRC`, or python -m tests.show_server --model=SRC.

The questions are about scenes of the demo's world, greedy. They are asked one after the other first, of a server with
one slot: that gives the answers and the rate that the rest is held against. Then --clients ask at once for --minutes.
Printed are errors, answers that are another's, both rates, the time to the first token, and the server's memory.
"""

import argparse
import asyncio
import base64
import io
import json
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np

from llava_jax.demo import world
from tests.serve_process import Served, served


class Reply(NamedTuple):
    text: str
    first: float
    whole: float
    tokens: int


class Client:
    """One connection, kept open; the least that reads server-sent events, since it shares the server's cores."""

    def __init__(self, url: str):
        self.host, self.port = url.removeprefix("http://").split(":")
        self.reader: asyncio.StreamReader | None = None

    async def ask(self, body: bytes) -> Reply:
        start, first, text, tokens = time.monotonic(), 0.0, "", 0
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, int(self.port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        reply = await self.reader.readuntil(b"\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 200"), reply[:200]
        while (size := int(await self.reader.readuntil(b"\r\n"), 16)) > 0:
            for event in (await self.reader.readexactly(size + 2)).split(b"\n\n"):
                if not event.startswith(b"data: {"):
                    continue
                chunk = json.loads(event[6:])
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content", "")
                    first = first or (time.monotonic() - start if text else 0.0)
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        await self.reader.readexactly(2)
        return Reply(text, first or time.monotonic() - start, time.monotonic() - start, tokens)


def questions(number: int, model: str) -> list[bytes]:
    """Return the bodies of `number` requests, each about a scene of its own: short questions and descriptions."""
    rng = np.random.default_rng(0)
    bodies = []
    for index, scene in enumerate(world.sample_scenes(rng, number, held_out=True)):
        file = io.BytesIO()
        world.draw(scene, rng)[0].save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        text = world.questions(scene, rng)[index % 5].text if index % 2 else "Describe the image in detail."
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 64}
        bodies.append(
            json.dumps({"model": model, "messages": [{"role": "user", "content": content}], **options}).encode()
        )
    return bodies


def memory(pid: int) -> float:
    """Return the MiB that a process holds."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


async def alone(server: Served, bodies: list[bytes]) -> tuple[list[Reply], float]:
    """Return the replies to requests that are sent one after the other, and how many came in a second."""
    one = Client(server.url)
    for body in bodies:  # compiles what there is to compile
        await one.ask(body)
    start = time.monotonic()
    replies = [await one.ask(body) for body in bodies]
    return replies, len(bodies) / (time.monotonic() - start)


async def load(
    server: Served, bodies: list[bytes], expected: list[Reply], rate_alone: float, clients: int, seconds: float
) -> bool:
    """Print the figures; return whether there was no error and every answer the right one."""
    _, rate_here = await alone(server, bodies)
    replies: list[Reply] = []
    faults: list[str] = []
    held: list[float] = []

    async def run(number: int, end: float, kept: list[Reply]) -> None:
        client, index = Client(server.url), number
        while time.monotonic() < end:
            try:
                reply = await client.ask(bodies[index % len(bodies)])
            except (AssertionError, OSError, asyncio.IncompleteReadError) as error:
                faults.append(f"error: {error!r}")
                client = Client(server.url)
                continue
            if reply.text != expected[index % len(bodies)].text:
                faults.append(
                    f"question {index % len(bodies)}: {reply.text!r}, alone {expected[index % len(bodies)].text!r}"
                )
            kept.append(reply)
            index += 7

    async def watch(end: float) -> None:
        while time.monotonic() < end:
            held.append(memory(server.pid))
            await asyncio.sleep(5)

    warm = time.monotonic() + 10
    await asyncio.gather(*(run(number, warm, []) for number in range(clients)))
    start = time.monotonic()
    await asyncio.gather(*(run(number, start + seconds, replies) for number in range(clients)), watch(start + seconds))
    rate = len(replies) / (time.monotonic() - start)
    first = sorted(reply.first for reply in replies)
    print(f"{clients} clients for {seconds:.0f} s: {rate:.1f} answers/s, {rate / rate_here:.2f} x one after the other")
    print(f"  ({rate_here:.1f} answers/s), and {rate / rate_alone:.2f} x one after the other of a server with one slot")
    print(f"time to first token: median {statistics.median(first):.2f} s, p95 {first[int(len(first) * 0.95)]:.2f} s")
    print(f"memory: {held[0]:.0f} MiB at the start, {max(held):.0f} at most, {held[-1]:.0f} at the end")
    print(f"{len(replies)} answers, {len(faults)} errors or answers of others")
    print("\n".join(faults[:5]))
    return not faults


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32)
    args = parser.parse_args()
    bodies = questions(args.questions, args.model.rstrip("/").rpartition("/")[2])
    with served(sys.executable, args.model, "--slots=1", "--max_length=256") as server:
        expected, rate = asyncio.run(alone(server, bodies))
        tokens = statistics.mean(reply.tokens for reply in expected)
        print(f"one after the other, one slot: {rate:.1f} answers/s, {tokens:.1f} tokens each", flush=True)
    with served(sys.executable, args.model, f"--slots={args.slots}", "--max_length=256") as server:
        right = asyncio.run(load(server, bodies, expected, rate, args.clients, args.minutes * 60))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
