"""Rows cut out of a stream of documents: any part is read at its own cost."""

import hashlib
import math
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int32, Int64

from ulysses_jax.data.stream import Stream
from ulysses_jax.data.tokenizer import IGNORED


class Rows:
    """A stream of documents, cut into rows.

    Row i is the stream's tokens [i T, (i + 1) T). Nothing is dropped: the last row may
    end in padding, and rows past the end are padding throughout.

    Attributes:
      stream: of the documents' tokens.
      sequence_tokens: T, before a row is padded to the mesh.
      mask_documents: whether rows have segment ids, and positions restart at documents.
      names: of the arrays that `read` returns.
      num_tokens: of the stream, or of its first rows.

    Args:
      most_rows: only the first ones, at most; what follows them is a label alone.
    """

    def __init__(
        self,
        stream: Stream,
        sequence_tokens: int,
        *,
        mask_documents: bool,
        most_rows: int | None = None,
    ):
        assert len(stream.ends) and sequence_tokens > 0
        self.stream = stream
        self.sequence_tokens = sequence_tokens
        self.mask_documents = mask_documents
        self.names = ("tokens", "labels", "positions")
        if mask_documents:
            self.names += ("segment_ids",)
        self.num_tokens = int(stream.ends[-1])
        if most_rows is not None:
            self.num_tokens = min(self.num_tokens, most_rows * sequence_tokens)

    def __len__(self) -> int:
        return math.ceil(self.num_tokens / self.sequence_tokens)

    def in_order(self) -> Sequence[int]:
        """The numbers of all rows, as those that validate are read."""
        return range(len(self))

    def shuffled(self, seed: int) -> grain.MapDataset[int]:
        """Numbers of rows without end: epochs, each a shuffle of all; any is reached at
        no cost.

        Args:
          seed: any integer.
        """
        # 32 bits for grain, which adds the epoch: neighbouring seeds lie apart.
        bits = int.from_bytes(hashlib.blake2b(b"%d" % seed, digest_size=4).digest())
        return grain.MapDataset.range(len(self)).shuffle(bits).repeat()

    def read(
        self, row: int, start: int, stop: int
    ) -> dict[str, Int32[np.ndarray, "n"]]:
        """Tokens [start, stop) of a row; equal to that slice of the whole row.

        Args:
          row: its number; past the end of the stream all is padding.
          start, stop: may reach past T, where a row is padded to the mesh.

        Returns:
          int32 arrays of stop - start elements by name:
          tokens: of the stream, or 0 in padding.
          labels: the next token of the same document, also where the next row holds
            it; IGNORED at a document's last token, before a token that does not
            count, and in padding.
          positions: from 0 at the row's start and, if documents are masked, at the
            start of each document; 0 in padding.
          segment_ids (if documents are masked): 1, 2, ... by document, from the row's
            start; 0 in padding.

        Raises:
          ValueError: a file is not as it was when the corpus was opened.

        Cost: reads the range's own tokens, and one more where the last label needs it.
        """
        row_start = row * self.sequence_tokens
        row_stop = min(row_start + self.sequence_tokens, self.num_tokens)
        first = row_start + start
        last = max(first, min(row_start + stop, row_stop))
        arrays = self._padding(stop - start)
        if first == last:
            return arrays

        here = slice(0, last - first)
        row_document, low, high = np.searchsorted(
            self.stream.ends, [row_start, first, last - 1], side="right"
        )
        ends = self.stream.ends[low : high + 1]
        before = self.stream.ends[low - 1] if low else 0
        starts = np.append(before, ends[:-1])

        arrays["tokens"][here], arrays["labels"][here] = self._labelled(
            first, last, ends
        )
        offsets = np.arange(first - row_start, last - row_start, dtype=np.int32)
        if not self.mask_documents:
            arrays["positions"][here] = offsets
            return arrays
        lengths = np.minimum(ends, last) - np.maximum(starts, first)
        piece_starts = (np.maximum(starts, row_start) - row_start).astype(np.int32)
        arrays["positions"][here] = offsets - np.repeat(piece_starts, lengths)
        segments = np.arange(low, high + 1) - row_document + 1
        arrays["segment_ids"][here] = np.repeat(segments.astype(np.int32), lengths)
        return arrays

    def lengths(self, row: int) -> Int64[np.ndarray, "documents"]:
        """Of the row's documents, in tokens; where they see each other, of all."""
        first = row * self.sequence_tokens
        last = min(first + self.sequence_tokens, self.num_tokens)
        if first >= last:
            return np.zeros(0, np.int64)
        if not self.mask_documents:
            return np.array([last - first])
        low, high = np.searchsorted(self.stream.ends, [first, last - 1], side="right")
        inside = self.stream.ends[low:high]
        return np.diff(np.concatenate([[first], inside, [last]]))

    def _padding(self, num: int) -> dict[str, Int32[np.ndarray, "n"]]:
        arrays = {name: np.zeros(num, np.int32) for name in self.names}
        arrays["labels"][:] = IGNORED
        return arrays

    def _labelled(
        self, first: int, last: int, ends: Int64[np.ndarray, "documents"]
    ) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
        """The stream's tokens [first, last), which are of the documents with these
        ends, and their labels."""
        # One token more, for the last label, if it is of the same document.
        label_stop = min(last + 1, int(ends[-1]))
        tokens = self.stream.read(first, label_stop)
        following = tokens[1:]
        counts = self.stream.counts(first + 1, label_stop)
        if counts is not None:
            following = np.where(counts, following, IGNORED)
        labels = np.full(last - first, IGNORED, np.int32)
        labels[: len(following)] = following
        labels[ends[ends <= last] - 1 - first] = IGNORED
        return tokens[: last - first], labels
