"""What the compiled program sends: four all-to-alls each way, and not a byte more."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax import make_mesh, ulysses_attention
from ulysses_jax.attention.reference import reference_attention

B, T, H = 2, 32, 8
DTYPE = jnp.dtype(jnp.float32)
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVES = (
    "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|"
    "collective-broadcast|ragged-all-to-all"
)
# `%name = shape opcode(operands)`; of an asynchronous pair the start counts.
LINE = re.compile(rf"= (\(?[^=]*?) ({COLLECTIVES})(?:-start)?\(")


def collectives(function, *args):
    """The (opcode, result bytes) of every collective in the program of one device."""
    text = jax.jit(function).lower(*args).compile().as_text()
    text = re.sub(r"/\*.*?\*/", "", text)  # tuples count: /*index=5*/
    return [
        (opcode, sum(map(array_bytes, re.findall(r"(\w+)\[([\d,]*)\]", shape))))
        for shape, opcode in LINE.findall(text)
    ]


def array_bytes(typed_dims):
    dtype, dims = typed_dims
    return BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)


def program(seq, num_heads, num_kv_heads, attention=None):
    """ulysses_attention, its vjp, and arguments that lie as they should."""
    mesh = make_mesh(seq=seq, devices=jax.devices()[:seq])
    spread = NamedSharding(mesh, P(None, "seq"))

    def shaped(heads):
        return jax.ShapeDtypeStruct((B, T, heads, H), DTYPE, sharding=spread)

    forward = functools.partial(ulysses_attention, mesh=mesh, attention=attention)

    def both_ways(q, k, v, upstream):
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(upstream)

    q, kv = shaped(num_heads), shaped(num_kv_heads)
    return forward, both_ways, (q, kv, kv, q)


def received(found, seq):
    """Bytes a device gets from others: all that an all-to-all returns but its own."""
    return sum(size for _, size in found) * (seq - 1) / seq


def formula(seq, num_heads, num_kv_heads):
    """Bytes a device receives forward, for P <= K and for P > K."""
    width, e, mu = num_heads * H, DTYPE.itemsize, (seq - 1) / seq
    g = num_heads / num_kv_heads
    if seq <= num_kv_heads:
        return B * (2 + 2 / g) * (T * width / seq) * mu * e
    return B * (2 * T * width / seq + 2 * T * H) * mu * e


@pytest.mark.parametrize("seq", [2, 4, 8])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (16, 2)])
def test_four_exchanges_each_way_of_the_bytes_that_the_paper_says(seq, heads, kv_heads):
    forward, both_ways, (q, k, v, upstream) = program(seq, heads, kv_heads)
    found = collectives(forward, q, k, v)
    assert [opcode for opcode, _ in found] == ["all-to-all"] * 4
    assert received(found, seq) == formula(seq, heads, kv_heads)
    found = collectives(both_ways, q, k, v, upstream)
    assert [opcode for opcode, _ in found] == ["all-to-all"] * 8
    assert received(found, seq) == 2 * formula(seq, heads, kv_heads)


def test_kv_heads_are_repeated_to_the_degree_and_no_further():
    """16 query heads and 1 KV head on 4 devices: K and V go as 4 heads, not as 16."""
    forward, _, (q, k, v, _) = program(4, 16, 1)
    sizes = sorted(size for _, size in collectives(forward, q, k, v))
    one_head = B * (T // 4) * H * DTYPE.itemsize
    assert sizes == [4 * one_head] * 2 + [16 * one_head] * 2


def test_one_device_sends_nothing():
    _, both_ways, args = program(1, 8, 2)
    assert collectives(both_ways, *args) == []


def test_other_axes_add_no_collective():
    """Batch and heads are spread already: no gradient of q, k or v crosses them."""
    mesh = make_mesh(fsdp=2, seq=2, tensor=2)
    spread = NamedSharding(mesh, P("fsdp", "seq", "tensor"))
    x = jax.ShapeDtypeStruct((B, T, 8, H), DTYPE, sharding=spread)

    def both_ways(q, k, v, upstream):
        out, pull = jax.vjp(functools.partial(ulysses_attention, mesh=mesh), q, k, v)
        return out, pull(upstream)

    found = collectives(both_ways, x, x, x, x)
    assert [opcode for opcode, _ in found] == ["all-to-all"] * 8


def test_head_chunks_send_the_same_bytes_in_more_exchanges():
    forward, _, (q, k, v, _) = program(2, 16, 4)
    whole = collectives(forward, q, k, v)
    chunked = collectives(functools.partial(forward, head_chunks=2), q, k, v)
    assert len(chunked) == 8
    assert received(chunked, 2) == received(whole, 2) == formula(2, 16, 4)


def test_a_needless_collective_is_seen():
    def wasteful(q, k, v, *, mask, scale):
        everything = lax.all_gather(k, "seq")
        return reference_attention(q, k + everything.mean(0), v, mask=mask, scale=scale)

    forward, _, (q, k, v, _) = program(4, 8, 8, attention=wasteful)
    found = collectives(forward, q, k, v)
    assert {opcode for opcode, _ in found} > {"all-to-all"}
    assert received(found, 4) > formula(4, 8, 8)
