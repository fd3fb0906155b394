"""What the demo's LLaMA reads while it is trained, and the tokenizer it reads with: text only, no pictures.

A row is a description (a sentence, or a map in words) and either questions about it with their answers, in the v1
dialogue, or the same scene said again. That is the reading comprehension a published LLaMA brings along.
"""

import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llava_jax.data.chat import find_template
from llava_jax.demo import world

VOCABULARY = 1024
LENGTH = 128
REPETITIONS = 150
BOS, EOS, NEWLINE = 1, 2, 13
SYSTEM = find_template("v1").opening[0].text.strip()
ASK_FOR_CAPTION = "Describe the image concisely."

# Sentences beside the world's own whose words should be whole tokens.
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


class Words:
    """Ids of text by LLaMA's rules, without BOS, cached by string."""

    def __init__(self, folder: str):
        self._tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self._seen: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        found = self._seen.get(text)
        if found is None:
            found = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._seen) < 100_000:
                self._seen[text] = found
        return found


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
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, list(map(tuple, model["merges"])), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
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
    """The scene's questions in random order, the kinds taking turns so that none is drowned by another."""
    by_kind: dict[str, list[world.Question]] = {}
    for question in world.questions(scene, rng):
        by_kind.setdefault(question.kind, []).append(question)
    ranked = []
    for found in by_kind.values():
        ranked += [(turn + rng.random(), found[i]) for turn, i in enumerate(rng.permutation(len(found)))]
    return [question for _, question in sorted(ranked, key=lambda pair: pair[0])]


def row(scene: world.Scene, words: Words, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
    """One text and which of its tokens are to be predicted: words said over and over, the scene told again, or questions."""
    context, kind = description(scene, words, rng), rng.random()
    if kind < 0.1:
        return repetition(words, rng)
    if kind < 0.4:
        return retelling(scene, context, words, rng)
    return dialogue(scene, context, words, rng)


def repetition(words: Words, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
    """Different words of the world in no order, and again in the same order until the row is full."""
    nouns = (*world.COLOURS, *world.SHAPES, *world.ROWS, *world.COLUMNS, *world.NUMBERS, "the", "a", "at", "is", "and")
    said = [token for word in rng.permutation(nouns)[: rng.integers(6, 25)] for token in words.ids(str(word))]
    tokens = ([BOS] + said * LENGTH)[:LENGTH]
    return tokens, [False] * (len(said) + 2) + [True] * (LENGTH - len(said) - 2)


def description(scene: world.Scene, words: Words, rng: np.random.Generator) -> list[int]:
    """What stands where a picture would stand: a map in words, or a sentence."""
    if rng.random() < 0.6:
        return [token for word in world.place_map(scene) for token in words.ids(word)]
    return words.ids(world.caption(scene, rng))


def retelling(
    scene: world.Scene, context: list[int], words: Words, rng: np.random.Generator
) -> tuple[list[int], list[bool]]:
    """The description, and the scene in other wordings, a line each: what belongs together has to be looked up."""
    tokens, targets = [BOS, *context], [False] * (1 + len(context))
    while len(tokens) < LENGTH:
        line = [*words.ids(world.caption(scene, rng)), NEWLINE]
        tokens, targets = tokens + line, targets + [True] * len(line)
    return tokens, targets


def dialogue(
    scene: world.Scene, context: list[int], words: Words, rng: np.random.Generator
) -> tuple[list[int], list[bool]]:
    """Questions about the description and their answers, as many as fit, in the v1 format."""
    asked = [(question.text, question.answer) for question in some_questions(scene, rng)]
    if rng.random() < 0.1:
        asked.insert(0, (ASK_FOR_CAPTION, world.caption(scene, rng)))
    user = f"{SYSTEM} USER: " if rng.random() < 0.5 else "USER: "
    if rng.random() < 0.25:
        opening = words.ids(f"{user}{world.caption(scene, rng)}\n{asked[0][0]} ASSISTANT:")
    else:
        opening = [*words.ids(user), *context, *words.ids(f"\n{asked[0][0]} ASSISTANT:")]
    tokens, targets = [BOS, *opening], [False] * (1 + len(opening))
    for turn, (question, answer) in enumerate(asked):
        prompt = [] if turn == 0 else words.ids(f"USER: {question} ASSISTANT:")
        reply = [*words.ids(answer), EOS]
        if turn and len(tokens) + len(prompt) + len(reply) > LENGTH:
            break
        tokens += prompt + reply
        targets += [False] * len(prompt) + [True] * len(reply)
    return tokens, targets


def batches(words: Words, rows: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches: tokens int32[rows, LENGTH] padded on the right with 0, targets bool[rows, LENGTH].

    The first REPETITIONS batches hold nothing but words said over and over: a decoder that has learned to find what it read
    before learns to read descriptions in minutes, one that has not stays for hours at guessing.
    """
    rng = np.random.default_rng(seed)
    for batch in itertools.count():
        tokens_BT = np.zeros((rows, LENGTH), np.int32)
        targets_BT = np.zeros((rows, LENGTH), bool)
        for index in range(rows):
            tokens, targets = (
                repetition(words, rng) if batch < REPETITIONS else row(world.sample_scene(rng), words, rng)
            )
            tokens_BT[index, : len(tokens)] = tokens[:LENGTH]
            targets_BT[index, : len(targets)] = targets[:LENGTH]
        yield tokens_BT, targets_BT
