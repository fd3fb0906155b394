"""What an exported folder holds next to weights: tokenizer with `<image>`, image settings, chat template.

LLaVA tokenises the text around an image piece by piece; a folder's users tokenise the whole string. The exported
tokenizer is chosen so that both give the same ids, and `check_ids` says what differs where none can.

BOS is in the chat template alone. Some programs render a chat and tokenise it with add_special_tokens, some without;
with a tokenizer that adds none, both get the one of the text.
"""

import copy
import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llava_jax.data.chat_template import ChatTemplate, Options
from llava_jax.data.templates import Span, Template, render
from llava_jax.data.tokenize import EXPORT_KEY, adds_bos, auto_tokenizer, encode, load_tokenizer
from llava_jax.hub import TOKENIZER_FILES
from llava_jax.types import IMAGE_MARK, IMAGE_PLACEHOLDER, ClipConfig, InputError, ModelConfig, Turn
from llava_jax.weights.hf_config import RESAMPLE, read_json, select_strategy, write_json

Json = dict[str, Any]

PAD = "<pad>"
# Grown vocabularies are rounded up to this, as the published LLaVA-1.5 folders are (32,000 + 2 -> 32,064).
VOCAB_MULTIPLE = 64
CHAT_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Keys of tokenizer_config.json that only the machine it was saved on had a use for.
DROPPED = ("backend", "is_local", "local_files_only")
# A SentencePiece text begins with ▁, and so does each piece after an image; in one string this rule puts it there.
AFTER_IMAGE = {"type": "Replace", "pattern": {"Regex": r"(?<=<image>)(?!<image>|\z|[ ▁])"}, "content": "▁"}


@dataclasses.dataclass(frozen=True)
class LlavaExtras:
    """What a LLaVA folder says next to config and weights; `tokenizer` is a folder.

    `template_assumed`: the folder names no template and its chat template is none of ours. `vision` is the folder
    that holds the tower's weights, those that LLaVA does not run included. `tuned_tower`: a run changed those weights,
    which are then no longer those of the folder that an original LLaVA folder names.
    """

    template: str = "v1"
    aspect: str = "crop"
    image_position: str = "front"
    tokenizer: str = ""
    template_assumed: bool = False
    vision: str = ""
    exif: str = "apply"
    tuned_tower: bool = False

    @property
    def rules(self) -> dict[str, str | bool]:
        """The fields that exports record in config.json."""
        said = {key: getattr(self, key) for key in ("template", "aspect", "image_position", "exif")}
        return said | ({"tuned_tower": True} if self.tuned_tower else {})


@dataclasses.dataclass(frozen=True)
class ExportedTokens:
    """Ids that the exported configs name; `image_id` may differ from the model's when its own was never a token.

    `eos_id` are those that end an answer, a list where there are several, and `stop_strings` the texts that do where
    the template ends it with no token. `size` is one more than the tokenizer's largest id.
    """

    image_id: int
    pad_id: int
    bos_id: int | None
    eos_id: int | list[int]
    stop_strings: tuple[str, ...]
    size: int


def write_processor(folder: str, config: ModelConfig, extras: LlavaExtras) -> ExportedTokens:
    """Write tokenizer, image and chat files into `folder`, whose config.json is not there yet."""
    chat = _chat(extras)
    tokens = _write_tokenizer(folder, extras, chat, _processor_class(config))
    _write_chat(folder, chat)
    _write_images(folder, config, extras.aspect)
    return tokens


def own_rows(tokenizer_folder: str, vocab_size: int) -> int:
    """Return how many of a model's `vocab_size` rows were its own before an export added some for image and pad.

    Our exports say it in config.json. In another's, `<image>` and `<pad>` are the tokenizer's last and the rows end at
    the next multiple of VOCAB_MULTIPLE, as transformers' conversion script leaves them.
    """
    path = os.path.join(tokenizer_folder, "config.json")
    said = (read_json(path).get("llava_jax") or {}).get("vocab_size") if os.path.isfile(path) else None
    if said is not None:
        return min(said, vocab_size)
    vocabulary = auto_tokenizer(tokenizer_folder).get_vocab()
    added = {vocabulary[text] for text in (IMAGE_PLACEHOLDER, PAD) if text in vocabulary}
    own = 1 + max(set(vocabulary.values()) - added)
    whole = not added or min(added) < own
    grown = round_up(max(added, default=0) + 1, VOCAB_MULTIPLE)
    return vocab_size if whole or vocab_size != grown else own


