"""The HLO reader on recorded text: shapes, loops, schedules, groups, copies."""

# ruff: noqa: E501

import numpy as np
import pytest

from ulysses_jax.attention.layouts import fixed
from ulysses_jax.costs.collectives import axes_of, find_collectives, replica_groups
from ulysses_jax.costs.flops import attention_flops, matmul_flops
from ulysses_jax.costs.hlo import (
    Array,
    arrays_of,
    parse,
    tuple_items,
)
from ulysses_jax.costs.pairs import Pairs
from ulysses_jax.plan.memory import estimated_extras, large_buffers
from ulysses_jax.plan.overlap import copies, is_attention_kernel, overlap

DEGREES = dict(data=1, fsdp=2, ring=1, seq=4, tensor=1)

# As XLA writes them for GPUs: an outer loop of 3 trips around an inner one of 2.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_dot (p.0: bf16[8,16], p.1: bf16[16,4]) -> bf16[8,4] {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  %p.1 = bf16[16,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_transpose (p.2: bf16[1,16,4,8]) -> bf16[4,1,16,8] {
  %p.2 = bf16[1,16,4,8]{3,2,1,0} parameter(0)
  %bitcast.9 = bf16[16,4,8]{2,1,0} bitcast(%p.2)
  ROOT %transpose.1 = bf16[4,1,16,8]{3,2,1,0} transpose(%bitcast.9), dimensions={1,0,2}
}

%fused_add (p.3: bf16[8,4]) -> bf16[8,4] {
  %p.3 = bf16[8,4]{1,0} parameter(0)
  %transpose.2 = bf16[8,4]{1,0} transpose(%p.3), dimensions={0,1}
  ROOT %add.1 = bf16[8,4]{1,0} add(%p.3, %transpose.2)
}

%fused_scale (p.5: bf16[4,1,16,8]) -> bf16[4,1,16,8] {
  %p.5 = bf16[4,1,16,8]{3,2,1,0} parameter(0)
  %transpose.3 = bf16[4,1,16,8]{3,2,1,0} transpose(%p.5), dimensions={0,1,2,3}
  ROOT %scaled = bf16[4,1,16,8]{3,2,1,0} multiply(%p.5, %transpose.3)
}

%wrapped (p.4: f32[32]) -> f32[4,8] {
  %p.4 = f32[32]{0} parameter(0)
  ROOT %inner.1 = f32[4]{0} reduce-scatter(%p.4), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum
}

%inner_body (arg.1: (s32[], bf16[1,16,4,8])) -> (s32[], bf16[1,16,4,8]) {
  %arg.1 = (s32[], bf16[1,16,4,8]{3,2,1,0}) parameter(0)
  %x = bf16[1,16,4,8]{3,2,1,0} get-tuple-element(%arg.1), index=1
  %n = s32[] get-tuple-element(%arg.1), index=0
  %q = bf16[8,16]{1,0} bitcast(%x)
  %w = bf16[16,4]{1,0} bitcast(%x)
  %pack = bf16[4,1,16,8]{3,2,1,0} fusion(%x), kind=kLoop, calls=%fused_transpose, metadata={op_name="jit(step)/jvp()/while/body/all_to_all"}
  %a2a = ((bf16[4,1,16,8]{3,2,1,0}), bf16[4,1,16,8]{3,2,1,0}) all-to-all-start(%pack), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(step)/jvp()/while/body/all_to_all"}, backend_config={"collective_backend_config":{"is_sync":false}}
  %gemm = bf16[8,4]{1,0} fusion(%q, %w), kind=kCustom, calls=%fused_dot
  %a2a.done = bf16[4,1,16,8]{3,2,1,0} all-to-all-done(%a2a)
  %scaled = bf16[4,1,16,8]{3,2,1,0} fusion(%a2a.done), kind=kLoop, calls=%fused_scale
  %other = ((bf16[4,1,16,8]{3,2,1,0}), bf16[4,1,16,8]{3,2,1,0}) all-to-all-start(%scaled), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/all_to_all"}
  %busy = bf16[8,4]{1,0} fusion(%gemm), kind=kLoop, calls=%fused_add
  %other.done = bf16[4,1,16,8]{3,2,1,0} all-to-all-done(%other)
  %unpack = bf16[1,16,4,8]{3,1,0,2} bitcast(%other.done)
  %copied = bf16[1,16,4,8]{3,2,1,0} copy(%unpack)
  ROOT %out = (s32[], /*index=1*/bf16[1,16,4,8]{3,2,1,0}) tuple(%n, %copied)
}

