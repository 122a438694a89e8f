"""Zigzag: the order of tokens in which all members of a ring work equally.

And, in that order or the sequence's own, which of the ring's steps see a key.
"""

from typing import Any

import numpy as np
from jaxtyping import Int32


def zigzag_order(num_tokens: int, members: int) -> Int32[np.ndarray, "T"]:
    """The sequence's index of every token of a row in zigzag order."""
    return zigzag_index(np.arange(num_tokens, dtype=np.int32), num_tokens, members)


def zigzag_index(place: Any, num_tokens: int, members: int) -> Any:
    """The sequence's index of the token at a place of a row in zigzag order.

    Args:
      place: an int, or integers of NumPy or JAX: arithmetic alone, so that a program
        computes an order of millions of tokens instead of holding it.
      num_tokens, members: as `zigzag_ranges`.
    """
    if members == 1:
        return place
    half = half_block_tokens(num_tokens, members)
    block, offset = place // half, place % half
    member, is_second = block // 2, block % 2
    block = member + is_second * (2 * members - 1 - 2 * member)
    return block * half + offset


def zigzag_ranges(
    start: int, stop: int, num_tokens: int, members: int
) -> list[tuple[int, int]]:
    """Where tokens [start, stop) of a row in zigzag order stand in the sequence.

    Member r of R holds half-blocks r and 2R - 1 - r of the sequence's 2R: under a
    causal mask all members then have equally many pairs to attend to.

    Args:
      num_tokens: T, a multiple of 2R; of one member, the order is the sequence's own.

    Returns:
      Ranges of the sequence, whose tokens one after the other are those.
    """
    if members == 1:
        return [(start, stop)]
    half = half_block_tokens(num_tokens, members)
    ranges = []
    while start < stop:
        first = zigzag_index(start, num_tokens, members)
        count = min(half - start % half, stop - start)
        ranges.append((first, first + count))
        start += count
    return ranges


def half_block_tokens(num_tokens: int, members: int) -> int:
    """The tokens of one of the 2R half-blocks of zigzag order over R members.

    Raises:
      ValueError: a row is not so many half-blocks of one size.
    """
    if num_tokens % (2 * members):
        more = -(-num_tokens // (2 * members)) * 2 * members
        raise ValueError(
            f"{num_tokens} tokens are not {2 * members} half-blocks for zigzag order "
            f"over {members} members: pad them to {more}"
        )
    return num_tokens // (2 * members)


def seen_steps(
    num_queries: int,
    num_keys: int,
    members: int,
    *,
    causal: bool,
    window: int | None,
    zigzag: bool,
) -> tuple[int, ...]:
    """The steps of a ring, 1 to R - 1, in which some member's queries see a key.

    In step s, member i of R attends to the keys of member i - s. Where nothing but the
    mask's indices decides what is seen, a window leaves the neighbours of a block: in
    the sequence's own order the members just before (and after, if not causal), in
    zigzag order those on both sides.

    Args:
      num_queries, num_keys: global; rounded up to blocks of one size.
    """
    if window is None:
        return tuple(range(1, members))
    member = np.arange(members)[:, None]
    blocks = [member, 2 * members - 1 - member] if zigzag else [member]
    blocks = np.concatenate(blocks, axis=1)

    def ends(num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last token of every block of every member."""
        size = -(-num_tokens // blocks.size)
        return blocks * size, blocks * size + size - 1

    # [query's member, key's member, query's block, key's block]
    q_first, q_last = (x[:, None, :, None] for x in ends(num_queries))
    k_first, k_last = (x[None, :, None, :] for x in ends(num_keys))
    sees = (q_first - k_last < window) & (k_first - q_last < window)
    if causal:
        sees &= k_first <= q_last
    meet = sees.any(axis=(2, 3))
    steps = (member - member.T) % members
    return tuple(int(step) for step in np.unique(steps[meet & (steps > 0)]))
