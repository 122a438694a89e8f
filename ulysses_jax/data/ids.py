"""A document's text as ids of its tokenizer."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from ulysses_jax.data.corpus import Document
from ulysses_jax.data.stream import read_bytes
from ulysses_jax.data.tokenizer import Bytes, Tokenizer
from ulysses_jax.data.tokens import HeldTokens


def data_of(document: Document) -> bytes:
    return read_bytes(document, 0, document.size)


def ids_of(data: bytes, tokenizer: Tokenizer, end: int | None) -> Int[np.ndarray, "n"]:
    """Of a text in UTF-8; a letter that is not is its sign, or as bytes itself. No text
    has no ids.

    Args:
      end: added where the ids do not end with it; None: nothing is.
    """
    if not data:
        return np.zeros(0, np.uint16)
    if isinstance(tokenizer, Bytes):
        ids = np.frombuffer(data, np.uint8).astype(np.uint16)
    else:
        ids = np.array(tokenizer.encode(data.decode(errors="replace")), np.uint32)
    if end is None or (len(ids) and ids[-1] == end):
        return ids
    return np.append(ids, np.array(end, ids.dtype))


def hold(data: Iterable[bytes], tokenizer: Tokenizer, end: int | None) -> HeldTokens:
    """Tokenises documents at once, into memory.

    Raises:
      ValueError: none has a token.
    """
    tokens = HeldTokens(ids_of(each, tokenizer, end) for each in data)
    if not len(tokens.ends):
        raise ValueError(
            f"the tokenizer makes no token of {tokens.num_empty} documents: give others"
        )
    return tokens