def round_up(rows: int, multiple: int) -> int:
    """Return the next multiple that is at least `rows`."""
    return -(-rows // multiple) * multiple


# ---- images and chat --------------------------------------------------------------------------------------------


def _write_images(folder: str, config: ModelConfig, aspect: str) -> None:
    """Write the image settings; where images are padded no class is named.

    transformers then takes the one of the model type: in version 5 LlavaImageProcessor, which pads, in 4.46
    CLIPImageProcessor, which does not know do_pad and crops. Naming the first would keep 4.46 from loading the folder.
    """
    name = _processor_class(config)
    settings = dict(processor_class=name) | image_settings(config.vision, aspect)
    if config.pinpoints:
        pinpoints = [list(pinpoint) for pinpoint in config.pinpoints]
        settings |= dict(image_processor_type="LlavaNextImageProcessor", do_pad=True, image_grid_pinpoints=pinpoints)
    else:
        kind = "SiglipImageProcessor" if aspect == "squash" else "CLIPImageProcessor"
        settings |= dict(do_pad=True) if aspect == "pad" else dict(image_processor_type=kind)
    processor = dict(
        processor_class=name,
        image_token=IMAGE_PLACEHOLDER,
        num_additional_image_tokens=config.vision.class_tokens,
        patch_size=config.vision.patch_size,
        vision_feature_select_strategy=select_strategy(config.vision),
    )
    write_json(folder, "preprocessor_config.json", settings)
    write_json(folder, "processor_config.json", processor)


def image_settings(vision: ClipConfig, aspect: str) -> Json:
    """Return what every class of image processors is told."""
    square = dict(height=vision.image_size, width=vision.image_size)
    return dict(
        do_convert_rgb=True,
        do_resize=True,
        size=square if aspect == "squash" else dict(shortest_edge=vision.image_size),
        resample=RESAMPLE[vision.pixels.resample],
        do_center_crop=aspect != "squash",
        crop_size=square,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(vision.pixels.mean),
        image_std=list(vision.pixels.std),
    )


def copy_tokenizer(source: str, folder: str) -> None:
    """Copy the tokenizer's files that are there."""
    for name in (*TOKENIZER_FILES, CHAT_FILE):
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))


def _processor_class(config: ModelConfig) -> str:
    return "LlavaNextProcessor" if config.pinpoints else "LlavaProcessor"


def _chat(extras: LlavaExtras) -> str:
    """Return the chat template of an export, a Jinja text."""
    tokenizer = load_tokenizer(extras.tokenizer)

    def spelled(text: str) -> str:
        token = tokenizer.special_id(text)
        return text if token is None else tokenizer.decode([token], skip_special=False)

    rules = tokenizer.template(extras.template)
    if isinstance(rules, ChatTemplate):
        return with_images(rules.source, extras.image_position, rules.options)
    return chat_jinja(rules, image_position=extras.image_position, spelled=spelled, after_bos=_after_bos(extras))


def _after_bos(extras: LlavaExtras) -> str | None:
    """Return what a text with BOS has after it, so that the rest is read as in training; None where there is no BOS.

    A SentencePiece text begins with ▁, which some tokenizers leave out after a token: they read a space as it.
    """
    tokenizer, theirs = load_tokenizer(extras.tokenizer), auto_tokenizer(extras.tokenizer)
    rules = tokenizer.template(extras.template)
    if not rules.bos or tokenizer.bos_id is None:
        return None
    first = next(iter(rules.opening), Span(""))
    text = "" if first.special and tokenizer.special_id(first.text) is not None else first.text[:1]
    whole = theirs(theirs.bos_token + text, add_special_tokens=False).input_ids
    return "" if whole == [tokenizer.bos_id, *tokenizer.encode_text(text)] else " "


def _write_chat(folder: str, chat: str) -> None:
    """chat_template.jinja (transformers 5) and .json (4); tokenizers of 4 keep the text themselves, too."""
    with open(os.path.join(folder, CHAT_FILE), "w", encoding="utf-8") as file:
        file.write(chat)
    write_json(folder, "chat_template.json", {"chat_template": chat})


