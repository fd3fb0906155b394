"""How a conversation becomes text, and which of it is trained: templates as data, one code path for all of them.

`render` yields spans whose texts join to the exact prompt. What a template supervises is written into its spans, so
labels never depend on counting tokens. Texts and supervised parts are those LLaVA trains with `--version NAME`
(`v0` without the built-in example exchange, as its trainer builds it); questions are asked in the same words.

Turns are selected before they are written:
- a leading answer is dropped (`drop_leading_answer`; LLaVA's v0 keeps it, and so does ours);
- in training, a last question without an answer is dropped, LLaVA would mask the whole row;
- two turns of the same speaker in a row are refused.
A first turn of the system is written in place of the template's system prompt.
Text that looks like a role, a header or a stop is ordinary text.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Turn


class Span(NamedTuple):
    """A piece of the prompt: `special` is a token spelled so (or `<image>`) and never comes from a conversation."""

    text: str
    is_target: bool = False
    special: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat format.

    Training text: `opening`, then for each question `again` (not before the first) + `question` + text +
    `after_question`, for each answer `cue` + `before_answer` + text + `after_answer` + `end_of_answer`, and `closing`.
    A prompt for an answer ends with `cue`. The answer's text with what surrounds it is a target, unless its turn is
    none. `system` is the part of `opening` that a conversation may replace.
    """

    system: str = ""
    opening: tuple[Span, ...] = ()
    again: tuple[Span, ...] = ()
    question: tuple[Span, ...] = ()
    after_question: tuple[Span, ...] = ()
    cue: tuple[Span, ...] = ()
    before_answer: str = ""
    after_answer: str = ""
    end_of_answer: tuple[Span, ...] = ()
    closing: tuple[Span, ...] = ()
    stop: tuple[str, ...] = ()
    image_tags: tuple[str, str] = ("", "")
    drop_leading_answer: bool = True
    caption_only: bool = False


def find_template(name: str) -> Template:
    """Return the template of that name. Raises InputError, which lists the known ones, for any other."""
    if name not in TEMPLATES:
        raise InputError(f"unknown template {name!r}; expected one of {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def render(
    turns: Sequence[Turn], template: Template, *, image_position: str = "front", open_turn: bool = False
) -> list[Span]:
    """Return the prompt as spans; with `open_turn` it ends where the assistant is to speak.

    `image_position` front moves the placeholder of a turn with one image to the front of that turn (and strips the
    rest, as the released LLaVA does); keep, and turns with several images, leave it as written.
    """
    system = [turn.text for turn in turns[:1] if turn.speaker == "system"]
    turns = select_turns(turns[len(system) :], template, open_turn=open_turn)
    spans = list(template.opening)
    if system and not template.system:
        raise InputError("the template has no system prompt to replace; remove the system text or choose another one")
    if system:
        spans = [span._replace(text=span.text.replace(template.system, system[0])) for span in spans]
    # What follows an answer may end it, as the hashes of v0 do: it is trained where the answer is.
    target = open_turn or any(turn.target for turn in turns if turn.speaker == "gpt")
    for index, turn in enumerate(turns):
        if turn.speaker == "human":
            spans += _trained(template.again, target) if index > 0 else ()
            spans += [*_trained(template.question, target), *_question_spans(turn.text, template, image_position)]
            spans += template.after_question
        else:
            target = turn.target
            answer = Span(template.before_answer + turn.text + template.after_answer, target)
            spans += [*_trained(template.cue, target), answer, *_trained(template.end_of_answer, target)]
    spans += template.cue if open_turn else _trained(template.closing, target)
    return spans


def _trained(spans: tuple[Span, ...], target: bool) -> Sequence[Span]:
    return spans if target else [span._replace(is_target=False) for span in spans]


def select_turns(turns: Sequence[Turn], template: Template, *, open_turn: bool = False) -> tuple[Turn, ...]:
    """Return the turns that are written. Raises InputError, with the reason, when they do not fit the template."""
    kept = list(turns)
    if kept and kept[0].speaker == "gpt" and template.drop_leading_answer:
        kept = kept[1:]
    if kept and kept[-1].speaker == "human" and not open_turn:
        if IMAGE_PLACEHOLDER in kept[-1].text:
            raise InputError("the last turn shows an image but has no answer; answer it or remove it")
        kept = kept[:-1]
    for before, turn in itertools.pairwise(kept):
        if turn.speaker == before.speaker:
            raise InputError(f"two {turn.speaker} turns in a row; expected human and gpt in turn")
    if not kept or kept[-1].speaker != ("human" if open_turn else "gpt"):
        raise InputError("no question to answer" if open_turn else "no answer to train on")
    if template.caption_only and (len(kept) != (1 if open_turn else 2) or kept[0].speaker != "human"):
        raise InputError(
            f"template plain holds one image and its caption, found {len(kept)} turns; "
            "train conversations with another template"
        )
    if template.caption_only and IMAGE_PLACEHOLDER not in kept[0].text:
        raise InputError(
            f"template plain needs {IMAGE_PLACEHOLDER} in the first turn; "
            "train rows without an image with another template"
        )
    return tuple(kept)


