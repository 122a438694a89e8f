"""The exchange moves every element where it belongs, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ulysses_jax import heads_to_seq, make_mesh, seq_to_heads
from ulysses_jax.parallel.exchange import head_layout

B, T, N, H = 2, 16, 8, 2


def rank_coded():
    """Every element says where it stands: batch, token, head and feature in decimal."""
    b, t, n, h = np.ogrid[:B, :T, :N, :H]
    return jnp.asarray(((b * 100 + t) * 100 + n) * 10 + h, jnp.int32)


def exchanged(function, mesh, in_spec, out_spec):
    return jax.shard_map(function, mesh=mesh, in_specs=in_spec, out_specs=out_spec)


@pytest.mark.parametrize("seq", [1, 2, 4, 8])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_order_and_round_trip(seq, axis_type):
    axis_type = getattr(jax.sharding.AxisType, axis_type)
    mesh = make_mesh(seq=seq, devices=jax.devices()[:seq], axis_type=axis_type)
    x = rank_coded()
    by_token, by_head = P(None, "seq"), P(None, None, "seq")
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, by_token))
        heads = exchanged(seq_to_heads, mesh, by_token, by_head)(sharded)
        # The global array is the same; only who holds what has changed.
        np.testing.assert_array_equal(heads, x)
        for shard in heads.addressable_shards:
            assert shard.data.shape == (B, T, N // seq, H)
            np.testing.assert_array_equal(shard.data, np.asarray(x)[shard.index])
        back = exchanged(heads_to_seq, mesh, by_head, by_token)(heads)
        np.testing.assert_array_equal(back, x)
        assert back.addressable_shards[0].data.shape == (B, T // seq, N, H)


@pytest.mark.parametrize("data, seq", [(2, 4), (4, 2)])
def test_only_the_named_axis_takes_part(data, seq):
    mesh = make_mesh(data=data, seq=seq)
    x = jnp.concatenate([rank_coded()] * 2)
    spec_in, spec_out = P("data", "seq"), P("data", None, "seq")
    heads = exchanged(seq_to_heads, mesh, spec_in, spec_out)(x)
    np.testing.assert_array_equal(heads, x)
    assert heads.addressable_shards[0].data.shape == (2 * B // data, T, N // seq, H)


def test_each_is_the_others_transpose():
    mesh = make_mesh(seq=8)
    by_token, by_head = P(None, "seq"), P(None, None, "seq")
    to_heads = exchanged(seq_to_heads, mesh, by_token, by_head)
    to_seq = exchanged(heads_to_seq, mesh, by_head, by_token)
    x = rank_coded().astype(jnp.float32)
    for function, inverse in ((to_heads, to_seq), (to_seq, to_heads)):
        _, pull = jax.vjp(jax.jit(function), x)
        np.testing.assert_array_equal(pull(x)[0], jax.jit(inverse)(x))


def test_what_does_not_divide_is_refused():
    mesh = make_mesh(seq=8)
    x = jnp.zeros((1, 16, 6, 2))
    with pytest.raises(ValueError, match="6 heads do not divide over 'seq' degree 8"):
        exchanged(seq_to_heads, mesh, P(None, "seq"), P(None, None, "seq"))(x)
    x = jnp.zeros((1, 12, 8, 2))
    with pytest.raises(ValueError, match="12 tokens .* pad the sequence to 16"):
        exchanged(heads_to_seq, mesh, P(None, None, "seq"), P(None, "seq"))(x)


@pytest.mark.parametrize(
    "heads, kv_heads, degree, slots, kv_slots",
    [
        (8, 8, 4, 8, 8),  # both divide: nothing is padded or repeated
        (8, 4, 4, 8, 4),
        (8, 2, 8, 8, 8),  # K < P: repeated to P
        (32, 8, 16, 32, 16),  # ... and not to N
        (8, 1, 4, 8, 4),  # multi-query
        (6, 6, 4, 8, 8),  # uneven
        (7, 7, 2, 8, 8),
        (12, 4, 8, 16, 8),  # uneven and K < P
        (28, 4, 8, 32, 8),
        (6, 2, 3, 6, 6),  # P a multiple of neither
        (5, 5, 8, 8, 8),
        (4, 4, 1, 4, 4),
    ],
)
def test_head_layout(heads, kv_heads, degree, slots, kv_slots):
    layout = head_layout(heads, kv_heads, degree)
    assert (layout.num_slots, layout.num_kv_slots) == (slots, kv_slots)
    # Follow each query head to its slot: there it meets its own KV head.
    q = np.arange(heads).reshape(1, 1, heads, 1) + 1
    kv = np.arange(kv_heads).reshape(1, 1, kv_heads, 1) + 1
    q_slots = np.asarray(layout.spread_q(jnp.asarray(q)))[0, 0, :, 0]
    kv_slots_held = np.asarray(layout.spread_kv(jnp.asarray(kv)))[0, 0, :, 0]
    assert len(q_slots) == slots and len(kv_slots_held) == kv_slots
    assert sorted(q_slots[q_slots > 0]) == list(range(1, heads + 1))
    for slot, head in enumerate(q_slots):
        if head:
            kv_head = kv_slots_held[slot // layout.group]
            assert kv_head - 1 == (head - 1) // (heads // kv_heads)
    restored = layout.gather_q(layout.spread_q(jnp.asarray(q)))
    np.testing.assert_array_equal(restored, q)
