"""Rows cut out of a stream of documents: any part is read at its own cost."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from ulysses_jax.data.corpus import Document
from ulysses_jax.data.tokenizer import END_OF_DOCUMENT, IGNORED


class Rows:
    """The documents end to end, each with END_OF_DOCUMENT after it, cut into rows.

    Row i is the stream's tokens [i T, (i + 1) T). Nothing is dropped: the last row may
    end in padding, and rows past the end are padding throughout.

    Attributes:
      documents: in the order of the stream.
      sequence_tokens: T, before a row is padded to the mesh.
      mask_documents: whether rows have segment ids, and positions restart at documents.
      names: of the arrays that `read` returns.
      num_tokens: of the whole stream.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        sequence_tokens: int,
        *,
        mask_documents: bool,
    ):
        assert documents and sequence_tokens > 0
        self.documents = list(documents)
        self.sequence_tokens = sequence_tokens
        self.mask_documents = mask_documents
        self.names = ("tokens", "labels", "positions")
        if mask_documents:
            self.names += ("segment_ids",)
        lengths = np.array([self._length(each) for each in documents], np.int64)
        self._ends = np.cumsum(lengths)  # of each document in the stream, exclusive
        self._starts = self._ends - lengths
        self.num_tokens = int(self._ends[-1])

    def __len__(self) -> int:
        return math.ceil(self.num_tokens / self.sequence_tokens)

    def read(
        self, row: int, start: int, stop: int
    ) -> dict[str, Int32[np.ndarray, "n"]]:
        """Tokens [start, stop) of a row; equal to that slice of the whole row.

        Args:
          row: its number; past the end of the stream all is padding.
          start, stop: may reach past T, where a row is padded to the mesh.

        Returns:
          int32 arrays of stop - start elements by name:
          tokens: bytes, END_OF_DOCUMENT, or 0 in padding.
          labels: the next token of the same document, also where the next row holds
            it; IGNORED at END_OF_DOCUMENT and in padding.
          positions: from 0 at the row's start and, if documents are masked, at the
            start of each document; 0 in padding.
          segment_ids (if documents are masked): 1, 2, ... by document, from the row's
            start; 0 in padding.

        Raises:
          ValueError: a file is not as it was when the corpus was opened.

        Cost: reads the range's own bytes, and one more where the last label needs it.
        """
        row_start = row * self.sequence_tokens
        row_stop = min(row_start + self.sequence_tokens, self.num_tokens)
        first = row_start + start
        last = max(first, min(row_start + stop, row_stop))
        arrays = {name: np.zeros(stop - start, np.int32) for name in self.names}
        arrays["labels"][:] = IGNORED
        if first == last:
            return arrays

        here = slice(0, last - first)
        row_document, low, high = np.searchsorted(
            self._ends, [row_start, first, last - 1], side="right"
        )
        starts = self._starts[low : high + 1]
        ends = self._ends[low : high + 1]

        # One token more, for the last label, if it is of the same document.
        stream = self._tokens(low, first, min(last + 1, int(ends[-1])))
        tokens = stream[here]
        arrays["tokens"][here] = tokens
        arrays["labels"][: len(stream) - 1] = stream[1:]
        arrays["labels"][ends[ends <= last] - 1 - first] = IGNORED

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

    def _length(self, document: Any) -> int:
        """The tokens that it has in the stream."""
        return document.size + 1

    def _tokens(self, document: int, first: int, last: int) -> Int32[np.ndarray, "n"]:
        """The stream's tokens [first, last), of which the first lies in `document`."""
        tokens = np.empty(last - first, np.int32)
        at = first
        while at < last:
            offset = at - int(self._starts[document])
            end = int(self._ends[document])
            count = min(last, end - 1) - at
            if count > 0:
                data = read_bytes(self.documents[document], offset, count)
                tokens[at - first : at - first + count] = np.frombuffer(data, np.uint8)
            if end <= last:
                tokens[end - 1 - first] = END_OF_DOCUMENT
            at, document = end, document + 1
        return tokens


def read_bytes(document: Document, offset: int, count: int) -> bytes:
    """Bytes [offset, offset + count) of a document, which may be a part of a file.

    Raises:
      ValueError: the file has another size than when the corpus was opened, or is gone.
    """
    wanted = document.before + document.size + document.after
    offset += document.before
    try:
        with open(document.path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            parts = []
            # One call may give less than it was asked for, and at most 2 GiB.
            while size == wanted and count > 0:
                part = os.pread(file.fileno(), count, offset)
                if not part:
                    size = offset
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
    except OSError as error:
        raise ValueError(
            f"cannot read {document.path} any more: {error.strerror}: put the file of "
            f"{wanted:,} bytes back, and start the run again"
        ) from None
    if size != wanted:
        raise ValueError(
            f"{document.path} had {wanted:,} bytes when the run started, and "
            f"has {size:,}: put the old file back, and start the run again"
        )
    return parts[0] if len(parts) == 1 else b"".join(parts)
