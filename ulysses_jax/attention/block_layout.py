"""Block-sparse attention's layout, as data: which blocks of keys a block of queries
sees."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from jax.errors import TracerArrayConversionError

from ulysses_jax.config import Model


class BlockLayout:
    """A block of queries sees these blocks of keys; what a mask hides of them it hides.

    It is part of the program, as a window is: two of the same content are equal.

    Attributes:
      blocks: bool `[heads, T / block_tokens, S / block_tokens]`; heads is 1 where all
        query heads see alike. Kept on the host; a program has the list of what is True.
      block_tokens: tokens of a block.
    """

    def __init__(self, blocks: Any, *, block_tokens: int):
        """Args:
          blocks: an array of bools, or of 0 and 1, `[T / block_tokens, S /
            block_tokens]`, or with a row a query head in front.
          block_tokens: what a device computes at a time, too: 128 and more keep a GPU's
            tensor cores at work.

        Raises:
          ValueError: another shape or kind; a block of queries that sees nothing.
        """
        if isinstance(block_tokens, bool) or not isinstance(
            block_tokens, int | np.integer
        ):
            raise ValueError(f"block_tokens is a number, not {block_tokens!r}")
        if block_tokens < 1:
            raise ValueError(f"block_tokens {block_tokens}: use 1 or more")
        try:
            given = np.asarray(blocks)
        except TracerArrayConversionError as error:
            raise ValueError(
                "a layout is known before the program is compiled: give a NumPy array"
            ) from error
        except ValueError as error:  # rows of unequal lengths
            raise ValueError(f"a layout is an array of bools: {error}") from None
        if given.ndim not in (2, 3) or 0 in given.shape:
            raise ValueError(
                "a layout is [T / block_tokens, S / block_tokens], or with a row a "
                f"query head in front, not {given.shape}"
            )
        if given.dtype != bool and not np.isin(given, (0, 1)).all():
            raise ValueError(f"a layout is of bools, or 0 and 1, not {given.dtype}")
        self.blocks = given.astype(bool).reshape(-1, *given.shape[-2:])
        self.blocks.setflags(write=False)
        self.block_tokens = int(block_tokens)
        self._digest = hashlib.sha256(
            repr((self.blocks.shape, self.block_tokens)).encode()
            + np.packbits(self.blocks).tobytes()
        ).digest()
        blind = np.argwhere(~self.blocks.any(axis=-1))
        if blind.size:
            raise ValueError(self._told(blind, "no block of keys"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockLayout) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        heads, queries, keys = self.blocks.shape
        of_heads = "" if heads == 1 else f" for each of {heads} heads"
        return (
            f"BlockLayout({queries} x {keys} blocks of {self.block_tokens} "
            f"tokens{of_heads}, {self.blocks.mean():.1%} of them)"
        )

    @property
    def num_heads(self) -> int:
        return self.blocks.shape[0]

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Of queries, and of keys."""
        _, queries, keys = self.blocks.shape
        return queries * self.block_tokens, keys * self.block_tokens

    def density(self, *, causal: bool) -> float:
        """The pairs of tokens that it leaves, of those that a mask by index does."""
        _, queries, keys = self.blocks.shape
        pairs = np.tri(queries, keys) - np.eye(queries, keys) / 2 if causal else 1.0
        everything = np.broadcast_to(pairs, (queries, keys)).sum()
        return float((self.blocks * pairs).sum() / everything / self.num_heads)

    def tiles(
        self, *, causal: bool = False, window: int | None = None
    ) -> tuple[np.ndarray, ...]:
        """Of every head, int32 `[tiles, 2]`: the blocks (queries, keys) to compute.

        Args:
          causal, window: of a mask by index, which empties some of them.

        Raises:
          ValueError: a block of queries sees none of those that the mask shows it.
        """
        return _tiles(self, causal, window)

    def visible(self, heads: Any = slice(None)) -> np.ndarray:
        """bool `[heads, T, S]`."""
        blocks = self.blocks[heads]
        return blocks.repeat(self.block_tokens, 1).repeat(self.block_tokens, 2)

    def check(self, num_heads: int, num_q: int, num_kv: int) -> None:
        """Raises ValueError where it is not of these (global) numbers."""
        if self.num_heads not in (1, num_heads):
            raise ValueError(
                f"the layout is of {self.num_heads} heads, but q has {num_heads}: give "
                f"one for all heads, or {num_heads}"
            )
        if self.num_tokens != (num_q, num_kv):
            _, queries, keys = self.blocks.shape
            raise ValueError(
                f"the layout is of {queries} x {keys} blocks of {self.block_tokens} "
                f"tokens, {self.num_tokens[0]} x {self.num_tokens[1]}, but there are "
                f"{num_q} query and {num_kv} key tokens: it must be of "
                f"{num_q / self.block_tokens:g} x {num_kv / self.block_tokens:g} "
                "blocks, which are whole numbers where block_tokens divides both"
            )

    def _told(self, blind: np.ndarray, what: str) -> str:
        """Args: blind: (head, block of queries) of each that sees nothing."""
        head, row = blind[0]
        of_head = f" of head {head}" if self.num_heads > 1 else ""
        return (
            f"block {row} of the layout's queries{of_head} sees {what}: let each see "
            f"at least one ({len(blind)} see none)"
        )


@lru_cache(maxsize=64)
def _tiles(
    layout: BlockLayout, causal: bool, window: int | None
) -> tuple[np.ndarray, ...]:
    _, queries, keys = layout.blocks.shape
    after = np.arange(queries)[:, None] - np.arange(keys)  # in blocks
    shown = np.ones((queries, keys), bool)
    if causal:
        shown &= after >= 0
    if window is not None:
        between = (np.abs(after) - 1) * layout.block_tokens  # two blocks, or -1
        shown &= np.maximum(between, -1) + 1 < window
    seen = layout.blocks & shown
    # What the mask alone leaves nothing may be blind.
    blind = np.argwhere(~seen.any(axis=-1) & shown.any(axis=-1))
    if blind.size:
        raise ValueError(layout._told(blind, "no block that the mask shows it"))
    return tuple(np.argwhere(head).astype(np.int32) for head in seen)


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
