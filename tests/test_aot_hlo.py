"""Scheduled HLO text as data: what is read of it, and what is found that must not be in it."""

import pytest

from llava_jax.aot import hlo
from llava_jax.aot.hlo import Instruction, parse

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_computation (param_0: bf16[8,16]) -> f32[2,8,16] {
  %param_0 = bf16[8,16]{1,0} parameter(0)
  ROOT %broadcast.1 = f32[2,8,16]{2,1,0} broadcast(%param_0), dimensions={1,2}
}

%cond (state: (s32[], f32[4])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %constant.9 = s32[]{:T(128)} constant(99)
  %constant.1 = s32[]{:T(128)} constant(32)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%counter, %constant.1), direction=LT
}

%fused_cond (state.1: (s32[], f32[4])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %constant.2 = s32[]{:T(128)} constant(7)
  ROOT %fusion.7 = pred[]{:T(512)} fusion(%state.1, %constant.2), kind=kLoop, calls=%compared
}

%endless (state.2: (s32[], f32[4])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  ROOT %flag = pred[]{:T(512)} get-tuple-element(%state.2), index=0
}

ENTRY %main.1 (a: bf16[8,16], b: bf16[16,32]) -> f32[2,8,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %dot.1 = f32[8,32]{1,0:T(8,128)} dot(%a, %b), lhs_contracting_dims={1}, metadata={op_name="jit(step)/dot"}
  %kernel = bf16[8,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={x="
  several lines"}, backend_config={"estimated_cycles":"123"}
  %all-reduce.1 = f32[600,512]{1,0} all-reduce(%dot.1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %all-gather-start.1 = (bf16[8,16]{1,0}, bf16[800,1600]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %all-gather-done.1 = bf16[800,1600]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %fusion.1 = f32[2,8,16]{2,1,0} fusion(%a), kind=kLoop, calls=%fused_computation
}
"""


@pytest.fixture(scope="module")
def program():
    return parse(PROGRAM)


def find(program, name):
    return next(i for i in program.instructions() if i.name == name)


def test_computations_and_entry(program):
    assert program.entry == "main.1"
    assert list(program.computations) == ["fused_computation", "cond", "fused_cond", "endless", "main.1"]
    assert [i.opcode for i in program.computations["main.1"]][:4] == ["parameter", "parameter", "dot", "custom-call"]


def test_an_instruction(program):
    dot = find(program, "dot.1")
    assert (dot.type, dot.operands, dot.op_name) == ("f32[8,32]{1,0:T(8,128)}", ["a", "b"], "jit(step)/dot")
    assert (dot.cycles, dot.collective, dot.calls) == (None, None, None)
    assert find(program, "fusion.1").calls == "fused_computation"


def test_attributes_over_several_lines_belong_to_the_instruction_above(program):
    assert find(program, "kernel").cycles == 123


def test_the_largest_number_is_no_estimate():
    written = 'add(%a), backend_config={"estimated_cycles":"18446744073709551615"}'
    assert Instruction("add.1", "f32[4]", "add", written).cycles is None


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("error: out of memory\n")


@pytest.mark.parametrize("condition, trips", [("cond", 32), ("fused_cond", 7), ("endless", None)])
def test_trip_counts(program, condition, trips):
    assert hlo.trip_count(program, condition) == trips


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("bf16[8,16]{1,0:T(8,128)(2,1)}", [256]),
        ("(f32[3], s4[10]{0}, pred[])", [12, 5, 1]),
        ("f8e4m3fn[7]", [7]),
        ("token[]", []),
    ],
)
def test_array_bytes(text, sizes):
    assert hlo.array_bytes(text) == sizes


def test_arrays_in_vmem_are_not_in_hbm():
    assert hlo.in_hbm("(f32[8]{0:T(8)S(1)}, bf16[4]{0:T(4)})") == ["bf16[4]{0:T(4)}"]


def test_flops_of_a_dot(program):
    types = {i.name: i.type for i in program.computations["main.1"]}
    assert hlo.matmul_flops(find(program, "dot.1"), types) == 2 * 8 * 16 * 32
    assert hlo.matmul_flops(find(program, "dot.1"), {}) == 0


@pytest.mark.parametrize(
    "lhs, rhs, out, how, multiplied",
    [
        ("bf16[8,16]", "bf16[16,32]", "bf16[8,32]", "dim_labels=bf_io->bf", 8 * 16 * 32),
        # x[b, n, h] w[n, h, d]: two dimensions are summed, the heads as the window.
        ("bf16[8,4,16]", "bf16[4,16,32]", "bf16[8,32,1]", "window={size=4}, dim_labels=b0f_0io->bf0", 8 * 4 * 16 * 32),
        # x[b, d] w[d, n, h]: the heads are written by a window that slides over one place.
        (
            "bf16[8,16,1]",
            "bf16[16,4,32]",
            "bf16[8,4,32]",
            "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            8 * 4 * 16 * 32,
        ),
        # q[t, n, h] k[s, n, h], each head by itself: strides and dilation meet one tap at each place.
        (
            "bf16[8,4,16]",
            "bf16[9,4,16]",
            "f32[4,8,9]",
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=b0f_o0i->0bf",
            4 * 8 * 9 * 16,
        ),
        ("bf16[1,5,3]", "bf16[3,3,7]", "bf16[1,5,7]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 13 * 3 * 7),
    ],
)
def test_flops_of_a_convolution(lhs, rhs, out, how, multiplied):
    convolution = Instruction("c", out, "convolution", f"convolution(%a, %b), {how}")
    assert hlo.matmul_flops(convolution, {"a": lhs, "b": rhs}) == 2 * multiplied


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[16,8]<=[128]", 8),
        ("replica_groups=mesh['data'=2,'fsdp'=16,'tensor'=4] {'fsdp','tensor'}", 64),
        ("channel_id=3", 512),
    ],
)
def test_group_sizes(groups, size):
    assert hlo.group_size(Instruction("x", "f32[4]", "all-reduce", f"all-reduce(%a), {groups}"), 512) == size


def test_buffers_are_found_in_any_order_of_dimensions_and_never_inside_a_fusion(program):
    assert hlo.buffers_shaped(program, [(2, 16, 8)]) == ["fusion.1 f32[2,8,16]{2,1,0}"]
    assert hlo.buffers_shaped(program, [(1, 32, 8)]) == ["dot.1 f32[8,32]{1,0:T(8,128)}"]
    assert hlo.buffers_shaped(program, [(32, 8, 2)]) == []


def test_wide_collectives_are_float32_and_large(program):
    assert hlo.wide_collectives(program) == ["all-reduce.1 f32[600,512]{1,0}"]
    assert hlo.wide_collectives(program, more_than=600 * 512 * 4) == []


def test_largest_buffers(program):
    assert [size for size, _ in hlo.largest_buffers(program)][:2] == [800 * 1600 * 2, 600 * 512 * 4]
