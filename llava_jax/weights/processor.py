"""What an exported folder holds next to weights: tokenizer with `<image>`, image settings, chat template.

LLaVA tokenises the text around an image piece by piece; a folder's users tokenise the whole string. The exported
tokenizer is chosen so that both give the same ids, and `check_ids` says what differs where none can.
"""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.data.templates import find_template, render
from llava_jax.data.tokenize import TextTokenizer, auto_tokenizer, encode, load_tokenizer
from llava_jax.types import IMAGE_MARK, IMAGE_PLACEHOLDER, ClipConfig, InputError, ModelConfig, Turn
from llava_jax.weights.chat_template import chat_jinja
from llava_jax.weights.hf_config import folder_value, read_json, select_strategy

Json = dict[str, Any]

PAD = "<pad>"
# Grown vocabularies are rounded up to this, as the published LLaVA-1.5 folders are (32,000 + 2 -> 32,064).
VOCAB_MULTIPLE = 64
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Keys of tokenizer_config.json that only the machine it was saved on had a use for.
DROPPED = ("backend", "is_local", "local_files_only")
# PIL's numbers, as image processors write them.
RESAMPLE = {"bilinear": 2, "bicubic": 3}
# A SentencePiece text begins with ▁, and so does each piece after an image; in one string this rule puts it there.
AFTER_IMAGE = {"type": "Replace", "pattern": {"Regex": r"(?<=<image>)(?!<image>|\z|[ ▁])"}, "content": "▁"}


@dataclasses.dataclass(frozen=True)
class ExportedTokens:
    """Ids that the exported configs name; `image_id` may differ from the model's when its own was never a token."""

    image_id: int
    pad_id: int
    bos_id: int | None
    eos_id: int | list[int]