%outer_body (arg.2: (s32[], bf16[1,16,4,8])) -> (s32[], bf16[1,16,4,8]) {
  %arg.2 = (s32[], bf16[1,16,4,8]{3,2,1,0}) parameter(0)
  ROOT %while.1 = (s32[], bf16[1,16,4,8]{3,2,1,0}) while(%arg.2), condition=%less, body=%inner_body, backend_config={"known_trip_count":{"n":"2"},"x":1}
}

%less (arg.3: (s32[], bf16[1,16,4,8])) -> pred[] {
  %arg.3 = (s32[], bf16[1,16,4,8]{3,2,1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (arg.4: (s32[], bf16[1,16,4,8]), arg.5: f32[32]) -> (s32[], bf16[1,16,4,8]) {
  %arg.4 = (s32[], bf16[1,16,4,8]{3,2,1,0}) parameter(0)
  %arg.5 = f32[32]{0} parameter(1)
  %while.2 = (s32[], bf16[1,16,4,8]{3,2,1,0}) while(%arg.4), condition=%less, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %scatter = ((f32[32]{0}), f32[4]{0}) async-start(%arg.5), calls=%wrapped
  %scatter.done = f32[4]{0} async-done(%scatter)
  %gather = ((f32[4]{0}, f32[2]{0}), (f32[8]{0}, f32[4]{0})) all-gather-start(%scatter.done, %scatter.done), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={0}
  %gather.done = (f32[8]{0}, f32[4]{0}) all-gather-done(%gather)
  %shift = f32[4]{0} collective-permute(%scatter.done), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  ROOT %reduced = f32[4]{0} all-reduce(%shift), channel_id=4, replica_groups={}, to_apply=%sum
}
"""


@pytest.fixture
def module():
    return parse(PROGRAM)


@pytest.fixture
def found(module):
    return find_collectives(module, DEGREES, gpus_per_host=4)


def test_types():
    text = "((bf16[2,3]{1,0:T(8,128)S(5)}, s32[]), /*index=5*/pred[7]{0})"
    assert arrays_of(text) == (
        Array("bf16", (2, 3), 5),
        Array("s32", ()),
        Array("pred", (7,)),
    )
    assert [a.num_bytes for a in arrays_of(text)] == [12, 4, 7]
    assert [Array(t, (3,)).num_bytes for t in ("s4", "f8e4m3fn", "c64")] == [2, 3, 24]
    assert len(tuple_items(text)) == 2
    assert tuple_items("f32[2]{0}") == ["f32[2]{0}"]


def test_text_that_is_no_hlo():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("hello {\n}\n")


def test_nested_loops_multiply(module):
    assert module.runs["inner_body"] == 6
    assert module.runs["outer_body"] == 3
    assert module.unknown_trips == ()
    unknown = parse(PROGRAM.replace('{"known_trip_count":{"n":"3"}}', "{}"))
    assert unknown.runs["inner_body"] == 2
    assert unknown.unknown_trips == ("while.2",)


def test_flops(module):
    entry = module.computations["main"]
    total = sum(matmul_flops(module, entry, each) for each in entry.instructions)
    assert total == 6 * (2 * 8 * 4 * 16)


def test_flops_of_cublas():
    """What contracts stands in its own words; a workspace is no result."""
    text = """HloModule m
ENTRY %main (a: bf16[32,64], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %g = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  ROOT %o = bf16[64,16]{1,0} get-tuple-element(%g), index=0
}
"""
    module = parse(text)
    entry = module.computations["main"]
    assert matmul_flops(module, entry, entry.by_name["g"]) == 2 * 64 * 32 * 16


def test_one_branch_of_a_conditional_runs():
    """The greatest counts; the other one's FLOPs are not added."""

    def branch(name, size):
        return f"""%{name} (a{name}: f32[4,8]) -> f32[4,{size}] {{
  %a{name} = f32[4,8]{{1,0}} parameter(0)
  %b{name} = f32[8,{size}]{{1,0}} constant({{...}})
  ROOT %d{name} = f32[4,{size}]{{1,0}} dot(%a{name}, %b{name}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

"""

    text = f"""HloModule m

{branch("few", 2)}{branch("many", 16)}ENTRY %main (p: pred[], x: f32[4,8]) -> f32[4,16] {{
  %p = pred[] parameter(0)
  %x = f32[4,8]{{1,0}} parameter(1)
  ROOT %c = f32[4,16]{{1,0}} conditional(%p, %x, %x), true_computation=%few, false_computation=%many
}}
"""
    module = parse(text)
    entry = module.computations["main"]
    assert matmul_flops(module, entry, entry.by_name["c"]) == 2 * 4 * 16 * 8


def test_attention_flops():
    text = """HloModule m
ENTRY %main (q: bf16[1,64,4,8], k: bf16[1,64,2,8]) -> bf16[1,4,64,8] {
  %q = bf16[1,64,4,8]{3,2,1,0} parameter(0)
  %k = bf16[1,64,2,8]{3,2,1,0} parameter(1)
  %f = (bf16[1,4,64,8]{3,1,2,0}, f32[1,4,64]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"mask_type": "CAUSAL"}
  %b = (bf16[1,4,64,8]{3,1,2,0}, bf16[1,2,64,8]{3,1,2,0}, bf16[1,2,64,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"mask_type": "NO_MASK"}
  ROOT %o = bf16[1,4,64,8]{3,1,2,0} get-tuple-element(%f), index=0
}
"""
    module = parse(text)
    entry = module.computations["main"]
    forward, backward = entry.by_name["f"], entry.by_name["b"]
    unit = 2 * 64 * 64 * 4 * 8
    assert attention_flops(module, entry, forward) == 2 * unit // 2
    assert attention_flops(module, entry, backward) == 5 * unit
    # Of a window of 16, 16 queries see half and 48 all of it.
    for length, pairs in (("0", 64 * 32), ("16", 16 * 8 + 48 * 16), ("64", 64 * 32)):
        causal = '"mask_type": "CAUSAL"'
        windowed = f'{causal}, "sliding_window_length": {length}, "x": 1'
        module = parse(text.replace(causal, windowed))
        narrow = module.computations["main"].by_name["f"]
        found = attention_flops(module, module.computations["main"], narrow)
        assert found == 2 * 2 * pairs * 4 * 8
    # To more keys than there are queries, all of them.
    module = parse(text.replace("bf16[1,64,2,8]", "bf16[1,96,2,8]"))
    entry = module.computations["main"]
    assert attention_flops(module, entry, entry.by_name["b"]) == 5 * unit * 96 // 64
    extras = {e["name"]: e["bytes"] for e in estimated_extras(module, [])}
    assert extras["cuDNN workspace"] == 4 * 64 * 4 * 8
    assert "NCCL buffers" not in extras


def test_attention_flops_of_ranges():
    """Forward by the pairs that the mask leaves, backward by the tiles that hold one."""
    text = """HloModule m
%body (b: (s32[], f32[8,1,8,6,16])) -> (s32[], f32[8,1,8,6,16]) {
  ROOT %b = (s32[], f32[8,1,8,6,16]{4,3,2,1,0}) parameter(0)
}
%cond (c: (s32[], f32[8,1,8,6,16])) -> pred[] {
  %c = (s32[], f32[8,1,8,6,16]{4,3,2,1,0}) parameter(0)
  ROOT %p = pred[] constant(false)
}
ENTRY %main (q: bf16[2,32,6,16], k: bf16[2,32,2,16], s: (s32[], f32[8,1,8,6,16])) -> f32[] {
  %q = bf16[2,32,6,16]{3,2,1,0} parameter(0)
  %k = bf16[2,32,2,16]{3,2,1,0} parameter(1)
  %s = (s32[], f32[8,1,8,6,16]{4,3,2,1,0}) parameter(2)
  %f = (bf16[2,32,6,16]{3,2,1,0}, f32[2,6,32]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/vmap()/flash_attention_sm90"}
  %w = (s32[], f32[8,1,8,6,16]{4,3,2,1,0}) while(%s), condition=%cond, body=%body, metadata={op_name="jit(step)/attention_by_tiles/2_rows/while"}
  ROOT %o = f32[] constant(0)
}
"""
    for pairs, share, tiles in ((None, 1, 16), (Pairs((None,)), 0.5, 10)):
        module = parse(text, pairs)
        entry = module.computations["main"]
        forward, backward = entry.by_name["f"], entry.by_name["w"]
        assert is_attention_kernel(forward)
        assert attention_flops(module, entry, forward) == (
            2 * 2 * 2 * 32 * 32 * share * 6 * 16
        )
        assert attention_flops(module, entry, backward) == (
            7 * 2 * 2 * tiles * 8 * 8 * 6 * 16
        )
    # Some queries and more keys, as in layers in pieces.
    module = parse(text.replace("bf16[2,32,2,16]", "bf16[2,96,2,16]"))
    entry = module.computations["main"]
    found = attention_flops(module, entry, entry.by_name["f"])
    assert found == 2 * 2 * 2 * 32 * 96 * 6 * 16


def test_attention_flops_by_layout():
    """Of tiles all pairs, as often as the loop over them runs."""
    op_name = 'op_name="jit(step)/attention_by_layout/while/body'
    mosaic = 'custom-call(%q, %k, %k), custom_call_target="mosaic_gpu_v2", metadata={'
    text = f"""HloModule m
%body (b: s32[]) -> s32[] {{
  %q = bf16[8,128,6,16]{{3,2,1,0}} parameter(0)
  %k = bf16[8,128,2,16]{{3,2,1,0}} parameter(1)
  %f = (bf16[8,128,6,16]{{3,2,1,0}}, f32[8,6,128]{{2,1,0}}) {mosaic}{op_name}/flash_attention_sm90"}}
  %dq = bf16[8,128,6,16]{{3,2,1,0}} {mosaic}{op_name}/mpmd_map"}}
  %dkv = (bf16[8,128,2,16]{{3,2,1,0}}, bf16[8,128,2,16]{{3,2,1,0}}) {mosaic}{op_name}/mpmd_map"}}
  ROOT %b = s32[] constant(0)
}}
%cond (c: s32[]) -> pred[] {{
  ROOT %p = pred[] constant(false)
}}
ENTRY %main (s: s32[]) -> f32[] {{
  %s = s32[] parameter(0)
  %w = s32[] while(%s), condition=%cond, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  ROOT %o = f32[] constant(0)
}}
"""
    module = parse(text)
    entry = module.computations["main"]
    product = 2 * 8 * 128 * 128 * 6 * 16
    assert attention_flops(module, entry, entry.by_name["w"]) == 5 * 9 * product
    # Among documents the trips are not known, but what they would be without them.
    known = 'backend_config={"known_trip_count":{"n":"5"}}'
    scope = 'metadata={op_name="jvp(attention_by_layout/20_steps_of_3_rows)/while"}'
    layout = fixed(16, block_tokens=128, local_blocks=4)
    for sparse, share in (
        (None, 1),
        (Pairs((layout,)), 1),
        (Pairs((layout,), 300), Pairs((layout,), 300).layout_fraction(3)),
    ):
        module = parse(text.replace(known, scope), sparse=sparse)
        loop = module.computations["main"].by_name["w"]
        found = attention_flops(module, module.computations["main"], loop)
        assert found == int(20 * share * 9 * product)


def test_collectives(found):
    rows = [(c.kind, c.axes, c.count, c.sent_bytes, c.crosses_hosts) for c in found]
    exchange = 4 * 16 * 8 * 2 * 3 / 4
    assert sorted(rows) == sorted(
        [
            ("all-to-all", "seq", 6, exchange, False),
            ("all-to-all", "seq", 6, exchange, False),
            ("reduce-scatter", "fsdp+seq", 1, 16 * 7, True),
            ("all-gather", "fsdp", 1, 48 / 2, True),
            ("collective-permute", "seq", 1, 16, False),
            ("all-reduce", "fsdp+seq", 1, 2 * 16 * 7 / 8, True),
        ]
    )


def test_bytes_between_hosts(found):
    """An all-to-all of 8 over 2 hosts sends 4 of 7 parts out; a ring shares adapters."""
    by_kind = {c.kind: c for c in found}
    assert by_kind["all-to-all"].between_hosts_bytes == 0
    assert by_kind["all-gather"].between_hosts_bytes == 24
    assert by_kind["reduce-scatter"].between_hosts_bytes == 16 * 7 * 2 / 8
    wide = PROGRAM.replace("{{0,1,2,3},{4,5,6,7}}", "{}")
    degrees = dict(data=1, fsdp=1, ring=1, seq=8, tensor=1)
    first = find_collectives(parse(wide), degrees, gpus_per_host=4)[0]
    sent = 4 * 16 * 8 * 2
    assert first.axes == "seq" and first.sent_bytes == sent * 7 / 8
    assert first.between_hosts_bytes == sent / 2


def test_overlap_and_phases(module, found):
    result = overlap(module, found)
    assert result["exchange_fraction"] == 0.5
    assert result["exchange_attention_fraction"] == 0.0
    assert result["exchange_phases"] == {"forward": 1.0, "recompute": 0.0}
    assert result["fractions"]["all-to-all over seq"] == 0.5
    assert result["fractions"]["collective-permute over seq"] == 0.0
    rows = {row["name"]: row for row in result["collectives"]}
    assert rows["a2a"]["matmul_flops_between"] == 2 * 8 * 4 * 16
    assert rows["scatter"]["is_asynchronous"]
    assert not rows["shift"]["is_asynchronous"]


def test_a_synchronous_start_hides_nothing():
    text = PROGRAM.replace('"is_sync":false', '"is_sync":true')
    module = parse(text)
    found = find_collectives(module, DEGREES, gpus_per_host=4)
    assert overlap(module, found)["exchange_fraction"] == 0.0


def test_no_exchange_has_no_fraction(module):
    assert overlap(module, [])["exchange_fraction"] is None


def test_a_synchronous_exchange_has_copies_too():
    """Nothing runs between its start and its done, but its result is the done's."""
    is_sync = 'backend_config={"collective_backend_config":{"is_sync":true}}'
    lines = [
        f"{line}, {is_sync}" if line.startswith("  %other =") else line
        for line in PROGRAM.splitlines()
    ]
    module = parse("\n".join(lines))
    found = find_collectives(module, DEGREES, gpus_per_host=4)
    rows = {row["name"]: row for row in overlap(module, found)["collectives"]}
    assert [rows[name]["is_asynchronous"] for name in ("a2a", "other")] == [True, False]
    result = copies(module, found, num_layer_runs=3)
    assert {c["name"] for c in result["copies"]} == {"pack", "copied"}


def test_copies(module, found):
    """The transpose before the first and the copy after the second; no arithmetic."""
    result = copies(module, found, num_layer_runs=3)
    assert {c["name"] for c in result["copies"]} == {"pack", "copied"}
    array = 4 * 16 * 8 * 2
    assert result["phases"] == {"forward": 6 * array / 3, "recompute": 6 * array / 3}
    assert result["bytes_per_layer"] == 4 * array


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("{{0,1,2,3}}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_replica_groups(text, groups):
    attributes = f", channel_id=1, replica_groups={text}, dimensions={{0}}"
    assert replica_groups(attributes, 4).tolist() == groups


def test_replica_groups_unknown():
    with pytest.raises(ValueError, match="notation unknown"):
        replica_groups(", replica_groups=<surprise>", 4)
    with pytest.raises(ValueError, match="unequal"):
        replica_groups(", replica_groups={{0,1},{2}}", 3)


def test_axes_of():
    degrees = dict(data=2, fsdp=1, ring=1, seq=4, tensor=2)
    ids = np.arange(16).reshape(2, 4, 2)
    assert axes_of(ids.transpose(0, 2, 1).reshape(-1, 4), degrees) == "seq"
    assert axes_of(ids.transpose(1, 2, 0).reshape(-1, 2), degrees) == "data"
    assert axes_of(ids.transpose(2, 0, 1).reshape(-1, 8), degrees) == "data+seq"
    part = ids.transpose(0, 2, 1).reshape(-1, 2)
    assert axes_of(part, degrees) == "seq in groups of 2"
    assert axes_of(np.arange(16)[:, None], degrees) == "none"


def test_large_buffers():
    text = PROGRAM.replace("%copied = bf16[1,16,4,8]", "%copied = bf16[70000,40000]")
    (large,) = large_buffers(parse(text))
    assert large["array"] == "bf16[70000,40000]"
    assert large["num_elements"] == 2_800_000_000
    assert large_buffers(parse(PROGRAM)) == []
