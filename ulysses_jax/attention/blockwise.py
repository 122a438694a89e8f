"""Flash attention in plain JAX: tiles of [queries, keys], O(T) memory, any mask."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ulysses_jax.attention.by_layout import gradients_by_layout, statistics_by_layout
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import Parts, attention_of
from ulysses_jax.attention.tiling import HIDDEN, Tiles, Tiling, product, tiling_of

SCOPE = "attention_blockwise"  # which a plan looks for


def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float | None = None,
    block_q: int = 256,
    block_kv: int = 512,
) -> Float[Array, "B T N H"]:
    """Attention in tiles, with an online softmax, exact forward and backward.

    Args:
      q, k, v: local arrays, float32 or bfloat16; query head n reads KV head n // (N/K),
        and keys are not repeated for it.
      mask: which keys a query sees. Tiles that its bounds show to be empty are not
        computed, forward or backward.
      scale: None is H**-0.5.
      block_q, block_kv: tokens of a tile; any T and S work.

    Returns:
      `[B, T, N, H]` in q's dtype; a query that sees no key gives 0, and gradient 0.

    Softmax and accumulators are float32, products are in q's dtype. Keeps out and
    logsumexp for the backward pass, under the names "attention_out" and
    "attention_logsumexp" for rematerialisation policies. Memory is O(T + S); FLOPs are
    2 products a tile forward and 5 backward.

    Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.
    """
    tiles = dict(block_q=block_q, block_kv=block_kv)
    parts = Parts(
        partial(blockwise_statistics, **tiles), partial(blockwise_gradients, **tiles)
    )
    return attention_of(parts)(q, k, v, mask=mask, scale=scale)


def blockwise_statistics(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float | None = None,
    block_q: int = 256,
    block_kv: int = 512,
) -> tuple[Float[Array, "B T N H"], Float[Array, "2 B N T"]]:
    """`blockwise_attention` and the float32 logsumexp of every query's logits.

    It is two that add up to it, the greatest logit and the logarithm of the sum
    relative to that: as one number it loses the digits of the second where the first is
    large. Of a query that sees no key it is `HIDDEN`.
    """
    mask.check(q, k)
    tiling = tiling_of(q, k, scale, block_q, block_kv)
    with jax.named_scope(f"{SCOPE}/forward"):
        return _statistics(tiling, q, k, v, jax.tree.map(jnp.asarray, mask))


def blockwise_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    logsumexp: Float[Array, "B N T"],
    dout: Float[Array, "B T N H"],
    *,
    mask: Mask,
    scale: float | None = None,
    block_q: int = 256,
    block_kv: int = 512,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv of these keys, given out and logsumexp over all keys of a query.

    In float32: they are summed over parts before they are rounded.
    """
    tiling = tiling_of(q, k, scale, block_q, block_kv)
    mask = jax.tree.map(jnp.asarray, mask)
    with jax.named_scope(f"{SCOPE}/backward"):
        return _gradients(tiling, q, k, v, out, logsumexp, dout, mask)


def _statistics(tiling: Tiling, q, k, v, mask):
    if mask.layout is not None:
        forward = partial(_statistics, tiling.of(mask.layout.block_tokens))
        out, logsumexp = statistics_by_layout(forward, q, k, v, mask)
        return out.astype(q.dtype), logsumexp
    tiles = Tiles(tiling, q, k, mask)
    queries, keys, values = tiles.split_q(q), tiles.split_kv(k), tiles.split_kv(v)

    def one_block_of_queries(_, inputs):
        i, query = inputs

        def one_tile(step, carry):
            highest, total, out = carry
            j = order[step]
            logits, seen = tiles.logits(query, keys[j], i, j)
            new_highest = jnp.maximum(highest, logits.max(axis=-1))
            weights = jnp.where(seen, jnp.exp(logits - new_highest[..., None]), 0)
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + weights.sum(axis=-1)
            out = out * shrink[..., None] + product(
                "BKGqs,BKsH->BKGqH", weights.astype(v.dtype), values[j]
            )
            return new_highest, total, out

        order, count = _nonempty(tiles.bounds.tiles(i, jnp.arange(tiles.num_kv)))
        start = (
            jnp.full(query.shape[:-1], HIDDEN, jnp.float32),
            jnp.zeros(query.shape[:-1], jnp.float32),
            jnp.zeros(query.shape, jnp.float32),
        )
        start = jax.tree.map(partial(_vary_like, q), start)
        highest, total, out = lax.fori_loop(0, count, one_tile, start)
        total = jnp.where(total == 0, 1, total)  # of a row without keys
        out = (out / total[..., None]).astype(q.dtype)
        return None, (out, highest, jnp.log(total))

    blocks = jnp.arange(tiles.num_q)
    _, (out, *logsumexp) = lax.scan(one_block_of_queries, None, (blocks, queries))
    return tiles.join_q(out), jnp.stack([tiles.join_rows(x) for x in logsumexp])