def write_processor(
    folder: str, tokenizer_folder: str, config: ModelConfig, *, template: str, aspect: str, image_position: str
) -> ExportedTokens:
    """Write tokenizer, image and chat files into `folder`, whose config.json is not there yet."""
    find_template(template)
    ours = load_tokenizer(tokenizer_folder)
    chat = _write_chat(folder, template, image_position, ours)
    tokens = _write_tokenizer(folder, tokenizer_folder, chat, ours.eos_id, _processor_class(config))
    _write_images(folder, config, aspect)
    # One that ends a turn next to the tokenizer's own stays an end; a single one is written as a number.
    return dataclasses.replace(tokens, eos_id=list(ours.ends)) if len(ours.ends) > 1 else tokens


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
    grown = -(-(max(added, default=0) + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return vocab_size if whole or vocab_size != grown else own


# ---- images and chat --------------------------------------------------------------------------------------------


def _write_json(folder: str, name: str, value: Json) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)


def _write_images(folder: str, config: ModelConfig, aspect: str) -> None:
    """The image settings; where images are padded no class is named.

    transformers then takes the one of the model type: in version 5 LlavaImageProcessor, which pads, in 4.46
    CLIPImageProcessor, which does not know do_pad and crops. Naming the first would keep 4.46 from loading the folder.
    """
    size, pixels = config.vision.image_size, config.vision.pixels
    square = dict(height=size, width=size)
    name = _processor_class(config)
    settings: Json = dict(
        processor_class=name,
        do_convert_rgb=True,
        do_resize=True,
        size=square if aspect == "squash" else dict(shortest_edge=size),
        resample=RESAMPLE[pixels.resample],
        do_center_crop=aspect != "squash",
        crop_size=square,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
    )
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
    _write_json(folder, "preprocessor_config.json", settings)
    _write_json(folder, "processor_config.json", processor)


def _processor_class(config: ModelConfig) -> str:
    return "LlavaNextProcessor" if config.pinpoints else "LlavaProcessor"


def _write_chat(folder: str, template: str, image_position: str, tokenizer: TextTokenizer) -> str:
    """chat_template.jinja (transformers 5) and .json (4); returns the text, which tokenizers of 4 keep themselves."""

    def spelled(text: str) -> str:
        token = tokenizer.special_id(text)
        return text if token is None else tokenizer.decode([token], skip_special=False)

    jinja = chat_jinja(find_template(template), image_position=image_position, spelled=spelled)
    with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as file:
        file.write(jinja)
    _write_json(folder, "chat_template.json", {"chat_template": jinja})
    return jinja


# ---- what a foreign folder says --------------------------------------------------------------------------------------


def _image_settings(folder: str) -> tuple[Json, str]:
    """The image processor's settings and the file they are in."""
    given, path = folder_value(folder, "image settings")
    return given or {}, path


def read_images(folder: str) -> str:
    """Return `pad`, `crop` or `squash`, as the folder's image settings say (crop where there are none)."""
    given, _ = _image_settings(folder)
    squashed = "height" in _sides(given.get("size")) and not given.get("do_center_crop")
    return "pad" if given.get("do_pad") else "squash" if squashed else "crop"


def _sides(size: Any) -> Json:
    """A size of an image processor by the names of its sides; older ones give the shortest as a number."""
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    return {side: pixels for side, pixels in size.items() if pixels is not None}


def _check_square(given: Json, path: str, size: int) -> None:
    """InputError unless images end as squares of the tower's `size`, and are resized to nothing else before."""
    sides = _sides(given.get("size"))
    keys = ("size",) if given.get("do_center_crop") is False else ("size", "crop_size")
    for key in keys:
        if {*_sides(given.get(key)).values()} - {size}:
            raise InputError(
                f"{path}: {key} is {given[key]}, which is not supported; expected {size}, the tower's image_size"
            )
    if given.get("do_center_crop") is False and not given.get("do_pad") and sides and "height" not in sides:
        raise InputError(
            f"{path}: do_center_crop is false and size {given['size']} is no square; expected height and width, or true"
        )


def with_pixels(vision: ClipConfig, folder: str) -> ClipConfig:
    """Return the tower with the folder's normalisation and resizing; InputError for what ours cannot do."""
    given, path = _image_settings(folder)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(key) is False:
            raise InputError(f"{path}: {key} is false, which is not supported; expected true")
    if not np.isclose(given.get("rescale_factor") or 1 / 255, 1 / 255, rtol=1e-6, atol=0):
        raise InputError(f"{path}: rescale_factor is {given['rescale_factor']}, not supported; expected 1/255")
    _check_square(given, path, vision.image_size)
    values: dict[str, Any] = {}
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        numbers = given.get(key)
        if numbers is not None:
            if not isinstance(numbers, list) or len(numbers) != 3 or {*map(type, numbers)} - {int, float}:
                raise InputError(f"{path}: {key} is {numbers}; expected three numbers")
            values[name] = tuple(float(number) for number in numbers)
    if given.get("resample") is not None:
        known = {number: name for name, number in RESAMPLE.items()}
        if given["resample"] not in known:
            raise InputError(f"{path}: resample is {given['resample']}, not supported; expected one of {sorted(known)}")
        values["resample"] = known[given["resample"]]
    return dataclasses.replace(vision, pixels=vision.pixels._replace(**values))


# ---- tokenizer ----------------------------------------------------------------------------------------------------


def check_vocabulary(tokenizer: TextTokenizer, config: ModelConfig, folder: str) -> None:
    """Raise InputError when the tokenizer in `folder` is that of another model.

    The embedding may have more rows than the tokenizer has ids; `<image>` and the pad token may lie outside, as their
    rows are never looked up.
    """
    rows, image = config.llm.vocab_size, tokenizer.image_token_id(0)
    outside = {i for i in (config.image_token_id, tokenizer.pad_id) if rows <= i < tokenizer.size}
    fix = "copy the tokenizer's files from where the model came from"
    if tokenizer.size - len(outside) > rows:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {tokenizer.size - 1} and the decoder's embedding {rows} rows: "
            f"expected the tokenizer that belongs to the decoder; {fix}"
        )
    if image < tokenizer.size and image != config.image_token_id:
        raise InputError(
            f"{folder}: <image> is {image} in the tokenizer and {config.image_token_id} in the model "
            f"(image_token_index of config.json): expected one id; {fix}"
        )
    word = tokenizer.decode([config.image_token_id]) if config.image_token_id < image == tokenizer.size else ""
    if word:
        raise InputError(
            f"{folder}: the model's image token {config.image_token_id} (image_token_index of config.json) is the text "
            f"{word!r} in the tokenizer: expected one with <image>; {fix}"
        )


