"""What writes instruction data: anything that answers chat messages."""

from collections.abc import Sequence
from typing import Protocol

# {"role": "system" | "user" | "assistant", "content": text}, as OpenAI-compatible endpoints take them.
Message = dict[str, str]


class Teacher(Protocol):
    """A language-only model; `name` is printed and names the teacher in the log of a run."""

    name: str

    def answer(self, messages: Sequence[Message]) -> str:
        """The reply to a conversation that ends with a user message."""
        ...
