"""A mask as one range of keys for every query: what kernels on GPUs take."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ulysses_jax.attention.mask import Mask

_INT32 = jnp.iinfo(jnp.int32)


class KeyRanges(NamedTuple):
    """Query t of row b sees the keys [start, stop), where the row is in order.

    Attributes:
      start, stop: int32 `[B, T]`, 0 <= start <= stop <= S.
      in_order: whether the row's keys lie so that ranges can say what is seen.
    """

    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]
    in_order: Bool[Array, "B"]


def key_ranges(mask: Mask, batch: int, num_q: int, num_kv: int) -> KeyRanges:
    """The keys that a mask lets each query see, as a range.

    There is one where the keys lie in order: their segment ids never fall, and inside a
    segment neither do their positions. The ids may fall once, to below the first of
    them: packed rows have 0 for padding at their end.

    Cost: O(T log S) integers.
    """
    q_at, low, high = _seen_positions(mask, num_q)
    if mask.is_by_index:
        start, stop = (
            jnp.broadcast_to(jnp.clip(x, 0, num_kv), (batch, num_q))
            for x in (low, jnp.where(high == _INT32.max, num_kv, high + 1))
        )
        return KeyRanges(start, jnp.maximum(start, stop), jnp.ones(batch, bool))
    kv_at = mask.kv_positions
    if kv_at is None:
        kv_at = jnp.arange(num_kv, dtype=jnp.int32)[None]
    q_segments = kv_segments = jnp.zeros((1, 1), jnp.uint32)
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        # Counted from a row's first id, modulo 2**32, those below it come last.
        first = mask.kv_segment_ids[:, :1].astype(jnp.uint32)
        kv_segments = mask.kv_segment_ids.astype(jnp.uint32) - first
        q_segments = mask.q_segment_ids.astype(jnp.uint32) - first
    shape = (batch, num_kv)
    keys = jnp.broadcast_to(kv_segments, shape), jnp.broadcast_to(kv_at, shape)
    start = _num_before(keys, q_segments, low, or_at=False)
    stop = _num_before(keys, q_segments, high, or_at=True)
    (before, before_at), (after, after_at) = (
        [x[:, part] for x in keys] for part in (slice(None, -1), slice(1, None))
    )
    rises = (before < after) | ((before == after) & (before_at <= after_at))
    return KeyRanges(start, jnp.maximum(start, stop), rises.all(axis=1))


def _seen_positions(mask: Mask, num_q: int) -> tuple[Array, Array, Array]:
    """The queries' positions, and the least and greatest that each sees, `[B|1, T]`."""
    at = mask.q_positions
    if at is None:
        at = jnp.arange(num_q, dtype=jnp.int32)[None]
    low = jnp.full_like(at, _INT32.min)
    high = jnp.full_like(at, _INT32.max)
    if mask.window is not None:
        reach = int(mask.window) - 1  # where int32 ends, so does what it reaches
        low = jnp.where(at < _INT32.min + reach, low, at - reach)
        high = jnp.where(at > _INT32.max - reach, high, at + reach)
    return at, low, at if mask.causal else high


def _num_before(
    keys: tuple[Array, Array], segments: Array, positions: Array, *, or_at: bool
) -> Int[Array, "B T"]:
    """How many keys come before each (segment, position), or at it too: bisection."""
    batch, num_kv = keys[0].shape
    segments, positions = jnp.broadcast_arrays(segments, positions)
    shape = (batch, positions.shape[1])
    segments, positions = (jnp.broadcast_to(x, shape) for x in (segments, positions))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        segment, position = (
            jnp.take_along_axis(x, jnp.minimum(middle, num_kv - 1), axis=1)
            for x in keys
        )
        behind = position <= positions if or_at else position < positions
        is_before = (segment < segments) | ((segment == segments) & behind)
        is_before &= low < high
        return jnp.where(is_before, middle + 1, low), jnp.where(is_before, high, middle)

    low, high = jnp.zeros(shape, jnp.int32), jnp.full(shape, num_kv, jnp.int32)
    # In shard_map a loop's carry must vary as what it becomes does.
    low, high = (x + 0 * positions for x in (low, high))
    return lax.fori_loop(0, num_kv.bit_length(), halve, (low, high))[0]