def _write_tokenizer(folder: str, source: str, chat: str, eos_id: int | None, processor_class: str) -> ExportedTokens:
    """The source's files as they are, plus `<image>`, a pad token where there is none; nothing cut or filled."""
    if eos_id is None:
        raise InputError(f"{source}: the tokenizer has no end-of-text token; name one in its tokenizer_config.json")
    tokenizer = auto_tokenizer(source)
    for name in TOKENIZER_FILES:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    vocabulary = tokenizer.get_vocab()
    added = [] if IMAGE_PLACEHOLDER in vocabulary else [IMAGE_PLACEHOLDER]
    pad = tokenizer.pad_token
    if pad is None:
        pad = PAD
        added += [] if PAD in vocabulary else [PAD]
    ids = {text: max(vocabulary.values()) + 1 + index for index, text in enumerate(added)}
    path = os.path.join(folder, "tokenizer.json")
    content = read_json(path) if os.path.isfile(path) else json.loads(tokenizer.backend_tokenizer.to_str())
    if added or not os.path.isfile(path) or _whole_text(content) != content:
        _write_json(folder, "tokenizer.json", _whole_text(_with_tokens(content, ids)))
    _edit_companions(folder, ids, pad, chat, tokenizer, eos_id, processor_class)
    known = vocabulary | ids
    return ExportedTokens(known[IMAGE_PLACEHOLDER], known[pad], tokenizer.bos_token_id, eos_id)


def _whole_text(content: Json) -> Json:
    """A tokenizer.json that neither cuts nor fills what it is given."""
    return content | {key: None for key in ("truncation", "padding") if content.get(key) is not None}


def _token(text: str, *, normalized: bool = False) -> Json:
    return dict(content=text, single_word=False, lstrip=False, rstrip=False, normalized=normalized, special=True)


def _with_tokens(content: Json, ids: dict[str, int]) -> Json:
    return content | {
        "added_tokens": [*content.get("added_tokens", []), *(dict(id=i) | _token(t) for t, i in ids.items())]
    }


def _edit_companions(
    folder: str, ids: dict[str, int], pad: str, chat: str, tokenizer: Any, eos_id: int, processor_class: str
) -> None:
    """The small files next to tokenizer.json, changed only where they must say the same."""
    path = os.path.join(folder, "tokenizer_config.json")
    config = read_json(path) if os.path.isfile(path) else {}
    config = {key: value for key, value in config.items() if key not in DROPPED}
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    ends = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(eos_id)
    for key, token in (("bos_token", tokenizer.bos_token), ("eos_token", ends), ("unk_token", tokenizer.unk_token)):
        if config.get(key) is None:
            config[key] = token
    config |= dict(pad_token=pad, processor_class=processor_class, chat_template=chat)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(i): _token(text) for text, i in ids.items()}
    _write_json(folder, "tokenizer_config.json", config)
    special = os.path.join(folder, "special_tokens_map.json")
    if os.path.isfile(special):
        _write_json(folder, "special_tokens_map.json", read_json(special) | {"pad_token": pad})
    more = os.path.join(folder, "added_tokens.json")
    if ids and (os.path.isfile(more) or os.path.isfile(os.path.join(folder, "tokenizer.model"))):
        _write_json(folder, "added_tokens.json", (read_json(more) if os.path.isfile(more) else {}) | ids)


# ---- the same ids, piecewise and whole ------------------------------------------------------------------------------

_CONVERSATION = (
    Turn("human", "<image>\nWhat is this?"),
    Turn("gpt", "A cat: 3.5 kg, café, 猫."),
    Turn("human", "Why\n does it sleep?"),
    Turn("gpt", "It is tired."),
    Turn("human", "Thanks!"),
)
_SAMPLES = (_CONVERSATION, (Turn("human", "<image>And here?"),), (Turn("human", "Look at this.\n<image>"),))


