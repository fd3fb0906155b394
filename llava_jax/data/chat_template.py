"""The tokenizer's own chat template, as `data.template=tokenizer` trains and asks with it.

The whole conversation is rendered as transformers renders it. An answer begins where the prompt for it ends: the
conversation before it, rendered with add_generation_prompt, must be how the whole one begins. It ends with the token
after its text, which ends the turn; where the template says itself what the model writes ({% generation %}), that is
trained, with that token. What no prompt leads to, or what stands otherwise in the text than in the row, is an error.

Templates are code of whoever made the tokenizer: they run in Jinja's sandbox, first for an exchange in a process of its
own that has limits (jinja_child.py).
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from llava_jax.data.jinja_child import compiled
from llava_jax.data.templates import NONCHARACTER, Span, Template, place_images, try_jinja
from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Turn

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# Noncharacters on their way through a template: what breaks a special string that a text spells, so that only those the
# template writes are tokens; what stands around a {% generation %} block.
_BREAK, _OPEN, _CLOSE = "\ufdef", "\ufdee", "\ufded"
# What a template is told that knows a mode without thinking: rows hold answers.
_ANSWER_AT_ONCE, _THINKING = (("enable_thinking", False),), (("enable_thinking", True),)
# What a template can raise, however it is written.
_REFUSALS = (
    *(jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NameError, RuntimeError, SyntaxError, TypeError, ValueError),
)
_BLANK = re.compile(r"\s*")
_INSTEAD = "change the row, or train with another data.template"
_PROBE = (Turn("human", "What is this?"), Turn("gpt", "A cat."))


Options = tuple[tuple[str, Any], ...]


class AddedToken(NamedTuple):
    """A token of the tokenizer's own list; `rstrip`: it takes the white space after it along."""

    text: str
    special: bool
    rstrip: bool