def _question_spans(text: str, template: Template, image_position: str) -> list[Span]:
    pieces = text.split(IMAGE_PLACEHOLDER)
    if len(pieces) == 1 and not template.caption_only:
        return [Span(text)] if text else []
    if template.caption_only:
        pieces = [""] * len(pieces)
    elif image_position == "front" and len(pieces) == 2:
        rest = "".join(pieces).strip()
        pieces = ["", "\n" + rest if rest else ""]
    before, after = template.image_tags
    spans = [Span(pieces[0])]
    for piece in pieces[1:]:
        # Tags are text, or tokens of their own (mm_use_im_start_end of the original).
        tags = [Span(tag, special=tag in SPECIAL_STRINGS) for tag in (before, after)]
        spans += [tags[0], Span(IMAGE_PLACEHOLDER, special=True), tags[1], Span(piece)]
    return [span for span in spans if span.text]


# ---- the templates (strings are interface constants of LLaVA) ------------------------------------------------------

_POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the {0}'s questions."
)
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language.The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_IMAGE_TAGS = ("<Image>", "</Image>")
IM_START_END = ("<im_start>", "<im_end>")
_BOS = Span("<s>", special=True)
_EOS = Span("</s>", is_target=True, special=True)


def _hashes(system: str, **changes) -> Template:
    """Return LLaVA v0's `###` format: hashes and the assistant's header are trained, the model opens its own turn."""
    hashes = Span("###", is_target=True)
    return Template(
        system=system,
        opening=(Span(system + "\n\n"),),
        question=(hashes, Span(" Human: ")),
        after_question=(Span("\n"),),
        cue=(hashes, Span(" Assistant:", is_target=True)),
        before_answer=" ",
        after_answer="\n",
        closing=(Span("### ", is_target=True),),
        stop=("###",),
        drop_leading_answer=False,
        **changes,
    )


def _vicuna(system: str, **changes) -> Template:
    return Template(
        system=system,
        opening=(Span(system + " "),),
        question=(Span("USER: "),),
        after_question=(Span(" "),),
        cue=(Span("ASSISTANT:"),),
        before_answer=" ",
        end_of_answer=(_EOS,),
        stop=("</s>",),
        **changes,
    )


def _instruct(system: str, again: tuple[Span, ...]) -> Template:
    """Return `[INST] … [/INST]`: the system message sits inside the first instruction."""
    return Template(
        system=system,
        opening=(Span("[INST] " + (f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "")),),
        again=again,
        after_question=(Span(" [/INST]"),),
        before_answer=" ",
        after_answer=" ",
        end_of_answer=(_EOS,),
        stop=("</s>",),
    )


def _chatml(system: str) -> Template:
    """Return ChatML as LLaVA writes it, without a newline after `<|im_end|>`."""
    start, end = Span("<|im_start|>", special=True), Span("<|im_end|>", special=True)
    return Template(
        system=system,
        opening=(start, Span(f"system\n{system}"), end),
        question=(start, Span("user\n")),
        after_question=(end,),
        cue=(start, Span("assistant\n")),
        end_of_answer=(end._replace(is_target=True),),
        stop=("<|im_end|>",),
    )


_PLAIN = Template(after_answer="\n", stop=("\n",), drop_leading_answer=False, caption_only=True)
_V0 = _hashes(_POLITE.format("human"))
_V1 = _vicuna(_POLITE.format("user"))
_CHATML_DIRECT = _chatml("Answer the questions.")

TEMPLATES: dict[str, Template] = {
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "v0": _V0,
    "default": _V0,
    "llava_v0": _V0,
    "v0_mmtag": _hashes(_TAGGED, image_tags=_IMAGE_TAGS),
    "v1": _V1,
    "vicuna_v1": _V1,
    "llava_v1": _vicuna(_POLITE.format("human")),
    "v1_mmtag": _vicuna(_TAGGED, image_tags=_IMAGE_TAGS),
    "llama_2": _instruct(_LLAMA_2, again=(_BOS, Span("[INST] "))),
    "llava_llama_2": _instruct(_LLAVA_LLAMA_2, again=(_BOS, Span("[INST] "))),
    "mistral_instruct": _instruct("", again=(Span("[INST] "),)),
    "mpt": _chatml(_MPT),
    "chatml_direct": _CHATML_DIRECT,
    "mistral_direct": _CHATML_DIRECT,
}

# The same around images between two tokens, as models with mm_use_im_start_end of the original were trained.
TEMPLATES |= {
    f"{name}_im_start_end": dataclasses.replace(TEMPLATES[name], image_tags=IM_START_END)
    for name in ("v0", "v1", "llava_llama_2")
}

# Strings that templates write as tokens of their own.
SPECIAL_STRINGS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", *IM_START_END)
