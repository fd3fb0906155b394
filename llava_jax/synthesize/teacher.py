"""What writes instruction data: anything that answers chat messages."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

# {"role": "system" | "user" | "assistant", "content": text}, as OpenAI-compatible endpoints take them.
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Reply:
    """One raw answer: its text, why it ended (OpenAI's finish_reason), and the tokens that it cost."""

    text: str
    finish: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0


class RequestFailed(Exception):
    """No answer to one request, after all tries; its text is the reason, in words fit for counting."""


class Teacher(Protocol):
    """A language-only model; `name` is printed and saved in the journal.

    `settings` are what a request holds besides its messages (the model, sampling): an answer under other settings is
    another answer.
    """

    name: str
    settings: Mapping[str, Any]

    def answer(self, messages: Sequence[Message]) -> Reply:
        """Return the reply to a conversation that ends with a user message; called from several threads.

        Raises RequestFailed when this request gets none, and InputError when no request will.
        """
        ...


def read_completion(body: Any) -> Reply:
    """Return the reply in the JSON body of a chat completion. Raises ValueError for a body that is none."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        usage = body.get("usage") or {}
        finish = "refusal" if refusal else choice.get("finish_reason") or "stop"
        tokens_in, tokens_out = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no choices[0].message ({type(error).__name__}: {error})") from error
    text = refusal if text is None else text
    is_text = isinstance(text, str | None) and isinstance(finish, str)
    if not is_text or not isinstance(tokens_in, int) or not isinstance(tokens_out, int):
        raise ValueError("choices[0].message.content is not text")
    return Reply(text or "", finish, tokens_in, tokens_out)


def estimate_messages(messages: Sequence[Message]) -> int:
    """Estimate how many tokens a conversation has."""
    return estimate_tokens([message["content"] for message in messages])


def estimate_tokens(texts: Sequence[str]) -> int:
    """Estimate how many tokens texts have: one for four characters, as in English, and four for each message."""
    return sum(4 + (len(text) + 3) // 4 for text in texts)
