"""A conversation template as the Jinja text that transformers and servers render: the same string as `chat.render`."""

import json
import re
from collections.abc import Callable, Sequence

from llava_jax.data.templates import Span, Template
from llava_jax.types import IMAGE_PLACEHOLDER

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
    """Jinja source that renders `template`; `spelled` gives a special string as the tokenizer writes it."""

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
