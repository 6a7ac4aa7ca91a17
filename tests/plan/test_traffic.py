"""Compiled programs as text: loops, products, and the three forms of a collective that other work can run beside."""

import gzip
from pathlib import Path

import pytest

from jaxscale.axes import AXES
from jaxscale.plan.program_text import flops, read_program, size_of, trip_count
from jaxscale.plan.report import hidden_share, links_of
from jaxscale.plan.traffic import transfers

REAL = Path(__file__).parent / "lm_tiny_v5e_fsdp8.hlo.gz"
"""The training step of `lm_tiny` as the TPU compiler scheduled it for 8 v5e chips, fsdp 8; paths left out."""


def sizes(**given):
    return dict.fromkeys(AXES, 1) | given


# ruff: noqa: E501 - programs have long lines

SMALL = """\
HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%begin (p: bf16[32,16]) -> (bf16[32,16], bf16[64,16], u32[]) {
  %p = bf16[32,16]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = bf16[64,16]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %custom-call.1 = (bf16[32,16]{1,0}, bf16[64,16]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry (p: bf16[32,16], x: bf16[8,32], w: bf16[32,4]) -> (bf16[8,4], bf16[64,16]) {
  %p = bf16[32,16]{1,0} parameter(0)
  %x = bf16[8,32]{1,0} parameter(1)
  %w = bf16[32,4]{1,0} parameter(2)
  %dot.1 = bf16[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-gather.2 = bf16[64,16]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %tuple.1 = (bf16[8,4]{1,0}, bf16[64,16]{1,0}) tuple(%dot.1, %all-gather.2)
}

%finish (p: bf16[64,16]) -> bf16[64,16] {
  %p = bf16[64,16]{1,0} parameter(0)
  %all-gather.3 = bf16[64,16]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %custom-call.2 = bf16[64,16]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (s: (s32[], bf16[32,16])) -> (s32[], bf16[32,16]) {
  %s = (s32[], bf16[32,16]{1,0}) parameter(0)
  %shard = bf16[32,16]{1,0} get-tuple-element(%s), index=1
  %start = (bf16[32,16]{1,0}, bf16[64,16]{1,0}, u32[]) fusion(%shard), kind=kCustom, calls=%begin
  %whole = bf16[64,16]{1,0} get-tuple-element(%start), index=1
  %carried = (bf16[8,4]{1,0}, bf16[64,16]{1,0}) fusion(%shard, %x0, %w0, %whole), kind=kOutput, calls=%carry, metadata={
op_name="of several
lines"
}}, more=1
  %whole.2 = bf16[64,16]{1,0} get-tuple-element(%carried), index=1
  %gathered = bf16[64,16]{1,0} fusion(%whole.2), kind=kCustom, calls=%finish
  %scattered = f32[16,16]{1,0} reduce-scatter(%gathered), channel_id=4, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, to_apply=%sum
  %permute-start = (bf16[32,16]{1,0}, bf16[32,16]{1,0}, u32[], u32[]) collective-permute-start(%shard), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %permute-done = bf16[32,16]{1,0} collective-permute-done(%permute-start)
  ROOT %next = (s32[], bf16[32,16]{1,0}) tuple(%permute-done, %shard)
}

%condition (s: (s32[], bf16[32,16])) -> pred[] {
  %s = (s32[], bf16[32,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[32,16]) -> f32[] {
  %x = bf16[32,16]{1,0} parameter(0)
  %loop = (s32[], bf16[32,16]{1,0}) while(%x), condition=%condition, body=%body
  %alone = f32[] all-reduce(%x), channel_id=9, replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  ROOT %total = f32[] all-reduce(%alone), channel_id=8, replica_groups={}, to_apply=%sum, metadata={op_name="jit(step)/norm"}
}
"""


def test_a_loop_runs_its_trip_count_and_a_product_costs_its_flops():
    program = read_program(SMALL)
    assert program.entry == "main"
    (loop,) = (one for one in program.computations["main"] if one.opcode == "while")
    assert trip_count(program, loop) == 5
    named = {one.name: one for one in program.computations["body"]}
    carried = named["carried"]
    assert carried.called == ("carry",)
    assert flops(program, carried) == 2 * 8 * 32 * 4
    assert size_of(carried.result) == (8 * 4 + 64 * 16) * 2
    assert named["whole.2"].operands == ("carried",), "an attribute of several lines ends nothing"


