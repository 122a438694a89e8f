"""Tokens of many documents in their source's order, and a stream of them in another."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64


class Tokens(Protocol):
    """Ids of documents end to end, held in memory or read from a disk.

    Attributes:
      ends: of each document, exclusive; none is empty.
    """

    ends: Int64[np.ndarray, "documents"]

    def ids(self, first: int, last: int) -> Int[np.ndarray, "n"]:
        """Tokens [first, last)."""
        ...

    def counts(self, first: int, last: int) -> Bool[np.ndarray, "n"] | None:
        """Which of them the loss asks for; None: all."""
        ...


class HeldTokens:
    """In memory: 4 bytes a token, and 8 a document.

    Args:
      documents: the ids of each; one without ids is left out.

    Attributes:
      num_empty: how many were.
    """

    def __init__(self, documents: Iterable[Int[np.ndarray, "n"]]):
        held, lengths = bytearray(), []
        for each in documents:
            held += each.astype(np.int32).tobytes()
            lengths.append(len(each))
        self._ids = np.frombuffer(held, np.int32)
        found = np.array(lengths, np.int64)
        self.num_empty = int((found == 0).sum())
        self.ends = np.cumsum(found[found > 0])

    def ids(self, first: int, last: int) -> Int32[np.ndarray, "n"]:
        return self._ids[first:last]

    def counts(self, first: int, last: int) -> None:
        return None


class TokenStream:
    """Pieces of `tokens`, end to end in the order given: a `data.stream.Stream`.

    Args:
      starts, stops: of each piece, a document or a part of one; None: all documents,
        in their own order.
    """

    def __init__(
        self,
        tokens: Tokens,
        starts: Int64[np.ndarray, "pieces"] | None = None,
        stops: Int64[np.ndarray, "pieces"] | None = None,
    ):
        if starts is None or stops is None:
            starts, stops = starts_of(tokens.ends), tokens.ends
        self.ends = np.cumsum(stops - starts)
        self._tokens, self._starts = tokens, starts

    def read(self, first: int, last: int) -> Int32[np.ndarray, "n"]:
        parts = [self._tokens.ids(*part) for part in self._parts(first, last)]
        return np.concatenate(parts, dtype=np.int32)

    def counts(self, first: int, last: int) -> Bool[np.ndarray, "n"] | None:
        parts = [self._tokens.counts(*part) for part in self._parts(first, last)]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if found else None

    def _parts(self, first: int, last: int) -> list[tuple[int, int]]:
        """Where the stream's tokens [first, last) lie in `tokens`."""
        low, high = np.searchsorted(self.ends, [first, last - 1], side="right")
        parts, at = [], first
        for piece in range(low, high + 1) if first < last else ():
            end = int(self.ends[piece])
            begin = int(self.ends[piece - 1]) if piece else 0
            stop, offset = min(end, last), int(self._starts[piece]) - begin
            parts.append((at + offset, stop + offset))
            at = stop
        return parts


def starts_of(ends: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    return np.concatenate([np.zeros(1, np.int64), ends[:-1]])
