"""The strategies by name: which mesh carries each, and what it cannot cut."""

import math
from typing import Literal, get_args

Strategy = Literal["ulysses", "ring", "hybrid", "all_gather", "megatron"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


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


def num_members(strategy: Strategy, ring: int, seq: int) -> int:
    """Members of the axis over which attention goes block by block; 1: no such axis."""
    check_name(strategy)
    if strategy in ("ring", "hybrid"):
        return ring
    return seq if strategy == "all_gather" else 1


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


def shared_out(count: int, what: str, each: int, **degrees: int) -> str:
    """A count and how it came about, as "8 heads / tensor 2 / seq 2 = 2 heads"."""
    over = "".join(f" / {axis} {n}" for axis, n in degrees.items() if n > 1)
    if not over:
        return f"{count} {what}"
    is_exact = each * math.prod(degrees.values()) == count
    return f"{count} {what}{over} = {each} {what}" + (
        "" if is_exact else ", rounded up"
    )