# ---- tokenizer ----------------------------------------------------------------------------------------------------


def _write_tokenizer(folder: str, extras: LlavaExtras, chat: str, processor_class: str) -> ExportedTokens:
    """Copy the source's files plus `<image>` and a pad token where absent, minus BOS, cutting and filling."""
    source, ours = extras.tokenizer, load_tokenizer(extras.tokenizer)
    if ours.eos_id is None:
        raise InputError(f"{source}: the tokenizer has no end-of-text token; name one in its tokenizer_config.json")
    tokenizer = auto_tokenizer(source)
    copy_tokenizer(source, folder)
    vocabulary = tokenizer.get_vocab()
    added = [] if IMAGE_PLACEHOLDER in vocabulary else [IMAGE_PLACEHOLDER]
    pad = tokenizer.pad_token
    if pad is None:
        pad = PAD
        added += [] if PAD in vocabulary else [PAD]
    ids = {text: max(vocabulary.values()) + 1 + index for index, text in enumerate(added)}
    path = os.path.join(folder, "tokenizer.json")
    content = read_json(path) if os.path.isfile(path) else json.loads(tokenizer.backend_tokenizer.to_str())
    written = _whole_text(_with_tokens(content, ids)) if added else _whole_text(content)
    removed = None
    if adds_bos(tokenizer):
        effective = json.loads(tokenizer.backend_tokenizer.to_str())
        removed = content.get("post_processor") or effective["post_processor"]
        written |= dict(post_processor=_without_tokens(removed))
    if not os.path.isfile(path) or written != content:
        write_json(folder, "tokenizer.json", written)
    _edit_companions(folder, ids, pad, chat, tokenizer, ours.eos_id, processor_class)
    if removed:
        change = {"add_bos_token": False, EXPORT_KEY: dict(post_processor=removed)}
        write_json(folder, TOKENIZER_CONFIG, read_json(os.path.join(folder, TOKENIZER_CONFIG)) | change)
    known, rules = vocabulary | ids, ours.template(extras.template)
    ends = list(dict.fromkeys([*ours.ends, *ours.stop_ids(rules)]))
    return ExportedTokens(
        image_id=known[IMAGE_PLACEHOLDER],
        pad_id=known[pad],
        bos_id=tokenizer.bos_token_id,
        eos_id=ends if len(ends) > 1 else ends[0],
        stop_strings=tuple(text for text in rules.stop if ours.special_id(text) is None),
        size=max(known.values()) + 1,
    )


def write_original_tokenizer(folder: str, extras: LlavaExtras) -> None:
    """Copy the tokenizer as the original code reads it, which leaves BOS to the tokenizer, with a chat template."""
    copy_tokenizer(extras.tokenizer, folder)
    path = os.path.join(folder, TOKENIZER_CONFIG)
    config = read_json(path) if os.path.isfile(path) else {}
    removed = config.pop(EXPORT_KEY, {}).get("post_processor")
    if removed:
        config["add_bos_token"] = True
        content = read_json(os.path.join(folder, "tokenizer.json"))
        write_json(folder, "tokenizer.json", content | dict(post_processor=removed))
    chat = _chat(extras)
    write_json(folder, TOKENIZER_CONFIG, config | dict(chat_template=chat))
    with open(os.path.join(folder, CHAT_FILE), "w", encoding="utf-8") as file:
        file.write(chat)


def _without_tokens(processor: Json) -> Json | None:
    """Return a tokenizer.json's post-processor without the parts that add tokens."""
    if processor["type"] == "Sequence":
        return processor | dict(processors=[each for each in processor["processors"] if each["type"] == "ByteLevel"])
    return processor if processor["type"] == "ByteLevel" else None


def _whole_text(content: Json) -> Json:
    """Return a tokenizer.json that neither cuts nor fills what it is given."""
    return content | {key: None for key in ("truncation", "padding") if content.get(key) is not None}


def _token(text: str) -> Json:
    return dict(content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)


def _with_tokens(content: Json, ids: dict[str, int]) -> Json:
    return content | {
        "added_tokens": [*content.get("added_tokens", []), *(dict(id=i) | _token(t) for t, i in ids.items())]
    }


