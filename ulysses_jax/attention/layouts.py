"""Layouts for block-sparse attention, by name."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.config import Model


@lru_cache(maxsize=64)
def layout_of(model: Model, num_tokens: int) -> BlockLayout:
    """Of layers of kind sparse, on sequences of `num_tokens`.

    Raises:
      ValueError: they are not whole blocks.
    """
    size = model.sparse_block_tokens
    if num_tokens % size:
        raise ValueError(
            f"model.sparse_block_tokens {size} does not divide {num_tokens} tokens: "
            f"use a sequence of {-(-num_tokens // size) * size}, or blocks of "
            f"{next(n for n in range(size, 0, -1) if num_tokens % n == 0)}"
        )
    options: dict[str, int] = dict(
        block_tokens=size, local_blocks=model.sparse_local_blocks
    )
    if model.sparse != "strided":
        options["global_blocks"] = model.sparse_global_blocks
    if model.sparse == "bigbird":
        options["random_blocks"] = model.sparse_random_blocks
    if model.sparse_by_head:
        options["num_heads"] = model.num_heads
    assert model.sparse
    return _LAYOUTS[model.sparse](num_tokens // size, **options)


def fixed(
    num_blocks: int,
    *,
    block_tokens: int,
    local_blocks: int = 4,
    global_blocks: int = 1,
    causal: bool = True,
    num_heads: int = 1,
) -> BlockLayout:
    """A block sees its own group of `local_blocks`, and the last `global_blocks` of
    every group.

    Args:
      num_heads: above 1, head h sees the last but h of every group instead, in turn.

    Source: "fixed" of Sparse Transformers, arXiv 1904.10509, section 4.2, in blocks.
    """
    _check(
        num_blocks,
        local_blocks=local_blocks,
        global_blocks=global_blocks,
        num_heads=num_heads,
    )
    if local_blocks % global_blocks:
        raise ValueError(
            f"global_blocks {global_blocks} does not divide local_blocks {local_blocks}"
        )
    i, j = _numbers(num_blocks)
    turns = local_blocks // global_blocks
    heads = []
    for head in range(num_heads):
        place = (j % local_blocks) // global_blocks
        is_global = place == turns - 1 - head % turns
        heads.append((i // local_blocks == j // local_blocks) | is_global)
    return _layout(np.stack(heads), block_tokens, causal)


def strided(
    num_blocks: int,
    *,
    block_tokens: int,
    local_blocks: int = 4,
    causal: bool = True,
) -> BlockLayout:
    """A block sees the `local_blocks` that end with it, and every `local_blocks`-th.

    Source: "strided" of Sparse Transformers, arXiv 1904.10509, section 4.2, in blocks.
    """
    _check(num_blocks, local_blocks=local_blocks)
    i, j = _numbers(num_blocks)
    seen = (abs(i - j) < local_blocks) | ((i - j) % local_blocks == 0)
    return _layout(seen, block_tokens, causal)


def longformer(
    num_blocks: int,
    *,
    block_tokens: int,
    local_blocks: int = 4,
    global_blocks: int = 1,
    causal: bool = True,
) -> BlockLayout:
    """A block sees those fewer than `local_blocks` away and the first `global_blocks`,
    which see all that the mask shows them.

    Source: Longformer, arXiv 2004.05150, section 3.1, in blocks.
    """
    _check(num_blocks, local_blocks=local_blocks)
    return _layout(
        _local_and_global(num_blocks, local_blocks, global_blocks), block_tokens, causal
    )


def bigbird(
    num_blocks: int,
    *,
    block_tokens: int,
    local_blocks: int = 4,
    global_blocks: int = 1,
    random_blocks: int = 1,
    causal: bool = True,
    num_heads: int = 1,
    seed: int = 0,
) -> BlockLayout:
    """As `longformer`, and `random_blocks` more a block, of those that the mask shows.

    Args:
      num_heads: above 1, each head has random blocks of its own.

    Source: BigBird, arXiv 2007.14062, section 2 and appendix D.
    """
    _check(num_blocks, local_blocks=local_blocks, num_heads=num_heads)
    base = _local_and_global(num_blocks, local_blocks, global_blocks)
    if causal:
        base = np.tril(base)
    numbers = np.random.default_rng(seed)
    heads = np.repeat(base[None], num_heads, axis=0)
    for head in heads:
        for row, seen in enumerate(head):
            others = np.flatnonzero(~seen[: row + 1 if causal else num_blocks])
            seen[numbers.permutation(others)[:random_blocks]] = True
    return _layout(heads, block_tokens, causal)


def random(
    num_blocks: int, *, block_tokens: int, density: float, seed: int = 0
) -> BlockLayout:
    """A block sees its own and random earlier ones: about `density` of the causal
    pairs. To measure with."""
    _check(num_blocks)
    seen, numbers = np.eye(num_blocks, dtype=bool), np.random.default_rng(seed)
    for row in range(num_blocks):
        # Half of the pairs of its own block are there.
        others = max(round((row + 0.5) * density - 0.5), 0)
        seen[row, numbers.permutation(row)[:others]] = True
    return _layout(seen, block_tokens, causal=True)


_LAYOUTS: dict[str, Callable[..., BlockLayout]] = {
    "fixed": fixed,
    "strided": strided,
    "longformer": longformer,
    "bigbird": bigbird,
}


def _local_and_global(
    num_blocks: int, local_blocks: int, global_blocks: int
) -> np.ndarray:
    i, j = _numbers(num_blocks)
    near = abs(i - j) < local_blocks
    return near | (j < global_blocks) | (i < global_blocks)


def _numbers(num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.arange(num_blocks)
    return numbers[:, None], numbers[None]


def _layout(seen: np.ndarray, block_tokens: int, causal: bool) -> BlockLayout:
    return BlockLayout(np.tril(seen) if causal else seen, block_tokens=block_tokens)


def _check(num_blocks: int, **least: int) -> None:
    for name, number in {"num_blocks": num_blocks, **least}.items():
        if number < 1:
            raise ValueError(f"{name} {number}: use 1 or more")
