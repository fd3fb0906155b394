"""Models for lmms-eval: `lmms-eval --model llava_jax --model_args pretrained=SRC --tasks …`, with no code of its own.

The entry point `lmms_eval.models` of the package names `manifest`; lmms-eval brings torch, in an environment with both.
"""

import collections
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from llava_jax import api
from llava_jax.infer.engine import Engine
from llava_jax.infer.generate import question_message
from llava_jax.types import InputError, Sampling

# What of a task's generation_kwargs decides an answer; each of the others is named once.
READ = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "until")
MAX_NEW_TOKENS = 1024  # where a task names none, as lmms-eval's other models


def manifest() -> ModelManifest:
    """Return what lmms-eval looks for: the two classes of the model `llava_jax`."""
    here = __name__
    return ModelManifest("llava_jax", simple_class_path=f"{here}.Simple", chat_class_path=f"{here}.Chat")


class Simple(lmms):
    """A model for tasks that give a text and images, each image before the text where it has no place of its own."""

    def __init__(
        self,
        pretrained: str,
        template: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Load the model.

        Args:
          pretrained, template, dtype: as of `llava_jax.load`.
          batch_size: answers at a time.
          max_batch_size: is not read, since batches are not searched for.
          device: must be left out; jax takes the devices it finds, or those of JAX_PLATFORMS.
        """
        super().__init__()
        if device is not None:
            raise InputError(f"device={device}: jax takes the devices it finds; set JAX_PLATFORMS and leave device out")
        if not str(batch_size).isdecimal():
            raise InputError(f"batch_size={batch_size}: expected how many answers are given at a time, as 16")
        self.model = api.load(pretrained, template, dtype)
        self._engine: Engine = self.model.engine(int(batch_size))
        self._unread: set[str] = set()

    def _messages(self, args: Sequence[Any]) -> list[dict[str, Any]]:
        text, _, doc_to_visual, doc_id, task, split = args
        return [question_message(text, doc_to_visual(self.task_dict[task][split][doc_id]) or [])]

    def _options(self, args: Sequence[Any]) -> dict[str, Any]:
        return args[1]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answers; those of one sampling are given together."""
        alike: dict[tuple[Sampling, tuple[str, ...]], list[int]] = collections.defaultdict(list)
        for index, request in enumerate(requests):
            alike[self._sampling(self._options(request.args))].append(index)
        answers = [""] * len(requests)
        for (sampling, until), indices in alike.items():
            prompts = (self.model.prompt(self._messages(requests[index].args)) for index in indices)
            for answer in self._engine.answers(prompts, sampling, until):
                answers[indices[answer.index]] = answer.text
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _sampling(self, options: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        """Return a task's sampling and the strings that end its answers."""
        unread = options.keys() - {*READ, *self._unread}
        if unread:
            self._unread |= unread
            print(f"llava_jax: generation_kwargs not read: {', '.join(sorted(unread))}", flush=True)
        drawn = options.get("do_sample", True) and (options.get("temperature") or 0) > 0
        until = options.get("until") or []
        sampling = Sampling(
            max_new_tokens=options.get("max_new_tokens") or MAX_NEW_TOKENS,
            temperature=options["temperature"] if drawn else 0.0,
            top_p=(options.get("top_p") or 1.0) if drawn else 1.0,
            top_k=(options.get("top_k") or 0) if drawn else 0,
            beams=options.get("num_beams") or 1,
        )
        return sampling, tuple(filter(None, [until] if isinstance(until, str) else until))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation as an answer, with what ends it, and whether it is greedy."""
        scores = []
        for request in requests:
            _, target, _, doc_id, task, split = request.args
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            # Chat models, too, are given these tasks as a text and images.
            scores.append(self.model.score(Simple._messages(self, request.args), answer.strip()))
        return scores

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: each task of several rounds asks in a way of its own."""
        raise InputError("tasks of several rounds (generate_until_multi_round) are not supported; choose other tasks")


class Chat(Simple):
    """A model for tasks that give messages, with images among the texts."""

    is_simple = False

    def _messages(self, args: Sequence[Any]) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = args
        return ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()

    def _options(self, args: Sequence[Any]) -> dict[str, Any]:
        return args[2]
