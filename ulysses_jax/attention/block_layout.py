"""Which blocks of keys a block of queries sees, as data."""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from jax.errors import TracerArrayConversionError


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

    def visible(self) -> np.ndarray:
        """bool `[heads, T, S]`."""
        return self.blocks.repeat(self.block_tokens, 1).repeat(self.block_tokens, 2)

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
