"""What the scripts about hostile input share: values nobody expects, JSON with one of them, an alarm, a limit."""

import contextlib
import copy
import faulthandler
import random
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

MEMORY = 2 << 30


class TooLong(BaseException):
    """A case took longer than SECONDS."""


# ---- values and texts ------------------------------------------------------------------------------------------------


def nested(depth: int, kind: type) -> Any:
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, -(2**63), 10**30, 1e308, -1e308, 0.5, float("nan"), float("inf")),
    *("", "x", "\ud800", "\0", "../../etc/passwd", "/etc/passwd", "__import__('os')", "{{ 1 }}", "é" * 10_000),
    *([], {}, [None], [[]], {"": None}, [1, 2, 3], ["a"] * 10_000, nested(90, list), nested(90, dict)),
)


def mutated(value: Any, rng: random.Random) -> Any:
    """Return JSON with one of its values changed, taken out or put in."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        each = left.pop()
        inner = (
            list(each.items()) if isinstance(each, dict) else list(enumerate(each)) if isinstance(each, list) else []
        )
        # Of a long list or table a few are enough.
        for key, child in inner if len(inner) < 60 else rng.sample(inner, 5):
            places.append((each, key))
            left.append(child)
    if not places or rng.random() < 0.05:
        return rng.choice(VALUES)
    container, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del container[key]
    elif how < 0.25 and isinstance(container, dict):
        container[rng.choice(("auto_map", "quantization_config", "rope_scaling", "x", "__class__"))] = rng.choice(
            VALUES
        )
    else:
        container[key] = rng.choice(VALUES)
    return value


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise TooLong after so many seconds; end the process with its stacks where it does not even hear that."""

    def too_long(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def limit_memory() -> None:
    """Let the process take MEMORY more than now, so that what would take all raises MemoryError."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def peak_memory() -> int:
    """Return the most bytes that were in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
