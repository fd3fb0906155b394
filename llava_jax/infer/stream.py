"""Text of an answer while its ids arrive."""

from collections.abc import Sequence

from llava_jax.data.tokenize import TextTokenizer


class StreamDecoder:
    """Text of ids that arrive one by one: never half a character, never a stop string or a beginning of one.

    `push` returns what can be shown now, `finish` the rest; `stopped` turns True at the first stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # ids[:shown] are decoded; ids[context:shown] gives the decoder the neighbour that a leading space depends on.
        self._context = self._shown = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Takes one id; returns new text, often empty."""
        if self.stopped:
            return ""
        self._ids.append(int(token))
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """Returns what was held back; incomplete characters become U+FFFD."""
        if self.stopped:
            return ""
        text = self._take(self._new_text())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(known) :]

    def _take(self, text: str) -> str:
        if text:
            self._context = self._shown
        self._shown = len(self._ids)
        self._held += text
        found = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        cut = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may begin `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
