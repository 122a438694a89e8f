"""Attention's tiles: arrays cut into blocks and joined, and what of a tile is seen."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ulysses_jax.attention.mask import Mask

HIDDEN = -1e30  # a logit that exp turns into 0, and the logsumexp of a row without keys


class Tiling(NamedTuple):
    """How attention is computed: the logits' scale, and tokens of a tile."""

    scale: float
    block_q: int
    block_kv: int

    def of(self, tokens: int) -> "Tiling":
        """For so many queries and keys, in equal parts where these are not small."""

        def fair(most: int) -> int:
            most = min(most, tokens)
            found = next(n for n in range(most, 0, -1) if tokens % n == 0)
            return found if 2 * found > most else most

        return Tiling(self.scale, fair(self.block_q), fair(self.block_kv))


def tiling_of(
    q: Array, k: Array, scale: float | None, block_q: int, block_kv: int
) -> Tiling:
    """Tiles no larger than the arrays are; scale None: H**-0.5."""
    return Tiling(
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        block_q=min(block_q, q.shape[1]),
        block_kv=min(block_kv, k.shape[1]),
    )


class Tiles:
    """Cuts arrays into blocks and joins them; knows which tiles the mask leaves.

    Blocks of queries are `[blocks, B, K, G, block, H]`: the G query heads of a KV head
    are rows of one product with it. Where the last block is not full it is padded, and
    the padding is hidden.
    """

    def __init__(self, tiling: Tiling, q: Array, k: Array, mask: Mask):
        self.tiling = tiling
        self.num_queries, self.num_keys = q.shape[1], k.shape[1]
        self.num_heads, self.num_kv_heads = q.shape[2], k.shape[2]
        self.num_q = math.ceil(self.num_queries / tiling.block_q)
        self.num_kv = math.ceil(self.num_keys / tiling.block_kv)
        # tree.map leaves what is None.
        self.mask = Mask(
            causal=mask.causal,
            window=mask.window,
            q_segment_ids=jax.tree.map(self._pad_q, mask.q_segment_ids),
            kv_segment_ids=jax.tree.map(self._pad_kv, mask.kv_segment_ids),
            q_positions=jax.tree.map(self._pad_q, mask.q_positions),
            kv_positions=jax.tree.map(self._pad_kv, mask.kv_positions),
        )
        self.bounds = self.mask.block_bounds(tiling.block_q, tiling.block_kv)

    def logits(self, query: Array, key: Array, i: Array, j: Array):
        """Scaled float32 logits of tile (i, j), HIDDEN where not seen; and what is."""
        block_q, block_kv = self.tiling.block_q, self.tiling.block_kv
        logits = product("BKGqH,BKsH->BKGqs", query, key) * self.tiling.scale
        seen = self.mask.visible(i * block_q, block_q, j * block_kv, block_kv)
        # Padding sees nothing and is not seen: no query of it may reach dk and dv.
        if self.num_queries % block_q:
            real = i * block_q + jnp.arange(block_q) < self.num_queries
            seen &= real[:, None]
        if self.num_keys % block_kv:
            seen &= j * block_kv + jnp.arange(block_kv) < self.num_keys
        seen = seen[:, None, None]
        return jnp.where(seen, logits, HIDDEN), seen

    def split_q(self, x: Array) -> Array:
        x = self._pad_q(x)
        groups = (self.num_kv_heads, self.num_heads // self.num_kv_heads)
        x = x.reshape(x.shape[0], self.num_q, self.tiling.block_q, *groups, x.shape[-1])
        return x.transpose(1, 0, 3, 4, 2, 5)

    def join_q(self, x: Array) -> Array:
        x = x.transpose(1, 0, 4, 2, 3, 5)
        x = x.reshape(x.shape[0], -1, self.num_heads, x.shape[-1])
        return x[:, : self.num_queries]

    def split_kv(self, x: Array) -> Array:
        x = self._pad_kv(x)
        x = x.reshape(x.shape[0], self.num_kv, self.tiling.block_kv, *x.shape[2:])
        return x.transpose(1, 0, 3, 2, 4)

    def join_kv(self, x: Array) -> Array:
        x = x.transpose(1, 0, 3, 2, 4)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.num_keys]

    def split_rows(self, x: Array) -> Array:
        """`[B, N, T] -> [blocks, B, K, G, block]`."""
        return self.split_q(x.transpose(0, 2, 1)[..., None])[..., 0]

    def join_rows(self, x: Array) -> Array:
        return self.join_q(x[..., None])[..., 0].transpose(0, 2, 1)

    def _pad_q(self, x: Array) -> Array:
        return _pad_tokens(x, self.num_q * self.tiling.block_q)

    def _pad_kv(self, x: Array) -> Array:
        return _pad_tokens(x, self.num_kv * self.tiling.block_kv)


def _pad_tokens(x: Array, size: int) -> Array:
    """Lengthens dim 1 by repeating its last element: blocks' bounds stay tight."""
    if x.shape[1] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, size - x.shape[1])
    return jnp.pad(x, widths, mode="edge")


def product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
