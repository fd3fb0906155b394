"""Many answers at a time: requests come and go from any thread, one thread of the engine's own drives the device.

The device holds a fixed number of slots. A request waits in a queue, is prefilled into a free slot (several that are
alike at once) and decoded with all others, a few ids a call, until it ends or is cancelled. A prompt that begins as one
whose keys and values a slot still holds (the same system text, the same image, the same conversation) starts from
these. An answer is a function of its prompt and sampling alone.
"""

import contextlib
import functools
import hashlib
import itertools
import queue
import threading
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.infer.generate import (
    Drawn,
    Inputs,
    Prompt,
    Row,
    Slots,
    admit,
    beam_ids,
    bucket,
    collate,
    decode,
    draw_first,
    empty_slots,
    encode_images,
    image_index,
    resized,
    row_bucket,
)
from llava_jax.infer.placed_model import PlacedModel
from llava_jax.infer.sample import check_sampling, draw_of
from llava_jax.types import InputError, ModelConfig, Sampling

# Ids a slot between two looks at what came in: where somebody reads along, and where all wait for whole answers.
STEPS, MOST_STEPS = 4, 16
MIN_SIZE = 96  # tokens a slot
CHUNK = 8  # tokens; prompts share whole ones
WORTH_WAITING = 4  # chunks that another prompt of the same call would have ready
LOGPROBS = 20  # the most of the likeliest ids that a request may ask for
# The pool of image features: bytes on the device and images (or tiles), whichever is less; it is made with the first.
POOL_BYTES, POOL_IMAGES = 256 * 2**20, 32


