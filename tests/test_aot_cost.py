"""The time of a program: small ones priced by hand, and an excerpt of a real one against stored figures."""

import gzip
import json
import math
import pathlib

import pytest

from llava_jax.aot.cost import SECONDS, Layout, estimate, layout_of
from llava_jax.aot.hlo import parse
from llava_jax.parallel.chips import CHIPS

DATA = pathlib.Path(__file__).parent / "data" / "plan"
V5E, FOUR = CHIPS["v5e"], Layout((2, 2), rings=False)
CLOCK, OVER, LINK, HBM = V5E.clock, V5E.vector_overpricing, V5E.link_bytes_per_second, 0.9 * V5E.hbm_bytes_per_second


def cycles(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def priced(*lines: str, others: str = "", chip=V5E, layout=FOUR):
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule m, is_scheduled=true\n{others}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return estimate(parse(text), chip, layout)


def only(part: str, seconds: float) -> dict[str, float]:
    return pytest.approx(dict.fromkeys(SECONDS, 0.0) | {part: seconds})


A, B = "%a = bf16[1024,512]{1,0} parameter(0)", "%b = bf16[512,256]{1,0} parameter(1)"
DOT = f"%dot.1 = bf16[1024,256]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, {cycles(3_000_000)}"


def test_a_matrix_product_takes_its_cycles():
    found = priced(A, B, DOT)
    assert found.seconds == pytest.approx(3_000_000 / 1.5e9)
    assert found.breakdown == only("matmul", 0.002)
    assert found.parts["matmul_flops"] == pytest.approx(2 * 1024 * 512 * 256)


def test_a_fusion_with_a_product_inside_is_a_product():
    others = f"%fused (p: bf16[1024,512], q: bf16[512,256]) -> bf16[1024,256] {{\n  {A}\n  {B}\n  {DOT}\n}}\n"
    found = priced(
        A, B, f"%fusion.1 = bf16[1024,256]{{1,0}} fusion(%a, %b), calls=%fused, {cycles(1500)}", others=others
    )
    assert found.breakdown == only("matmul", 1e-6)
    assert found.parts["matmul_flops"] == pytest.approx(2 * 1024 * 512 * 256)


def test_elementwise_cycles_are_divided_but_not_below_what_memory_takes():
    small = "%a = f32[8]{0} parameter(0)"
    found = priced(small, f"%add.1 = f32[8]{{0}} add(%a, %a), {cycles(3000)}")
    assert found.breakdown == only("vector", 3000 / CLOCK / OVER)
    large = "%a = f32[1000000]{0} parameter(0)"  # read twice, written once: 12 MB
    found = priced(large, f"%add.1 = f32[1000000]{{0}} add(%a, %a), {cycles(30_000)}")
    assert found.breakdown == only("vector", 12e6 / HBM)
    vmem = "%a = f32[1000000]{0:S(1)} parameter(0)"
    found = priced(vmem, f"%add.1 = f32[1000000]{{0:S(1)}} add(%a, %a), {cycles(30_000)}")
    assert found.breakdown == only("vector", 30_000 / CLOCK / OVER)


def test_a_transpose_is_a_copy():
    found = priced("%a = f32[8]{0} parameter(0)", f"%copy.1 = f32[8]{{0}} copy(%a), {cycles(3000)}")
    assert found.breakdown == only("copy", 3000 / CLOCK / OVER)


def test_a_loop_counts_its_trips():
    others = f"""
%cond (s: (s32[])) -> pred[] {{
  %s = (s32[]) parameter(0)
  %constant.1 = s32[] constant(32)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %compare.1 = pred[] compare(%i, %constant.1), direction=LT
}}

%body (s.1: (s32[])) -> (s32[]) {{
  {A}
  {B}
  {DOT}
}}
"""
    found = priced("%while.1 = (s32[]) while(%t), condition=%cond, body=%body", others=others)
    assert found.breakdown == only("matmul", 32 * 0.002)
    assert found.parts["matmul_flops"] == pytest.approx(32 * 2 * 1024 * 512 * 256)
    assert found.costliest[0][:1] == (pytest.approx(0.064),) and found.costliest[0][1].startswith("32 x dot.1")
    unknown = others.replace("constant(32)", "parameter(1)")
    found = priced("%while.1 = (s32[]) while(%t), condition=%cond, body=%body", others=unknown)
    assert (found.parts["unknown_loops"], found.seconds) == (1, pytest.approx(0.002))


def test_the_longer_branch_counts():
    others = "".join(
        f"%{name} (p: f32[8]) -> f32[8] {{\n  {A}\n  {B}\n  {DOT.replace('3000000', count)}\n}}\n\n"
        for name, count in (("short", "1500"), ("long", "15000"))
    )
    found = priced("%c = f32[8] conditional(%p, %a, %b), branch_computations={%short, %long}", others=others)
    assert found.seconds == pytest.approx(1e-5)


# ---- communication ----------------------------------------------------------------------------------------------

GROUP = "channel_id=1, replica_groups={{0,1,2,3}}"
MEGABYTE = "bf16[1000,500]{1,0}"  # 1e6 bytes
HOPS = (2 + 2) * 1e-6


@pytest.mark.parametrize(
    "collective, wire",
    [
        (f"%x = {MEGABYTE} all-gather(%a), {GROUP}", 0.75e6),
        (f"%x = {MEGABYTE} all-reduce(%a), {GROUP}", 1.5e6),
        (f"%x = {MEGABYTE} reduce-scatter(%a), {GROUP}", 3e6),
        (f"%x = {MEGABYTE} all-to-all(%a), {GROUP}", 0.75e6 / 4),
        (f"%x = {MEGABYTE} collective-permute(%a), source_target_pairs={{{{0,1}}}}", 1e6),
    ],
)
def test_a_synchronous_collective_is_exposed_whole(collective, wire):
    found = priced("%a = bf16[250,500]{1,0} parameter(0)", collective)
    seconds = wire / (2 * LINK) + HOPS
    assert found.parts["wire_bytes"] == pytest.approx(wire)
    assert found.breakdown == only("communication_exposed", seconds)
    assert found.parts["communication"] == pytest.approx(seconds)


def test_an_asynchronous_permute_takes_one_link_and_sends_its_array_once():
    start = f"%s = ({MEGABYTE}, {MEGABYTE}, u32[], u32[]) collective-permute-start(%a), channel_id=1"
    done = f"%x = {MEGABYTE} collective-permute-done(%s), channel_id=1"
    found = priced("%a = bf16[1000,500]{1,0} parameter(0)", start, done)
    assert found.parts["wire_bytes"] == pytest.approx(1e6)
    assert found.seconds == found.breakdown["communication_exposed"] == pytest.approx(1e6 / LINK + HOPS, rel=1e-4)


def test_rings_go_both_ways_and_part_of_the_chips_use_part_of_the_axes():
    line = f"%x = {MEGABYTE} all-gather(%a), replica_groups={{{{0,1,2,3}}}}"
    ring = priced(line, chip=CHIPS["v5p"], layout=Layout((4, 4, 4), rings=True))
    assert ring.seconds == pytest.approx(0.75e6 / (90e9 * 1 * 2) + 6e-6)
    assert priced(f"%x = {MEGABYTE} all-gather(%a), replica_groups=[4,1]<=[4]").seconds == 0


START = f"%all-gather-start.1 = (bf16[250,500]{{1,0}}, {MEGABYTE}) all-gather-start(%a), {GROUP}"
DONE = f"%all-gather-done.1 = {MEGABYTE} all-gather-done(%all-gather-start.1)"
ASYNC = 0.75e6 / (2 * LINK) + HOPS


@pytest.mark.parametrize("work", [0, 9000, 900_000])
def test_what_runs_meanwhile_hides_an_asynchronous_collective(work):
    dot = f"%dot.1 = bf16[1024,256]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, {cycles(work)}"
    found = priced(A, B, START, dot, DONE)
    assert found.seconds == pytest.approx(max(ASYNC, work / CLOCK))
    assert found.breakdown["communication_exposed"] == pytest.approx(max(0.0, ASYNC - work / CLOCK))
    assert found.parts["communication"] == pytest.approx(ASYNC)


def test_one_link_carries_two_collectives_one_after_the_other():
    second = START.replace("start.1", "start.2").replace("channel_id=1", "channel_id=2")
    found = priced(A, START, second, DONE, DONE.replace(".1", ".2"))
    assert found.seconds == pytest.approx(2 * ASYNC)


def test_a_sparse_core_takes_a_collective_off_the_core():
    others = f"%offloaded (p: f32[8]) -> f32[8] {{\n  %x = {MEGABYTE} all-gather(%p), {GROUP}\n}}\n"
    start = "%custom-call-start.1 = ((), u32[]) custom-call-start(), called_computations={%offloaded}"
    update = "%custom-call-update.1 = ((), u32[]) custom-call-update(%custom-call-start.1, %a)"
    done = f"%custom-call-done.1 = {MEGABYTE} custom-call-done(%custom-call-update.1)"
    found = priced(
        A,
        B,
        start,
        update,
        f"%dot.1 = bf16[1024,256]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, {cycles(9000)}",
        done,
        others=others,
    )
    assert found.breakdown["communication_exposed"] == pytest.approx(ASYNC - 9000 / CLOCK)
    found = priced(
        A,
        f"%call-start.1 = ((), {MEGABYTE}) call-start(%a), to_apply=%offloaded",
        f"%call-done.1 = {MEGABYTE} call-done(%call-start.1)",
        others=others,
    )
    assert found.breakdown == only("communication_exposed", ASYNC)


def test_a_fusion_that_carries_a_collective_is_computation():
    others = f"%async_collective_fusion.1 (p: f32[8]) -> f32[8] {{\n  %x = {MEGABYTE} all-gather(%p), {GROUP}\n}}\n"
    found = priced(
        A, f"%fusion.1 = f32[8]{{0}} fusion(%a), calls=%async_collective_fusion.1, {cycles(3000)}", others=others
    )
    assert (found.parts["wire_bytes"], found.breakdown["communication_exposed"]) == (0, 0)
    assert found.breakdown["vector"] > 0


def test_bytes_between_slices_are_counted_and_not_priced():
    found = priced(f"%send.1 = ({MEGABYTE}, u32[], token[]) send(%a, %t), channel_id=3, is_host_transfer=true")
    assert (found.parts["network_bytes"], found.seconds) == (1e6, 0)


def test_a_copy_from_hbm_that_is_waited_for_too_early():
    start = "%copy-start.1 = (bf16[1000,500]{1,0:S(1)}, bf16[1000,500]{1,0}, u32[]) copy-start(%a)"
    done = "%copy-done.1 = bf16[1000,500]{1,0:S(1)} copy-done(%copy-start.1)"
    assert priced(A, start, done).breakdown == only("dma_exposed", 1e6 / HBM)
    hidden = priced(A, B, start, DOT, done)
    assert hidden.breakdown == only("matmul", 0.002)


# ---- kernels ----------------------------------------------------------------------------------------------------

CAUSAL = 2 * 32 * 2048 * 2048 * 128 / 2  # FLOPs of one product of scores of 32 heads over the causal half


def splash(name: str) -> str:
    layouts = "operand_layout_constraints={bf16[32,2048,128]{2,1,0}, bf16[32,2048,128]{2,1,0}}"
    call = 'custom-call(%q, %k), custom_call_target="tpu_custom_call"'
    return f"%{name} = bf16[32,2048,128]{{2,1,0}} {call}, {layouts}, frontend_attributes={{}}"


@pytest.mark.parametrize(
    "names, products, efficiency",
    [
        (["splash_mha_fwd.1"], 2, 0.47),
        (["splash_mha_dkv.1"], 5, 0.55),
        (["splash_mha_dq.1", "splash_mha_dkv.1"], 3 + 4, 0.55),
    ],
)
def test_splash_attention_by_its_products(names, products, efficiency):
    found = priced(*map(splash, names))
    assert found.parts["kernel_flops"] == pytest.approx(products * CAUSAL)
    assert found.breakdown == only("kernels", products * CAUSAL / (197e12 * efficiency))


# ---- a real program ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chip, sizes, rings",
    [
        ("v5e", (8, 8), False),
        ("v5e", (16, 16), True),
        ("v5p", (2, 2, 1), False),
        ("v5p", (4, 4, 4), True),
        ("v5p", (2, 4, 8), False),
        ("v6e", (4, 4), False),
    ],
)
def test_which_slices_have_rings(chip, sizes, rings):
    assert layout_of(CHIPS[chip], sizes) == Layout(sizes, rings)
    assert layout_of(CHIPS[chip], sizes).chips == math.prod(sizes)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.hlo.gz")), ids=lambda path: path.name)
def test_real_programs_cost_what_they_did(path):
    expected = json.loads(path.with_name(path.name.replace(".hlo.gz", ".expected.json")).read_text())
    chip, sizes = CHIPS[expected["chip"]], tuple(expected["sizes"])
    found = estimate(parse(gzip.decompress(path.read_bytes()).decode()), chip, layout_of(chip, sizes))
    assert found.seconds == pytest.approx(expected["seconds"], rel=1e-9)
    assert found.breakdown == pytest.approx(expected["breakdown"], rel=1e-6, abs=1e-12)
    assert sum(found.breakdown.values()) == pytest.approx(found.seconds)
    assert found.parts["wire_bytes"] == pytest.approx(expected["wire_bytes"])
    assert found.parts["matmul_flops"] == pytest.approx(expected["matmul_flops"])
    assert found.parts["unknown_loops"] == 0
