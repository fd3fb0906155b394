"""A process that is stuck, or told to stop, ends with the code that says so."""

import os
import signal
import sys
import threading
import time

import pytest

from llava_jax.cli import main
from llava_jax.parallel.distributed import is_lost, stop_signal
from llava_jax.train import watchdog as W

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def codes(monkeypatch) -> list[int]:
    """The exit codes of the process, of which only the watchdog's thread ends."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        sys.exit()

    monkeypatch.setattr(os, "_exit", leave)
    return codes


def wait(codes: list[int], seconds: float = 3.0) -> list[int]:
    end = time.monotonic() + seconds
    while not codes and time.monotonic() < end:
        time.sleep(0.02)
    return codes


def test_a_phase_that_takes_too_long_ends_the_process(codes, capfd):
    with W.watching(1) as watchdog:
        for phase in ("compile", "save"):
            watchdog.enter(phase)
            time.sleep(0.7)
        assert not codes
        assert wait(codes) == [43]
    said = capfd.readouterr().err
    assert "in test_a_phase_that_takes_too_long" in said  # the stacks
    assert said.endswith("error: save takes more than 1 s (train.watchdog): stuck\n")


def test_a_step_may_take_as_long_as_usual(codes, monkeypatch):
    monkeypatch.setattr(W, "STEP_SECONDS", 0.1)
    with W.watching(1) as watchdog:
        for seconds in (0.05, 0.05, 0.6):
            watchdog.enter("step")
            time.sleep(seconds)
        assert not codes
        assert wait(codes) == [43]


@pytest.mark.parametrize("phase", W.UNSAVED)
def test_sigterm_ends_at_once_where_nothing_is_to_be_saved(codes, phase, capfd):
    with stop_signal(), W.watching(0) as watchdog:
        watchdog.enter(phase)
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait(codes) == [42]
    assert capfd.readouterr().err == f"stopped by SIGTERM during {phase}: nothing is to be saved\n"


@pytest.mark.parametrize("is_first", [True, False])
def test_several_leave_together_before_the_first_update(codes, monkeypatch, is_first):
    """Another process got the signal; the first process leaves last."""
    monkeypatch.setattr(W, "LAST_SECONDS", 1.5)
    agreed = threading.Event()
    with W.watching(0) as watchdog:
        watchdog.leave_together(lambda n: agreed.is_set() and n == 1, is_first)
        watchdog.enter("compile")
        assert not wait(codes, 0.7)
        agreed.set()
        assert wait(codes, 1.4) == ([] if is_first else [42])
        assert wait(codes) == [42]


def test_one_of_several_leaves_alone_where_the_others_do_not_answer(codes, monkeypatch):
    monkeypatch.setattr(W, "TOGETHER_SECONDS", 1.0)
    with stop_signal(), W.watching(0) as watchdog:
        watchdog.leave_together(lambda n: False, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not wait(codes, 0.7)
        assert wait(codes) == [42]


def test_sigterm_is_still_handled_by_who_handled_it(codes, monkeypatch):
    """The step is over in time, and the save has its own."""
    monkeypatch.setattr(W, "TERM_SECONDS", 0.1)
    with stop_signal() as should_stop, W.watching(0) as watchdog:
        watchdog.enter("step")
        assert not should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop(2)
        watchdog.enter("save")
        assert not wait(codes, 0.7)
        watchdog.enter("step")
        assert wait(codes) == [43]


def test_the_update_after_a_pass_has_its_own_time(codes, monkeypatch):
    """Several processes that are told to stop during a pass finish it, and do one more update."""
    monkeypatch.setattr(W, "TERM_SECONDS", 0.6)
    with stop_signal(), W.watching(0) as watchdog:
        watchdog.enter("evaluation")
        os.kill(os.getpid(), signal.SIGTERM)
        assert not wait(codes, 0.7)
        watchdog.enter("step")
        assert not wait(codes, 0.55)
        assert wait(codes) == [43]


def test_sigterm_before_the_start(codes, capfd, monkeypatch):
    """While the arguments of `train` are read, and the config file that they name runs."""

    def told(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(main, "split_passed", told)
    with pytest.raises(SystemExit):
        main.main(("train", "--config=tiny", "--workdir=run"))
    assert codes == [42] and signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err == "stopped by SIGTERM: nothing is to be saved\n"


@pytest.mark.parametrize(
    "text, lost",
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:22013", True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: step 3", True),
        ("UNAVAILABLE: The tasks have crashed. Heartbeat timeout", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.", False),
        ("INVALID_ARGUMENT: executable expected parameter 0", False),
    ],
)
def test_what_says_that_another_process_is_gone(text, lost):
    import jax

    error = ValueError("orbax wraps it")
    error.__cause__ = jax.errors.JaxRuntimeError(text)
    assert is_lost(error) == is_lost(error.__cause__) == lost
    assert not is_lost(ValueError(text))
