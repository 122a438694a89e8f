"""A stream of documents end to end: where its tokens come from."""

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int32, Int64

from ulysses_jax.data.corpus import Document
from ulysses_jax.data.tokenizer import END_OF_DOCUMENT


class Stream(Protocol):
    """What rows are cut from.

    Attributes:
      ends: of each document in the stream, exclusive; none is empty.
    """

    ends: Int64[np.ndarray, "documents"]

    def read(self, first: int, last: int) -> Int32[np.ndarray, "n"]:
        """The stream's tokens [first, last), at the cost of these alone."""
        ...

    def counts(self, first: int, last: int) -> Bool[np.ndarray, "n"] | None:
        """Which of these tokens the loss asks for; None: all."""
        ...


class ByteStream:
    """The bytes of files, each file with END_OF_DOCUMENT after it.

    Attributes:
      documents: in the order of the stream.
    """

    def __init__(self, documents: Sequence[Document]):
        assert documents
        self.documents = list(documents)
        lengths = np.array([each.size + 1 for each in documents], np.int64)
        self.ends = np.cumsum(lengths)
        self._starts = self.ends - lengths

    def read(self, first: int, last: int) -> Int32[np.ndarray, "n"]:
        """Raises ValueError: a file is not as it was when the corpus was opened."""
        tokens = np.empty(last - first, np.int32)
        document = int(np.searchsorted(self.ends, first, side="right"))
        at = first
        while at < last:
            offset = at - int(self._starts[document])
            end = int(self.ends[document])
            count = min(last, end - 1) - at
            if count > 0:
                data = read_bytes(self.documents[document], offset, count)
                tokens[at - first : at - first + count] = np.frombuffer(data, np.uint8)
            if end <= last:
                tokens[end - 1 - first] = END_OF_DOCUMENT
            at, document = end, document + 1
        return tokens

    def counts(self, first: int, last: int) -> None:
        return None


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
