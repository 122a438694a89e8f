"""Tiles and pieces of a device's tokens, and a loop over them, so that wide
intermediates stay small."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Shaped


def over_tiles(
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    sums: Any,
    tokens: Any,
    outputs: Any,
    *,
    tile_tokens: int,
) -> tuple[Any, Any]:
    """Runs `sums, new = body(sums, tile, old)` on one tile of tokens after another.

    Tiles are cut from `tokens` and `outputs`, and what they become is written over
    `outputs` in place: no padded or stacked copy of either exists, and outputs that
    start as the input which they replace take no memory of their own. Where the tile
    does not divide the tokens, the last and smaller one runs after the loop.

    Args:
      body: on local arrays of at most `tile_tokens` rows; `old` are the tile's rows of
        `outputs`, `new` as they.
      sums: what tiles add to.
      tokens: a pytree of local arrays `[num_tokens, ...]`, only read.
      outputs: a pytree of local arrays `[num_tokens, ...]` to write over.
      tile_tokens: rows of a tile; more than there are is all of them.

    Returns:
      `(sums, outputs)`.
    """
    num_tokens = jax.tree.leaves((tokens, outputs))[0].shape[0]
    tile_tokens = min(tile_tokens, num_tokens)
    num_tiles, rest = divmod(num_tokens, tile_tokens)

    def run(start: int | Array, size: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, outputs = carry

        def cut(x: Shaped[Array, "T ..."]) -> Shaped[Array, "t ..."]:
            return lax.dynamic_slice_in_dim(x, start, size)

        def write(whole: Shaped[Array, "T ..."], part: Shaped[Array, "t ..."]) -> Array:
            return lax.dynamic_update_slice_in_dim(whole, part, start, 0)

        old = jax.tree.map(cut, outputs)
        sums, new = body(sums, jax.tree.map(cut, tokens), old)
        return sums, jax.tree.map(write, outputs, new)

    def one_tile(carry: tuple[Any, Any], i: Array) -> tuple[tuple[Any, Any], None]:
        return run(i * tile_tokens, tile_tokens, carry), None

    # scan, not fori_loop: its trip count stands in the program.
    carry, _ = lax.scan(one_tile, (sums, outputs), jax.numpy.arange(num_tiles))
    return run(num_tiles * tile_tokens, rest, carry) if rest else carry


def over_row_tiles(
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    sums: Any,
    tokens: Any,
    outputs: Any,
    *,
    tile_tokens: int,
) -> tuple[Any, Any]:
    """`over_tiles` of local arrays `[B, t, ...]`, of all rows together: `[1, n, ...]`
    a tile."""

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def one_tile(sums: Any, tokens: Any, old: Any) -> tuple[Any, Any]:
        sums, new = body(sums, *jax.tree.map(lambda x: x[None], (tokens, old)))
        return sums, jax.tree.map(lambda x: x[0], new)

    sums, new = over_tiles(
        one_tile, sums, flat(tokens), flat(outputs), tile_tokens=tile_tokens
    )
    return sums, jax.tree.map(lambda x, like: x.reshape(like.shape), new, outputs)


def cut(tree: Any, start: Array, size: int) -> Any:
    """Tokens of local arrays `[B, T, ...]`."""
    return jax.tree.map(
        lambda a: lax.dynamic_slice_in_dim(a, start, size, axis=1), tree
    )


def write(whole: Array, part: Array, start: Array) -> Array:
    """Over tokens of a local array `[B, T, ...]`."""
    return lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)


def add(sums: Any, *others: Any) -> Any:
    return jax.tree.map(lambda *each: sum(each[1:], each[0]), sums, *others)
