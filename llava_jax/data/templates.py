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
import functools
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.data import jinja_child
from llava_jax.types import IMAGE_PLACEHOLDER, InputError, Turn

# Marks that the text of a conversation may not hold: tokenize and chat_template put them into texts.
NONCHARACTER = re.compile("[\ufdd0-\ufdef]")
# The name of the tokenizer's own chat template (data.chat_template), which is no constant.
OWN = "tokenizer"


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
    none. `system` is the part of `opening` that a conversation may replace, `bos` whether the tokenizer's BOS goes in
    front, `trim` whether texts are written without the white space at their ends.
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
    trim: bool = False
    bos: bool = True

    def write(
        self, system: str, turns: Sequence[Turn], *, image_position: str = "front", open_turn: bool = False
    ) -> list[Span]:
        """Return the spans of selected turns; `system` replaces the template's, "" keeps it."""
        if system and not self.system:
            raise InputError(
                "the template has no system prompt to replace; remove the system text or choose another one"
            )
        # What follows an answer may end it, as the hashes of v0 do: it is trained where the answer is.
        target = open_turn or any(turn.target for turn in turns if turn.speaker == "gpt")
        said = system.strip() if self.trim else system
        spans = [s._replace(text=s.text.replace(self.system, said)) if system else s for s in self.opening]
        spans = [*_trained(spans, target)]
        for index, turn in enumerate(turns):
            text = turn.text.strip() if self.trim else turn.text
            if turn.speaker == "human":
                spans += _trained(self.again, target) if index > 0 else ()
                spans += [*_trained(self.question, target), *_question_spans(text, self, image_position)]
                spans += _trained(self.after_question, target)
            else:
                target = turn.target
                answer = Span(self.before_answer + text + self.after_answer, target)
                spans += [*_trained(self.cue, target), answer, *_trained(self.end_of_answer, target)]
        return [*spans, *(self.cue if open_turn else _trained(self.closing, target))]


def find_template(name: str) -> Template:
    """Return the template of that name. Raises InputError, which lists the known ones, for any other."""
    check_template(name)
    if name == OWN:
        raise InputError("template tokenizer is that of a tokenizer, and none is at hand; expected another one")
    return TEMPLATES[name]


def check_template(name: str) -> None:
    """Raise InputError, which lists the known ones, where no template has that name."""
    if name != OWN and name not in TEMPLATES:
        raise InputError(f"unknown template {name!r}; expected one of {', '.join(sorted([*TEMPLATES, OWN]))}")


def render(
    turns: Sequence[Turn], template: Template, *, image_position: str = "front", open_turn: bool = False
) -> list[Span]:
    """Return the prompt as spans; with `open_turn` it ends where the assistant is to speak.

    `image_position` front moves the placeholder of a turn with one image to the front of that turn (and strips the
    rest, as the released LLaVA does); keep, and turns with several images, leave it as written.
    """
    system = [turn.text for turn in turns[:1] if turn.speaker == "system"]
    turns = select_turns(turns[len(system) :], template, open_turn=open_turn)
    return template.write("".join(system), turns, image_position=image_position, open_turn=open_turn)


def _trained(spans: Sequence[Span], target: bool) -> Sequence[Span]:
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


def place_images(text: str, image_position: str) -> str:
    """Return a question with its image where `image_position` says, as `render` does."""
    pieces = text.split(IMAGE_PLACEHOLDER)
    if image_position != "front" or len(pieces) != 2:
        return text
    return "\n".join(filter(None, (IMAGE_PLACEHOLDER, "".join(pieces).strip())))


def _question_spans(text: str, template: Template, image_position: str) -> list[Span]:
    pieces = place_images(text, image_position).split(IMAGE_PLACEHOLDER)
    if len(pieces) == 1 and not template.caption_only:
        return [Span(text)] if text else []
    if template.caption_only:
        pieces = [""] * len(pieces)
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


def _llama_3(system: str) -> Template:
    """LLaVA-NeXT trains every token that opens or ends a header or a turn, and the whole header of an answer."""
    opened, closed = (Span(f"<|{name}_header_id|>", is_target=True, special=True) for name in ("start", "end"))
    end = Span("<|eot_id|>", is_target=True, special=True)
    return Template(
        system=system,
        opening=(opened, Span("system"), closed, Span(f"\n\n{system}"), end),
        question=(opened, Span("user"), closed, Span("\n\n")),
        after_question=(end,),
        cue=(opened, Span("assistant", is_target=True), closed, Span("\n\n", is_target=True)),
        end_of_answer=(end,),
        stop=("<|eot_id|>",),
        trim=True,
    )


def _qwen(system: str) -> Template:
    """LLaVA-NeXT trains every `<|im_start|>`, `<|im_end|>` and newline of the format, and an answer's whole turn."""
    start, end = (Span(f"<|im_{name}|>", is_target=True, special=True) for name in ("start", "end"))
    newline = Span("\n", is_target=True)
    return Template(
        system=system,
        opening=(start, Span("system"), newline, Span(system), end, newline),
        question=(start, Span("user"), newline),
        after_question=(end, newline),
        cue=(start, Span("assistant", is_target=True), newline),
        end_of_answer=(end, newline),
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
    "llama_3": _llama_3(_LLAVA_LLAMA_2),
    "qwen": _qwen("You are a helpful assistant."),
}

# The same around images between two tokens, as models with mm_use_im_start_end of the original were trained.
TEMPLATES |= {
    f"{name}_im_start_end": dataclasses.replace(TEMPLATES[name], image_tags=IM_START_END)
    for name in ("v0", "v1", "llava_llama_2")
}

# Strings that templates write as tokens of their own.
SPECIAL_STRINGS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", *IM_START_END)
SPECIAL_STRINGS += ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


# ---- templates in Jinja, tried --------------------------------------------------------------------------------------

# What marks the text of the model for transformers.
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def try_jinja(source: str, renderings: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Return what a chat template writes with the variables of each rendering, None where it refuses them.

    A process of its own does it. Raises InputError where that takes more time or memory than its limits.
    """
    source = GENERATION.sub("", source)
    if len(source) > jinja_child.CHARACTERS:
        raise _too_much()
    return _tried(json.dumps({"source": source, "renderings": renderings}))


@functools.lru_cache(maxsize=64)
def _tried(asked: str) -> list[str | None]:
    child = subprocess.run([sys.executable, "-P", jinja_child.__file__], input=asked, capture_output=True, text=True)
    if child.returncode in (jinja_child.TOO_MUCH, -signal.SIGXCPU, -signal.SIGKILL, -signal.SIGSEGV):
        raise _too_much()
    if child.returncode:
        raise InputError(f"the chat template cannot be tried: {child.stderr.strip()[-200:]}")
    return json.loads(child.stdout)


def _too_much() -> InputError:
    limits = f"{jinja_child.SECONDS} s of the processor, {jinja_child.MEBIBYTES} MiB or {jinja_child.CHARACTERS:,}"
    return InputError(f"the chat template takes more than {limits} characters; use another tokenizer folder")
