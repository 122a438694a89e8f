"""A layer in pieces, forward and backward: by chunks, groups of heads and tiles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ulysses_jax.memory.block_attention import Pieces, attend_group, pull_group
from ulysses_jax.memory.tiles import add, cut, over_row_tiles, write

Tree = Any


Attended = tuple[Float[Array, "B T N H"], tuple[Float[Array, "c P B n t"], ...]]


def forward(
    pieces: Pieces, leaves: Tree, x: Float[Array, "B T D"], angles: Tree, *, keep: bool
) -> tuple[Float[Array, "B T D"], Attended | None]:
    """The layer's result, and attention's out and logsumexp where `keep` says so.

    Args:
      x: local.
      angles: a pytree of local arrays `[B, T, ...]`.

    Cost: x, which becomes the result in place; the keys and values of the whole
    sequence (of this device's heads); attention of a chunk, and for a group of heads
    its queries; the feed-forward of a tile.
    """
    keys = _keys_values(pieces, leaves, x, angles)

    def one_chunk(x, i):
        _, out, logsumexps = _attend_chunk(pieces, leaves, x, angles, keys, i)
        back, start = pieces.back(out), i * pieces.chunk_tokens

        def one_tile(_, out, x):
            return None, pieces.finish(leaves, x, out)

        part = cut(x, start, pieces.chunk_tokens)
        _, part = over_row_tiles(
            one_tile, None, back, part, tile_tokens=pieces.tile_tokens
        )
        return write(x, part, start), (back, logsumexps) if keep else None

    y, kept = lax.scan(one_chunk, x, jnp.arange(_num_chunks(pieces, x)))
    if kept is None:
        return y, None
    out, logsumexps = kept
    out = jnp.moveaxis(out, 0, 1)
    return y, (out.reshape(out.shape[0], -1, *out.shape[3:]), logsumexps)


def backward(
    pieces: Pieces,
    leaves: Tree,
    x: Float[Array, "B T D"],
    angles: Tree,
    attended: Attended | None,
    dy: Float[Array, "B T D"],
) -> tuple[Float[Array, "B T D"], Tree]:
    """dx, and the gradients of the leaves over this device's tokens, float32.

    Everything is computed again from x, piece by piece; attention too, unless
    `attended` has what `forward` kept.

    Cost: x; dy, which becomes dx in place; keys and values, and their gradients in
    float32, of the whole sequence; of a chunk, attention's results and their gradients
    for all groups, and its queries where attention is computed again; the leaves'
    gradients, float32 and whole in D.
    """
    keys = _keys_values(pieces, leaves, x, angles)
    dkeys = jax.tree.map(lambda k: jnp.zeros(k.shape, jnp.float32), keys)
    sums = jax.tree.map(jnp.zeros_like, leaves)

    def queries_of_chunk(carry, inputs):
        dx, dkeys, sums = carry
        i, logsumexps = inputs
        start = i * pieces.chunk_tokens
        part, its_angles = cut((x, angles), start, pieces.chunk_tokens)
        shapes = _group_shapes(pieces, leaves, part, its_angles)
        transposed = jax.linear_transpose(pieces.back, shapes)
        if attended is None:
            qs, outs, logsumexps = _attend_chunk(pieces, leaves, x, angles, keys, i)
            back = pieces.back(outs)
        else:
            back = cut(attended[0], start, pieces.chunk_tokens)
            qs, (outs,) = None, transposed(back)

        def one_tile(sums, tile, old):
            dy, out = old
            _, pull = jax.vjp(pieces.finish, leaves, tile, out)
            dleaves, dtile, dout = pull(dy)
            return add(sums, dleaves), (dtile, dout)

        dpart = cut(dx, start, pieces.chunk_tokens)
        sums, (dpart, dback) = over_row_tiles(
            one_tile, sums, part, (dpart, back), tile_tokens=pieces.tile_tokens
        )
        (douts,) = transposed(dback)
        for g in range(len(pieces.key_slots)):
            (q, sinks), pull = jax.vjp(
                lambda leaves, x, g=g: pieces.queries(leaves, x, its_angles, g),
                leaves,
                part,
            )
            q = q if qs is None else qs[g]  # not to exchange it again
            given = (outs[g], logsumexps[g], douts[g])
            dqueries, dkeys = pull_group(pieces, q, sinks, keys, *given, dkeys, i, g)
            dleaves, more = pull(dqueries)
            dpart, sums = dpart + more, add(sums, dleaves)
        return (write(dx, dpart, start), dkeys, sums), None

    def keys_of_chunk(carry, inputs):
        dx, sums = carry
        i, (dk, dv) = inputs
        start = i * pieces.chunk_tokens
        part, its_angles, dpart = cut((x, angles, dx), start, pieces.chunk_tokens)
        (k, v), pull = jax.vjp(
            lambda leaves, x: pieces.keys_values(leaves, x, its_angles), leaves, part
        )
        dleaves, more = pull((dk.astype(k.dtype), dv.astype(v.dtype)))
        return (write(dx, dpart + more, start), add(sums, dleaves)), None

    numbers = jnp.arange(_num_chunks(pieces, x))
    logsumexps = None if attended is None else attended[1]
    (dx, dkeys, sums), _ = lax.scan(
        queries_of_chunk, (dy, dkeys, sums), (numbers, logsumexps)
    )
    (dx, sums), _ = lax.scan(keys_of_chunk, (dx, sums), (numbers, dkeys))
    return dx, sums


def _num_chunks(pieces: Pieces, x: Array) -> int:
    return x.shape[1] // pieces.chunk_tokens


def _group_shapes(pieces, leaves, part, angles) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(
        jax.eval_shape(lambda g=g: pieces.queries(leaves, part, angles, g)[0])
        for g in range(len(pieces.key_slots))
    )


def _keys_values(pieces, leaves, x, angles) -> tuple[Array, Array]:
    """All keys and values, `[c, P, B, t, K', H]`, made chunk by chunk."""

    def one_chunk(_, i):
        part = cut((x, angles), i * pieces.chunk_tokens, pieces.chunk_tokens)
        keys = pieces.keys_values(leaves, *part)
        if pieces.keys_on_host:
            keys = jax.device_put(keys, jax.memory.Space.Host)
        return None, keys

    return lax.scan(one_chunk, None, jnp.arange(_num_chunks(pieces, x)))[1]


def _attend_chunk(pieces, leaves, x, angles, keys, i):
    """Attention of chunk i: q, out and logsumexp, each a tuple of groups of heads."""
    start = i * pieces.chunk_tokens
    part, its_angles = cut((x, angles), start, pieces.chunk_tokens)
    groups = []
    for g in range(len(pieces.key_slots)):
        q, sinks = pieces.queries(leaves, part, its_angles, g)
        groups.append((q, *attend_group(pieces, q, sinks, keys, i, g)))
    return tuple(zip(*groups, strict=True))