def _edit_companions(
    folder: str, ids: dict[str, int], pad: str, chat: str, tokenizer: Any, eos_id: int, processor_class: str
) -> None:
    """Write the small files next to tokenizer.json, changed only where they must say the same."""
    path = os.path.join(folder, TOKENIZER_CONFIG)
    config = read_json(path) if os.path.isfile(path) else {}
    config = {key: value for key, value in config.items() if key not in DROPPED}
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if config["tokenizer_class"] == "PreTrainedTokenizerFast":
        # Or transformers 4 gives token_type_ids, which no decoder takes.
        config["model_input_names"] = ["input_ids", "attention_mask"]
    ends = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(eos_id)
    for key, token in (("bos_token", tokenizer.bos_token), ("eos_token", ends), ("unk_token", tokenizer.unk_token)):
        if config.get(key) is None:
            config[key] = token
    config |= dict(pad_token=pad, processor_class=processor_class, chat_template=chat)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(i): _token(text) for text, i in ids.items()}
    write_json(folder, TOKENIZER_CONFIG, config)
    special = os.path.join(folder, "special_tokens_map.json")
    if os.path.isfile(special):
        write_json(folder, "special_tokens_map.json", read_json(special) | {"pad_token": pad})
    more = os.path.join(folder, "added_tokens.json")
    if ids and (os.path.isfile(more) or os.path.isfile(os.path.join(folder, "tokenizer.model"))):
        write_json(folder, "added_tokens.json", (read_json(more) if os.path.isfile(more) else {}) | ids)


# ---- the same ids, piecewise and whole ------------------------------------------------------------------------------

_CONVERSATION = (
    Turn("human", "<image>\nWhat is this?"),
    Turn("gpt", "A cat: 3.5 kg, café, 猫."),
    Turn("human", "Why\n does it sleep?"),
    Turn("gpt", "It is tired."),
    Turn("human", "Thanks!"),
)
_SAMPLES = (_CONVERSATION, (Turn("human", "<image>And here?"),), (Turn("human", "Look at this.\n<image>"),))
_CAPTIONED = (Turn("human", "<image>"), Turn("gpt", "A cat."))


def check_ids(folder: str, extras: LlavaExtras, force: bool) -> None:
    """Make whole-string tokenisation in `folder` (complete by now) give the ids we train on.

    The source's own file comes first; where transformers reads the source by other rules than those written in it
    (`legacy`), these are written; where ▁ after an image is lost, `AFTER_IMAGE` is added. Raises InputError where none
    of them gives those ids; with `force` that is a printed warning, and the source's own file stays.
    """
    expected = _expected(extras.tokenizer, extras)

    def difference() -> str | None:
        if _expected(folder, extras) != expected:
            return "the exported tokenizer reads the pieces around an image otherwise than the source"
        return _difference(folder, expected)

    path = os.path.join(folder, "tokenizer.json")
    first = read_json(path)
    problem = difference()
    if problem is None:
        return
    effective = _whole_text(json.loads(auto_tokenizer(extras.tokenizer).backend_tokenizer.to_str()))
    for content in _variants(first, effective | dict(post_processor=first.get("post_processor"))):
        _write_rules(folder, content)
        if difference() is None:
            return
    if not force:
        raise InputError(f"{problem}; --force writes it all the same")
    _write_rules(folder, first)
    print(f"export: warning: {problem}; tokenise the text around each image by itself when you serve it")


def _write_rules(folder: str, content: Json) -> None:
    """Write tokenizer.json, and the same flags of its tokens in tokenizer_config.json, whose word counts."""
    write_json(folder, "tokenizer.json", content)
    config = read_json(os.path.join(folder, TOKENIZER_CONFIG))
    decoder = config.get("added_tokens_decoder", {})
    for token in content["added_tokens"]:
        if str(token["id"]) in decoder:
            decoder[str(token["id"])] = {key: value for key, value in token.items() if key != "id"}
    write_json(folder, TOKENIZER_CONFIG, config)


def same_pieces(folder: str, extras: LlavaExtras) -> bool:
    """Return whether the tokenizer of `folder` reads the text around images as the source's does."""
    return _expected(folder, extras) == _expected(extras.tokenizer, extras)


