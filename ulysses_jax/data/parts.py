"""Documents by number: which validate, and in which order the others are read."""

import hashlib
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from ulysses_jax.data.tokens import starts_of


class Pieces(NamedTuple):
    """Of tokens in their source's order: documents, or parts of them."""

    starts: Int64[np.ndarray, "pieces"]
    stops: Int64[np.ndarray, "pieces"]


def parts(
    ends: Int64[np.ndarray, "documents"], validation_fraction: float, seed: int
) -> tuple[Pieces, Pieces | None]:
    """Training's pieces, in the order of the seed, and those that validate.

    In an order by a hash of their numbers documents validate until they hold the
    fraction of all tokens, exactly: the end of the last one does, and what of it is
    before trains. At a fraction of 0 none validates.

    Raises:
      ValueError: there is one token alone.

    Cost: a sort of the documents, and arrays of 8 bytes each of them while it lasts.
    """
    starts, stops = starts_of(ends), ends.copy()
    if validation_fraction == 0:
        order = _by_hash(len(ends), salt=f"order {seed}")
        return Pieces(starts[order], stops[order]), None
    total = int(ends[-1])
    if total < 2:
        raise ValueError(
            f"data.validation_fraction {validation_fraction} of 1 token: use "
            "data.validation_fraction 0, or give more text"
        )
    # The product of a decimal fraction may lie a hair above its whole number.
    wanted = math.ceil(round(validation_fraction * total, 6))
    wanted = min(max(wanted, 1), total - 1)
    order = _by_hash(len(ends), salt="split")
    reached = np.cumsum(stops[order] - starts[order])
    num = int(np.searchsorted(reached, wanted, side="right"))
    whole, rest = order[:num], wanted - (int(reached[num - 1]) if num else 0)
    first, last = starts[whole], stops[whole]
    if rest:
        cut = order[num]
        first = np.append(first, stops[cut] - rest)
        last = np.append(last, stops[cut])
        stops[cut] -= rest
    trains = np.ones(len(ends), bool)
    trains[whole] = False
    order = _by_hash(len(ends), salt=f"order {seed}")
    order = order[trains[order]]
    return Pieces(starts[order], stops[order]), Pieces(first, last)


def _by_hash(num: int, *, salt: str) -> Int64[np.ndarray, "n"]:
    """Numbers below `num` in the order of a hash that no library's version changes."""
    digest = hashlib.blake2b(salt.encode(), digest_size=8).digest()
    keys = np.arange(num, dtype=np.uint64) ^ np.uint64(int.from_bytes(digest))
    return np.argsort(_mixed(keys), kind="stable")


def _mixed(x: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """One to one, and every bit depends on all: the finalizer of SplitMix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
