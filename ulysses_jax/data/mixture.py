"""Rows of several corpora, each as often as its weight says."""

import hashlib
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int32, Int64

from ulysses_jax.data.rows import Rows


class MixedRows(Rows):
    """The rows of several parts, counted one part after another.

    In training a part is drawn as often as its weight says: of any n rows in a row its
    weight's share of n, to within a row or two; each part's own rows come in epochs,
    each a shuffle, none again before all have come. Rows that validate are each read
    once, the parts' evenly among each other.

    Attributes:
      parts: in the order in which rows are counted.
      weights: a positive number for each, of any sum.
    """

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float]):
        first = parts[0]
        self.parts, self.weights = list(parts), list(weights)
        self.sequence_tokens = first.sequence_tokens
        self.mask_documents = first.mask_documents
        self.names = first.names
        self.num_tokens = sum(part.num_tokens for part in parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def in_order(self) -> Sequence[int]:
        places = [(np.arange(len(part)) + 0.5) / len(part) for part in self.parts]
        return np.argsort(np.concatenate(places), kind="stable").tolist()

    def shuffled(self, seed: int) -> grain.MapDataset[int]:
        drawn = []
        for number, (part, end) in enumerate(zip(self.parts, self._ends, strict=True)):
            its = hashlib.blake2b(b"%d %d" % (seed, number), digest_size=8).digest()
            before = int(end) - len(part)
            own = part.shuffled(int.from_bytes(its))
            drawn.append(own.map(lambda row, before=before: before + row))
        return grain.MapDataset.mix(drawn, self.weights)

    def read(
        self, row: int, start: int, stop: int
    ) -> dict[str, Int32[np.ndarray, "n"]]:
        part, row = self._part_of(row)
        return part.read(row, start, stop)

    def lengths(self, row: int) -> Int64[np.ndarray, "documents"]:
        part, row = self._part_of(row)
        return part.lengths(row)

    def _part_of(self, row: int) -> tuple[Rows, int]:
        """A part and its own number of the row; past the end, past that of the last."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        number = min(number, len(self.parts) - 1)
        part = self.parts[number]
        return part, row - (int(self._ends[number]) - len(part))
