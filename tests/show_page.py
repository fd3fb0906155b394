"""Drive the page of `serve` in headless Chromium and take screenshots: `make page MODEL=SRC`.

It needs playwright alone; the server is started with the Python of another environment. Images are dropped, pasted and
picked, a streamed answer read, one stopped midway, one made again, a question edited; then a person looks at what a
desktop, a phone and a dark desktop show.
"""

import argparse
import base64
import contextlib
import json
import pathlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serve_process import served

KEY = "the key of the page's test"
EXAMPLES = pathlib.Path(__file__).parent.parent / "llava_jax" / "serve" / "page" / "examples"
# The text of a model that tries what it can.
NASTY = """## A **bold** title

Some `code`, *emphasis* and a [link](https://example.com), <img src=x onerror="window.hacked = 1">
<script>window.hacked = 1</script>

- one
- two
  - three, and [not this](javascript:window.hacked=1)

| shape | colour |
| --- | --- |
| circle | red &amp; green |

```python
print("a < b")
```

![tracker](https://evil.example/x.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--python", default=".venv/bin/python")
    parser.add_argument("--output", type=pathlib.Path, default="build/page")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    expect.set_options(timeout=60_000)  # a program that is compiled for the first time
    args.output.mkdir(parents=True, exist_ok=True)
    with served(args.python, args.model, key=KEY) as server, sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        for show in (key, desktop, stop, markdown, phone):
            show(browser, server.url, args.output)
            print(f"{show.__name__}: as expected", flush=True)
        browser.close()
    print(f"screenshots in {args.output}")


def opened(browser: Browser, url: str, with_key: bool = True, **context) -> Page:
    """Open the page; whatever it says to the console, or asks of another host, is an error."""
    page = browser.new_context(**context).new_page()
    if with_key:
        page.add_init_script(f"sessionStorage.setItem('key', {json.dumps(KEY)})")
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: fail(f"the page fails: {error}"))
    page.on("console", lambda line: line.type == "error" and "401" not in line.text and fail(f"console: {line.text}"))
    page.on("request", lambda request: request.url.startswith((url, "data:", "blob:")) or fail(f"asks {request.url}"))
    page.goto(url)
    if with_key:
        expect(page.get_by_role("heading", level=1)).not_to_have_text("llava_jax")
    return page


def fail(problem: str) -> None:
    raise SystemExit(problem)


def give(page: Page, name: str, how: str) -> None:
    """Drop an image file on the page, or paste it."""
    content = base64.b64encode((EXAMPLES / name).read_bytes()).decode()
    script = """([content, name, how]) => {
        const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], name, { type: "image/png" }));
        const at = document.querySelector(how === "paste" ? "textarea" : ".app");
        if (how === "paste") at.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        else for (const kind of ["dragover", "drop"])
            at.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true }));
    }"""
    page.evaluate(script, [content, name, how])
    expect(page.get_by_alt_text("Image 1 to send")).to_be_visible()


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def done(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def key(browser: Browser, url: str, folder: pathlib.Path) -> None:
    page = opened(browser, url, with_key=False, viewport={"width": 1200, "height": 800})
    page.get_by_role("textbox", name="Key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("does not know this key")
    page.screenshot(path=folder / "key.png")
    page.get_by_role("textbox", name="Key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)


def desktop(browser: Browser, url: str, folder: pathlib.Path) -> None:
    page = opened(browser, url, viewport={"width": 1200, "height": 800})
    page.screenshot(path=folder / "start.png")
    give(page, "2.png", "drop")
    page.screenshot(path=folder / "dropped.png")
    ask(page, "What colour is the triangle?")
    done(page)
    answers = page.locator("li.assistant")
    expect(answers).to_have_count(1)
    first = answers.first.locator(".answer").inner_text()
    assert first.strip(), "an answer"
    ask(page, "How many objects are there?")
    done(page)
    expect(answers).to_have_count(2)
    page.screenshot(path=folder / "conversation.png")
    page.get_by_role("button", name="Regenerate").last.click()
    done(page)
    expect(answers).to_have_count(2)
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Your message").fill("Where is the blue square?")
    page.screenshot(path=folder / "edit.png")
    page.keyboard.press("Enter")
    expect(answers).to_have_count(1)
    done(page)
    page.locator("input[type=file]").set_input_files([EXAMPLES / "1.png", EXAMPLES / "3.png"])
    expect(page.get_by_alt_text("Image 2 to send")).to_be_visible()
    page.get_by_role("button", name="Remove image 1").click()
    ask(page, "How many objects are there?")
    done(page)
    expect(page.locator("li.user").last.locator("img")).to_have_count(1)
    expect(page.get_by_role("button", name="Copy").last).to_be_in_viewport()
    page.wait_for_function("scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0.8")
    page.screenshot(path=folder / "settings.png")
    page.get_by_label("Appearance").select_option("dark")
    page.get_by_text("Settings").click()
    page.screenshot(path=folder / "dark.png")
    page.get_by_role("button", name="New chat").click()
    expect(answers).to_have_count(0)
    page.screenshot(path=folder / "dark_start.png")


class Slow(BaseHTTPRequestHandler):
    """An answer of a word each 50 ms, for ever; `left` is set when the reader leaves."""

    left = threading.Event()

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                chunk = {"choices": [{"delta": {"content": "word "}, "finish_reason": None}]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                time.sleep(0.05)
        Slow.left.set()

    def log_message(self, *_):
        pass


def stop(browser: Browser, url: str, folder: pathlib.Path) -> None:
    """Stop an answer midway, with the button and with the keyboard; of a stand-in that is slow enough."""
    slow = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=slow.serve_forever, daemon=True).start()
    page = opened(browser, url, viewport={"width": 1200, "height": 800})
    page.route("**/v1/chat/completions", lambda route: route.continue_(url=f"http://127.0.0.1:{slow.server_port}/"))
    for leave in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        Slow.left.clear()
        ask(page, "Tell me a long story.")
        answer = page.locator("li.assistant").last
        expect(answer.locator(".answer")).to_contain_text("word word word")
        page.screenshot(path=folder / "streaming.png")
        leave()
        done(page)
        expect(answer).to_contain_text("stopped")
        assert Slow.left.wait(5), "the server is told"


def markdown(browser: Browser, url: str, folder: pathlib.Path) -> None:
    """Show an answer full of Markdown and HTML, in two chunks that are cut inside a character."""
    page = opened(browser, url, viewport={"width": 1200, "height": 1000})
    half = len(NASTY) // 2
    chunks = [{"delta": {"content": text}, "finish_reason": None} for text in (NASTY[:half], NASTY[half:])]
    chunks.append({"delta": {}, "finish_reason": "stop"})
    body = "".join(f"data: {json.dumps({'choices': [chunk]})}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "Show me everything.")
    done(page)
    answer = page.locator("li.assistant .answer")
    assert page.evaluate("window.hacked") is None, "what the model writes ran"
    assert answer.locator("img, script, [onerror]").count() == 0, "what the model writes became HTML"
    assert answer.locator("table td").all_inner_texts() == ["circle", "red & green"]
    assert answer.locator("a").count() == 1, "only the link to the web is one"
    expect(answer).to_contain_text("<script>window.hacked = 1</script>")
    page.screenshot(path=folder / "markdown.png")


def phone(browser: Browser, url: str, folder: pathlib.Path) -> None:
    page = opened(browser, url, viewport={"width": 390, "height": 844}, device_scale_factor=2, has_touch=True)
    page.screenshot(path=folder / "phone_start.png")
    page.get_by_role("button", name="How many objects").click()
    done(page)
    give(page, "1.png", "paste")
    page.get_by_label("Message", exact=True).fill("And in this one?")
    page.screenshot(path=folder / "phone.png")
    wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert not wide, "nothing stands out of the phone's width"


if __name__ == "__main__":
    main()
