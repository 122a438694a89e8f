"""Which documents validate, and in which order the others are read: by their names."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Sequence

from ulysses_jax.data.corpus import Document, unreadable

# How far a line's end is looked for from where a file would be cut.
_CUT_BYTES = 2**20


def split(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Parts the documents into (train, validation), by a hash of their names.

    In the order of that hash files validate until they hold the fraction of all bytes.
    The last one is cut at the end of a line, and its own end validates; where no line
    ends near there, the file goes to the part that it leaves nearer to the fraction.
    Both parts have a document; at a fraction of 0 none validates. Neither the order in
    which files are found nor the machine changes anything.

    Raises:
      ValueError: one file cannot be cut.

    Cost: up to 2 MiB are read, of the file that is cut.
    """
    ordered = _by_hash(documents, salt="split")
    if validation_fraction == 0:
        return ordered, []
    total = sum(document.size for document in ordered)
    # The product of a decimal fraction may lie a hair above its whole number.
    wanted = math.ceil(round(validation_fraction * total, 6))
    num = 0
    while num < len(ordered) and ordered[num].size <= wanted:
        wanted -= ordered[num].size
        num += 1
    if num < len(ordered) and wanted > 0:
        crossing = ordered[num]
        cut = _line_start(crossing, crossing.size - wanted)
        if cut is not None:
            kept = dataclasses.replace(crossing, size=cut, after=crossing.size - cut)
            rest = dataclasses.replace(crossing, size=crossing.size - cut, before=cut)
            return [kept, *ordered[num + 1 :]], [*ordered[:num], rest]
        num += 2 * wanted >= crossing.size
    if len(ordered) == 1:
        raise ValueError(
            f"data.files is 1 file ({ordered[0].name}) without a line's end where "
            f"data.validation_fraction {validation_fraction} would cut it: use "
            "data.validation_fraction 0, or give 2 files or more"
        )
    num = min(max(num, 1), len(ordered) - 1)
    return ordered[num:], ordered[:num]


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents in an order that follows from their names and the seed alone."""
    return _by_hash(documents, salt=f"order {seed}")


def fingerprint(documents: Iterable[Document]) -> str:
    """A digest of all names and sizes, in any order: 32 hexadecimal digits.

    A file that was edited and kept its size is not seen.
    """
    digest = hashlib.blake2b(digest_size=16)
    for document in sorted(documents, key=lambda d: os.fsencode(d.name)):
        digest.update(b"%s\0%d\n" % (os.fsencode(document.name), document.size))
    return digest.hexdigest()


def _line_start(document: Document, near: int) -> int | None:
    """Where a line starts inside a file: the first from `near` on, or the last before.

    None: no line starts within `_CUT_BYTES` of it.
    """
    if document.size < 2:
        return None
    low = max(near - _CUT_BYTES, 0)
    try:
        with open(document.path, "rb") as file:
            file.seek(low)
            # Not the last byte: no line starts after it.
            text = file.read(min(near + _CUT_BYTES, document.size - 1) - low)
    except OSError as error:
        raise unreadable(document.path, error) from None
    # A line starts after its predecessor's end, which may be the byte before `near`.
    at = text.find(b"\n", max(near - low - 1, 0))
    if at < 0:
        at = text.rfind(b"\n")
    return None if at < 0 else low + at + 1


def _by_hash(documents: Iterable[Document], *, salt: str) -> list[Document]:
    def place(document: Document) -> bytes:
        return hashlib.blake2b(os.fsencode(f"{salt} {document.name}")).digest()

    return sorted(documents, key=place)
