"""Requests and answers of OpenAI's chat completions: what a request asks for, checked, and what it is answered with."""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_jax.serve.errors import Refused
from llava_jax.settings import nearest
from llava_jax.types import Sampling

# Keys that change nothing about the answer.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "verbosity", "reasoning_effort"),
)
# Lists of what the model may call. It never calls one, which clients must allow for anyway; some, such as Open WebUI,
# offer tools with every request. A call that is required is refused, below.
OFFERED = ("tools", "functions")
# Keys of what is not done here, each with the values that ask for nothing of it.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
KEYS = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed"),
    *("stream", "stream_options", "logprobs", "top_logprobs"),
)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS, STOP_LENGTH, MOST_LOGPROBS = 16, 256, 20
# Clients ask for far more than a context holds, and mean as much as there is.
MOST_TOKENS = 2**20
# No token of a vocabulary is longer, so a text of more characters than this a position cannot fit.
TOKEN_CHARACTERS = 128


class Limits(NamedTuple):
    """What one request may hold; `pixels` is over all its images, `positions` the model's, prompt and answer."""

    positions: int
    body: int = 20_000_000
    images: int = 8
    pixels: int = 64_000_000
    choices: int = 4


class ImageAt(NamedTuple):
    """An image part of a request: its address, and where it stands, for messages."""

    url: str
    where: str


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request; `messages` are the model's (see `api.read_messages`), with an `ImageAt` where an image comes.

    `logprobs` is how many alternatives a token comes with, None for no log-probabilities at all.
    """

    messages: list[dict[str, Any]]
    sampling: Sampling
    choices: int
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool

    @property
    def images(self) -> list[ImageAt]:
        parts = [part for message in self.messages for part in message["content"]]
        return [part["image"] for part in parts if part["type"] == "image"]


def read_ask(body: bytes, model: str, limits: Limits) -> Ask:
    """Return what a request asks for. Raises Refused with the first thing in it that cannot be."""
    try:
        asked = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None
    if not isinstance(asked, dict):
        raise Refused("the body is not a JSON object")
    _check_keys(asked)
    if asked.get("model") is None:
        raise Refused(f"model is missing; here it is {json.dumps(model)}", "model")
    if asked["model"] != model:
        message = f"no model {_shown(asked['model'])}; here it is {json.dumps(model)}"
        raise Refused(message, "model", status=404, code="model_not_found")
    messages = _messages(asked.get("messages"), limits)
    options = _object(asked, "stream_options")
    if options and not asked.get("stream"):
        raise Refused("stream_options goes with stream: true", "stream_options")
    return Ask(
        messages,
        _sampling(asked, limits),
        choices=int(_number(asked, "n", 1, limits.choices, 1, whole=True)),
        stop=_stop(asked.get("stop")),
        logprobs=_logprobs(asked),
        stream=_flag(asked, "stream"),
        include_usage=_flag(options, "include_usage"),
    )


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _check_keys(asked: Mapping[str, Any]) -> None:
    for key, value in asked.items():
        if key in KEYS or key in IGNORED or value is None:
            continue
        if key in OFFERED:
            if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
                raise Refused(f"{key} is {_shown(value)}; expected a list of objects", key)
            continue
        if key not in UNSUPPORTED:
            raise Refused(f"there is no parameter {_shown(key)}{nearest(key[:80], KEYS)}", key[:80])
        if value not in UNSUPPORTED[key]:
            raise Refused(f"{key} is not supported by this server; leave it out", key, code="unsupported_parameter")


def _sampling(asked: Mapping[str, Any], limits: Limits) -> Sampling:
    newer, older = asked.get("max_completion_tokens"), asked.get("max_tokens")
    if newer is not None and older is not None and newer != older:
        raise Refused("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    name = "max_tokens" if newer is None else "max_completion_tokens"
    return Sampling(
        # The engine ends every answer where the context does, with finish_reason length.
        max_new_tokens=min(int(_number(asked, name, 1, MOST_TOKENS, MOST_TOKENS, whole=True)), limits.positions),
        temperature=_number(asked, "temperature", 0, 2, 0),
        top_p=_number(asked, "top_p", 1e-6, 1, 1),
        top_k=int(_number(asked, "top_k", 0, 1_000_000, 0, whole=True)),
        seed=int(_number(asked, "seed", -(2**63), 2**63 - 1, secrets.randbits(32), whole=True)) % 2**32,
    )


def _logprobs(asked: Mapping[str, Any]) -> int | None:
    top = int(_number(asked, "top_logprobs", 0, MOST_LOGPROBS, 0, whole=True))
    if _flag(asked, "logprobs"):
        return top
    if asked.get("top_logprobs") is not None:
        raise Refused("top_logprobs goes with logprobs: true", "top_logprobs")
    return None


def _stop(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    fits = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not fits or not all(isinstance(text, str) and 0 < len(text) <= STOP_LENGTH for text in stops):
        expected = f"a text, or up to {MOST_STOPS} of them, of 1 to {STOP_LENGTH} characters each"
        raise Refused(f"stop is {_shown(stop)}; expected {expected}", "stop")
    return tuple(stops)


def _messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise Refused(f"messages is {_shown(messages)}; expected a list of at least one message", "messages")
    read = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    parts = [part for message in read for part in message["content"]]
    images = sum(part["type"] == "image" for part in parts)
    if images > limits.images:
        raise Refused(f"{images} images; at most {limits.images} in one request", "messages")
    characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
    if characters > limits.positions * TOKEN_CHARACTERS:
        too_long = f"{characters:,} characters of text do not fit into the model's {limits.positions:,} tokens"
        raise Refused(too_long, "messages", code="context_length_exceeded")
    return read


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Refused(f"{where} is {_shown(message)}; expected an object with role and content", where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(f"{where}.role is {_shown(role)}; expected system, developer, user or assistant", f"{where}.role")
    for key, value in message.items():
        if key not in ("role", "content", "name") and value not in (None, [], {}, ""):
            raise Refused(f"{where}.{key[:80]} is not supported by this server; leave it out", f"{where}.{key[:80]}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refused(f"{where}.content is {_shown(content)}; expected a text or a list of parts", f"{where}.content")
    return {"role": ROLES[role], "content": [_part(part, f"{where}.content[{i}]") for i, part in enumerate(parts)]}


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image_url":
        raise Refused(f"{where} is {_shown(part)}; expected a part of type text or image_url", where)
    image = part.get("image_url")
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise Refused(f'{where}.image_url: expected an object, {{"url": "data:image/…"}}', f"{where}.image_url")
    return {"type": "image", "image": ImageAt(image["url"], f"{where}.image_url.url")}


def _number(
    asked: Mapping[str, Any], name: str, low: float, high: float, default: float, *, whole: bool = False
) -> float:
    value = asked.get(name)
    if value is None:
        return default
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise Refused(f"{name} is {_shown(value)}; expected {kind} from {low:g} to {high:g}", name)
    return value


def _flag(asked: Mapping[str, Any], name: str) -> bool:
    value = asked.get(name)
    if not isinstance(value, bool | None):
        raise Refused(f"{name} is {_shown(value)}; expected true or false", name)
    return bool(value)


def _object(asked: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = asked.get(name)
    if not isinstance(value, dict | None):
        raise Refused(f"{name} is {_shown(value)}; expected an object", name)
    return value or {}


def _shown(value: Any) -> str:
    """Return at most 80 characters of JSON, without a look into what may be deep or large."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return "missing" if value is None else json.dumps(value[:80] if isinstance(value, str) else value)[:80]


# ---- answers --------------------------------------------------------------------------------------------------------


def choice(index: int, key: str, content: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
    """Return one choice; `key` is message, or delta in a stream."""
    return {"index": index, key: content, "logprobs": logprobs, "finish_reason": reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
