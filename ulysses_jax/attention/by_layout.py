"""Block-sparse attention: any flash attention, called on the tiles of a layout.

A tile is a block of queries and a block of keys; only those that the layout has, and
that documents and positions leave a visible pair, are computed, forward and backward.
What else a mask says holds inside the tiles.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from ulysses_jax.attention.by_tiles import TileList, over_tiles, rows_of, sum_gradients
from ulysses_jax.attention.join import Statistics
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.tiling import HIDDEN

SCOPE = "attention_by_layout"  # which a plan looks for
# A step has at most a tile for so many tokens of a block: to add tiles up costs as
# their number squared, and little beside them.
TOKENS_A_TILE = 16
TOKENS_AT_ONCE = 1024


def statistics_by_layout(
    forward: Callable[..., Statistics],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> Statistics:
    """Float32 out and logsumexp, of which two add up.

    Args:
      forward: `f(q, k, v, mask)` of tiles, a row each, and of a mask without layout.
      tokens_at_once: about as many queries in a call of it.

    Cost: `block_tokens`**2 pairs a tile, and one joining of its results.
    """
    blocks = _Blocks(q, k, mask)
    tiles = blocks.tiles()
    of_q, of_kv = blocks.split(q), (blocks.split(k), blocks.split(v))
    at_once = blocks.at_once(tiles, tokens_at_once)
    shape = len(of_q), blocks.batch, of_q.shape[3], blocks.size
    start = (
        jnp.full(shape, HIDDEN, jnp.float32),  # the highest logit
        jnp.zeros(shape, jnp.float32),  # the sum of exponentials, relative to it
        jnp.zeros(of_q.shape, jnp.float32),  # out, times that sum
    )

    def some_tiles(carry, i, j, is_tile):
        rows = rows_of(of_q, i), *(rows_of(x, j) for x in of_kv)
        part, its = forward(*rows, blocks.mask_of(i, j))
        part = part.astype(jnp.float32).reshape(at_once, *of_q.shape[1:])
        its_highest, its_total = its.reshape(2, at_once, *shape[1:])
        # Tiles of one block of queries are added up first: each then writes the same.
        alike = (i[:, None] == i) & is_tile
        highest, total, out = (x[i] for x in carry)
        new = jnp.where(alike[..., None, None, None], its_highest, HIDDEN).max(axis=1)
        new = jnp.maximum(highest, new)
        weight = jnp.exp(its_highest - new + its_total)
        shrink = jnp.exp(highest - new)
        total = total * shrink + _sum_alike(alike, weight)
        weight, shrink = (jnp.swapaxes(x, 2, 3)[..., None] for x in (weight, shrink))
        out = out * shrink + _sum_alike(alike, weight * part)
        # Where there is no tile, block 0 gets what it has.
        return tuple(
            x.at[i].set(rows) for x, rows in zip(carry, (new, total, out), strict=True)
        )

    with blocks.scope(tiles, at_once):
        highest, total, out = over_tiles(some_tiles, start, tiles, at_once)
    total = jnp.where(total == 0, 1, total)  # of a query without keys
    out = blocks.joined_q(out / jnp.swapaxes(total, 2, 3)[..., None])
    return out, jnp.stack([blocks.joined_rows(x) for x in (highest, jnp.log(total))])


def _sum_alike(alike: Bool[Array, "t u"], x: Float[Array, "u ..."]) -> Array:
    alike = alike.reshape(*alike.shape, *[1] * (x.ndim - 1))
    return jnp.where(alike, x, 0).sum(axis=1)


def gradients_by_layout(
    pull: Callable[..., tuple[Array, Array, Array]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    dout: Float[Array, "B T N H"],
    rows: tuple[Float[Array, "B N T"], ...],
    mask: Mask,
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> tuple[Array, Array, Array]:
    """Float32 dq, dk, dv of these keys.

    Args:
      pull: `f(q, k, v, out, dout, rows, mask) -> (dq, dk, dv)` of tiles, a row each.
      out: over all keys of a query.
      rows: what else there is of every query, such as its logsumexp.
    """
    blocks = _Blocks(q, k, mask)
    tiles = blocks.tiles()

    def pull_tiles(i, j, query, its_out, its_dout, *more):
        *its_rows, key, value = more
        its_rows = tuple(x[..., 0].transpose(0, 2, 1) for x in its_rows)
        its_mask = blocks.mask_of(i, j)
        return pull(query, key, value, its_out, its_dout, its_rows, its_mask)

    of_rows = (blocks.split(x.transpose(0, 2, 1)[..., None]) for x in rows)
    at_once = blocks.at_once(tiles, tokens_at_once)
    with blocks.scope(tiles, at_once):
        dq, dk, dv = sum_gradients(
            pull_tiles,
            (*map(blocks.split, (q, out, dout)), *of_rows),
            (blocks.split(k), blocks.split(v)),
            tiles,
            at_once,
        )
    return blocks.joined_q(dq), blocks.joined_kv(dk), blocks.joined_kv(dv)


class _Blocks:
    """Arrays cut into blocks of the layout, `[blocks, B, block, heads, H]`.

    Where each query head has a layout of its own its blocks are cut by themselves, one
    head after another: a tile is then of one head.
    """

    def __init__(self, q: Array, k: Array, mask: Mask):
        mask.check(q, k)
        assert mask.layout is not None
        self.mask, self.layout = mask, mask.layout
        self.size = self.layout.block_tokens
        self.batch, num_q, self.num_heads, _ = q.shape
        self.num_kv_heads = k.shape[2]
        self.by_head = self.layout.num_heads > 1
        self.num_q, self.num_kv = num_q // self.size, k.shape[1] // self.size

    def split(self, x: Float[Array, "B T N H"]) -> Shaped[Array, "blocks B block n H"]:
        batch, tokens, heads, size = x.shape
        x = x.reshape(batch, -1, self.size, heads, size)
        x = jnp.moveaxis(x, 1, 0)
        if self.by_head:
            x = jnp.moveaxis(x, 3, 0)[..., None, :]
            x = x.reshape(-1, *x.shape[2:])
        return x

    def joined_q(self, x: Array) -> Float[Array, "B T N H"]:
        return self._joined(x, self.num_heads)

    def joined_kv(self, x: Array) -> Float[Array, "B S K H"]:
        return self._joined(x, self.num_kv_heads)

    def joined_rows(self, x: Float[Array, "blocks B n block"]) -> Float[Array, "B N T"]:
        x = self._joined(jnp.swapaxes(x, 2, 3)[..., None], self.num_heads)
        return x[..., 0].transpose(0, 2, 1)

    def mask_of(self, i: Array, j: Array) -> Mask:
        return self.mask.of_tiles(i % self.num_q, j % self.num_kv, self.batch)

    def at_once(self, tiles: TileList, tokens: int) -> int:
        """How many tiles in a step."""
        most = min(tokens // self.size, self.size // TOKENS_A_TILE, len(tiles.q))
        return max(1, most)

    def scope(self, tiles: TileList, at_once: int):
        """Tells a plan how many steps there would be, in the mean of all parts of a
        sequence, if nothing but the layout hid tiles."""
        if isinstance(tiles.number, int):
            return jax.named_scope(SCOPE)
        _, all_q, all_kv = self.layout.blocks.shape
        here = len(tiles.q) * self.num_q * self.num_kv / (all_q * all_kv)
        steps = math.ceil(here / at_once)
        return jax.named_scope(f"{SCOPE}/{steps}_steps_of_{self.batch}_rows")

    def tiles(self) -> TileList:
        """Those that are here and may hold a visible pair, as numbers of blocks.

        Where all tokens and heads are here, in order, and there are no documents, their
        number is known.
        """
        mask = self.mask
        heads, q_blocks, kv_blocks = mask.places
        by_index = q_blocks is None and mask.q_positions is None
        lists = self.layout.tiles(
            causal=mask.causal and by_index, window=mask.window if by_index else None
        )
        longest = max(map(len, lists))
        table: Any = np.full((len(lists), longest, 2), -1, np.int32)
        for row, each in zip(table, lists, strict=True):
            row[: len(each)] = each
        if heads is not None and self.by_head:
            table = jnp.asarray(table)[heads]
        q, kv = table[..., 0], table[..., 1]
        if q_blocks is not None and kv_blocks is not None:
            _, all_q, all_kv = self.layout.blocks.shape
            q, kv = _here(q, q_blocks[0], all_q), _here(kv, kv_blocks[0], all_kv)
        is_here = (q >= 0) & (kv >= 0)
        is_known = by_index and mask.q_segment_ids is None
        if not is_known:
            bounds = mask.block_bounds(self.size, self.size)
            is_here = is_here & bounds.tiles(q, kv)
        if self.by_head:
            head = np.arange(len(table))[:, None]
            group = self.num_heads // self.num_kv_heads
            q, kv = head * self.num_q + q, head // group * self.num_kv + kv
        if isinstance(is_here, np.ndarray):
            q, kv = (jnp.asarray(x[is_here], jnp.int32) for x in (q, kv))
            return TileList(q, kv, len(q))
        q, kv, is_here = (jnp.asarray(x).reshape(-1) for x in (q, kv, is_here))
        if is_known:  # of these heads some have fewer than the longest
            return TileList(jnp.where(is_here, q, -1), kv, len(q))
        order = jnp.argsort(~is_here, stable=True)
        return TileList(q[order], kv[order], is_here.sum())

    def _joined(self, x: Array, num_heads: int) -> Array:
        if self.by_head:
            x = x[..., 0, :].reshape(num_heads, -1, *x.shape[1:3], x.shape[-1])
            x = jnp.moveaxis(x, 0, 3)
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])


def _here(numbers: Any, places: Array, number: int) -> Array:
    """Where each of the layout's blocks is; -1: not here."""
    where = jnp.full(number, -1, jnp.int32)
    where = where.at[places].set(jnp.arange(len(places), dtype=jnp.int32))
    return jnp.where(numbers >= 0, where[numbers], -1)
