"""What the demo's LLaMA reads while it is trained, and the tokenizer it reads with: text only, no images.

A row is a description (a sentence, a map in words, or a map whose fields mix several words) and either questions about
it with their answers, in the v1 dialogue, or the same scene described again. That is the reading comprehension a
published LLaMA comes with.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llava_jax.data.templates import find_template, render
from llava_jax.data.tokenize import TextTokenizer, encode
from llava_jax.demo import world
from llava_jax.types import IMAGE_MARK, IMAGE_PLACEHOLDER, Encoded, Turn

VOCABULARY = 1024
LENGTH = 128
BOS, EOS, NEWLINE = 1, 2, 13
SYSTEM = find_template("v1").opening[0].text.strip()
ASK_FOR_CAPTION = "Describe the image concisely."
# Shares of the descriptions that are maps of mixtures and maps in words; the rest are sentences.
WORDS_ONLY, MIXED = (0.0, 0.6), (0.75, 0.07)
NOUNS = (*world.COLOURS, *world.SHAPES, *world.ROWS, *world.COLUMNS, world.EMPTY)

# Sentences in addition to the world's own whose words should be single tokens.
PHRASES = (
    SYSTEM,
    "A chat between a curious human. You are a helpful language and vision assistant. You are able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.",
    "USER: ASSISTANT: Human: Assistant: Question: Answer:",
    "Describe the image concisely. Provide a brief description of the given image. Describe the following image in "
    "detail. What do you see in this picture? Yes, there is. No, there is not. The answer is that it is here because "
    "Which object is higher, lower, further to the left or to the right? The scene shows nothing else besides.",
    "I can see an image with one object, two objects and three objects on a grey background. zero one two three "
    "It is above, below, beside, next to the other one, so the answer is this. There is only one object.",
)


def make_tokenizer(folder: str) -> None:
    """Train the BPE tokenizer and write it as LLaMA's are: byte fallback, `▁` for spaces, a leading one added."""
    rng = np.random.default_rng(0)
    corpus = []
    for scene in world.sample_scenes(rng, 3000):
        corpus += [world.caption(scene, rng), " ".join(world.place_map(scene))]
        asked = world.questions(scene, rng)
        corpus += [f"USER: {q.text} ASSISTANT: {q.answer}" for q in asked] + [q.text for q in asked]
    corpus = [" " + text for text in (*corpus, *PHRASES * 400)] + [q for q in corpus if q.endswith("?")]
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    alphabet = [chr(code) for code in range(33, 127)]
    trained.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=specials + bytes_, initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for index in range(len(vocabulary), VOCABULARY):
        vocabulary[f"<reserved_{index}>"] = index
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        add_bos_token=True, add_eos_token=False, clean_up_tokenization_spaces=False, model_max_length=2048,
    )  # fmt: skip
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)


def some_questions(scene: world.Scene, rng: np.random.Generator) -> list[world.Question]:
    """Return the scene's questions in random order, the kinds taking turns so that none crowds out another.

    Questions of position come first: they take the longest to learn.
    """
    by_kind: dict[str, list[world.Question]] = {}
    for question in world.questions(scene, rng):
        by_kind.setdefault(question.kind, []).append(question)
    ranked = []
    for kind, group in by_kind.items():
        early = 0.5 if kind == "position" else 0.0
        ranked += [(turn + rng.random() - early, group[i]) for turn, i in enumerate(rng.permutation(len(group)))]
    return [question for _, question in sorted(ranked, key=lambda pair: pair[0])]


def row(
    scene: world.Scene, tokenizer: TextTokenizer, rng: np.random.Generator, shares: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, targets) of one text: repeated words, the scene described again, or questions about it."""
    kind = rng.random()
    if kind < 0.1:
        return repetition(tokenizer, rng)
    if kind < 0.5:
        return retelling(scene, tokenizer, rng, shares)
    return dialogue(scene, tokenizer, rng, shares)


def repetition(tokenizer: TextTokenizer, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return different words of the world in no order, repeated in the same order until the row is full."""
    nouns = (*world.COLOURS, *world.SHAPES, *world.ROWS, *world.COLUMNS, *world.NUMBERS, "the", "a", "at", "is", "and")
    words = tokenizer.encode_text(" ".join(rng.permutation(nouns)[: rng.integers(6, 25)]))
    tokens = np.array([BOS, *np.resize(words, LENGTH - 1)], np.int32)
    return tokens, np.arange(LENGTH) > len(words) + 1


def retelling(
    scene: world.Scene, tokenizer: TextTokenizer, rng: np.random.Generator, shares: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the description, then the scene in other wordings, one a line: what belongs together must be looked up."""
    described = [BOS, *description(scene, tokenizer, rng, shares)]
    tokens = list(described)
    while len(tokens) < LENGTH:
        tokens += [*tokenizer.encode_text(world.caption(scene, rng)), NEWLINE]
        if IMAGE_MARK in described:
            break  # the next one could be read from this one
    tokens = tokens[:LENGTH]
    return np.array(tokens, np.int32), np.arange(len(tokens)) >= len(described)


def description(
    scene: world.Scene, tokenizer: TextTokenizer, rng: np.random.Generator, shares: tuple[float, float]
) -> list[int]:
    """Return what stands in place of an image: marks for a map of mixtures, a map in words, or a sentence."""
    kind, (mixed, maps) = rng.random(), shares
    if kind < mixed:
        return [IMAGE_MARK] * world.MAP_SIDE**2
    text = " ".join(world.place_map(scene)) if kind < mixed + maps else world.caption(scene, rng)
    return tokenizer.encode_text(text)


def mixtures(scene: world.Scene, rng: np.random.Generator) -> np.ndarray:
    """Return float32[P, W]: how much of each of `NOUNS` is in each of the P fields of a 6 x 6 map.

    A field holds the words of its place and `empty`, or all four words of the thing on it, each in a random share; now
    and then a thing misses a field. What a projector makes of a patch, which shows only part of a thing, is as uneven.
    """
    fields_YXW = np.zeros((world.MAP_SIDE, world.MAP_SIDE, len(NOUNS)), np.float32)
    place, fields_YXW[..., NOUNS.index(world.EMPTY)] = rng.random(2)
    for index in range(3):
        fields_YXW[2 * index : 2 * index + 2, :, NOUNS.index(world.ROWS[index])] = place
        fields_YXW[:, 2 * index : 2 * index + 2, NOUNS.index(world.COLUMNS[index])] = place
    for thing in scene:
        words = [NOUNS.index(word) for word in (thing.colour, thing.shape, *thing.place.split())]
        for dy, dx in itertools.product(range(2), repeat=2):
            field_W = fields_YXW[2 * thing.row + dy, 2 * thing.column + dx]
            if rng.random() < 0.9:
                field_W[NOUNS.index(world.EMPTY)] = 0
                field_W[words] = rng.uniform(0.3, 1.2, 4)
    return fields_YXW.reshape(-1, len(NOUNS))


def noise(width: int, rng: np.random.Generator) -> np.ndarray:
    """Return float32[P, width], what a projector adds that means nothing: the same to all fields, and to each."""
    common = rng.normal(0, rng.uniform(0, 0.8) / np.sqrt(width), (1, width))
    return (common + rng.normal(0, 0.3 / np.sqrt(width), (world.MAP_SIDE**2, width))).astype(np.float32)


def dialogue(
    scene: world.Scene, tokenizer: TextTokenizer, rng: np.random.Generator, shares: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return questions about the scene with answers, as many as fit, in the v1 format, often without its first words.

    The description stands in place of the image, or is part of the first question.
    """
    asked = [(question.text, question.answer) for question in some_questions(scene, rng)]
    if rng.random() < 0.1:
        asked.insert(0, (ASK_FOR_CAPTION, world.caption(scene, rng)))
    template = find_template("v1") if rng.random() < 0.5 else dataclasses.replace(find_template("v1"), opening=())
    context = world.caption(scene, rng) if rng.random() < 0.25 else IMAGE_PLACEHOLDER
    described = description(scene, tokenizer, rng, shares)
    for count in range(len(asked), 0, -1):
        turns = [Turn(who, text) for pair in asked[:count] for who, text in zip(("human", "gpt"), pair, strict=True)]
        turns[0] = Turn("human", f"{context}\n{turns[0].text}")
        tokens, targets = splice(encode(render(turns, template), tokenizer), described)
        if len(tokens) <= LENGTH or count == 1:
            break
    return tokens[:LENGTH], targets[:LENGTH]


def splice(encoded: Encoded, described: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, targets) with the words of a description in place of the image, if there is one."""
    marks = np.flatnonzero(encoded.tokens == IMAGE_MARK)
    at = int(marks[0]) if len(marks) else 0
    described, rest = (described, at + 1) if len(marks) else ([], 0)
    tokens = np.concatenate([encoded.tokens[:at], np.array(described, np.int32), encoded.tokens[rest:]])
    untrained = np.zeros(len(described), bool)
    return tokens, np.concatenate([encoded.targets[:at], untrained, encoded.targets[rest:]])


def batches(
    tokenizer: TextTokenizer, rows: int, seed: int, repetitions: int, shares: tuple[float, float], width: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield batches endlessly: tokens, targets, and what the tokens that are IMAGE_MARK stand for.

    That is tokens int32[rows, LENGTH], padded on the right with 0, targets bool[rows, LENGTH], `mixtures`
    float32[rows, P, W] and `noise` float32[rows, P, width]. Both are scaled alike, by 4 to 64, since projected patches
    come out that much longer than words.

    Args:
      tokenizer, rows: of a batch.
      seed: of the scenes and rows.
      repetitions: so many first batches hold only repeated words: a decoder that has learned to find what it read
        before learns to read descriptions sooner.
      shares: WORDS_ONLY or MIXED.
      width: of the decoder's embeddings.
    """
    rng = np.random.default_rng(seed)
    for batch in itertools.count():
        tokens_BT = np.zeros((rows, LENGTH), np.int32)
        targets_BT = np.zeros((rows, LENGTH), bool)
        mixtures_BPW = np.zeros((rows, world.MAP_SIDE**2, len(NOUNS)), np.float32)
        noise_BPD = np.zeros((rows, world.MAP_SIDE**2, width), np.float32)
        for index in range(rows):
            scene = world.sample_scene(rng)
            tokens, targets = repetition(tokenizer, rng) if batch < repetitions else row(scene, tokenizer, rng, shares)
            tokens_BT[index, : len(tokens)], targets_BT[index, : len(tokens)] = tokens, targets
            scale = np.exp(rng.uniform(np.log(4), np.log(64)))
            mixtures_BPW[index], noise_BPD[index] = scale * mixtures(scene, rng), scale * noise(width, rng)
        yield tokens_BT, targets_BT, mixtures_BPW, noise_BPD