@dataclasses.dataclass(frozen=True)
class ChatTemplate(Template):
    """A template in Jinja; make it with `chat_template`.

    `variables` are the special tokens by their names, `options` what the prompt for an answer is rendered with.
    """

    source: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    added: tuple[AddedToken, ...] = ()
    options: Options = ()

    def write(
        self, system: str, turns: Sequence[Turn], *, image_position: str = "front", open_turn: bool = False
    ) -> list[Span]:
        turns = (Turn("system", system), *turns) if system else turns
        messages = [self._message(turn, image_position) for turn in turns]
        if open_turn:
            return self._spans(self.rendered(messages, prompt=True, options=self.options)[0], [])
        whole, marked = self.rendered(messages)
        answers = [index for index, turn in enumerate(turns) if turn.speaker == "gpt"]
        if marked and len(marked) != len(answers):
            raise InputError(
                f"the chat template marks {len(marked)} of {len(answers)} answers as generated; {_INSTEAD}"
            )
        runs = []
        for number, index in enumerate(answers):
            if turns[index].target:
                runs.append(self.answer(whole, messages[: index + 1], marked[number] if marked else None))
        return self._spans(whole, runs)

    def _values(self, messages: Sequence[Mapping[str, str]], prompt: bool, options: Options) -> dict[str, Any]:
        given = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None}
        return given | dict(self.variables) | dict(options)

    def rendered(
        self, messages: Sequence[Mapping[str, str]], *, prompt: bool = False, options: Options = ()
    ) -> tuple[str, list[range]]:
        """Return the text of messages and its {% generation %} blocks; with `prompt` it asks for an answer."""
        try:
            text = _compiled(self.source).render(self._values(messages, prompt, options))
        except _REFUSALS as error:
            reason = " ".join(f"{error}".split())[:200]
            raise InputError(f"the chat template refuses the conversation ({reason}); {_INSTEAD}") from error
        if _OPEN not in text:
            return text, []
        clean, *rest = re.split(f"[{_OPEN}{_CLOSE}]", text)
        blocks = []
        for block, after in zip(rest[::2], rest[1::2], strict=True):
            blocks.append(range(len(clean), len(clean) + len(block)))
            clean += block + after
        return clean, blocks

    def answer(self, whole: str, messages: Sequence[Mapping[str, str]], marked: range | None) -> range:
        """Return where `whole` holds the last of `messages`, an answer, with the token that ends its turn."""
        body = messages[-1]["content"].strip()
        number = sum(message["role"] == "assistant" for message in messages)
        ways = dict.fromkeys((self.options, (), _THINKING))
        asked = (self.rendered(messages[:-1], prompt=True, options=way)[0] for way in ways)
        start = next((len(text) for text in asked if whole.startswith(text)), None)
        if start is None:
            raise InputError(f"the chat template rewrites what it wrote before answer {number}; {_INSTEAD}")
        if marked is None:
            at = _blank(whole, start)
            found, stop = whole.startswith(body, at), _blank(whole, at + len(body))
        else:
            start, stop = marked.start, marked.stop
            found = body in whole[start:stop]
        if not found:
            written, given = (text[:60].replace(_BREAK, "") for text in (whole[start:], body))
            raise InputError(
                f"the chat template changes answer {number}: it writes {written!r} for {given!r}; {_INSTEAD}"
            )
        if marked is None or not self.ending(whole[start:stop]):
            token = self._added.match(whole, stop)
            if token is None:
                raise InputError(f"the chat template ends answer {number} with no token of its own; {_INSTEAD}")
            stop = token.end()
        # Such a token covers the white space after it, and is a target when all that it covers is one.
        swallows = whole.endswith(self._swallowing, start, stop)
        return range(start, _blank(whole, stop) if swallows else stop)

    def ending(self, text: str) -> str:
        """Return the token that ends a text; "" where none does."""
        text = text.rstrip()
        return max((token.text for token in self.added if text.endswith(token.text)), key=len, default="")

    def _message(self, turn: Turn, image_position: str) -> dict[str, str]:
        found = None if turn.text.isascii() else NONCHARACTER.search(turn.text)
        if found:
            raise InputError(f"the text holds the Unicode noncharacter U+{ord(found[0]):04X}; remove it")
        text = place_images(turn.text, image_position) if turn.speaker == "human" else turn.text
        return {"role": ROLES[turn.speaker], "content": self._special_start.sub(lambda found: found[0] + _BREAK, text)}

    def _spans(self, text: str, runs: Sequence[range]) -> list[Span]:
        # Of hundreds of special tokens a text holds a few.
        tokens = _any_of([IMAGE_PLACEHOLDER, *(special for special in self._special if special in text)])
        spans, position = [], 0
        for run in [*runs, range(len(text), len(text))]:
            for part, is_target in ((text[position : run.start], False), (text[run.start : run.stop], True)):
                for index, piece in enumerate(tokens.split(part)):
                    if piece:
                        spans.append(Span(piece.replace(_BREAK, ""), is_target, special=index % 2 == 1))
            position = run.stop
        return spans

    @functools.cached_property
    def _added(self) -> re.Pattern[str]:
        return _any_of(token.text for token in self.added)

    @functools.cached_property
    def _swallowing(self) -> tuple[str, ...]:
        return tuple(token.text for token in self.added if token.rstrip)

    @functools.cached_property
    def _special(self) -> list[str]:
        """What is a token wherever the rendered text spells it."""
        return [token.text for token in self.added if token.special and token.text != IMAGE_PLACEHOLDER]

    @functools.cached_property
    def _special_start(self) -> re.Pattern[str]:
        # Each begins with a character of its own, so that the search passes over all others.
        return re.compile(
            "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in self._special) or "(?!)"
        )


def chat_template(source: str, variables: tuple[tuple[str, str], ...], added: tuple[AddedToken, ...]) -> ChatTemplate:
    """Return the template of a Jinja text, tried with one question; InputError where it cannot be trained with."""
    template = ChatTemplate(source=source, variables=variables, added=added, bos=False)
    messages = [template._message(turn, "keep") for turn in _PROBE]
    prompts = [template._values(messages[:1], True, options) for options in ((), _ANSWER_AT_ONCE)]
    try_jinja(source, [template._values(messages, False, ()), *prompts])  # before any is rendered in this process
    whole, marked = template.rendered(messages)
    asked, at_once = (template.rendered(messages[:1], prompt=True, options=o)[0] for o in ((), _ANSWER_AT_ONCE))
    options = _ANSWER_AT_ONCE if at_once != asked and whole.startswith(at_once) else ()
    template = dataclasses.replace(template, options=options)
    run = template.answer(whole, messages, marked[0] if marked else None)
    return dataclasses.replace(template, stop=(template.ending(whole[run.start : run.stop]),))


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of the texts, the longest first; nothing where there are none."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)") + ")")


def _blank(text: str, start: int) -> int:
    """Where the white space from `start` on ends."""
    found = _BLANK.match(text, start)
    assert found is not None
    return found.end()


# ---- Jinja ----------------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the model writes."""

    tags = {"generation"}  # noqa: RUF012, as Extension has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opened, closed = (nodes.Output([nodes.TemplateData(m)], lineno=line) for m in (_OPEN, _CLOSE))
        return [opened, *body, closed]


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return compiled(source, [_Generation])
