"""Chat templates in Jinja, as transformers and servers render them: ours written so, and a folder's recognised."""

import json
import re
from collections.abc import Callable, Sequence

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_jax.data.templates import TEMPLATES, Span, Template, find_template, render
from llava_jax.types import IMAGE_PLACEHOLDER, Turn
from llava_jax.weights.hf_config import folder_value, special_tokens

# ---- written ------------------------------------------------------------------------------------------------------

# Content is text, or parts of type text and image; images without a placeholder in the text stand before it.
_TEXT = """\
{%- set ns = namespace(text='', images='') -%}
{%- if message['content'] is string -%}
{%- set ns.text = message['content'] -%}
{%- else -%}
{%- set ns.text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ['image', 'image_url'] -%}
{%- set ns.images = ns.images + IMAGE + '\\n' -%}
{%- endif -%}
{%- endfor -%}
{%- if IMAGE not in ns.text -%}
{%- set ns.text = ns.images + ns.text -%}
{%- endif -%}
{%- endif -%}
"""
_FRONT = """\
{%- if ns.text.split(IMAGE) | length == 2 -%}
{%- set rest = ns.text.replace(IMAGE, '') | trim -%}
{%- set ns.text = IMAGE + ('\\n' + rest if rest else '') -%}
{%- endif -%}
"""
_CAPTION = """\
{%- set ns.text = IMAGE * (ns.text.split(IMAGE) | length - 1) -%}
"""
_LOOP = """\
{{- OPENING -}}
{%- for message in messages -%}
{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception('messages take turns, user first; there is no system message') -}}
{%- endif -%}
TEXT
{%- if message['role'] == 'user' -%}
{{- ('' if loop.first else AGAIN) + QUESTION + ns.text.replace(IMAGE, TAGGED) + AFTER_QUESTION -}}
{%- else -%}
{{- CUE + BEFORE_ANSWER + ns.text + AFTER_ANSWER + END -}}
{%- endif -%}
{%- endfor -%}
{{- CUE if add_generation_prompt else CLOSING -}}
"""


def chat_jinja(template: Template, *, image_position: str, spelled: Callable[[str], str]) -> str:
    """Return jinja source that renders `template`; `spelled` gives a special string as the tokenizer writes it."""

    def join(spans: Sequence[Span]) -> str:
        return "".join(spelled(span.text) if span.special else span.text for span in spans)

    place = _CAPTION if template.caption_only else _FRONT if image_position == "front" else ""
    before, after = template.image_tags
    literals = dict(
        OPENING=join(template.opening),
        AGAIN=join(template.again),
        QUESTION=join(template.question),
        AFTER_QUESTION=join(template.after_question),
        CUE=join(template.cue),
        BEFORE_ANSWER=template.before_answer,
        AFTER_ANSWER=template.after_answer,
        END=join(template.end_of_answer),
        CLOSING=join(template.closing),
        TAGGED=before + IMAGE_PLACEHOLDER + after,
        IMAGE=IMAGE_PLACEHOLDER,
    )
    names = re.compile(rf"\b({'|'.join(literals)})\b")
    source = _LOOP.replace("TEXT\n", _TEXT + place)
    return names.sub(lambda name: json.dumps(literals[name[0]], ensure_ascii=False), source)


# ---- recognised ---------------------------------------------------------------------------------------------------

_PROBE = (Turn("human", "<image>\nWhat is this?"), Turn("gpt", "A cat."), Turn("human", "Why?"))


def recognised_template(folder: str) -> str | None:
    """Return the first of our templates that the folder's chat template renders as, None without such one."""
    tokens, source = _chat_template(folder)
    if source is None:
        return None
    given = _rendered(source, tokens)
    for name, template in TEMPLATES.items():
        if not template.caption_only and _ours(template, tokens) in given:
            return name
    return None


def chat_template_note(folder: str, name: str) -> str | None:
    """Return a line when the tokenizer's chat template in `folder` writes prompts otherwise than `name` does.

    No error: a LLaVA learns the template it is trained with, and v1 on another base is common. None where both write
    the same, the folder brings no chat template, or `name` is for captions, which know no turns.
    """
    template = find_template(name)
    tokens, source = _chat_template(folder)
    if source is None or template.caption_only:
        return None
    ours, given = _ours(template, tokens), _rendered(source, tokens)
    if ours in given:
        return None
    if not given:
        return f"template {name}: the chat template of {folder} does not render a question and cannot be compared"
    theirs = min(given, key=len)
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
    shown = [text[max(at - 10, 0) : at + 30] for text in (ours, theirs)]
    same = recognised_template(folder)
    take = f"; data.template={same} writes as it does" if same else ""
    return f"template {name} writes {shown[0]!r} where the chat template of {folder} writes {shown[1]!r}{take}"


def _ours(template: Template, tokens: dict[str, str]) -> str:
    """The probe as our template writes it."""
    spans = render(_PROBE, template, open_turn=True)
    spelled = {"<s>": tokens["bos_token"] or "<s>", "</s>": tokens["eos_token"] or "</s>"}
    return "".join(spelled.get(span.text, span.text) if span.special else span.text for span in spans)


def _chat_template(folder: str) -> tuple[dict[str, str], str | None]:
    """(bos_token and eos_token, Jinja text or None) of a folder."""
    named = special_tokens(folder)
    tokens = {key: named.get(key, "") for key in ("bos_token", "eos_token")}
    source, _ = folder_value(folder, "chat template")
    if isinstance(source, list):  # several under names, as tokenizers with tools have them
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    return tokens, source if isinstance(source, str) else None


def _rendered(source: str, tokens: dict[str, str]) -> set[str]:
    """The probe as the chat template writes it, content as text and as parts, with and without its own BOS."""
    # As transformers compiles them; its `generation` tags only mark spans.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    names = {"human": "user", "gpt": "assistant"}
    found = set()
    for as_parts in (False, True):
        messages = []
        for turn in _PROBE:
            text = turn.text.removeprefix("<image>\n")
            parts = [{"type": "image"}] * (text != turn.text) + [{"type": "text", "text": text}]
            messages.append({"role": names[turn.speaker], "content": parts if as_parts else turn.text})
        try:
            template = environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source))
            text = template.render(messages=messages, add_generation_prompt=True, **tokens)
        except (TemplateError, TypeError, ValueError, LookupError):
            continue
        found |= {text, text.removeprefix(tokens["bos_token"])}
    return found
