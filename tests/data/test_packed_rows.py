"""Rows of whole documents against a plain walk over every token."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.ranges import key_ranges
from ulysses_jax.config import Memory, Model
from ulysses_jax.data.packed_rows import PackedRows
from ulysses_jax.data.packing import pack
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training.model import features_and_head, padding_apart


class Held:
    """A stream of tokens that are their own places."""

    def __init__(self, lengths, counts=None):
        self.ends = np.cumsum(lengths)
        self._counts = counts

    def read(self, first, last):
        return np.arange(first, last, dtype=np.int32) + 1

    def counts(self, first, last):
        return None if self._counts is None else self._counts[first:last]


def walk(stream, rows, padded_tokens, mask_documents, counts):
    """All rows, a token at a time."""
    packing = rows.packing
    starts = stream.ends - np.diff(stream.ends, prepend=0)
    found = []
    for number in range(len(rows)):
        row, segment = [], 0
        for piece in range(packing.bounds[number], packing.bounds[number + 1]):
            document, segment = packing.document[piece], segment + 1
            for i in range(packing.first[piece], packing.last[piece]):
                token = starts[document] + i
                is_label = token + 1 < stream.ends[document] and counts[token + 1]
                position = i - packing.first[piece] if mask_documents else len(row)
                label = token + 2 if is_label else IGNORED
                row.append((token + 1, label, position, segment))
        row += [(0, IGNORED, 0, 0)] * (padded_tokens - len(row))
        names = ("tokens", "labels", "positions", "segment_ids")[: 3 + mask_documents]
        columns = [list(map(int, values)) for values in zip(*row, strict=True)]
        found.append(dict(zip(names, columns, strict=False)))
    return found


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("sequence_tokens, all_count", [(1, 1), (7, 0), (16, 1)])
def test_every_range_of_every_row(sequence_tokens, all_count, mask_documents):
    lengths = np.random.default_rng(0).integers(1, 20, 12)
    counts = np.random.default_rng(1).random(lengths.sum()) < (1 if all_count else 0.6)
    stream = Held(lengths, None if all_count else counts)
    rows = PackedRows(stream, sequence_tokens, mask_documents=mask_documents)
    padded = sequence_tokens + 3
    expected = walk(stream, rows, padded, mask_documents, counts)
    assert len(rows) == len(expected) == len(pack(lengths, sequence_tokens))
    for number, row in enumerate(expected):
        for start in range(padded + 1):
            for stop in range(start, padded + 1):
                read = rows.read(number, start, stop)
                assert {n: v.tolist() for n, v in read.items()} == {
                    name: values[start:stop] for name, values in row.items()
                }
                assert all(values.dtype == np.int32 for values in read.values())
    past = rows.read(len(rows), 0, padded)
    assert (past.pop("labels") == IGNORED).all()
    assert all((values == 0).all() for values in past.values())


@pytest.mark.parametrize("kind", [Rows, PackedRows])
def test_every_token_but_a_documents_first_is_a_label_once(kind):
    stream = Held(np.random.default_rng(2).integers(1, 40, 20))
    rows = kind(stream, 16, mask_documents=True)
    read = [rows.read(i, 0, 16) for i in range(len(rows))]
    labels = np.concatenate([each["labels"] for each in read])
    firsts = np.append(0, stream.ends[:-1]) + 1
    expected = np.setdiff1d(np.arange(1, stream.ends[-1] + 1), firsts)
    assert sorted(labels[labels != IGNORED]) == expected.tolist()


@pytest.mark.parametrize("kind", [Rows, PackedRows])
def test_lengths_are_those_of_the_rows_segments(kind):
    stream = Held(np.random.default_rng(3).integers(1, 40, 20))
    masked, whole = (kind(stream, 16, mask_documents=masks) for masks in (True, False))
    for row in range(len(masked) + 1):
        segments = masked.read(row, 0, 16)["segment_ids"]
        counted = np.bincount(segments, minlength=1)[1:]
        assert masked.lengths(row).tolist() == counted.tolist()
        assert whole.lengths(row).sum() == counted.sum()
        assert len(whole.lengths(row)) == (row < len(whole))


def test_the_part_that_is_padding():
    rows = PackedRows(Held([3, 3, 9]), 4, mask_documents=True)
    lengths = [rows.lengths(i).tolist() for i in range(len(rows))]
    assert lengths == [[4], [4], [3], [3, 1]]
    assert rows.padding == 1 / 16


@pytest.mark.parametrize("is_run", [False, True])
def test_padding_sees_padding_alone(is_run):
    """Of a row's padding each token sees all, of documents none; in a run, itself."""
    rows = PackedRows(Held([6, 5, 3, 2]), 8, mask_documents=True)
    batch = [rows.read(i, 0, 10) for i in range(len(rows) + 1)]
    segments, positions = (
        np.stack([read[name] for read in batch])
        for name in ("segment_ids", "positions")
    )
    if is_run:
        segments = padding_apart(segments)
    mask = Mask(
        causal=True,
        q_segment_ids=segments,
        kv_segment_ids=segments,
        q_positions=positions,
        kv_positions=positions,
    )
    ranges = key_ranges(mask, len(batch), 10, 10)
    assert np.asarray(ranges.in_order).all()
    pairs = np.asarray(ranges.stop - ranges.start).sum(axis=1)
    for row, found in enumerate(pairs):
        lengths = rows.lengths(row)
        padding = 10 - lengths.sum()
        expected = padding if is_run else padding**2
        assert found == sum(n * (n + 1) // 2 for n in lengths) + expected


def test_a_run_sets_its_padding_apart(monkeypatch):
    """What a model of a run is given: no token of padding has another's segment."""
    given, features = [], Transformer.features

    def spy(self, tokens, positions, segment_ids, **options):
        given.append(segment_ids)
        return features(self, tokens, positions, segment_ids, **options)

    monkeypatch.setattr(Transformer, "features", spy)
    rows = PackedRows(Held([6, 5, 3, 2]), 8, mask_documents=True)
    read = [rows.read(i, 0, 10) for i in range(len(rows) + 1)]
    batch = {name: jnp.stack([row[name] for row in read]) for name in rows.names}
    config = Model(vocab_size=320, width=16, num_layers=1, num_heads=2)
    model = Transformer(config, rngs=nnx.Rngs(0))
    features_and_head(model, batch, Memory())
    (segments,), before = given, np.asarray(batch["segment_ids"])
    assert (before == 0).sum() > 10
    np.testing.assert_array_equal(segments[before > 0], before[before > 0])
    for found, is_padding in zip(np.asarray(segments), before == 0, strict=True):
        padding = found[is_padding]
        assert len(set(padding.tolist())) == len(padding)
        assert not set(padding) & {0, *found[~is_padding].tolist()}