class TokenLogprobs(NamedTuple):
    """An id, the logarithm of its probability, and the likeliest ids with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """What an answer grows by; `text` is empty while ids are half a character or may begin a stop string."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class End(NamedTuple):
    """The end of an answer: `reason` is stop, length or cancelled; ids are counted with the one that ended it."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


class Failed(NamedTuple):
    """The end of an answer that the device could not give."""

    error: Exception


class Call(NamedTuple):
    """What the device was asked to draw: `rows` are (row of the arrays, slot), one for each ticket."""

    rows: list[tuple[int, int]]
    tickets: list["Ticket"]
    drawn: Drawn
    stopped_B: jax.Array


Event = Piece | End | Failed
Emit = Callable[[Event], None]


class Full(Exception):
    """As many requests wait as the engine takes."""


class Closed(Exception):
    """The engine takes no more requests: it was closed, or has died of an error."""


class TextDecoder(Protocol):
    """Makes text of ids as they come: sample.AnswerDecoder, or NoText."""

    stopped: bool

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class Answering(Protocol):
    """What the engine needs of a model."""

    @property
    def placed(self) -> PlacedModel: ...
    def decoder(self, stop: Sequence[str] = ()) -> TextDecoder: ...


class Model(Answering, Protocol):
    """What chat and batch_generate need of `llava_jax.Llava`."""

    @property
    def name(self) -> str: ...
    @property
    def about(self) -> dict[str, Any]: ...
    @property
    def stream(self) -> Callable[..., Iterator[str]]: ...
    def engine(self, slots: int) -> "Engine": ...
    def length(self, messages: Sequence[dict[str, Any]]) -> int: ...
    def prompt(self, messages: Sequence[dict[str, Any]], pixels: np.ndarray | None = None) -> Prompt: ...


class NoText:
    """The text of an answer of which only the ids are wanted."""

    stopped = False

    def push(self, token: int) -> str:
        """Take one id."""
        return ""

    def finish(self) -> str:
        """Return nothing, as `push`."""
        return ""


class IdModel(NamedTuple):
    """A model without a tokenizer: its answers are ids."""

    placed: PlacedModel

    def decoder(self, stop: Sequence[str] = ()) -> NoText:
        """Return what makes no text."""
        return NoText()


class Answer(NamedTuple):
    """The whole answer to one of several prompts, and the ids it was made of."""

    index: int
    text: str
    ids: list[int]


class Ticket:
    """A request under way."""

    def __init__(self, prompt: Prompt, sampling: Sampling, emit: Emit, decoder: TextDecoder, top: int | None):
        self.prompt, self.sampling, self.emit, self.decoder, self.top = prompt, sampling, emit, decoder, top
        self.images = [hashlib.sha256(np.ascontiguousarray(x).data).digest() for x in prompt.pixels]
        self.hash = zlib.crc32(b"".join(self.images), zlib.crc32(prompt.tokens.tobytes()))
        self.chunks: list[bytes] = []
        self.start = self.source = 0
        self.limit, self.drawn, self.cancelled, self.is_read_along = sampling.max_new_tokens, 0, False, True

    @property
    def kind(self) -> tuple[int, bool, int]:
        """Return what is the same for requests that are prefilled together."""
        return bucket(len(self.prompt.tokens) - self.start), self.start > 0, self.sampling.beams

    def cancel(self) -> None:
        """End the answer; its slot is free at the next call of the device. Nothing happens where it has ended."""
        self.cancelled = True

    def end(self, reason: str) -> None:
        self.emit(End(reason, len(self.prompt.tokens), self.drawn))


def _chunks(ticket: Ticket, config: ModelConfig) -> list[bytes]:
    """Return a digest of the prompt up to the end of each of its chunks, images by their content; the last token of a
    prompt is in none, as it must be run."""
    index_T, P = image_index(ticket.prompt, config), config.vision.patches
    images = np.array([int.from_bytes(name[:8], "little", signed=True) for name in ticket.images] or [0], np.int64)
    content_TC = np.stack(
        [ticket.prompt.tokens, index_T, np.where(index_T < 0, 0, images[index_T.clip(0) // P])], axis=1
    )
    digest, chunks = hashlib.blake2b(digest_size=16), []
    for end in range(CHUNK, len(content_TC), CHUNK):
        digest.update(content_TC[end - CHUNK : end].tobytes())
        chunks.append(digest.digest())
    return chunks


class Features:
    """Image features on the device, found by the content of their image; those used longest ago give way."""

    def __init__(self, placed: PlacedModel):
        self._placed = placed
        self._entries: OrderedDict[bytes, int] = OrderedDict()
        self.pool_CPD: jax.Array | None = None
        self._size = 0

    def entries(self, tickets: Sequence[Ticket]) -> list[list[int]]:
        """Return where the features of each ticket's images are, after those that are missing were computed.

        Nothing for a ticket that starts after its images.
        """
        token = self._placed.config.image_token_id
        needing = [token in ticket.prompt.tokens[ticket.start :] for ticket in tickets]
        asked = [ticket for ticket, needs in zip(tickets, needing, strict=True) if needs]
        pixels = {name: x for ticket in asked for name, x in zip(ticket.images, ticket.prompt.pixels, strict=True)}
        self._make_pool(len(pixels))
        for name in pixels.keys() & self._entries.keys():
            self._entries.move_to_end(name)
        missing = [name for name in pixels if name not in self._entries]
        while missing:
            count = self._placed.group(len(missing))
            self._encode({name: pixels[name] for name in missing[:count]})
            missing = missing[count:]
        return [
            [self._entries[name] for name in ticket.images] if needs else []
            for ticket, needs in zip(tickets, needing, strict=True)
        ]

    def _make_pool(self, needed: int) -> None:
        config = self._placed.config
        shape, dtype = (config.vision.patches, config.llm.width), jnp.dtype(config.dtype)
        if needed > self._size:
            fitting = POOL_BYTES // (shape[0] * shape[1] * dtype.itemsize)
            # Programs are compiled for its size: a conversation that grows meets few.
            self._size = max(row_bucket(needed), min(POOL_IMAGES, fitting))
            self.pool_CPD = self._placed.replicate(jnp.zeros((self._size, *shape), dtype))
            self._entries.clear()

    def _encode(self, pixels: dict[bytes, np.ndarray]) -> None:
        for name in pixels:
            used = len(self._entries)
            self._entries[name] = self._entries.popitem(last=False)[1] if used == self._size else used
        fill = self._placed.group(len(pixels)) - len(pixels)
        entry_N = np.array([self._entries[name] for name in pixels] + [self._size] * fill, np.int32)
        given = self._placed.place((np.stack([*pixels.values(), *[next(iter(pixels.values()))] * fill]), entry_N))
        self.pool_CPD = encode_images(self._placed.params, self.pool_CPD, *given, config=self._placed.config)


class Engine:
    """Answers requests in the order they come, `slots` at a time."""

    def __init__(self, model: Answering, *, slots: int = 8, max_length: int | None = None, waiting: int = 64):
        """Start nothing yet: the thread runs while there is work.

        Args:
          model: what answers.
          slots: answers at a time; over several devices rounded up to a multiple of those that rows are split over.
          max_length: most tokens of a prompt with its answer, reserved from the first request on; by default as many
            as the model has positions, with room made as requests need it.
          waiting: most requests in the queue.
        """
        self.model, self.placed = model, model.placed
        self.slots = self.placed.rows(slots)
        positions = self.placed.config.llm.max_positions
        self.max_length = min(positions, max_length or positions)
        self._reserved = 0 if max_length is None else self.max_length
        self._waiting = waiting
        self._features = Features(self.placed)
        self._state: Slots | None = None
        self._lock = threading.Lock()
        self._queue: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        # The chunks that each slot's cache begins with, slots filled longest ago first, and a slot for each chunk.
        self._held: dict[int, list[bytes]] = {slot: [] for slot in range(self.slots)}
        self._slot_of: dict[bytes, int] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def alive(self) -> bool:
        """Return whether requests are taken."""
        return not self._closed

    @property
    def running(self) -> int:
        """Return how many requests have a slot."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Return how many requests wait for one."""
        return len(self._queue)

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        emit: Emit,
        *,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
    ) -> Ticket:
        """Queue a request and return at once.

        Args:
          prompt: of `Model.prompt`.
          sampling: how to draw; an answer of beam search comes in one Piece, and all others wait for it.
          emit: is given each Piece, then an End or Failed, on the engine's thread; must neither block nor raise.
          stop: strings that end the answer, next to those of the template.
          logprobs: how many of the likeliest ids come with each one (0: only its own probability), at most LOGPROBS;
            None for no probabilities.

        Raises InputError for what cannot be asked, Full where the queue is, Closed where nothing is taken.
        """
        ticket = self._ticket(prompt, sampling, emit, stop, logprobs)
        self._enqueue([ticket])
        return ticket

    def close(self, timeout: float) -> None:
        """Take no more requests; finish what there is within `timeout` seconds and cancel the rest.

        Returns when the device is done with the call that is under way then.
        """
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is None:
            return
        thread.join(timeout)
        with self._lock:
            for ticket in (*self._queue, *self._running.values()):
                ticket.cancel()
        thread.join()

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the text of one answer as it comes; a reader who leaves cancels it. Raises what `submit` does."""
        if sampling.beams > 1:
            raise InputError("beam search knows its answer only at the end and cannot be streamed: set beams to 1")
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return _texts(events, self.submit(prompt, sampling, events.put))

    def answers(self, prompts: Iterable[Prompt], sampling: Sampling, stop: Sequence[str] = ()) -> Iterator[Answer]:
        """Yield the answers to prompts in the order in which they end; `stop` are strings that end them, too.

        Prompts are taken, and made, while the device answers earlier ones. Raises what `submit` does.
        """
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        tickets: dict[int, Ticket] = {}
        pieces: defaultdict[int, list[Piece]] = defaultdict(list)
        waiting = enumerate(prompts)
        try:
            while True:
                # The first ones together, so that they are prefilled together.
                most = 2 * self.slots if tickets else self.slots
                new = {
                    index: self._ticket(prompt, sampling, functools.partial(_put, events, index), stop)
                    for index, prompt in itertools.islice(waiting, most - len(tickets))
                }
                for ticket in new.values():
                    ticket.is_read_along = False
                tickets |= new
                if new:
                    self._enqueue(list(new.values()))
                if not tickets:
                    return
                index, event = events.get()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Piece):
                    pieces[index].append(event)
                    continue
                del tickets[index]
                given = pieces.pop(index, [])
                text, ids = "".join(piece.text for piece in given), [token for piece in given for token in piece.ids]
                yield Answer(index, text, ids)
        finally:
            for ticket in tickets.values():
                ticket.cancel()

    def _ticket(
        self, prompt: Prompt, sampling: Sampling, emit: Emit, stop: Sequence[str] = (), logprobs: int | None = None
    ) -> Ticket:
        check_sampling(sampling)
        if "" in stop:
            raise InputError("stop: a string is empty; expected text that ends an answer")
        if logprobs is not None and not 0 <= logprobs <= LOGPROBS:
            raise InputError(f"logprobs is {logprobs}; expected 0 to {LOGPROBS}")
        if logprobs is not None and sampling.beams > 1:
            raise InputError("logprobs: beam search gives none; set beams to 1")
        left = self.max_length - len(prompt.tokens)
        if left < 1:
            raise InputError(
                f"prompt of {len(prompt.tokens)} tokens (image tokens included), but this model holds "
                f"{self.max_length} with room for an answer: shorten the text or give fewer images"
            )
        ticket = Ticket(prompt, sampling, emit, self.model.decoder(stop), logprobs)
        ticket.limit, ticket.chunks = min(ticket.limit, left), _chunks(ticket, self.placed.config)
        return ticket

    def _enqueue(self, tickets: Sequence[Ticket]) -> None:
        """Queue requests, all of them before the engine looks at the first."""
        with self._lock:
            if self._closed:
                raise Closed("the engine takes no more requests")
            if len(self._queue) + len(tickets) > self._waiting:
                raise Full(f"{len(self._queue)} requests wait already, and no more than {self._waiting} may")
            self._queue.extend(tickets)
            if self._thread is None:
                # Not a daemon: Python aborts where it ends while such a thread is inside XLA. So it waits for the
                # last answer, or, where that is cancelled, for the call that the device is at.
                self._thread = threading.Thread(target=self._run, name="engine")
                self._thread.start()

    # ---- the engine's thread ----

    def _run(self) -> None:
        try:
            with contextlib.nullcontext() if self.placed.mesh is None else jax.set_mesh(self.placed.mesh):
                while self._turn():
                    pass
        except Exception as error:
            # Not the device's: nobody may wait for an answer that will not come.
            with self._lock:
                self._closed = True
                left = [*self._running.values(), *self._queue]
                self._running.clear()
                self._queue.clear()
            for ticket in left:
                ticket.emit(Failed(error))
            raise

    def _turn(self) -> bool:
        """Admit requests and draw a few ids for all that have a slot; return whether there is more to do."""
        self._end_cancelled()
        try:
            calls = self._admit()
            if self._running:
                calls.append(self._decode())
            # The first ids reach their readers while the device draws the next ones.
            for call in calls:
                self._deliver(call)
        except jax.errors.JaxRuntimeError as error:
            self._state, self._features = None, Features(self.placed)
            for slot in range(self.slots):
                self._hold(slot, [])
            self._fail(dict(self._running), error)
        with self._lock:
            if self._running or self._queue:
                return True
            self._thread = None
            return False

    def _end_cancelled(self) -> None:
        with self._lock:
            left = [ticket for ticket in self._queue if ticket.cancelled]
            self._queue = deque(ticket for ticket in self._queue if not ticket.cancelled)
        for slot in [slot for slot, ticket in self._running.items() if ticket.cancelled]:
            left.append(self._running.pop(slot))
        for ticket in left:
            ticket.end("cancelled")

    def _fail(self, tickets: dict[int, Ticket], error: Exception) -> None:
        for slot, ticket in tickets.items():
            del self._running[slot]
            ticket.emit(Failed(error))

    def _admit(self) -> list[Call]:
        """Prefill requests that wait into the slots that are free; return what was drawn."""
        calls = []
        while group := self._next_group():
            try:
                if next(iter(group.values())).sampling.beams > 1:
                    self._search(group)
                else:
                    calls.append(self._prefill(group))
            except jax.errors.JaxRuntimeError as error:
                if self._state is None or self._state.last_B.is_deleted():
                    raise
                self._features = Features(self.placed)  # some may have been noted, and not made
                self._fail(group, error)
        return calls

    def _next_group(self) -> dict[int, Ticket]:
        """Take the request that waits longest, and others of its kind, for slots that are free.

        What would find more of its prompt ready after this call waits for it.
        """
        with self._lock:
            free = [slot for slot in self._held if slot not in self._running]
            # No more than one call takes; fewer are cut to the size below.
            most = min(len(free), self.placed.group(len(free))) if free else 0
            group, chunks = [], set()
            for ticket in itertools.islice(self._queue, 2 * self.slots):
                if len(group) == most:
                    break
                self._find_prefix(ticket)
                ready = ticket.start // CHUNK + WORTH_WAITING
                is_alike = not group or ticket.kind == group[0].kind
                if is_alike and chunks.isdisjoint(ticket.chunks[ready - 1 : ready]):
                    group.append(ticket)
                    chunks.update(ticket.chunks)
            group = group[: self.placed.group(len(group))] if group else group
            self._queue = deque(ticket for ticket in self._queue if ticket not in group)
            taken = dict(zip(free, group, strict=False))
            self._running |= taken
            return taken

    def _find_prefix(self, ticket: Ticket) -> None:
        """Find the slot that holds most of the prompt's beginning."""
        ticket.start = ticket.source = 0
        if ticket.sampling.beams == 1:
            for count in range(len(ticket.chunks), 0, -1):
                if ticket.chunks[count - 1] in self._slot_of:
                    ticket.start, ticket.source = count * CHUNK, self._slot_of[ticket.chunks[count - 1]]
                    return

    def _hold(self, slot: int, chunks: list[bytes]) -> None:
        """Note what the cache of a slot begins with."""
        for chunk in self._held.pop(slot):
            if self._slot_of.get(chunk) == slot:
                del self._slot_of[chunk]
        self._held[slot] = chunks
        self._slot_of |= dict.fromkeys(chunks, slot)

    def _inputs(self, tickets: Sequence[Ticket]) -> tuple[Inputs, np.ndarray]:
        """Return what is prefilled, and the most ids of each row."""
        entries, rows = self._features.entries(tickets), self.placed.group(len(tickets))
        given = [
            Row(ticket.prompt, shown, ticket.start, ticket.source)
            for ticket, shown in zip(tickets, entries, strict=True)
        ]
        limit_R = np.zeros(rows, np.int32)
        limit_R[: len(tickets)] = [ticket.limit for ticket in tickets]
        return self.placed.place((collate(given, self.placed.config, rows), limit_R))

    def _prefill(self, group: dict[int, Ticket]) -> Call:
        placed, tickets = self.placed, list(group.values())
        self._make_room(tickets)
        inputs, limit_R = self._inputs(tickets)
        fill = len(limit_R) - len(tickets)
        samplings, hashes = [*(ticket.sampling for ticket in tickets), *[Sampling()] * fill], [0] * fill
        draw = draw_of(samplings, [*(ticket.hash for ticket in tickets), *hashes])
        draw, slot_R = placed.place((draw, np.array([*group, *[self.slots] * fill], np.int32)))
        self._state, logits_RV = admit(
            placed.params,
            self._state,
            self._features.pool_CPD,
            inputs,
            slot_R,
            config=placed.config,
            size=bucket(max(len(ticket.prompt.tokens) for ticket in tickets)),
        )
        self._state, drawn, stopped_R = draw_first(
            self._state, logits_RV, limit_R, draw, slot_R, placed.stops_QV, top=_top(tickets)
        )
        for slot, ticket in group.items():
            self._hold(slot, ticket.chunks)
        return Call(list(enumerate(group)), tickets, drawn, stopped_R)

    def _make_room(self, tickets: Sequence[Ticket]) -> None:
        """Give every slot room for the longest of these answers: two sizes for twice the length, each a compilation."""
        needed = self._reserved or max(len(ticket.prompt.tokens) + ticket.limit for ticket in tickets)
        size = bucket(min(self.max_length, max(MIN_SIZE, needed)))
        if self._state is None:
            empty = empty_slots(config=self.placed.config, rows=self.slots, size=size)
            self._state = empty if self.placed.mesh else self.placed.replicate(empty)
        elif size > self._state.cache.size:
            self._state = resized(self._state, size=size)

    def _search(self, group: dict[int, Ticket]) -> None:
        """Answer requests by beam search."""
        tickets = list(group.values())
        inputs, limit_B = self._inputs(tickets)
        answers = beam_ids(self.placed, inputs, self._features.pool_CPD, limit_B, tickets[0].sampling.beams)
        for (slot, ticket), ids in zip(group.items(), answers, strict=False):
            self._extend(slot, ticket, Drawn(np.array(ids)), is_stopped=len(ids) < ticket.limit)

    def _decode(self) -> Call:
        placed, tickets = self.placed, list(self._running.values())
        keep_B = placed.place(np.isin(np.arange(self.slots), list(self._running)))
        # Where others wait, a call ends once a quarter of the slots is free.
        enough = self.slots - max(1, self.slots // 4) if self._queue else 0
        self._state, drawn, stopped_B = decode(
            placed.params,
            self._state,
            placed.stops_QV,
            keep_B,
            np.int32(enough),
            np.int32(STEPS if any(ticket.is_read_along for ticket in tickets) else MOST_STEPS),
            config=placed.config,
            steps=MOST_STEPS,
            top=_top(tickets),
        )
        return Call([(slot, slot) for slot in self._running], tickets, drawn, stopped_B)

    def _deliver(self, call: Call) -> None:
        drawn, stopped_B = jax.device_get((call.drawn, call.stopped_B))
        for (row, slot), ticket in zip(call.rows, call.tickets, strict=True):
            if self._running.get(slot) is ticket:
                self._extend(slot, ticket, jax.tree.map(lambda x: x[row], drawn), bool(stopped_B[row]))  # noqa: B023

    def _extend(self, slot: int, ticket: Ticket, drawn: Drawn, is_stopped: bool) -> None:
        """Give a ticket the ids that were drawn for it, up to the one that completes a stop string."""
        ids, text = [], ""
        for token in drawn.ids_BM[drawn.ids_BM >= 0].tolist():
            ids.append(token)
            text += ticket.decoder.push(token)
            if ticket.decoder.stopped:
                break
        ticket.drawn += len(ids)
        is_stopped |= ticket.decoder.stopped
        is_ended = is_stopped or ticket.drawn >= ticket.limit
        if is_ended:
            del self._running[slot]
            text += ticket.decoder.finish()
        ticket.emit(Piece(text, tuple(ids), _logprobs(drawn, ids, ticket.top)))
        if is_ended:
            ticket.end("stop" if is_stopped else "length")


def _put(events: queue.SimpleQueue[tuple[int, Event]], index: int, event: Event) -> None:
    events.put((index, event))


def _texts(events: queue.SimpleQueue[Event], ticket: Ticket) -> Iterator[str]:
    try:
        while not isinstance(event := events.get(), End):
            if isinstance(event, Failed):
                raise event.error
            if event.text:
                yield event.text
    finally:
        ticket.cancel()


def _top(tickets: Iterable[Ticket]) -> int:
    """Return how many of the likeliest ids a call computes."""
    return LOGPROBS if any(ticket.top is not None for ticket in tickets) else 0


def _logprobs(drawn: Drawn, ids: Sequence[int], top: int | None) -> tuple[TokenLogprobs, ...]:
    if top is None:
        return ()
    likeliest = zip(drawn.top_BMN[:, :top].tolist(), drawn.top_logprob_BMN[:, :top].tolist(), strict=True)
    each = zip(ids, drawn.logprob_BM.tolist(), likeliest, strict=False)
    return tuple(TokenLogprobs(token, logprob, tuple(zip(*others, strict=True))) for token, logprob, others in each)
