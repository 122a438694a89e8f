"""Documents as a folder's tokenizer has them: their ids, held in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from ulysses_jax.data.corpus import Document
from ulysses_jax.data.rows import Rows, read_bytes
from ulysses_jax.data.tokenizer import Folder


def text_of(document: Document) -> str:
    """A document's text; a letter that is not UTF-8 is its sign."""
    return read_bytes(document, 0, document.size).decode(errors="replace")


class IdRows(Rows):
    """As `Rows`, of documents that end where their ids do, or with an id that ends
    them.

    Args:
      end: added to each document that does not end with it; None: nothing is.

    Cost: the text is tokenised at once, and 4 bytes a token are held.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        sequence_tokens: int,
        tokenizer: Folder,
        *,
        mask_documents: bool,
        end: int | None = None,
    ):
        self._ids = []
        for each in documents:
            ids = tokenizer.encode(text_of(each))
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
            if ids:
                self._ids.append(np.array(ids, np.int32))
        if not self._ids:
            raise ValueError(
                f"the tokenizer makes no token of {len(documents)} files: give others"
            )
        kept: Any = self._ids
        super().__init__(kept, sequence_tokens, mask_documents=mask_documents)

    def _length(self, document: Any) -> int:
        return document.size

    def _tokens(self, document: int, first: int, last: int) -> Int32[np.ndarray, "n"]:
        start, stop = int(self._starts[document]), document + 1
        while self._ends[stop - 1] < last:
            stop += 1
        ids = np.concatenate(self._ids[document:stop])
        return ids[first - start : last - start]
