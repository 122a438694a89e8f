"""Ulysses inside the members of a ring: any heads, any two degrees."""

import functools

import jax
import numpy as np
import pytest
from slow import slow_but_for
from strategy_cases import (
    MASKS,
    B,
    H,
    T,
    assert_close,
    counts,
    inputs,
    mesh_of,
    oracle,
    out_and_gradients,
    pairs_computed,
    programs,
    sent,
    spread_results,
)

from ulysses_jax import ulysses_attention
from ulysses_jax.parallel.bytes import received_bytes

MESHES = [dict(ring=2, seq=4), dict(ring=4, seq=2)]


@pytest.mark.parametrize(
    "heads, degrees, zigzag",
    slow_but_for(
        [
            ((8, 2), MESHES[0], True),
            ((7, 7), MESHES[1], False),
            ((3, 1), MESHES[0], False),
            ((8, 8), MESHES[1], True),
        ],
        [(8, 8), (8, 2), (7, 7), (3, 1)],  # KV heads below seq, prime, fewer than seq
        MESHES,
        [False, True],
    ),
)
def test_equals_the_oracle(heads, degrees, zigzag):
    got = spread_results("hybrid", "causal", *heads, zigzag=zigzag, **degrees)
    assert_close(got, oracle("causal", *heads))


@pytest.mark.parametrize("mask", ["causal", "segments and window", "positions"])
def test_the_public_function_takes_arrays_in_their_natural_order(mask):
    mesh, masked = mesh_of(ring=2, seq=2, tensor=2), MASKS[mask]
    attention = functools.partial(
        ulysses_attention,
        mesh=mesh,
        window=masked.window,
        segment_ids=masked.q_segment_ids,
        positions=masked.q_positions,
    )
    assert_close(out_and_gradients(attention, *inputs(4, 2)), oracle(mask, 4, 2))
    out = jax.jit(attention)(*inputs(4, 2)[:3])
    assert out.addressable_shards[0].data.shape == (B, T // 4, 2, H)


def test_head_chunks_change_nothing():
    attention = functools.partial(
        ulysses_attention, mesh=mesh_of(ring=2, seq=2), head_chunks=2
    )
    assert_close(out_and_gradients(attention, *inputs(8, 4)), oracle("causal", 8, 4))
    with pytest.raises(
        ValueError,
        match=r"head_chunks 4 .* seq 2 = 2 key/value heads: .* use one of \[1, 2\]",
    ):
        attention(*inputs(8, 4)[:3], head_chunks=4)


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_bytes_of_the_formula(degrees, heads, kv_heads):
    forward, both = programs("hybrid", heads, kv_heads, **degrees)
    ring, seq = degrees["ring"], degrees["seq"]
    exchange, hops = ("all-to-all", "seq"), ("collective-permute", "ring")
    assert counts(forward) == {exchange: 4, hops: ring - 1}
    assert counts(both) == {exchange: 8, hops: 3 * ring - 4}
    sizes = dict(tokens=T, num_heads=heads, num_kv_heads=kv_heads, head_size=H)
    formula = received_bytes("hybrid", **sizes, itemsize=4, ring=ring, seq=seq)
    assert sent(forward) == {key: B * there for key, (there, _) in formula.items()}
    assert sent(both) == {key: B * sum(ways) for key, ways in formula.items()}
    if kv_heads == 8:  # the table of strategies, g = 1
        width = heads * H
        by_hand = (4 * (seq - 1) / seq + 2 * (ring - 1)) * T * width / (ring * seq) * 4
        assert sum(there for there, _ in formula.values()) == by_hand


def test_every_device_works_equally_in_zigzag_order():
    work = pairs_computed("hybrid", zigzag=True, ring=4, seq=2)
    block = T // 4
    # Each member's two devices, of half the heads each.
    assert work == [2 * (block * (block + 1) // 2 + 3 * block**2 // 2)] * 4
    assert np.sum(work) == 2 * T * (T + 1) // 2
