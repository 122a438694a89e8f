"""Rows of whole documents, as `data.packing` lays them out."""

import numpy as np
from jaxtyping import Int32, Int64

from ulysses_jax.data.packing import pack
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.stream import Stream


class PackedRows(Rows):
    """As `Rows`, but that each row has whole documents, and padding after them.

    Labels, positions and segment ids are as there; of a document that is longer than a
    row the parts' last tokens have labels too.

    Attributes:
      packing: which pieces of which documents stand in which row.

    Cost: at the start, `pack` on every process; 24 bytes a document and 8 a row.
    """

    def __init__(self, stream: Stream, sequence_tokens: int, *, mask_documents: bool):
        super().__init__(stream, sequence_tokens, mask_documents=mask_documents)
        self.packing = pack(np.diff(stream.ends, prepend=0), sequence_tokens)

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def padding(self) -> float:
        """The part of all rows that is padding."""
        return 1 - self.num_tokens / (len(self) * self.sequence_tokens)

    def lengths(self, row: int) -> Int64[np.ndarray, "documents"]:
        if row >= len(self):
            return np.zeros(0, np.int64)
        here = slice(*self.packing.bounds[row : row + 2])
        sizes = self.packing.last[here] - self.packing.first[here]
        return sizes if self.mask_documents else sizes.sum(keepdims=True)

    def read(
        self, row: int, start: int, stop: int
    ) -> dict[str, Int32[np.ndarray, "n"]]:
        arrays = self._padding(stop - start)
        if row >= len(self):
            return arrays
        packing, at = self.packing, 0
        pieces = range(*packing.bounds[row : row + 2])
        for segment, piece in enumerate(pieces, 1):
            document = int(packing.document[piece])
            end = int(self.stream.ends[document])
            begin = int(self.stream.ends[document - 1]) if document else 0
            first, last = int(packing.first[piece]), int(packing.last[piece])
            low, high = max(start - at, 0), min(stop - at, last - first)
            if low < high:
                here = slice(at + low - start, at + high - start)
                tokens, labels = self._labelled(
                    begin + first + low, begin + first + high, np.array([end])
                )
                arrays["tokens"][here], arrays["labels"][here] = tokens, labels
                positions = np.arange(low, high, dtype=np.int32)
                if self.mask_documents:
                    arrays["segment_ids"][here] = segment
                else:
                    positions += at
                arrays["positions"][here] = positions
            at += last - first
        return arrays
