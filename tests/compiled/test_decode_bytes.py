"""The step of decoding compiled for a TPU: what it holds and moves. No TPU is needed, and no weight is made."""

import itertools
import json
import os
import subprocess
import sys

import pytest

MIB = 2**20


@pytest.mark.parametrize(
    "llm, batches, slots",
    [("vicuna-7b", (8,), (1024,)), ("tests/data/plan/decoder_34b.json", (8,), (1024,))],
    ids=["7b", "34b with grouped heads"],
)
def test_a_step_on_v5p_holds_and_moves_little_but_weights_and_cache(llm, batches, slots):
    shapes = ["--batch", *map(str, batches), "--slots", *map(str, slots)]
    command = [sys.executable, "-m", "tests.decode_bytes", "--topology=v5p:2x2x1", f"--llm={llm}", "--json", *shapes]
    # A process of its own: libtpu stays loaded, and tests of other files want a process without it.
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["batch"], one["slots"]) for one in found] == list(itertools.product(batches, slots))
    for one in found:
        assert one["temporary_bytes"] < 64 * MIB, one
        # Less than all of the weights and the cache is a fault of the counting.
        assert 0.99 < one["ratio"] <= 1.10, one
        assert one["cache_copies"] == [], one
