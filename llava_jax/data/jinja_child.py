"""Chats rendered with a chat template of unknown origin, in a process of its own with limits on time and memory.

`python -P jinja_child.py` reads JSON with `source`, `chats` (each a list of messages) and `values` (of the template's
variables) from standard input, and writes a list of texts, null for a chat that the template refuses.
"""

import json
import resource
import sys

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEBIBYTES, CHARACTERS = 2, 512, 1 << 20
TOO_MUCH = 3  # the exit code where memory or characters do not do
# What a template can raise, however it is written.
REFUSALS = (
    *(TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)


def refuse(message: str) -> None:
    """Be a template's raise_exception."""
    raise TemplateError(message)


def main() -> int:
    """Render, and return the exit code."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEBIBYTES << 20, MEBIBYTES << 20))
    asked, texts = json.load(sys.stdin), []
    # As transformers compiles them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    names = {"raise_exception": refuse, "strftime_now": lambda _: "2024"}
    for chat in asked["chats"]:
        try:
            template = environment.from_string(asked["source"], globals=names)
            texts.append(template.render(messages=chat, add_generation_prompt=True, **asked["values"]))
        except REFUSALS:
            texts.append(None)
        except MemoryError:
            return TOO_MUCH
    if sum(len(text or "") for text in texts) > CHARACTERS:
        return TOO_MUCH
    json.dump(texts, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