def _gradients(tiling: Tiling, q, k, v, out, logsumexp, dout, mask):
    if mask.layout is not None:
        tiling = tiling.of(mask.layout.block_tokens)

        def pull(q, k, v, out, dout, rows, mask):
            (logsumexp,) = rows
            return _gradients(tiling, q, k, v, out, logsumexp, dout, mask)

        return gradients_by_layout(pull, q, k, v, out, dout, (logsumexp,), mask)
    tiles = Tiles(tiling, q, k, mask)
    # The part of d(logits) that is the same for all keys of a query.
    shared = jnp.einsum("BTNH,BTNH->BNT", dout, out, preferred_element_type=jnp.float32)
    shared, logsumexp = map(tiles.split_rows, (shared, logsumexp))
    queries, douts = tiles.split_q(q), tiles.split_q(dout)
    keys, values = tiles.split_kv(k), tiles.split_kv(v)

    def one_block_of_keys(dqueries, inputs):
        j, key, value = inputs

        def one_tile(step, carry):
            dqueries, dkey, dvalue = carry
            i = order[step]
            query, dblock = queries[i], douts[i]
            logits, seen = tiles.logits(query, key, i, j)
            weights = jnp.where(seen, jnp.exp(logits - logsumexp[i][..., None]), 0)
            # Sums over queries come out as [H, keys]: no [queries, keys] is transposed.
            dvalue += product("BKGqH,BKGqs->BKHs", dblock, weights.astype(dblock.dtype))
            dweights = product("BKGqH,BKsH->BKGqs", dblock, value)
            dlogits = weights * (dweights - shared[i][..., None]) * tiling.scale
            dlogits = dlogits.astype(query.dtype)
            dkey += product("BKGqH,BKGqs->BKHs", query, dlogits)
            dquery = dqueries[i] + product("BKGqs,BKsH->BKGqH", dlogits, key)
            dqueries = lax.dynamic_update_index_in_dim(dqueries, dquery, i, 0)
            return dqueries, dkey, dvalue

        order, count = _nonempty(tiles.bounds.tiles(jnp.arange(tiles.num_q), j))
        zeros = jnp.zeros(jnp.matrix_transpose(key).shape, jnp.float32)
        zeros = _vary_like(q, zeros)
        dqueries, dkey, dvalue = lax.fori_loop(
            0, count, one_tile, (dqueries, zeros, zeros)
        )
        # Else XLA on CPU (jax 0.10.2) folds the transposition into the product of a
        # lone tile, and cannot run what comes out: "BF16 x BF16 = F32".
        dkey, dvalue = lax.optimization_barrier((dkey, dvalue))
        dkey, dvalue = jnp.matrix_transpose(dkey), jnp.matrix_transpose(dvalue)
        return dqueries, (dkey, dvalue)

    dqueries = _vary_like(q, jnp.zeros(queries.shape, jnp.float32))
    blocks = jnp.arange(tiles.num_kv)
    dqueries, (dkeys, dvalues) = lax.scan(
        one_block_of_keys, dqueries, (blocks, keys, values)
    )
    return tiles.join_q(dqueries), tiles.join_kv(dkeys), tiles.join_kv(dvalues)


def _nonempty(tiles: Array) -> tuple[Array, Array]:
    """The numbers of the tiles to compute, first and in order; and how many."""
    return jnp.argsort(~tiles, stable=True), tiles.sum()


def _vary_like(like: Array, x: Array) -> Array:
    """A loop's start must vary over the shard_map axes that its results vary over."""
    axes = tuple(_varying(like) - _varying(x))
    return lax.pcast(x, axes, to="varying") if axes else x


def _varying(x: Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying
