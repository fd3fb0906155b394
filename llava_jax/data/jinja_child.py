"""Chat templates of unknown origin: how they are compiled, and rendered in a process of its own with limits.

`python -P jinja_child.py` reads JSON with `source` and `renderings` (the variables of each) from standard input, and
writes a list of texts, null for a rendering that the template refuses.
"""

import datetime
import json
import resource
import sys
from collections.abc import Sequence
from typing import NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEBIBYTES, CHARACTERS = 2, 512, 1 << 20
TOO_MUCH = 3  # the exit code where memory or characters do not do
# Templates may write the date. What is trained, and what a resumed run reads, must not depend on the day; this one is
# what Llama 3's templates write where they know no date.
_TODAY = datetime.date(2024, 7, 26)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def compiled(source: str, extensions: Sequence[type[Extension]] = ()) -> jinja2.Template:
    """Compile a template with what transformers gives chat templates, and a date that stays."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, *extensions]
    )
    return environment.from_string(source, globals={"raise_exception": _refuse, "strftime_now": _TODAY.strftime})


def main() -> int:
    """Render, and return the exit code."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEBIBYTES << 20, MEBIBYTES << 20))
    asked, texts = json.load(sys.stdin), []
    for values in asked["renderings"]:
        try:
            texts.append(compiled(asked["source"]).render(values))
        except MemoryError:
            return TOO_MUCH
        except Exception:  # noqa: BLE001, a template is a program of somebody else and may raise anything
            texts.append(None)
    if sum(len(text or "") for text in texts) > CHARACTERS:
        return TOO_MUCH
    json.dump(texts, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