def test_a_tpu_writes_a_product_over_several_dims_as_a_convolution():
    text = """\
ENTRY %main (x: bf16[256,256,1], w: bf16[256,4,64]) -> bf16[256,4,64] {
  %x = bf16[256,256,1]{0,1,2} parameter(0)
  %w = bf16[256,4,64]{2,0,1} parameter(1)
  ROOT %y = bf16[256,4,64]{2,0,1} convolution(%x, %w), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f
}
"""
    program = read_program(text)
    assert flops(program, program.computations["main"][-1]) == 2 * 256 * 256 * 4 * 64


def test_collectives_are_counted_once_with_their_loops_and_what_they_hide_behind():
    found = transfers(read_program(SMALL), sizes(data=2, fsdp=2))
    gather, scatter, permute, total = found
    assert (gather.kind, gather.axes, gather.nbytes, gather.times) == ("all-gather", ("fsdp",), 64 * 16 * 2, 5)
    assert gather.asynchronous
    assert gather.hidden_flops == 2 * 8 * 32 * 4
    assert gather.hides
    assert (scatter.kind, scatter.axes, scatter.nbytes) == ("reduce-scatter", ("data",), 2 * 16 * 16 * 4)
    assert not scatter.asynchronous
    assert (permute.kind, permute.axes, permute.nbytes) == ("collective-permute", ("fsdp",), 32 * 16 * 2)
    assert permute.asynchronous
    assert not permute.hides, "there is nothing between its begin and its end"
    assert (total.kind, total.axes, total.times, total.in_loop) == ("all-reduce", ("data", "fsdp"), 1, False)
    assert total.operation == "jit(step)/norm"
    inside = (64 * 16 * 2, 2 * 16 * 16 * 4, 32 * 16 * 2)
    assert hidden_share(found) == pytest.approx(inside[0] / sum(inside))
    links = links_of(found)
    assert {(link.kind, link.nbytes, link.count) for link in links[:2]} == {
        ("all-gather", 5 * 64 * 16 * 2, 5),
        ("reduce-scatter", 5 * 2 * 16 * 16 * 4, 5),
    }
    assert (links[-1].kind, links[-1].in_loop, links[-1].hidden) == ("all-reduce", False, 0.0)


SPARSE = """\
HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}, execution_thread="sparsecore"

%called (p: f32[16,8]) -> f32[8,8] {
  %p = f32[16,8]{1,0} parameter(0)
  ROOT %reduce-scatter.2 = f32[8,8]{1,0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%sum
}, execution_thread="sparsecore"

ENTRY %main (x: f32[16,8], w: f32[8,8]) -> f32[8,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %begun.call-start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %early = f32[16,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %begun.call-update = ((f32[16,8]{1,0}), f32[8,8]{1,0}) call-update(%begun.call-start, %early)
  %beside = f32[8,8]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %begun.call-done = f32[8,8]{1,0} call-done(%begun.call-update)
}
"""


def test_what_a_sparse_core_does_has_begun_when_it_gets_its_operands():
    (scatter,) = transfers(read_program(SPARSE), sizes(data=2, fsdp=4))
    assert (scatter.kind, scatter.axes, scatter.nbytes) == ("reduce-scatter", ("fsdp",), 2 * 8 * 8 * 4)
    assert scatter.asynchronous
    assert scatter.hidden_flops == 2 * 8 * 8 * 8, "the product before the update is not beside it"


def test_a_real_program_of_a_tpu():
    """4 layers with 7 weights: each gathered in the forward and in the backward pass, each gradient scattered."""
    program = read_program(gzip.decompress(REAL.read_bytes()).decode())
    found = transfers(program, sizes(fsdp=8))
    loops = [one for one in found if one.in_loop]
    assert {one.times for one in loops} == {4}
    assert sum(one.kind == "all-gather" for one in loops) == 2 * 7
    assert sum(one.kind == "reduce-scatter" for one in loops) == 7
    weights = (256 * 256 * 4 + 256 * 1024 * 3) * 4
    assert sum(one.nbytes * one.times for one in loops if one.kind == "all-gather") == 2 * weights * 2, "in bfloat16"
    assert sum(one.nbytes * one.times for one in loops if one.kind == "reduce-scatter") == weights * 4, "in float32"
    assert any(one.beside_kernel for one in loops), "splash attention runs beside a gather"
    assert hidden_share(found) == pytest.approx(0.453, abs=0.001)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no HLO program"):
        read_program("Llama")


def test_groups_that_are_parts_of_axes_count_as_those_axes():
    def axes_of_groups(groups):
        text = SMALL.replace("replica_groups={}", f"replica_groups={{{groups}}}")
        return {one.axes for one in transfers(read_program(text), sizes(data=2, fsdp=2)) if one.kind == "all-reduce"}

    assert axes_of_groups("{0,3},{1,2}") == {("data", "fsdp")}
    assert axes_of_groups("{0,1},{2},{3}") == {("fsdp",)}
