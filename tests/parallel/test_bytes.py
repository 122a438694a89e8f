"""What strategies receive, by formula: against formulas written by hand."""

import pytest

from ulysses_jax.parallel.bytes import received_bytes, total_bytes


def bytes_of(strategy, *, heads=32, kv_heads=8, ring=1, seq=1):
    sizes = dict(num_heads=heads, num_kv_heads=kv_heads, head_size=128, itemsize=2)
    sizes["width"] = heads * 128
    return received_bytes(strategy, tokens=2**20, **sizes, ring=ring, seq=seq)


def test_the_table_of_forward_bytes():
    """As the facts have it: g = N/K, mu = (P-1)/P, in units of T D e."""
    unit, g, p = 2**20 * 32 * 128 * 2, 4, 8
    mu = (p - 1) / p

    def forward(strategy, **degrees):
        return sum(there for there, _ in bytes_of(strategy, **degrees).values()) / unit

    assert forward("ulysses", seq=8) == (2 + 2 / g) / p * mu
    # P > K: each KV head repeated P/K times, never to N.
    assert forward("ulysses", seq=16) == (2 / 16 + 2 / 32) * 15 / 16
    assert forward("ring", ring=8) == forward("all_gather", seq=8) == 2 / g * mu
    assert forward("megatron", seq=8) == 4 * mu
    for r, u in ((2, 4), (4, 2)):
        by_hand = ((2 + 2 / g) * (u - 1) / u + 2 / g * (r - 1)) / p
        assert forward("hybrid", ring=r, seq=u) == by_hand


def test_backward_gradients_are_float32():
    block = 2 * 8 * 128 * 2**20 / 8
    ((there, back),) = bytes_of("ring", ring=8).values()
    assert (there, back) == (7 * block * 2, 6 * block * 2 + 7 * block * 4)
    gathered = bytes_of("all_gather", seq=8)
    assert gathered["reduce-scatter", "seq"] == (
        0,
        2 * gathered["all-gather", "seq"][0],
    )


@pytest.mark.parametrize("g, than_ring, than_gather", [(1, 2, 2), (4, 3, 4), (8, 5, 7)])
def test_crossover(g, than_ring, than_gather):
    """The fewest devices from which Ulysses receives less; P <= K."""

    def total(strategy, **degrees):
        heads = dict(heads=64 * g, kv_heads=64)
        return total_bytes(bytes_of(strategy, **heads, **degrees))

    counts = range(2, 20)
    rings = [p for p in counts if total("ulysses", seq=p) < total("ring", ring=p)]
    gathers = [
        p for p in counts if total("ulysses", seq=p) < total("all_gather", seq=p)
    ]
    assert (rings[0], gathers[0]) == (than_ring, than_gather)
    assert than_gather == int(2 / 3 * (g + 1)) + 1


def test_the_bytes_of_megatron_need_a_width():
    sizes = dict(num_heads=8, num_kv_heads=2, head_size=8, itemsize=2)
    with pytest.raises(ValueError, match="give their width"):
        received_bytes("megatron", tokens=64, ring=1, seq=2, **sizes)
