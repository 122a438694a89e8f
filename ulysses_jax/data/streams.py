"""What a run trains and validates on, as streams: of files, or of tokens by number."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from ulysses_jax.config import Config
from ulysses_jax.data.corpus import Document, find_documents, kind_of
from ulysses_jax.data.ids import data_of, hold
from ulysses_jax.data.parts import parts
from ulysses_jax.data.prepared import PreparedTokens, is_prepared
from ulysses_jax.data.run_tokenizer import digest_of
from ulysses_jax.data.sources import records
from ulysses_jax.data.split import fingerprint, shuffled, split
from ulysses_jax.data.stream import ByteStream, Stream
from ulysses_jax.data.tokenizer import Bytes, Tokenizer
from ulysses_jax.data.tokens import HeldTokens, Tokens, TokenStream


@dataclasses.dataclass(frozen=True)
class Streams:
    """Both parts of a run's data.

    Attributes:
      train, validation: None where none is to be validated on.
      what: a document is called: file, document.
      notes: for whoever starts the run.
      meta: what of the data the batches depend on, as JSON can hold it.
    """

    train: Stream
    validation: Stream | None
    what: str
    notes: list[str]
    meta: dict[str, Any]


def streams_of_text(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    validation_fraction: float,
    seed: int,
) -> Streams:
    """Of text files: read as bytes when they are asked for, or tokenised at once."""
    train, validation = split(documents, validation_fraction)
    notes = [
        f"of {part.name} the last {part.size:,} bytes validate, the {part.before:,} "
        "before them train"
        for part in validation
        if part.before
    ]
    meta = {
        "bytes that validate": sum(part.size for part in validation),
        "number of files": len(documents),
        "bytes": sum(document.size for document in documents),
        "fingerprint": fingerprint([*train, *validation]),
    }
    return Streams(
        stream_of_text(shuffled(train, seed), tokenizer),
        stream_of_text(validation, tokenizer) if validation else None,
        "file",
        notes,
        meta,
    )


def stream_of_text(
    documents: Sequence[Document], tokenizer: Tokenizer, *, ends: bool = True
) -> Stream:
    """Text files in the order given.

    Args:
      ends: whether the ids of a document, where these are no bytes, end with the
        tokenizer's own for it.
    """
    if isinstance(tokenizer, Bytes):
        return ByteStream(documents)
    end = next(iter(tokenizer.ends), None) if ends else None
    return TokenStream(hold(map(data_of, documents), tokenizer, end))


def whole_stream(
    files: str, tokenizer: Tokenizer, text_field: str, *, ends: bool
) -> tuple[Stream, list[str]]:
    """All documents of `data.files`, in their source's order; and what was left out.

    Raises:
      ValueError: nothing that can be read; tokens of another tokenizer.
    """
    path = Path(os.path.expanduser(files))
    if is_prepared(path):
        tokens = PreparedTokens(path)
        if digest_of(tokenizer) != tokens.index["tokenizer"]:
            raise ValueError(
                f"data.files {files} was prepared with another tokenizer "
                f"({tokens.index['tokenizer']}) than the model's "
                f"({digest_of(tokenizer)}): give the files themselves"
            )
        return TokenStream(tokens), []
    documents, notes = find_documents(files)
    if all(kind_of(each.name) == "text" for each in documents):
        return stream_of_text(documents, tokenizer, ends=ends), notes
    held = held_records(documents, tokenizer, text_field, ends=ends)
    return TokenStream(held), notes


def document_ends(config: Config) -> Int64[np.ndarray, "documents"]:
    """Where documents end in the stream of all of them; of text files as bytes.

    Raises:
      ValueError: that is not known without a read of all files.
    """
    files = config.data.files
    path = Path(os.path.expanduser(files))
    if is_prepared(path):
        return PreparedTokens(path).ends
    documents = find_documents(files, config.run.folder).documents
    if not all(kind_of(each.name) == "text" for each in documents):
        raise ValueError(
            f"how long the documents in data.files {files!r} are is not known before "
            "they are read: python -m ulysses_jax.data prepare counts them"
        )
    return ByteStream(documents).ends


def held_records(
    files: Sequence[Document],
    tokenizer: Tokenizer,
    text_field: str,
    *,
    ends: bool = True,
) -> HeldTokens:
    """The documents of files of any kind, tokenised at once."""
    end = next(iter(tokenizer.ends), None) if ends else None
    data = (record.data for record in records(files, text_field))
    return hold(data, tokenizer, end)


def streams_of_tokens(
    tokens: Tokens, validation_fraction: float, seed: int, meta: dict[str, Any]
) -> Streams:
    """Of documents by number (`data.parts`).

    Args:
      meta: what says which tokens they are.
    """
    train, validation = parts(tokens.ends, validation_fraction, seed)
    validates = 0 if validation is None else int((validation[1] - validation[0]).sum())
    meta = meta | {
        "tokens that validate": validates,
        "number of documents": len(tokens.ends),
        "tokens": int(tokens.ends[-1]),
    }
    return Streams(
        TokenStream(tokens, *train),
        None if validation is None else TokenStream(tokens, *validation),
        "document",
        [],
        meta,
    )
