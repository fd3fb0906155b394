"""A teacher behind an OpenAI-compatible endpoint, through the `openai` client."""

import email.utils
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import openai

from llava_jax.synthesize.teacher import Message, Reply, RequestFailed, read_completion
from llava_jax.types import InputError

TRIES = 12
CONNECT_WAIT, ANSWER_WAIT = 15.0, 600.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
LONGEST_ASKED_WAIT = 3600.0  # an endpoint that asks for more ends the run
# Tries without a connection, or without a single chat completion, before the address counts as wrong.
TRIES_UNREACHED = 4
# Errors that every request would get, and what to do about them.
WRONG_FOR_ALL = {
    401: "put the key of this endpoint in the environment as OPENAI_API_KEY",
    403: "take a key in OPENAI_API_KEY that may use this model",
    404: "expected an address that ends in /v1, and a model that is there",
}
TRANSIENT = (408, 409, 425, 429)


class EndpointTeacher:
    """A model behind the chat completions of `endpoint` (…/v1); `settings` are its name and what else is sent.

    Transient errors (429, 5xx, lost connections, answers that are not JSON) are tried again, after the time the
    endpoint asks for (Retry-After), or else with exponential backoff and jitter. `stop` ends the waiting.
    """

    def __init__(self, endpoint: str, key: str, settings: Mapping[str, Any], stop: threading.Event):
        self.name = str(settings["model"])
        self.settings = settings
        self._endpoint, self._key, self._stop = endpoint, key, stop
        self._reached = self._answered = False
        self._client = openai.OpenAI(
            base_url=endpoint, api_key=key, max_retries=0, timeout=openai.Timeout(ANSWER_WAIT, connect=CONNECT_WAIT)
        )

    def answer(self, messages: Sequence[Message]) -> Reply:
        """See `Teacher`."""
        problem, nonsense = "", 0
        for tried in range(1, TRIES + 1):
            asked_for: float | None = None
            try:
                payload: Any = list(messages)  # the client's own types are narrower
                more = {name: value for name, value in self.settings.items() if name != "model"}
                create = self._client.chat.completions.with_raw_response.create
                response = create(model=self.name, messages=payload, extra_body=more)
                reply = read_completion(json.loads(response.text))
                self._reached = self._answered = True
                return reply
            except openai.APIStatusError as error:
                self._reached = True
                self._give_up(error)
                problem = f"status {error.status_code}"
                asked_for = retry_after(error.response.headers)
            except openai.APIConnectionError as error:
                problem = "no answer in time" if isinstance(error, openai.APITimeoutError) else "connection lost"
                if not self._reached and tried >= TRIES_UNREACHED:
                    raise InputError(
                        f"{self._endpoint}: cannot be reached ({error.__cause__ or error}); is it up, and the address "
                        "right?"
                    ) from error
            except (ValueError, RecursionError) as error:
                self._reached = True
                problem = f"an answer that is no chat completion ({error})"
                nonsense += 1
                if not self._answered and nonsense == tried >= TRIES_UNREACHED:
                    raise InputError(f"{self._endpoint}: gives {problem:.200}; {WRONG_FOR_ALL[404]}") from error
            self._wait(tried, asked_for)
        raise RequestFailed(f"no answer after {TRIES} tries, at last: {problem:.200}")

    def _give_up(self, error: openai.APIStatusError) -> None:
        """Raise for what another try does not change: InputError when no request can succeed, else RequestFailed."""
        status = error.status_code
        says = " ".join(str(error.message).replace(self._key, "***").split())[:300]
        if status in WRONG_FOR_ALL:
            raise InputError(
                f"{self._endpoint}: refuses with status {status}: {says}; {WRONG_FOR_ALL[status]}"
            ) from error
        if error.code == "insufficient_quota":
            raise InputError(
                f"{self._endpoint}: the quota is spent: {says}; the same command continues when there is more"
            ) from error
        if status < 500 and status not in TRANSIENT:
            raise RequestFailed(f"refused with status {status}: {says}") from error

    def _wait(self, tried: int, asked_for: float | None) -> None:
        if asked_for is not None and asked_for > LONGEST_ASKED_WAIT:
            raise InputError(f"{self._endpoint}: asks to come back in {asked_for:.0f} s; run the command again then")
        backoff = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tried - 1)) * random.uniform(0.5, 1.0)
        if self._stop.wait(backoff if asked_for is None else asked_for + random.uniform(0.0, 0.1 * FIRST_WAIT)):
            raise RequestFailed("stopped")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait, None without them: Retry-After of RFC 9110, 10.2.3."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
