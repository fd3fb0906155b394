"""Held-out rows answered during training: how many answers are right, or how close they are."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from llava_jax.data.images import load_tiles, normalised
from llava_jax.data.templates import render
from llava_jax.data.tiles import spread, tiling
from llava_jax.data.tokenize import TextTokenizer, encode, expand, image_paths, image_sizes
from llava_jax.evaluate.exact_match import normalise
from llava_jax.evaluate.rouge import rouge_l
from llava_jax.infer.generate import Prompt, bucket, greedy_ids
from llava_jax.infer.placed_model import PlacedModel
from llava_jax.infer.sample import AnswerDecoder, stop_table
from llava_jax.models.layers import stored_as, unstacked
from llava_jax.models.llava import for_answers, join_parts, overlaid
from llava_jax.parallel.sharding import place, replicated
from llava_jax.train.setup import Run
from llava_jax.train.step import Params
from llava_jax.types import DataSettings, InputError, ModelConfig, Record, Settings

SHORT = 5  # words; where no reference has more, an answer is right or wrong


@dataclasses.dataclass(frozen=True)
class Questions:
    """The first questions of held-out rows: `prompts` (pixels still bytes) and the answers of the rows to them.

    `model` is without weights, `at_once` are answered together, with at most `limit` ids.
    """

    model: PlacedModel
    prompts: list[Prompt]
    references: list[str]
    tokenizer: TextTokenizer
    stop: Sequence[str]
    at_once: int
    limit: int

    def text(self, ids: Sequence[int]) -> str:
        """Return the answer that ids spell."""
        decoder = AnswerDecoder(self.tokenizer, self.stop)
        return "".join(decoder.push(token) for token in ids) + decoder.finish()

    @property
    def are_short(self) -> bool:
        return all(len(text.split()) <= SHORT for text in self.references)


def open_questions(
    settings: Settings, data: DataSettings, tokenizer: TextTokenizer, run: Run, rows: Sequence[Record]
) -> Questions:
    """Read the first `train.eval_generate` of the held-out `rows`; `data` is how they are read.

    What stands before a row's first answer is asked. Raises InputError for a row that cannot be.
    """
    train, config = settings.train, run.config
    if train.eval_generate > len(rows):
        raise InputError(f"train.eval_generate={train.eval_generate}: data.eval has {len(rows)} rows, expected no more")
    rules = tokenizer.template(data.template)
    # What spells a stop is cut from the text: only ids end an answer on the device.
    stops_QV = stop_table((), tokenizer.stop_ids(rules), [""] * config.llm.vocab_size)
    config = dataclasses.replace(config, remat="none", attention="xla")
    model = PlacedModel({}, config, place(stops_QV, replicated(run.mesh)), run.mesh)
    asked = Questions(model, [], [], tokenizer, rules.stop, train.batch_size // train.accumulate, 0)
    longest, room = 0, config.llm.max_positions
    for row in range(train.eval_generate):
        try:
            prompt, answer = _first_question(rows[row], data, config, tokenizer)
        except InputError as error:
            raise InputError(f"data.eval row {row}: {error}") from None
        room = min(room, config.llm.max_positions - len(prompt.tokens))
        if room < 2:
            raise InputError(f"data.eval row {row}: its first question leaves no room for an answer; shorten it")
        asked.prompts.append(prompt)
        asked.references.append(answer)
        longest = max(longest, len(tokenizer.encode_text(answer)))
    return dataclasses.replace(asked, limit=max(2, min(bucket(longest + 2), room)))


def _first_question(
    record: Record, data: DataSettings, config: ModelConfig, tokenizer: TextTokenizer
) -> tuple[Prompt, str]:
    """Return what is asked before a row's first trained answer, in the words of `generate`, and that answer."""
    turns, rules, size, tiles = record.turns, tokenizer.template(data.template), config.vision.image_size, None
    pairs = enumerate(itertools.pairwise(turn.speaker for turn in turns), 1)
    at = next((i for i, speakers in pairs if speakers == ("human", "gpt") and turns[i].target), 0)
    spans = render(turns[:at], rules, image_position=data.image_position, open_turn=True)
    encoded = encode(spans, tokenizer, bos=rules.bos)
    record = dataclasses.replace(record, images=record.images[: encoded.images])
    sizes: list[tuple[int, int]] = []
    if config.pinpoints:
        tiles, sizes = tiling(config), image_sizes(record, data)
    counts = config.vision.patches if tiles is None else tiles.tokens(sizes)
    tokens, _ = expand(encoded.tokens, encoded.targets, config.image_token_id, counts, max_length=None)
    pixels = [np.zeros((0, size, size, 3), np.uint8)]
    for path in image_paths(record, data):
        pixels.append(load_tiles(path, size, data.aspect, tiles, config.vision.pixels, data.exif))
    index_T = None if tiles is None else spread(tokens, config.image_token_id, tiles.feature_index(sizes))
    return Prompt(tokens, np.concatenate(pixels), index_T), turns[at].text.strip()


@functools.partial(jax.jit, static_argnums=1)
def copied_for_answers(parts: Params, config: ModelConfig) -> Params:
    """Return a copy of the weights in the dtype of the computation, as infer/ takes them."""
    params = stored_as(join_parts(parts), config.dtype)
    return for_answers(params) if config.is_dense else params | {"llm": unstacked(params["llm"])}


def answer(
    questions: Questions, params: Params, frozen: Params, should_stop: Callable[[], bool]
) -> dict[str, float | int]:
    """Return the figure of greedy answers in percent and their number, `eval_answers`; nothing when told to stop.

    It is `eval_exact_match` where all references are SHORT, else `eval_rouge_l`. Several processes call this together.
    """
    config = questions.model.config
    model = dataclasses.replace(questions.model, params=copied_for_answers(overlaid(frozen, params), config))
    how, said = config.vision.pixels, []
    for first in range(0, len(questions.prompts), questions.at_once):
        if should_stop():
            return {}
        prompts = questions.prompts[first : first + questions.at_once]
        ready = [prompt._replace(pixels=normalised(prompt.pixels, how)) for prompt in prompts]
        said += [questions.text(ids) for ids in greedy_ids(model, ready, questions.limit)]
    pairs = list(zip(said, questions.references, strict=True))
    if questions.are_short:
        name, scores = "eval_exact_match", [normalise(given) == normalise(right) for given, right in pairs]
    else:
        name, scores = "eval_rouge_l", [rouge_l(given, right) for given, right in pairs]
    return {name: 100.0 * sum(scores) / len(scores), "eval_answers": len(scores)}
