"""Spans of documents, by the binary digits of their lengths."""

import numpy as np
import pytest

from ulysses_jax.data.decomposition import buckets, spans, spans_of

STREAM = np.array([*range(1, 13), 0, 1, 2, 3, 4, 5, 0, 1, 2, 0])


def by_walk(lengths_of_documents, lengths):
    """Span by span."""
    found, at = [], 0
    for left in lengths_of_documents:
        start = at
        at += left
        while left >= lengths[0]:
            length = max(each for each in lengths if each <= left)
            found.append([start, start + length])
            start, left = start + length, left - length
    return found


def test_a_known_answer():
    expected = [[0, 4], [4, 8], [8, 12], [13, 17], [17, 19], [19, 21]]
    assert spans(STREAM, (2, 4), end_of_document=0).tolist() == expected
    ends = np.array([13, 19, 22])
    assert spans_of(ends, (2, 4)).tolist() == expected
    assert buckets(ends, (2, 4)).num_dropped == 2


def test_a_stream_may_end_within_a_document():
    assert spans(STREAM[:11], (2, 4), 0).tolist() == [[0, 4], [4, 8], [8, 10]]
    assert spans(STREAM[:0], (2, 4), 0).shape == (0, 2)


@pytest.mark.parametrize(
    "lengths", [(1,), (4,), (1, 2, 4, 8, 16), (2, 16), (8, 16, 32)]
)
@pytest.mark.parametrize("seed", range(3))
def test_spans_are_those_of_a_walk_and_in_one_document_each(lengths, seed):
    sizes = np.random.default_rng(seed).integers(1, 75, 100)
    ends = np.cumsum(sizes)
    found = spans_of(ends, lengths)
    assert found.tolist() == by_walk(sizes.tolist(), lengths)
    of = np.searchsorted(ends, found[:, 0], side="right")
    np.testing.assert_array_equal(of, np.searchsorted(ends, found[:, 1] - 1, "right"))
    own = buckets(ends, lengths)
    assert own.num_dropped == sum(n % lengths[0] for n in sizes)
    together = sorted((s, s + n) for n, each in own.starts.items() for s in each)
    assert together == [tuple(span) for span in found.tolist()]
    assert own.num_rows == {n: len(starts) for n, starts in own.starts.items()}


def test_powers_of_2_are_the_binary_digits():
    lengths = tuple(2**k for k in range(8, 14))
    for size in (1, 255, 256, 0b10110111111111, 2**14 + 2**9 + 1):
        own = buckets(np.array([size]), lengths).num_rows
        assert [own[n] for n in lengths[:-1]] == [size >> k & 1 for k in range(8, 13)]
        assert own[2**13] == size >> 13


@pytest.mark.parametrize("lengths", [(), (0, 2), (3,), (4, 2), (2, 2), (-2,)])
def test_lengths_that_are_no_rising_powers_of_2(lengths):
    with pytest.raises(ValueError, match="are not rising powers of 2: use some such"):
        spans(STREAM, lengths, 0)