def _variants(first: Json, effective: Json) -> Iterator[Json]:
    present = {token["content"] for token in effective.get("added_tokens", [])}
    missing = {t["content"]: t["id"] for t in first.get("added_tokens", []) if t["content"] not in present}
    rules = _with_tokens(effective, missing)
    yield _with_rule(first)
    yield rules
    yield _with_rule(rules)


def _with_rule(content: Json) -> Json:
    """Return the tokenizer with AFTER_IMAGE, which sees `<image>` only when that is matched in normalised text."""
    content = copy.deepcopy(content)
    before = content.get("normalizer")
    content["normalizer"] = dict(type="Sequence", normalizers=[*([before] if before else []), AFTER_IMAGE])
    for token in content["added_tokens"]:
        if token["content"] == IMAGE_PLACEHOLDER:
            token["normalized"] = True
    return content


def _expected(folder: str, extras: LlavaExtras) -> list[tuple[str, list[int]]]:
    """Return (whole string, ids piece by piece with images as IMAGE_MARK) of the sample conversations that fit."""
    tokenizer = load_tokenizer(folder)
    after_bos = _after_bos(extras)
    begin = "" if after_bos is None else auto_tokenizer(folder).bos_token + after_bos
    rules = tokenizer.template(extras.template)
    samples = (*_SAMPLES[1:], _CAPTIONED) if rules.caption_only else _SAMPLES
    found = []
    for turns in samples:
        asks = turns[-1].speaker == "human"
        spans = render(turns, rules, image_position=extras.image_position, open_turn=asks)
        words = {text: tokenizer.special_id(text) for text in {span.text for span in spans if span.special}}
        spelled = {t: t if i is None else tokenizer.decode([i], skip_special=False) for t, i in words.items()}
        text = "".join(spelled.get(span.text, span.text) if span.special else span.text for span in spans)
        found.append((begin + text, encode(spans, tokenizer, bos=rules.bos).tokens.tolist()))
    return found


def _difference(folder: str, expected: list[tuple[str, list[int]]]) -> str | None:
    """Return what the folder's tokenizer reads differently, images repeated as its processor does; None for nothing."""
    tokenizer = auto_tokenizer(folder)
    image = tokenizer.get_vocab()[IMAGE_PLACEHOLDER]
    for text, ids in expected:
        wanted = [token for i in ids for token in ([image] * 3 if i == IMAGE_MARK else [i])]
        given = tokenizer(text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER * 3)).input_ids
        if given != wanted:
            at = next((i for i, pair in enumerate(zip(given, wanted, strict=False)) if pair[0] != pair[1]), -1)
            pieces = [tokenizer.convert_ids_to_tokens(ids[max(at - 2, 0) : at + 3]) for ids in (given, wanted)]
            return (
                f"the exported tokenizer reads {text!r} otherwise than it was trained on: {pieces[0]} instead of "
                f"{pieces[1]} at token {at}"
            )
    return None


# ---- chat templates, written ----------------------------------------------------------------------------------------

