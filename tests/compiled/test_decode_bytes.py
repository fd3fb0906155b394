"""The step of decoding compiled for a TPU: what it holds and moves. No TPU is needed, and no weight is made."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from llava_jax.aot import hlo
from tests.decode_bytes import traffic

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


PROGRAM = """
HloModule decode, is_scheduled=true

%fused_scatter (p.0: bf16[2,4,64,8], p.1: s32[2], p.2: bf16[2,4,8]) -> bf16[2,4,64,8] {
  %p.0 = bf16[2,4,64,8]{3,2,1,0} parameter(0)
  ROOT %scatter.1 = bf16[2,4,64,8]{3,2,1,0} scatter(%p.0)
}

%step (state: (bf16[2,4,64,8], bf16[32,16], bf16[100,16])) -> (bf16[2,4,64,8], bf16[32,16], bf16[100,16]) {
  %state = (bf16[2,4,64,8]{3,2,1,0}, bf16[32,16]{1,0}, bf16[100,16]{1,0}) parameter(0)
  %cache = bf16[2,4,64,8]{3,2,1,0} get-tuple-element(%state), index=0
  %weight = bf16[32,16]{1,0} get-tuple-element(%state), index=1
  %embeddings = bf16[100,16]{1,0} get-tuple-element(%state), index=2
  %row = bf16[16]{0:S(1)} fusion(%embeddings), kind=kLoop, calls=%fused_gather
  %fetched = (bf16[32,16]{1,0:S(1)}, bf16[32,16]{1,0}, u32[]{:S(2)}) copy-start(%weight)
  %there = bf16[32,16]{1,0:S(1)} copy-done(%fetched)
  %new = bf16[2,4,8]{2,1,0} fusion(%there, %row), kind=kLoop, calls=%fused_product
  %slots = s32[2]{0:S(1)} fusion(%row), kind=kLoop, calls=%fused_slots
  %written = bf16[2,4,64,8]{3,2,1,0} fusion(%cache, %slots, %new), calls=%fused_scatter, metadata={op_name="a/scatter"}
  %read = bf16[16]{0:S(1)} fusion(%written), kind=kLoop, calls=%fused_attention
  COPY
  ROOT %out = (bf16[2,4,64,8]{3,2,1,0}, bf16[32,16]{1,0}, bf16[100,16]{1,0}) tuple(%written, %weight, %embeddings)
}

ENTRY %main (state: (bf16[2,4,64,8], bf16[32,16], bf16[100,16])) -> bf16[16] {
  %state = (bf16[2,4,64,8]{3,2,1,0}, bf16[32,16]{1,0}, bf16[100,16]{1,0}) parameter(0)
  ROOT %end = bf16[16]{0} call(%state), to_apply=%step
}
"""


@pytest.mark.parametrize(
    "copy, copies, more",
    [
        ("", 0, 0),
        ("%copy.1 = bf16[4,64,8,2]{3,2,1,0} copy(%written)", 1, 2),
        ("%ahead = bf16[2,4,64,8]{3,2,1,0:S(1)} copy(%written)", 0, 1),
        ("%half = ((bf16[2,4,64,8]{3,2,1,0}), bf16[1,4,64,8]{3,2,1,0:S(1)}, s32[]) slice-start(%written)", 0, 0.5),
    ],
    ids=["none", "in another order", "into VMEM", "half of it into VMEM"],
)
def test_what_is_counted_of_a_small_program(copy, copies, more):
    cache, weight, new = 2 * 4 * 64 * 8 * 2, 32 * 16 * 2, 2 * 4 * 8 * 2
    program = hlo.parse(PROGRAM.replace("COPY", copy))
    moved, found = traffic(program, "main", (2, 4, 64, 8), (100, 16))
    # The weight is fetched; the new values are written, read, and written to their slots; the cache is read once.
    assert moved == weight + 3 * new + cache + more * cache
    assert len(found) == copies
