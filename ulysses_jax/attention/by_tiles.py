"""Attention tile by tile: a kernel is called on the tiles that are not empty.

A kernel that hides what a mask hides, but computes it, does the work of all pairs. Here
it is called on tiles of some queries and some keys, several in a call, and only on
tiles in which a query sees a key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ulysses_jax.attention.ranges import KeyRanges


class TileList(NamedTuple):
    """The tiles that are not empty, those of one block of queries after another.

    Attributes:
      q, kv: int32, the blocks of each tile; past `number`, and where q is -1, they mean
        nothing.
      number: how many there are; an int where it is known.
    """

    q: Int[Array, "tiles"]
    kv: Int[Array, "tiles"]
    number: Int[Array, ""] | int


def over_tiles(
    one_step: Callable[..., Any], start: Any, tiles: TileList, at_once: int
) -> Any:
    """`carry = one_step(carry, q, kv, is_tile)` over the tiles, `at_once` in a step.

    Args:
      one_step: q, kv and is_tile are `[at_once]`; where is_tile is False, which is so
        at the end of the list, they are 0.
    """

    def step(carry):
        number, carry = carry
        at = number * at_once + jnp.arange(at_once)
        is_tile = at < tiles.number
        at = jnp.minimum(at, len(tiles.q) - 1)
        is_tile &= tiles.q[at] >= 0
        q, kv = (jnp.where(is_tile, x[at], 0) for x in (tiles.q, tiles.kv))
        return number + 1, one_step(carry, q, kv, is_tile)

    # Not fori_loop: where layers are scanned JAX would compute what follows from the
    # list alone before the scan, for all steps of all tiles at once.
    steps = -(-tiles.number // at_once)
    return lax.while_loop(lambda carry: carry[0] < steps, step, (0, start))[1]


def rows_of(x: Shaped[Array, "blocks B ..."], blocks: Array) -> Shaped[Array, "r ..."]:
    """Some blocks as rows of one call."""
    x = x[blocks]
    return x.reshape(-1, *x.shape[2:])


def sum_gradients(
    pull: Callable[..., tuple[Array, Array, Array]],
    of_q: tuple[Shaped[Array, "q B block ..."], ...],
    of_kv: tuple[Shaped[Array, "kv B block K H"], ...],
    tiles: TileList,
    at_once: int,
) -> tuple[Array, Array, Array]:
    """Float32 dq, dk, dv of all blocks, summed in an order that is always the same.

    Args:
      pull: `f(q, kv, *rows_of_q, *rows_of_kv) -> (dq, dk, dv)` of some tiles; what it
        gives past the end of the list does not count.
      of_q: the first is the queries.
      of_kv: keys and values.
    """

    def some_tiles(carry, i, j, is_tile):
        rows = *(rows_of(x, i) for x in of_q), *(rows_of(x, j) for x in of_kv)
        parts = pull(i, j, *rows)
        sums = []
        for total, part, at in zip(carry, parts, (i, j, j), strict=True):
            part = part.astype(jnp.float32).reshape(at_once, *total.shape[1:])
            hidden = ~is_tile.reshape(-1, *[1] * (part.ndim - 1))
            part = jnp.where(hidden, 0, part)
            # One after another: two tiles may share a block.
            for tile in range(at_once):
                total = total.at[at[tile]].add(part[tile])
            sums.append(total)
        return tuple(sums)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (of_q[0], *of_kv))
    return over_tiles(some_tiles, start, tiles, at_once)


def tiles_of(ranges: KeyRanges, block_tokens: int, num_kv_blocks: int) -> TileList:
    """The tiles in which a query sees a key, or might.

    Args:
      ranges: of a multiple of `block_tokens` queries.
      block_tokens: of queries, and of keys.
      num_kv_blocks: of a row.

    Returns: blocks are counted through all rows, a row's before the next one's.
    """
    batch, num_q = ranges.start.shape
    q_blocks = num_q // block_tokens
    start, stop = (
        x.reshape(batch * q_blocks, block_tokens) for x in (ranges.start, ranges.stop)
    )
    sees = start < stop
    first = jnp.where(sees, start // block_tokens, num_kv_blocks).min(axis=1)
    last = jnp.where(sees, (stop - 1) // block_tokens, -1).max(axis=1)
    counts = jnp.maximum(last - first + 1, 0)
    ends = jnp.cumsum(counts)
    tile = jnp.arange(batch * q_blocks * num_kv_blocks, dtype=jnp.int32)
    q = jnp.searchsorted(ends, tile, side="right").astype(jnp.int32)
    q = jnp.minimum(q, batch * q_blocks - 1)
    kv = q // q_blocks * num_kv_blocks + first[q] + tile - (ends - counts)[q]
    return TileList(q, kv.astype(jnp.int32), ends[-1])


def gradients_by_tiles(
    pull: Callable[..., tuple[Array, Array, Array]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    logsumexp: Float[Array, "B N T"],
    dout: Float[Array, "B T N H"],
    ranges: KeyRanges,
    *,
    block_tokens: int,
    tiles_at_once: int,
) -> tuple[Array, Array, Array]:
    """Float32 dq, dk, dv, summed over tiles in an order that is always the same.

    Args:
      pull: `f(q, k, v, out, logsumexp, dout, start, stop) -> (dq, dk, dv)` of one tile
        a row: a flash attention's backward pass where a query sees the tile's keys
        [start, stop).
      out, logsumexp: over all keys of a query.

    Cost: `pull` computes `block_tokens`**2 pairs a tile, and `tiles_at_once` - 1 tiles
    at most beside those that are not empty.
    """
    batch, num_q = q.shape[:2]
    num_kv = k.shape[1]
    kv_blocks = -(-num_kv // block_tokens)

    def split(x: Array, axis: int) -> Float[Array, "blocks 1 ..."]:
        """Into blocks of one row each, a row's before the next one's."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = 0, -x.shape[axis] % block_tokens
        x = jnp.pad(x, widths) if widths[axis][1] else x
        x = x.reshape(*x.shape[:axis], -1, block_tokens, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis, 1)
        return x.reshape(-1, 1, *x.shape[2:])

    def joined(x: Array) -> Float[Array, "B T ..."]:
        return x.reshape(batch, -1, *x.shape[3:])

    # Queries of padding see nothing: [0, 0).
    of_q = (
        *(split(x, 1) for x in (q, out, dout)),
        split(logsumexp, 2),
    )
    starts, stops = (split(x, 1) for x in ranges[:2])
    of_kv = tuple(split(x, 1) for x in (k, v))
    tiles = tiles_of(
        KeyRanges(joined(starts), joined(stops), ranges.in_order),
        block_tokens,
        kv_blocks,
    )

    def pull_tiles(i, j, *arrays):
        first = (j % kv_blocks * block_tokens)[:, None, None]
        start, stop = (jnp.clip(x[i] - first, 0, block_tokens) for x in (starts, stops))
        start, stop = (x.reshape(-1, block_tokens) for x in (start, stop))
        queries, outs, douts, logsumexps, keys, values = arrays
        return pull(queries, keys, values, outs, logsumexps, douts, start, stop)

    with jax.named_scope(f"attention_by_tiles/{batch}_rows"):  # which a plan reads
        sums = sum_gradients(pull_tiles, of_q, of_kv, tiles, tiles_at_once)
    dq, dk, dv = map(joined, sums)
    return dq[:, :num_q], dk[:, :num_kv], dv[:, :num_kv]
