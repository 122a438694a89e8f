"""Rows that keep documents whole: each goes where it leaves the least room."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True)
class Packing:
    """Which pieces of which documents stand in which row, by row and place.

    Attributes:
      document, first, last: int64 `[pieces]`: a piece is the document's tokens
        [first, last). Most are whole documents; of one that is longer than a row the
        parts are rows, and what is left.
      bounds: int64 `[rows + 1]`: row i is the pieces bounds[i] to bounds[i + 1], end to
        end, and then padding.
      num_split: documents longer than a row.
    """

    document: Int64[np.ndarray, "pieces"]
    first: Int64[np.ndarray, "pieces"]
    last: Int64[np.ndarray, "pieces"]
    bounds: Int64[np.ndarray, "rows+1"]
    num_split: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def padding_tokens(self, sequence_tokens: int) -> Int64[np.ndarray, "rows"]:
        """Of every row."""
        held = np.add.reduceat(self.last - self.first, self.bounds[:-1])
        return sequence_tokens - held


def pack(
    lengths: Sequence[int] | Int64[np.ndarray, "documents"], sequence_tokens: int
) -> Packing:
    """Packs documents into rows by best fit, the longest first; drops none.

    A document goes into the row in which it leaves the least room, else into a new one.
    One that is longer than a row is split: its parts of a row's length are rows of
    their own, and what is left is packed as a document. All follows from the lengths
    and their order, which between equal ones decides.

    Args:
      lengths: in tokens, each 1 or more.
      sequence_tokens: of a row.

    Cost: a sort, and for each document a bisection in a list of the rooms that rows
    still have, which are fewer than `sequence_tokens`.

    Source: best-fit packing as in arXiv 2404.10830, which also splits first.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) == 0 or lengths.min() < 1 or sequence_tokens < 1:
        raise ValueError(
            f"{len(lengths)} documents of {lengths.min(initial=0)} tokens or more do "
            f"not fill rows of {sequence_tokens}: give documents of 1 token or more"
        )
    whole = lengths // sequence_tokens  # parts that are rows of their own
    rest = lengths - whole * sequence_tokens
    full = np.repeat(np.arange(len(lengths)), whole)
    before = np.repeat(np.cumsum(whole) - whole, whole)
    full_first = (np.arange(len(full)) - before) * sequence_tokens

    order = np.argsort(-rest, kind="stable")
    order = order[: np.count_nonzero(rest)]
    rows = _best_fit(rest[order].tolist(), sequence_tokens)

    document = np.concatenate((full, order))
    first = np.concatenate((full_first, (whole * sequence_tokens)[order]))
    size = np.concatenate((np.full(len(full), sequence_tokens), rest[order]))
    row = np.concatenate((np.arange(len(full)), len(full) + np.array(rows, np.int64)))
    by_row = np.argsort(row, kind="stable")
    num_rows = int(row.max()) + 1
    return Packing(
        document=document[by_row],
        first=first[by_row],
        last=(first + size)[by_row],
        bounds=np.searchsorted(row[by_row], np.arange(num_rows + 1)),
        num_split=int(np.count_nonzero(lengths > sequence_tokens)),
    )


def _best_fit(sizes: list[int], room: int) -> list[int]:
    """The row of each, which come from the largest on."""
    rows: list[int] = []
    rooms: list[int] = []  # those that some row has, each once, rising
    with_room: dict[int, list[int]] = {}
    num_rows = 0
    for size in sizes:
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, left = num_rows, room - size
            num_rows += 1
        else:
            left = rooms[at] - size
            row = with_room[rooms[at]].pop()
            if not with_room[rooms[at]]:
                del with_room[rooms.pop(at)]
        rows.append(row)
        if left:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(row)
    return rows