# Content is text, or parts of type text and image; an image stands at its part's place, as in training, unless the
# texts have placeholders.
_TEXT = """\
{%- set ns = namespace(text='', lines=[]) -%}
{%- if message['content'] is string -%}
{%- set ns.text = message['content'] -%}
{%- else -%}
{%- set ns.text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set ns.lines = ns.lines + [part['text']] -%}
{%- elif part['type'] in ['image', 'image_url'] -%}
{%- set ns.lines = ns.lines + [IMAGE] -%}
{%- endif -%}
{%- endfor -%}
{%- if IMAGE not in ns.text -%}
{%- set ns.text = ns.lines | join('\\n') -%}
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
# Before a tokenizer's own template, which takes texts: its messages, those with parts as texts.
_TEXTS = """\
{%- set texts = namespace(messages=[]) -%}
{%- for message in messages -%}
TEXT
{%- set texts.messages = texts.messages + [dict(message, content=ns.text)] -%}
{%- endfor -%}
{%- set messages = texts.messages %}
"""
_SYSTEM = """\
{%- set message = messages[0] -%}
TEXT
{%- set system = ns.text or system -%}
"""
_NO_SYSTEM = """\
{{- raise_exception('the template has no system prompt to replace; remove the system message') -}}
"""
_LOOP = """\
{%- set turns = messages -%}
{%- set system = SYSTEM -%}
{%- if messages[0]['role'] == 'system' -%}
REPLACE
{%- set turns = messages[1:] -%}
{%- endif -%}
OPENING
{%- for message in turns -%}
{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception('after a system message, user and assistant take turns, user first') -}}
{%- endif -%}
TEXT
{%- if message['role'] == 'user' -%}
PLACE
{%- if not loop.first -%}
AGAIN
{%- endif -%}
QUESTION
{%- else -%}
ANSWER
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
CUE
{%- else -%}
CLOSING
{%- endif -%}
"""
# A Jinja expression, and whether what it writes is trained.
Part = tuple[str, bool]


def chat_jinja(template: Template, *, image_position: str, spelled: Callable[[str], str], after_bos: str | None) -> str:
    """Return jinja source that renders `template`, with what is trained between {% generation %} tags.

    `spelled` gives a special string as the tokenizer writes it. The text begins with `bos_token` and `after_bos`,
    unless that is None.
    """

    def parts(spans: Sequence[Span]) -> list[Part]:
        return [(_literal(spelled(span.text) if span.special else span.text), span.is_target) for span in spans]

    # Nothing predicts a first token, and for a block that ends with it transformers marks the whole chat.
    opening: list[Part] = [] if after_bos is None else [("bos_token", False), (_literal(after_bos), False)]
    for index, span in enumerate(template.opening):
        if index == 0 and after_bos is None:
            span = span._replace(is_target=False)
        if template.system and template.system in span.text:
            before, after = (span._replace(text=text) for text in span.text.split(template.system))
            opening += [*parts([before]), ("system", span.is_target), *parts([after])]
        else:
            opening += parts([span])
    tagged = f"ns.text.replace({_literal(IMAGE_PLACEHOLDER)}, {_literal(IMAGE_PLACEHOLDER.join(template.image_tags))})"
    said = [(_literal(template.before_answer), True), ("ns.text", True), (_literal(template.after_answer), True)]
    written = dict(
        SYSTEM=_literal(template.system),
        IMAGE=_literal(IMAGE_PLACEHOLDER),
        OPENING=_statements(opening),
        AGAIN=_statements(parts(template.again)),
        QUESTION=_statements([*parts(template.question), (tagged, False), *parts(template.after_question)]),
        ANSWER=_statements([*parts(template.cue), *said, *parts(template.end_of_answer)]),
        CUE=_statements(parts(template.cue)),
        CLOSING=_statements(parts(template.closing)),
    )
    trim = "{%- set ns.text = ns.text | trim -%}\n" if template.trim else ""
    place = _CAPTION if template.caption_only else _FRONT if image_position == "front" else ""
    source = _LOOP.replace("REPLACE\n", _SYSTEM.replace("TEXT\n", _TEXT + trim) if template.system else _NO_SYSTEM)
    source = source.replace("TEXT\n", _TEXT + trim).replace("PLACE\n", place)
    return re.sub(rf"\b({'|'.join(written)})\b", lambda name: written[name[0]], source)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _statements(parts: Sequence[Part]) -> str:
    """Return the statements that write the parts one after another."""
    lines = []
    for trained, run in itertools.groupby((part for part in parts if part[0] != '""'), key=lambda part: part[1]):
        line = "{{- " + " + ".join(expression for expression, _ in run) + " -}}"
        lines += ["{%- generation -%}", line, "{%- endgeneration -%}"] if trained else [line]
    return "\n".join(lines)


def with_images(source: str, image_position: str, options: Options = ()) -> str:
    """Return a tokenizer's own chat template so that it takes images: unchanged behind what makes parts to text.

    `options` are those that prompts were trained with; they become what programs get that give none.
    """
    text = _TEXT + (_FRONT if image_position == "front" else "")
    before = _TEXTS.replace("TEXT\n", text).replace("IMAGE", json.dumps(IMAGE_PLACEHOLDER))
    defaults = [f"{{%- set {name} = {name} | default({json.dumps(value)}) %}}\n" for name, value in options]
    return "".join([before, *defaults, source.removeprefix(before)])
