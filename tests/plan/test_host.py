"""Moves between host and device memory, in a program written by hand."""

from ulysses_jax.costs.hlo import parse
from ulysses_jax.plan.host import host_moves

# A layer of 16 float32 is fetched, multiplied, and written back, 3 times; before, 8
# come from the host, and after it 8 go back. A copy within the host's memory is none.
TEXT = """HloModule step, is_scheduled=true

%cut (p.0: f32[3,16], p.1: s32[]) -> f32[1,16] {
  %p.0 = f32[3,16]{1,0:S(5)} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %ds = f32[1,16]{1,0} dynamic-slice(%p.0, %p.1, %p.1)
}

%body (c: (s32[], f32[3,16], f32[4,4])) -> (s32[], f32[3,16], f32[4,4]) {
  %c = (s32[], f32[3,16]{1,0:S(5)}, f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[3,16]{1,0:S(5)} get-tuple-element(%c), index=1
  %w = f32[4,4]{1,0} get-tuple-element(%c), index=2
  %s.1 = ((f32[3,16]{1,0:S(5)}, s32[]), f32[1,16]{1,0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%cut
  %d.1 = f32[1,16]{1,0} fusion-done(%s.1)
  %r = f32[4,4]{1,0} bitcast(%d.1)
  %dot.1 = f32[4,4]{1,0} dot(%r, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %b = f32[1,16]{1,0} bitcast(%dot.1)
  %s.2 = ((f32[3,16]{1,0:S(5)}, f32[1,16]{1,0}, s32[]), f32[3,16]{1,0:S(5)}, u32[]) fusion-start(%x, %b, %i), kind=kLoop, calls=%cut
  %d.2 = f32[3,16]{1,0:S(5)} fusion-done(%s.2)
  ROOT %t = (s32[], f32[3,16]{1,0:S(5)}, f32[4,4]{1,0}) tuple(%i, %d.2, %w)
}

%condition (c.1: (s32[], f32[3,16], f32[4,4])) -> pred[] {
  %c.1 = (s32[], f32[3,16]{1,0:S(5)}, f32[4,4]{1,0}) parameter(0)
  ROOT %k = pred[] constant(true)
}

ENTRY %main (a: f32[3,16], e: f32[8], w.1: f32[4,4]) -> f32[8] {
  %a = f32[3,16]{1,0:S(5)} parameter(0)
  %e = f32[8]{0:S(5)} parameter(1)
  %w.1 = f32[4,4]{1,0} parameter(2)
  %n = s32[] constant(0)
  %s.3 = (f32[8]{0}, f32[8]{0:S(5)}, u32[]) copy-start(%e)
  %d.3 = f32[8]{0} copy-done(%s.3)
  %g = f32[2,2]{1,0} dot(%w.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %t.1 = (s32[], f32[3,16]{1,0:S(5)}, f32[4,4]{1,0}) tuple(%n, %a, %w.1)
  %l = (s32[], f32[3,16]{1,0:S(5)}, f32[4,4]{1,0}) while(%t.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %h = f32[8]{0:S(5)} copy(%e)
  %m = f32[8]{0} negate(%d.3)
  %s.4 = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%m)
  ROOT %d.4 = f32[8]{0:S(5)} copy-done(%s.4)
}
"""  # noqa: E501


def test_bytes_and_what_stands_beside_them():
    found = host_moves(parse(TEXT))
    assert found["to_device_bytes"] == 3 * 16 * 4 + 8 * 4
    assert found["to_host_bytes"] == 3 * 16 * 4 + 8 * 4
    places = {each["name"]: each for each in found["places"]}
    assert set(places) == {"body", "main"}
    body, main = places["body"], places["main"]
    assert body["count"] == 3 and main["count"] == 1
    assert body["to_device_bytes"] == body["to_host_bytes"] == 16 * 4
    assert body["matmul_flops"] == 2 * 4 * 4 * 4
    # Not those of the loop: they stand beside the loop's own moves.
    assert main["matmul_flops"] == 2 * 2 * 2 * 4
    assert main["attention_flops"] == 0
