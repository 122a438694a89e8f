"""A layer taken apart, and its attention: a chunk's queries over blocks of keys."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


class Pieces(NamedTuple):
    """A layer taken apart, as functions of one device's arrays; t tokens a chunk.

    Attention's arrays hold P pieces of t tokens each, one from every device of the
    exchange: piece p of chunk i is block `p c + i` of the sequence, of c chunks. Where
    one chunk is all there is, P is 1 here, and the piece the whole sequence. The heads
    of a device are attended in groups: every group g has n query heads.

    leaves are what gradients are taken of: float32 arrays.

    keys_values: `f(leaves, x [B, t, D], angles) -> (k, v)`, each `[P, B, t, K', H]`.
    queries: `f(leaves, x, angles, g) -> (q, sinks)`, `[P, B, t, n, H]`, `[n]` or None.
    back: `f(outs) -> [B, t, N, H]`, linear; outs is a tuple, a group each.
    finish: `f(leaves, x, out [B, t, N, H]) -> [B, t, D]`, the layer's result; token by
      token.
    statistics: `f(q, k, v, g, q_block, kv_block, is_own) -> (out, logsumexp)`, of a
      piece of queries and a block of keys, float32, logsumexp `[2, B, n, t]`: two that
      add up to it; is_own: the two are one block.
    gradients: `f(q, k, v, out, logsumexp, dout, g, q_block, kv_block, is_own)
      -> (dq, dk, dv)`, given out and logsumexp over all keys.
    join: two results of statistics into one.
    with_sinks: `f(statistics, sinks)`, of the result over all keys.
    sinks_gradient: `f(sinks, out, logsumexp, dout)` of a piece, given out and logsumexp
      with sinks: `[n]`, or None where there are none.
    first_block: `f(q_block) -> kv_block`, the first that a query of it sees, of any
      row: its own, or one before.
    key_slots: the slice of K' that each group reads.
    chunk_tokens: of a row, of attention; divides its tokens.
    tile_tokens: of all rows of a chunk together, of finish; at most.
    keys_on_host: keys and values wait in the host's memory, a block on the device.
    """

    keys_values: Callable[..., tuple[Array, Array]]
    queries: Callable[..., tuple[Array, Array | None]]
    back: Callable[[tuple[Array, ...]], Array]
    finish: Callable[..., Array]
    statistics: Callable[..., tuple[Array, Array]]
    gradients: Callable[..., tuple[Array, Array, Array]]
    join: Callable[..., tuple[Array, Array]]
    with_sinks: Callable[..., tuple[Array, Array]]
    sinks_gradient: Callable[..., Array | None]
    first_block: Callable[[Array], Array | int]
    key_slots: tuple[slice, ...]
    chunk_tokens: int
    tile_tokens: int
    keys_on_host: bool


def _block(pieces, keys, block, g) -> tuple[Array, Array]:
    """Keys and values of one block for one group of heads, on the device."""
    found = jax.tree.map(lambda k: _cut_block(k, block), keys)
    if pieces.keys_on_host:
        found = jax.device_put(found, jax.memory.Space.Device)
    return jax.tree.map(lambda k: k[:, :, pieces.key_slots[g]], found)


def _is_one_block(keys: tuple[Array, Array]) -> bool:
    return keys[0].shape[:2] == (1, 1)


def _cut_block(x: Shaped[Array, "c P ..."], block: Array) -> Shaped[Array, "..."]:
    number = x.shape[0]
    start = (block % number, block // number) + (0,) * (x.ndim - 2)
    return lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))[0, 0]


def _write_block(x: Array, part: Array, block: Array) -> Array:
    number = x.shape[0]
    start = (block % number, block // number) + (0,) * (x.ndim - 2)
    return lax.dynamic_update_slice(x, part[None, None], start)


def _over_earlier_blocks(pieces, keys, q_block, g, step, start):
    """`step(carry, k, v, block)` over the blocks before a query's own.

    The next block is on its way from the host while one is attended.
    """
    first = pieces.first_block(q_block)

    def body(block, carry):
        carry, (k, v) = carry
        following = _block(pieces, keys, jnp.minimum(block + 1, q_block), g)
        return step(carry, k, v, block), following

    carry, _ = lax.fori_loop(
        first, q_block, body, (start, _block(pieces, keys, first, g))
    )
    return carry


def attend_group(pieces, q, sinks, keys, i, g) -> tuple[Array, Array]:
    """Attention of chunk i and group g: out as q, logsumexp `[P, B, n, t]`."""
    number = keys[0].shape[0]

    def one_piece(inputs):
        p, query = inputs
        own = p * number + i
        out, logsumexp = pieces.statistics(
            query, *_block(pieces, keys, own, g), g, own, own, True
        )

        def step(joined, k, v, block):
            return pieces.join(
                joined, pieces.statistics(query, k, v, g, own, block, False)
            )

        if not _is_one_block(keys):
            out, logsumexp = _over_earlier_blocks(
                pieces, keys, own, g, step, (out, logsumexp)
            )
        out, logsumexp = pieces.with_sinks((out, logsumexp), sinks)
        return out.astype(query.dtype), logsumexp.sum(axis=0)

    return lax.map(one_piece, (jnp.arange(q.shape[0]), q))


def pull_group(pieces, q, sinks, keys, out, logsumexp, dout, dkeys, i, g):
    """(dq, dsinks) of chunk i and group g; and dkeys, to which its part was added."""
    number = keys[0].shape[0]

    def one_piece(carry, inputs):
        dkeys, dsinks = carry
        p, query, its_out, its_logsumexp, its_dout = inputs
        own = p * number + i

        def step(carry, k, v, block, is_own=False):
            dquery, dkeys = carry
            dq, dk, dv = pieces.gradients(
                query, k, v, its_out, its_logsumexp, its_dout, g, own, block, is_own
            )

            def add(whole, part):
                sums = _cut_block(whole, block)
                sums = sums.at[:, :, pieces.key_slots[g]].add(part)
                return _write_block(whole, sums, block)

            return dquery + dq, jax.tree.map(add, dkeys, (dk, dv))

        start = step(
            (jnp.zeros(query.shape, jnp.float32), dkeys),
            *_block(pieces, keys, own, g),
            own,
            is_own=True,
        )
        if _is_one_block(keys):
            dquery, dkeys = start
        else:
            dquery, dkeys = _over_earlier_blocks(pieces, keys, own, g, step, start)
        part = pieces.sinks_gradient(sinks, its_out, its_logsumexp, its_dout)
        dsinks = jax.tree.map(jnp.add, dsinks, part)
        return (dkeys, dsinks), dquery.astype(query.dtype)

    start = dkeys, jax.tree.map(jnp.zeros_like, sinks)
    (dkeys, dsinks), dq = lax.scan(
        one_piece, start, (jnp.arange(q.shape[0]), q, out, logsumexp, dout)
    )
    return (dq, dsinks), dkeys