def check_ids(folder: str, source: str, template: str, image_position: str, force: bool) -> None:
    """Make whole-string tokenisation in `folder` (complete by now) give the ids we train on.

    The source's own file comes first; where transformers reads the source by other rules than those written in it
    (`legacy`), these are written; where ▁ after an image is lost, `AFTER_IMAGE` is added. Raises InputError where none
    of them gives those ids; with `force` that is a printed warning, and the source's own file stays.
    """
    expected = _expected(load_tokenizer(source), template, image_position)

    def difference() -> str | None:
        if _expected(load_tokenizer(folder), template, image_position) != expected:
            return "the exported tokenizer reads the pieces around an image otherwise than the source"
        return _difference(folder, expected)

    path = os.path.join(folder, "tokenizer.json")
    first = read_json(path)
    problem = difference()
    if problem is None:
        return
    effective = _whole_text(json.loads(auto_tokenizer(source).backend_tokenizer.to_str()))
    for content in _variants(first, effective):
        _write_rules(folder, content)
        if difference() is None:
            return
    if not force:
        raise InputError(f"{problem}; --force writes it all the same")
    _write_rules(folder, first)
    print(f"export: warning: {problem}; tokenise the text around each image by itself when you serve it")


def _write_rules(folder: str, content: Json) -> None:
    """tokenizer.json, and the same flags of its tokens in tokenizer_config.json, whose word counts."""
    _write_json(folder, "tokenizer.json", content)
    config = read_json(os.path.join(folder, "tokenizer_config.json"))
    decoder = config.get("added_tokens_decoder", {})
    for token in content["added_tokens"]:
        if str(token["id"]) in decoder:
            decoder[str(token["id"])] = {key: value for key, value in token.items() if key != "id"}
    _write_json(folder, "tokenizer_config.json", config)


def same_pieces(folder: str, source: str, template: str, image_position: str) -> bool:
    """Return whether the tokenizers of two folders read the text around images alike."""
    one, other = (_expected(load_tokenizer(path), template, image_position) for path in (folder, source))
    return one == other


def _variants(first: Json, effective: Json) -> Iterator[Json]:
    present = {token["content"] for token in effective.get("added_tokens", [])}
    missing = {t["content"]: t["id"] for t in first.get("added_tokens", []) if t["content"] not in present}
    rules = _with_tokens(effective, missing)
    yield _with_rule(first)
    yield rules
    yield _with_rule(rules)


def _with_rule(content: Json) -> Json:
    """The tokenizer with AFTER_IMAGE, which sees `<image>` only when that token is matched in normalised text."""
    content = copy.deepcopy(content)
    before = content.get("normalizer")
    content["normalizer"] = dict(type="Sequence", normalizers=[*([before] if before else []), AFTER_IMAGE])
    for token in content["added_tokens"]:
        if token["content"] == IMAGE_PLACEHOLDER:
            token["normalized"] = True
    return content


def _expected(tokenizer: TextTokenizer, template: str, image_position: str) -> list[tuple[str, list[int]]]:
    """(whole string, ids piece by piece with images as IMAGE_MARK) of the sample conversations that fit."""
    rules = find_template(template)
    samples = _SAMPLES[1:] if rules.caption_only else _SAMPLES
    found = []
    for turns in samples:
        spans = render(turns, rules, image_position=image_position, open_turn=True)
        words = {text: tokenizer.special_id(text) for text in {span.text for span in spans if span.special}}
        spelled = {t: t if i is None else tokenizer.decode([i], skip_special=False) for t, i in words.items()}
        text = "".join(spelled.get(span.text, span.text) if span.special else span.text for span in spans)
        found.append((text, encode(spans, tokenizer).tokens.tolist()))
    return found


def _difference(folder: str, expected: list[tuple[str, list[int]]]) -> str | None:
    """What the folder's tokenizer reads differently, images repeated as its processor does; None when nothing."""
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
