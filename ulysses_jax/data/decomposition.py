"""Documents cut into spans of a few lengths, each of one document, in buckets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64

from ulysses_jax.lengths import check_powers


def spans(
    stream: Int[np.ndarray, "tokens"],
    lengths: Sequence[int],
    end_of_document: int,
) -> Int64[np.ndarray, "spans 2"]:
    """Cuts every document into spans of these lengths, the longest first.

    A document ends with its `end_of_document`, which is its own, or where the stream
    does. It gives as many spans of the greatest length as it holds, of what is left as
    many of the next, and so on: where all powers of 2 are there, by the binary digits
    of its length. What is left below the least length is in no span.

    Args:
      lengths: in tokens, powers of 2, rising.

    Returns:
      (start, stop) of each span, in the stream's order.

    Raises:
      ValueError: other lengths.

    Cost: O(tokens).

    Source: Dataset Decomposition, arXiv 2405.13226.
    """
    stream = np.asarray(stream)
    ends = np.flatnonzero(stream == end_of_document) + 1
    if len(stream) and (len(ends) == 0 or ends[-1] != len(stream)):
        ends = np.append(ends, len(stream))
    return spans_of(ends, lengths)


def spans_of(
    ends: Int64[np.ndarray, "documents"], lengths: Sequence[int]
) -> Int64[np.ndarray, "spans 2"]:
    """As `spans`, of documents that end there, exclusive; O(documents + spans)."""
    check_powers(lengths)
    at = np.concatenate([np.zeros(1, np.int64), np.asarray(ends, np.int64)])
    at, left = at[:-1], np.diff(at)
    starts, stops = [], []
    for length in reversed(lengths):
        num = left // length
        first = np.repeat(at, num)
        number = np.arange(len(first)) - np.repeat(np.cumsum(num) - num, num)
        starts.append(first + number * length)
        stops.append(starts[-1] + length)
        at, left = at + num * length, left - num * length
    found = np.stack([np.concatenate(starts), np.concatenate(stops)], axis=1)
    return found[np.argsort(found[:, 0])]


@dataclass(frozen=True)
class Buckets:
    """Spans by their length.

    Attributes:
      starts: of each length's spans, where in the stream they start, rising.
      num_dropped: tokens of the stream that are in no span.
    """

    starts: dict[int, Int64[np.ndarray, "spans"]]
    num_dropped: int

    @property
    def num_rows(self) -> dict[int, int]:
        return {length: len(starts) for length, starts in self.starts.items()}


def buckets(ends: Int64[np.ndarray, "documents"], lengths: Sequence[int]) -> Buckets:
    """The spans of `spans_of`, by length."""
    found = spans_of(ends, lengths)
    sizes = found[:, 1] - found[:, 0]
    num_tokens = int(ends[-1]) if len(ends) else 0
    return Buckets(
        {length: found[sizes == length, 0] for length in lengths},
        num_tokens - int(sizes.sum()),
    )
