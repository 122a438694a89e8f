"""Every token stands in one row; rows are as full as documents let them be."""

import numpy as np
import pytest

from ulysses_jax.data.packing import pack


def pieces_of(packing, row):
    here = slice(packing.bounds[row], packing.bounds[row + 1])
    return list(
        zip(
            packing.document[here].tolist(),
            packing.first[here].tolist(),
            packing.last[here].tolist(),
            strict=True,
        )
    )


def rooms_of_best_fit(sizes, room):
    """Best fit, by looking at every row."""
    rooms, rows = [], []
    for size in sizes:
        fits = [(left, row) for row, left in enumerate(rooms) if left >= size]
        if fits:
            _, row = min(fits)
        else:
            row = len(rooms)
            rooms.append(room)
        rooms[row] -= size
        rows.append(row)
    return sorted(rooms)


@pytest.mark.parametrize("sequence_tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("seed", range(2))
def test_every_token_once_and_documents_whole(sequence_tokens, seed):
    lengths = np.random.default_rng(seed).integers(1, 90, 60)
    packing = pack(lengths, sequence_tokens)
    seen = [np.zeros(n, int) for n in lengths]
    num_pieces = np.zeros(len(lengths), int)
    for row in range(len(packing)):
        held = 0
        for document, first, last in pieces_of(packing, row):
            assert 0 <= first < last
            # A part begins where one of a row's length ends.
            assert first % sequence_tokens == 0
            seen[document][first:last] += 1
            num_pieces[document] += 1
            held += last - first
        assert 0 < held <= sequence_tokens
        assert packing.padding_tokens(sequence_tokens)[row] == sequence_tokens - held
    assert all((each == 1).all() for each in seen)
    assert (num_pieces == -(-lengths // sequence_tokens)).all()
    assert packing.num_split == (lengths > sequence_tokens).sum()


@pytest.mark.parametrize("seed", range(2))
def test_is_best_fit_from_the_longest_on(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, 150)
    packing = pack(lengths, 60)
    expected = rooms_of_best_fit(sorted(lengths.tolist(), reverse=True), 60)
    assert sorted(packing.padding_tokens(60).tolist()) == expected


def test_equal_lengths_go_by_their_order_and_nothing_else_does():
    packing = pack([3, 3, 3, 2, 2, 2], 5)
    rows = [[document for document, _, _ in pieces_of(packing, i)] for i in range(3)]
    assert rows == [[0, 5], [1, 4], [2, 3]]
    again = pack([3, 3, 3, 2, 2, 2], 5)
    assert all(
        (getattr(packing, name) == getattr(again, name)).all()
        for name in ("document", "first", "last", "bounds")
    )


def test_a_long_document_fills_rows_and_its_rest_is_packed():
    packing = pack([11, 2, 1], 4)
    assert [pieces_of(packing, i) for i in range(len(packing))] == [
        [(0, 0, 4)],
        [(0, 4, 8)],
        [(0, 8, 11), (2, 0, 1)],
        [(1, 0, 2)],
    ]
    assert packing.num_split == 1
    # One of exactly a row's length is whole.
    assert pack([4, 8], 4).num_split == 1


def test_documents_as_of_the_web_leave_less_than_2_percent():
    lengths = np.random.default_rng(0).lognormal(6.5, 1.2, 20_000).astype(int) + 1
    for sequence_tokens in (2048, 16384):
        packing = pack(lengths, sequence_tokens)
        padding = packing.padding_tokens(sequence_tokens).sum()
        assert padding < 0.02 * len(packing) * sequence_tokens


@pytest.mark.parametrize("lengths, tokens", [([], 4), ([3, 0], 4), ([3], 0)])
def test_what_cannot_be_packed(lengths, tokens):
    with pytest.raises(ValueError, match="do not fill rows of"):
        pack(lengths, tokens)
