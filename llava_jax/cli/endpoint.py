"""Flags of the commands that ask a model behind an OpenAI-compatible endpoint: how, and what it may cost."""

import json
import math
import os
import threading
import urllib.parse
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from llava_jax.cli.flags import check_least
from llava_jax.types import InputError

if TYPE_CHECKING:
    from llava_jax.synthesize.budget import Prices
    from llava_jax.synthesize.teacher import Teacher

KEY = "OPENAI_API_KEY"
ENDPOINT = f"OpenAI-compatible, ends in /v1; its key stands in {KEY}"
# What a request may not be given: it is ours, or answers of it could not be read.
OURS = ("messages", "model", "stream", "n")


def endpoint_flags(parser: ArgumentParser, group: Any, *, request: str | None, attempts: int) -> None:
    """Add the flags besides the model's name and its endpoint, with their defaults, to a group and one of the cost."""
    if request is not None:
        group.add_argument("--request", default=request, metavar="JSON", help=f"sent besides ({request})")
    group.add_argument("--concurrency", type=int, default=8, help="requests under way at a time (8)")
    again = f"answers to a request until one can be used ({attempts})"
    group.add_argument("--attempts", type=int, default=attempts, help=again)
    cost = parser.add_argument_group("cost")
    cost.add_argument("--price", metavar="IN,OUT", help="USD for a million tokens asked, and answered")
    cost.add_argument("--budget_usd", type=float, default=0.0, help="stop before all answers cost more; 0, never (0)")
    cost.add_argument("--budget_tokens", type=int, default=0, help="the same in tokens, asked and answered (0)")


def check_costs(args: Namespace) -> None:
    """Raise InputError for a flag of `endpoint_flags` out of its range."""
    check_least(args, 0, "budget_usd", "budget_tokens")
    for name, most in (("concurrency", 1024), ("attempts", 100)):
        if not 1 <= getattr(args, name) <= most:
            raise InputError(f"--{name}={getattr(args, name)}: expected 1 to {most}")


def check_endpoint(args: Namespace, model: str, request: str) -> "tuple[dict[str, Any], Prices | None]":
    """Return (what a request to the model holds besides messages, prices). Raises InputError."""
    if args.endpoint:
        _check_address(args.endpoint)
    if args.budget_usd and not args.price:
        raise InputError("--budget_usd needs --price=IN,OUT, USD for a million tokens asked and answered")
    return {"model": model, **_request(request)}, _prices(args.price)


def _check_address(endpoint: str) -> None:
    try:
        parts = urllib.parse.urlsplit(endpoint)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise InputError(f"--endpoint={endpoint}: no address, expected one such as http://localhost:8000/v1")


def _request(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise InputError(f'--request={text!r:.60}: not JSON ({error}), as {{"max_tokens": 2048}}') from error
    if not isinstance(fields, dict) or set(OURS) & fields.keys():
        raise InputError(f"--request={text!r:.60}: expected a JSON object without {', '.join(OURS)}")
    for name in ("max_tokens", "max_completion_tokens"):
        value = fields.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"--request: {name} is {value!r}, expected 1 or more")
    return fields


def _prices(text: str | None) -> "Prices | None":
    from llava_jax.synthesize.budget import Prices

    if text is None:
        return None
    try:
        tokens_in, tokens_out = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--price={text}: expected IN,OUT, as 2.50,10") from error
    if not (0 <= tokens_in < math.inf and 0 <= tokens_out < math.inf):
        raise InputError(f"--price={text}: expected two prices of 0 or more")
    return Prices(tokens_in, tokens_out)


def open_endpoint(endpoint: str, settings: dict[str, Any], stop: threading.Event) -> "Teacher":
    """Return the model behind an endpoint. Raises InputError for a key that cannot be one."""
    try:
        from llava_jax.synthesize.endpoint import EndpointTeacher
    except ImportError as error:
        needs = 'is not installed, which asks endpoints: pip install "llava-jax[teacher]"'
        raise InputError(f"{error.name} {needs}") from error
    key = os.environ.get(KEY, "").strip()
    if not key and "api.openai.com" in endpoint:
        raise InputError(f"{endpoint} needs a key: put it in the environment as {KEY}")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the key in {KEY} holds a letter that no key has; copy it again")
    # Servers of one's own take any key, but the client sends no request without one.
    return EndpointTeacher(endpoint, key or "none", settings, stop)
