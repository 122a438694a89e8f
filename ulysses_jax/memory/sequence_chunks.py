"""A layer over chunks of its tokens: nothing but its input and result is ever whole."""

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
    exchange: piece p of chunk i is block `p c + i` of the sequence, of c chunks.

    keys_values: `f(weights, x [B, t, D], angles) -> (k, v)`, each `[P, B, t, K', H]`.
    queries: `f(weights, x, angles) -> [P, B, t, N', H]`.
    back: `f(out [P, B, t, N', H]) -> [B, t, N, H]`, linear.
    finish: `f(weights, x, out [B, t, N, H]) -> [B, t, D]`, the layer's result.
    attend: `f(q, k, v, q_block, kv_block, is_own) -> (out, logsumexp)`, of a piece of
      queries and a block of keys; is_own: the two are one block.
    gradients: `f(q, k, v, out, logsumexp, dout, q_block, kv_block, is_own)
      -> (dq, dk, dv)`, given out and logsumexp over all keys.
    join: two results of attend into one, float32.
    first_block: `f(q_block) -> kv_block`, the first that a query of it sees.
    keys_on_host: keys and values wait in the host's memory, a block on the device.
    """

    keys_values: Callable[..., tuple[Array, Array]]
    queries: Callable[..., Array]
    back: Callable[[Array], Array]
    finish: Callable[..., Array]
    attend: Callable[..., tuple[Array, Array]]
    gradients: Callable[..., tuple[Array, Array, Array]]
    join: Callable[..., tuple[Array, Array]]
    first_block: Callable[[Array], Array | int]
    keys_on_host: bool


Attended = tuple[Float[Array, "B T N H"], Float[Array, "c P B n t"]]


def forward(
    pieces: Pieces,
    weights: Tree,
    x: Float[Array, "B T D"],
    angles: Tree,
    chunk_tokens: int,
    *,
    keep: bool,
) -> tuple[Float[Array, "B T D"], Attended | None]:
    """The layer's result, and attention's out and logsumexp where `keep` says so.

    Args:
      x: local; chunk_tokens divides its tokens.
      angles: a pytree of local arrays `[B, T, ...]`.

    Cost: x, which becomes the result in place; the keys and values of the whole
    sequence (of this device's heads); all else is of one chunk.
    """
    chunks = _Chunks(x, chunk_tokens)
    keys = _keys_values(pieces, weights, x, angles, chunks)

    def one_chunk(x, i):
        part, its_angles = chunks.cut((x, angles), i)
        q = pieces.queries(weights, part, its_angles)
        out, logsumexp = _attend(pieces, q, keys, i)
        out = pieces.back(out)
        x = chunks.write(x, pieces.finish(weights, part, out), i)
        return x, (out, logsumexp) if keep else None

    y, kept = lax.scan(one_chunk, x, jnp.arange(chunks.number))
    if kept is None:
        return y, None
    out, logsumexp = kept
    return y, (chunks.join(out), logsumexp)


def backward(
    pieces: Pieces,
    weights: Tree,
    x: Float[Array, "B T D"],
    angles: Tree,
    attended: Attended | None,
    dy: Float[Array, "B T D"],
    chunk_tokens: int,
) -> tuple[Float[Array, "B T D"], Tree]:
    """dx, and the gradients of the weights over this device's tokens.

    Everything is computed again from x, chunk by chunk; attention too, unless
    `attended` has what `forward` kept.

    Returns:
      `(dx, dweights)`; dweights in the dtypes of weights, in which they are summed.

    Cost: x; dy, which becomes dx in place; keys and values, and their gradients in
    float32, of the whole sequence.
    """
    chunks = _Chunks(x, chunk_tokens)
    keys = _keys_values(pieces, weights, x, angles, chunks)
    dkeys = jax.tree.map(lambda k: jnp.zeros(k.shape, jnp.float32), keys)
    sums = jax.tree.map(jnp.zeros_like, weights)

    def queries_of_chunk(carry, inputs):
        dx, dkeys, sums = carry
        i, logsumexp = inputs
        part, its_angles, dy = chunks.cut((x, angles, dx), i)
        q, pull_queries = jax.vjp(
            lambda w, x: pieces.queries(w, x, its_angles), weights, part
        )
        transposed = jax.linear_transpose(pieces.back, q)
        if attended is None:
            out, logsumexp = _attend(pieces, q, keys, i)
            back = pieces.back(out)
        else:
            back = chunks.cut(attended[0], i)
            (out,) = transposed(back)
        _, pull_finish = jax.vjp(pieces.finish, weights, part, back)
        dweights, dpart, dback = pull_finish(dy)
        (dout,) = transposed(dback)
        dq, dkeys = _pull(pieces, q, keys, out, logsumexp, dout, dkeys, i)
        more, dpart_of_queries = pull_queries(dq)
        dx = chunks.write(dx, dpart + dpart_of_queries, i)
        return (dx, dkeys, _add(sums, dweights, more)), None

    def keys_of_chunk(carry, inputs):
        dx, sums = carry
        i, (dk, dv) = inputs
        part, its_angles, dpart = chunks.cut((x, angles, dx), i)
        (k, v), pull = jax.vjp(
            lambda w, x: pieces.keys_values(w, x, its_angles), weights, part
        )
        dweights, more = pull((dk.astype(k.dtype), dv.astype(v.dtype)))
        return (chunks.write(dx, dpart + more, i), _add(sums, dweights)), None

    numbers = jnp.arange(chunks.number)
    logsumexps = None if attended is None else attended[1]
    (dx, dkeys, sums), _ = lax.scan(
        queries_of_chunk, (dy, dkeys, sums), (numbers, logsumexps)
    )
    (dx, sums), _ = lax.scan(keys_of_chunk, (dx, sums), (numbers, dkeys))
    return dx, sums


class _Chunks(NamedTuple):
    """Cuts dim 1 of local arrays into chunks, and writes them back in place."""

    x: Array
    tokens: int

    @property
    def number(self) -> int:
        return self.x.shape[1] // self.tokens

    def cut(self, tree: Tree, i: Array) -> Tree:
        def one(a):
            return lax.dynamic_slice_in_dim(a, i * self.tokens, self.tokens, axis=1)

        return jax.tree.map(one, tree)

    def write(self, whole: Array, part: Array, i: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(whole, part, i * self.tokens, axis=1)

    def join(self, stacked: Array) -> Array:
        """`[c, B, t, ...] -> [B, T, ...]`."""
        x = jnp.moveaxis(stacked, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])


def _keys_values(pieces, weights, x, angles, chunks) -> tuple[Array, Array]:
    """All keys and values, `[c, P, B, t, K', H]`, made chunk by chunk."""

    def one_chunk(_, i):
        keys = pieces.keys_values(weights, *chunks.cut((x, angles), i))
        if pieces.keys_on_host:
            keys = jax.device_put(keys, jax.memory.Space.Host)
        return None, keys

    return lax.scan(one_chunk, None, jnp.arange(chunks.number))[1]


def _block(pieces, keys, block) -> tuple[Array, Array]:
    """Keys and values of one block of the sequence, on the device."""
    found = jax.tree.map(lambda k: _cut_block(k, block), keys)
    if pieces.keys_on_host:
        found = jax.device_put(found, jax.memory.Space.Device)
    return found


def _cut_block(x: Shaped[Array, "c P ..."], block: Array) -> Shaped[Array, "..."]:
    number = x.shape[0]
    start = (block % number, block // number) + (0,) * (x.ndim - 2)
    return lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))[0, 0]


def _write_block(x: Array, part: Array, block: Array) -> Array:
    number = x.shape[0]
    start = (block % number, block // number) + (0,) * (x.ndim - 2)
    return lax.dynamic_update_slice(x, part[None, None], start)


def _over_earlier_blocks(pieces, keys, q_block, step, start):
    """`step(carry, k, v, block)` over the blocks before a query's own.

    The next block is on its way from the host while one is attended.
    """
    first = pieces.first_block(q_block)

    def body(block, carry):
        carry, (k, v) = carry
        following = _block(pieces, keys, jnp.minimum(block + 1, q_block))
        return step(carry, k, v, block), following

    carry, _ = lax.fori_loop(first, q_block, body, (start, _block(pieces, keys, first)))
    return carry


def _attend(pieces, q, keys, i) -> tuple[Array, Array]:
    """Attention of chunk i: out as q, logsumexp `[P, B, n, t]`."""
    number = keys[0].shape[0]

    def one_piece(inputs):
        p, query = inputs
        own = p * number + i
        out, logsumexp = pieces.attend(
            query, *_block(pieces, keys, own), own, own, True
        )

        def step(joined, k, v, block):
            return pieces.join(joined, pieces.attend(query, k, v, own, block, False))

        out, logsumexp = _over_earlier_blocks(
            pieces, keys, own, step, (out.astype(jnp.float32), logsumexp)
        )
        return out.astype(query.dtype), logsumexp

    return lax.map(one_piece, (jnp.arange(q.shape[0]), q))


def _pull(pieces, q, keys, out, logsumexp, dout, dkeys, i):
    """dq of chunk i; and dkeys, to which its part has been added."""
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
                return _write_block(whole, _cut_block(whole, block) + part, block)

            return dquery + dq, jax.tree.map(add, dkeys, (dk, dv))

        start = step(
            (jnp.zeros(query.shape, jnp.float32), dkeys),
            *_block(pieces, keys, own),
            own,
            is_own=True,
        )
        dquery, dkeys = _over_earlier_blocks(pieces, keys, own, step, start)
        return dkeys, dquery.astype(query.dtype)

    dkeys, dq = lax.scan(
        one_piece, dkeys, (jnp.arange(q.shape[0]), q, out, logsumexp, dout)
    )
    return dq, dkeys


def _add(sums: Tree, *others: Tree) -> Tree:
    return jax.tree.map(lambda *each: sum(each[1:], each[0]), sums, *others)
