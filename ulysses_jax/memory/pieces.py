"""A layer in pieces: chunks of its tokens, groups of its heads, tiles of a chunk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

Tree = Any


class Pieces(NamedTuple):
    """A layer taken apart, as functions of one device's arrays; t tokens a chunk.

    Attention's arrays hold P pieces of t tokens each, one from every device of the
    exchange: piece p of chunk i is block `p c + i` of the sequence, of c chunks. Where
    one chunk is all there is, P is 1 here, and the piece the whole sequence. The heads
    of a device are attended in groups: every group g has n query heads.

    leaves are what gradients are taken of: float32 arrays.

    keys_values: `f(leaves, x [B, t, D], angles) -> (k, v)`, each `[P, B, t, K', H]`.
    queries: `f(leaves, x, angles, g) -> [P, B, t, n, H]`.
    back: `f(outs) -> [B, t, N, H]`, linear; outs is a tuple, a group each.
    finish: `f(leaves, x, out [B, t, N, H]) -> [B, t, D]`, the layer's result; token by
      token.
    attend: `f(q, k, v, q_block, kv_block, is_own) -> (out, logsumexp)`, of a piece of
      queries and a block of keys; is_own: the two are one block.
    gradients: `f(q, k, v, out, logsumexp, dout, q_block, kv_block, is_own)
      -> (dq, dk, dv)`, given out and logsumexp over all keys.
    join: two results of attend into one, float32.
    first_block: `f(q_block) -> kv_block`, the first that a query of it sees.
    key_slots: the slice of K' that each group reads.
    chunk_tokens, tile_tokens: of attention, of finish; each divides the former.
    keys_on_host: keys and values wait in the host's memory, a block on the device.
    """

    keys_values: Callable[..., tuple[Array, Array]]
    queries: Callable[..., Array]
    back: Callable[[tuple[Array, ...]], Array]
    finish: Callable[..., Array]
    attend: Callable[..., tuple[Array, Array]]
    gradients: Callable[..., tuple[Array, Array, Array]]
    join: Callable[..., tuple[Array, Array]]
    first_block: Callable[[Array], Array | int]
    key_slots: tuple[slice, ...]
    chunk_tokens: int
    tile_tokens: int
    keys_on_host: bool


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
        back = pieces.back(out)

        def one_tile(x, j):
            start = i * pieces.chunk_tokens + j * pieces.tile_tokens
            part = _cut(x, start, pieces.tile_tokens)
            its_out = _cut(back, j * pieces.tile_tokens, pieces.tile_tokens)
            return _write(x, pieces.finish(leaves, part, its_out), start), None

        x, _ = lax.scan(one_tile, x, jnp.arange(_num_tiles(pieces)))
        return x, (back, logsumexps) if keep else None

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
        part, its_angles = _cut((x, angles), start, pieces.chunk_tokens)
        shapes = _group_shapes(pieces, leaves, part, its_angles)
        transposed = jax.linear_transpose(pieces.back, shapes)
        if attended is None:
            qs, outs, logsumexps = _attend_chunk(pieces, leaves, x, angles, keys, i)
            back = pieces.back(outs)
        else:
            back = _cut(attended[0], start, pieces.chunk_tokens)
            qs, (outs,) = None, transposed(back)

        def one_tile(carry, j):
            dx, dback, sums = carry
            first = j * pieces.tile_tokens
            tile, dy = _cut((x, dx), start + first, pieces.tile_tokens)
            out = _cut(back, first, pieces.tile_tokens)
            _, pull = jax.vjp(pieces.finish, leaves, tile, out)
            dleaves, dtile, dout = pull(dy)
            dx, dback = _write(dx, dtile, start + first), _write(dback, dout, first)
            return (dx, dback, _add(sums, dleaves)), None

        (dx, dback, sums), _ = lax.scan(
            one_tile, (dx, jnp.zeros_like(back), sums), jnp.arange(_num_tiles(pieces))
        )
        (douts,) = transposed(dback)
        dpart = _cut(dx, start, pieces.chunk_tokens)
        for g in range(len(pieces.key_slots)):
            q, pull = jax.vjp(
                lambda leaves, x, g=g: pieces.queries(leaves, x, its_angles, g),
                leaves,
                part,
            )
            q = q if qs is None else qs[g]  # not to exchange it again
            given = (outs[g], logsumexps[g], douts[g])
            dq, dkeys = _pull(pieces, q, keys, *given, dkeys, i, g)
            dleaves, more = pull(dq)
            dpart, sums = dpart + more, _add(sums, dleaves)
        return (_write(dx, dpart, start), dkeys, sums), None

    def keys_of_chunk(carry, inputs):
        dx, sums = carry
        i, (dk, dv) = inputs
        start = i * pieces.chunk_tokens
        part, its_angles, dpart = _cut((x, angles, dx), start, pieces.chunk_tokens)
        (k, v), pull = jax.vjp(
            lambda leaves, x: pieces.keys_values(leaves, x, its_angles), leaves, part
        )
        dleaves, more = pull((dk.astype(k.dtype), dv.astype(v.dtype)))
        return (_write(dx, dpart + more, start), _add(sums, dleaves)), None

    numbers = jnp.arange(_num_chunks(pieces, x))
    logsumexps = None if attended is None else attended[1]
    (dx, dkeys, sums), _ = lax.scan(
        queries_of_chunk, (dy, dkeys, sums), (numbers, logsumexps)
    )
    (dx, sums), _ = lax.scan(keys_of_chunk, (dx, sums), (numbers, dkeys))
    return dx, sums


def _num_chunks(pieces: Pieces, x: Array) -> int:
    return x.shape[1] // pieces.chunk_tokens


def _num_tiles(pieces: Pieces) -> int:
    return pieces.chunk_tokens // pieces.tile_tokens


def _cut(tree: Tree, start: Array, size: int) -> Tree:
    """Tokens of local arrays `[B, T, ...]`."""
    return jax.tree.map(
        lambda a: lax.dynamic_slice_in_dim(a, start, size, axis=1), tree
    )


def _write(whole: Array, part: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)


def _group_shapes(pieces, leaves, part, angles) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(
        jax.eval_shape(lambda g=g: pieces.queries(leaves, part, angles, g))
        for g in range(len(pieces.key_slots))
    )


def _keys_values(pieces, leaves, x, angles) -> tuple[Array, Array]:
    """All keys and values, `[c, P, B, t, K', H]`, made chunk by chunk."""

    def one_chunk(_, i):
        part = _cut((x, angles), i * pieces.chunk_tokens, pieces.chunk_tokens)
        keys = pieces.keys_values(leaves, *part)
        if pieces.keys_on_host:
            keys = jax.device_put(keys, jax.memory.Space.Host)
        return None, keys

    return lax.scan(one_chunk, None, jnp.arange(_num_chunks(pieces, x)))[1]


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


def _attend_chunk(pieces, leaves, x, angles, keys, i):
    """Attention of chunk i: q, out and logsumexp, each a tuple of groups of heads."""
    start = i * pieces.chunk_tokens
    part, its_angles = _cut((x, angles), start, pieces.chunk_tokens)
    groups = []
    for g in range(len(pieces.key_slots)):
        q = pieces.queries(leaves, part, its_angles, g)
        groups.append((q, *_attend(pieces, q, keys, i, g)))
    return tuple(zip(*groups, strict=True))


def _attend(pieces, q, keys, i, g) -> tuple[Array, Array]:
    """Attention of chunk i and group g: out as q, logsumexp `[P, B, n, t]`."""
    number = keys[0].shape[0]

    def one_piece(inputs):
        p, query = inputs
        own = p * number + i
        out, logsumexp = pieces.attend(
            query, *_block(pieces, keys, own, g), own, own, True
        )
        if _is_one_block(keys):
            return out, logsumexp

        def step(joined, k, v, block):
            return pieces.join(joined, pieces.attend(query, k, v, own, block, False))

        out, logsumexp = _over_earlier_blocks(
            pieces, keys, own, g, step, (out.astype(jnp.float32), logsumexp)
        )
        return out.astype(query.dtype), logsumexp

    return lax.map(one_piece, (jnp.arange(q.shape[0]), q))


def _pull(pieces, q, keys, out, logsumexp, dout, dkeys, i, g):
    """dq of chunk i and group g; and dkeys, to which its part has been added."""
    number = keys[0].shape[0]

    def one_piece(dkeys, inputs):
        p, query, its_out, its_logsumexp, its_dout = inputs
        own = p * number + i

        def step(carry, k, v, block, is_own=False):
            dquery, dkeys = carry
            dq, dk, dv = pieces.gradients(
                query, k, v, its_out, its_logsumexp, its_dout, own, block, is_own
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
        return dkeys, dquery.astype(query.dtype)

    dkeys, dq = lax.scan(
        one_piece, dkeys, (jnp.arange(q.shape[0]), q, out, logsumexp, dout)
    )
    return dq, dkeys


def _add(sums: Tree, *others: Tree) -> Tree:
    return jax.tree.map(lambda *each: sum(each[1:], each[0]), sums, *others)
