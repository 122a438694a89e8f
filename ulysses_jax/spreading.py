"""How a sequence may lie over a mesh: the strategies, what each receives, its order."""

import math
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int32

Strategy = Literal["ulysses", "ring", "hybrid", "all_gather", "megatron"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def received_bytes(
    strategy: Strategy,
    *,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    itemsize: int,
    ring: int,
    seq: int,
    width: int | None = None,
    window: int | None = None,
    zigzag: bool = True,
) -> dict[tuple[str, str], tuple[float, float]]:
    """Bytes that a device receives a layer and row of the batch: the formulas.

    Args:
      tokens: T, global.
      num_heads, num_kv_heads: of one device's part of `tensor`.
      itemsize: e, of the compute dtype.
      ring, seq: the degrees.
      width: D; only megatron sends whole activations, the others heads.
      window, zigzag: of a causal mask and of the order of tokens: what a ring sends.

    Returns:
      By (collective, axis): (forward, backward). With P = ring x seq, S = seq, R =
      ring, K' = K or, where S > K, each KV head repeated to S in all, never beyond N:
      the exchange, `2 (N + K') H (T/P) (S-1)/S e` both ways; a ring's n blocks (R - 1,
      or the `seen_steps` of a window), `2 (K'/S) H (T/R) n e` forward, and
      `2 (K'/S) H (T/R) ((n-1) e + n 4)` backward, with float32 gradients; the gather
      `2 K H T (S-1)/S e` forward, and its float32 gradients backward; megatron's two
      gathers and two scatters of D features, for attention and feed-forward,
      `4 T D (S-1)/S e` both ways.
    """
    check_name(strategy)
    found: dict[tuple[str, str], tuple[float, float]] = {}
    if strategy == "megatron":
        if width is None:
            raise ValueError("megatron sends whole activations: give their width")
        two = 2 * tokens * width * (seq - 1) / seq * itemsize
        return {(k, "seq"): (two, two) for k in ("all-gather", "reduce-scatter")}
    if strategy == "all_gather":
        elements = 2 * num_kv_heads * head_size * tokens * (seq - 1) / seq
        found["all-gather", "seq"] = (elements * itemsize, 0.0)
        found["reduce-scatter", "seq"] = (0.0, elements * 4)
        return found
    kv_slots = min(max(num_kv_heads, seq), num_heads)
    if strategy in ("ulysses", "hybrid"):
        slots = 2 * (num_heads + kv_slots) * head_size
        exchange = slots * tokens / (ring * seq) * (seq - 1) / seq * itemsize
        found["all-to-all", "seq"] = (exchange, exchange)
    if strategy in ("ring", "hybrid"):
        block = 2 * kv_slots / seq * head_size * tokens / ring
        hops = len(
            seen_steps(tokens, tokens, ring, causal=True, window=window, zigzag=zigzag)
        )
        backward = block * (max(hops - 1, 0) * itemsize + hops * 4)
        found["collective-permute", "ring"] = (block * hops * itemsize, backward)
    return found


def total_bytes(received: dict[tuple[str, str], tuple[float, float]]) -> float:
    """Forward and backward together, over all collectives."""
    return sum(forward + backward for forward, backward in received.values())


def check_name(strategy: str) -> None:
    """Raises ValueError for what is no strategy."""
    if strategy not in STRATEGIES:
        names = ", ".join(map(repr, STRATEGIES))
        raise ValueError(f"there is no strategy {strategy!r}: use one of {names}")


def strategy_of(ring: int, seq: int) -> Strategy:
    """What a mesh of these degrees does where nothing else is asked for."""
    if ring > 1:
        return "hybrid" if seq > 1 else "ring"
    return "ulysses"


def check_strategy(strategy: Strategy, ring: int, seq: int) -> None:
    """Refuses a strategy that there is not, or that a mesh does not carry.

    Raises:
      ValueError: with the choices; with the degrees and two meshes that do.
    """
    check_name(strategy)
    if _carries(strategy, ring, seq):
        return
    shards = ring * seq
    fewer = [n for n in range(shards - 1, 0, -1) if shards % n == 0]
    fits = [
        f"ring={r}, seq={num // r}"
        for num in (shards, *fewer, 2 * shards, 4 * shards, 8 * shards)
        for r in range(1, num + 1)
        if num % r == 0 and _carries(strategy, r, num // r)
    ]
    raise ValueError(
        f"strategy {strategy} spreads tokens over {_OVER[strategy]}, but the mesh has "
        f"ring={ring}, seq={seq}: use {fits[0]} or {fits[1]}, or strategy "
        f"{strategy_of(ring, seq)}; data and fsdp share the devices that are left"
    )


_OVER = {
    "ulysses": "seq alone",
    "ring": "ring alone, above 1",
    "hybrid": "ring and seq, both above 1",
    "all_gather": "seq alone, above 1",
    "megatron": "seq alone, above 1",
}


def _carries(strategy: Strategy, ring: int, seq: int) -> bool:
    return {
        "ulysses": ring == 1,
        "ring": ring > 1 and seq == 1,
        "hybrid": ring > 1 and seq > 1,
        "all_gather": ring == 1 and seq > 1,
        "megatron": ring == 1 and seq > 1,
    }[strategy]


def check_split(sizes: dict[str, int], degrees: dict[str, int]) -> None:
    """Refuses a model whose heads and features megatron cannot cut over tensor x seq.

    Args:
      sizes: of the heads, the key/value heads, the feed-forward; by name.
      degrees: the mesh's.

    Raises:
      ValueError: with the numbers and two meshes of as many devices that would do, if
        there are two.
    """
    tensor, seq = degrees["tensor"], degrees["seq"]
    bad = [f"{name} {size}" for name, size in sizes.items() if size % (tensor * seq)]
    if not bad:
        return
    fits = [
        (t, s)
        for t in range(1, tensor + 1)
        for s in range(2, tensor * seq + 1)
        if tensor % t == 0
        and tensor * seq % (t * s) == 0
        and not any(size % (t * s) for size in sizes.values())
    ]
    fits.sort(key=lambda each: (-each[0] * each[1], -each[0]))
    meshes = [
        f"mesh.fsdp {degrees['fsdp'] * tensor * seq // (t * s)}, mesh.seq {s}, "
        f"mesh.tensor {t}"
        for t, s in fits[:2]
    ]
    raise ValueError(
        f"strategy megatron cuts heads and features over mesh.tensor {tensor} x "
        f"mesh.seq {seq}, and {', '.join(bad)} do not divide by {tensor * seq}: use "
        + "; or ".join([*meshes, "strategy ulysses"])
    )


def shared_out(count: int, what: str, each: int, **degrees: int) -> str:
    """A count and how it came about, as "8 heads / tensor 2 / seq 2 = 2 heads"."""
    over = "".join(f" / {axis} {n}" for axis, n in degrees.items() if n > 1)
    if not over:
        return f"{count} {what}"
    is_exact = each * math.prod(degrees.values()) == count
    return f"{count} {what}{over} = {each} {what}" + (
        "" if is_exact else ", rounded up"
    )


def check_head_chunks(
    strategy: Strategy, head_chunks: int, num_kv_heads: int, *, tensor: int, seq: int
) -> None:
    """Refuses groups of heads that would send keys more than once, or not at all.

    Args:
      num_kv_heads: of all devices together.

    Raises:
      ValueError: fewer than one; a strategy by blocks and head_chunks that do not
        divide the key/value heads of a device.
    """
    if head_chunks < 1:
        raise ValueError(f"head_chunks {head_chunks}: use 1 or more")
    if strategy in ("all_gather", "megatron") and head_chunks > 1:
        raise ValueError(
            f"head_chunks {head_chunks} are groups of an exchange, and strategy "
            f"{strategy} exchanges no heads: use head_chunks 1, or strategy ulysses"
        )
    local = -(-num_kv_heads // (tensor * seq))
    if strategy in ("ring", "hybrid") and local % head_chunks:
        fits = [n for n in range(1, local + 1) if local % n == 0]
        raise ValueError(
            f"head_chunks {head_chunks} does not divide what a device has of "
            + shared_out(num_kv_heads, "key/value heads", local, tensor=tensor, seq=seq)
            + f": over ring each key goes round once; use one of {fits}"
        )


def num_members(strategy: Strategy, ring: int, seq: int) -> int:
    """Members of the axis over which attention goes block by block; 1: no such axis."""
    check_name(strategy)
    if strategy in ("ring", "hybrid"):
        return ring
    return seq if strategy == "all_gather" else 1


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


def zigzag_order(num_tokens: int, members: int) -> Int32[np.ndarray, "T"]:
    """The sequence's index of every token of a row in zigzag order."""
    return zigzag_index(np.arange(num_tokens, dtype=np.int32), num_tokens, members)


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
