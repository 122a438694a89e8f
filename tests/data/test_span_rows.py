"""Rows of several lengths: each of one document, with labels, in a sampler's order."""

import contextlib
import dataclasses
import re

import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from source_cases import write_every_kind

from ulysses_jax import make_mesh
from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Model, Run, Training
from ulysses_jax.data.decomposition import buckets
from ulysses_jax.data.loader import Layout, batches_in_order
from ulysses_jax.data.open import open_data, refuse_other_data
from ulysses_jax.data.span_rows import SpanRows
from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.data.tokens import TokenStream

LENGTHS = (4, 8, 16)
SIZES = [37, 1, 16, 5, 3, 24, 12, 19]


class Coded:
    """Token i of document d is 100 d + i."""

    ends = np.cumsum(SIZES)

    def __init__(self, every=1):
        """Args: every: one in so many tokens counts."""
        self._ids = np.concatenate(
            [100 * d + np.arange(n) for d, n in enumerate(SIZES)]
        )
        self._every = every

    def ids(self, first, last):
        return self._ids[first:last]

    def counts(self, first, last):
        return self._ids[first:last] % self._every == 0 if self._every > 1 else None


def rows_of(tokens):
    stream = TokenStream(tokens)
    found = buckets(stream.ends, LENGTHS)
    return {n: SpanRows(stream, n, starts) for n, starts in found.starts.items()}


@pytest.mark.parametrize("every", [1, 3])
def test_a_row_is_of_one_document_and_its_labels_too(every):
    seen = []
    for length, rows in rows_of(Coded(every)).items():
        assert rows.num_tokens == len(rows) * length
        for row in range(len(rows)):
            read = rows.read(row, 0, length)
            assert set(read) == set(rows.names) == {"tokens", "labels", "positions"}
            documents, places = read["tokens"] // 100, read["tokens"] % 100
            assert (documents == documents[0]).all()
            assert (np.diff(places) == 1).all()
            following = np.where(
                (places + 1 < SIZES[documents[0]])
                & ((read["tokens"] + 1) % every == 0),
                read["tokens"] + 1,
                IGNORED,
            )
            np.testing.assert_array_equal(read["labels"], following)
            np.testing.assert_array_equal(read["positions"], np.arange(length))
            assert rows.lengths(row).tolist() == [length]
            seen += read["tokens"].tolist()
    # Each token of a span once; what is dropped is each document's end.
    want = [100 * d + i for d, n in enumerate(SIZES) for i in range(n - n % 4)]
    assert sorted(seen) == want


def test_a_part_is_that_slice_of_the_row_and_past_the_end_is_padding():
    for length, rows in rows_of(Coded()).items():
        whole = rows.read(1, 0, length + 3)
        assert (whole["labels"][length:] == IGNORED).all()
        assert not whole["tokens"][length:].any()
        for start, stop in [(0, 1), (1, 4), (3, length), (2, length + 3)]:
            for name, part in rows.read(1, start, stop).items():
                np.testing.assert_array_equal(part, whole[name][start:stop])
        assert not rows.read(len(rows), 0, length)["tokens"].any()
        assert rows.lengths(len(rows)).tolist() == []


def config_of(files, *, lengths=LENGTHS, seed=0, **data):
    return complete(
        Config(
            run=Run(seed=seed),
            model=Model(width=8, num_heads=2),
            data=Data(
                files=str(files), lengths=lengths, validation_fraction=0.1, **data
            ),
            training=Training(num_steps=30, batch_size=4, sequence_tokens=max(lengths)),
        ),
        name="x",
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for i, size in enumerate(SIZES * 3):
        (tmp_path / "in" / f"{i}.txt").write_bytes(bytes([65 + i]) * (size + 3) + b"\n")
    return tmp_path / "in"


def drawn(files, degrees, steps, **options):
    """(length, rows of tokens) of each step, on a mesh."""
    mesh = make_mesh(**degrees)
    rows = open_data(config_of(files, **options)).by_length
    assert rows is not None
    sharding = NamedSharding(mesh, P(None, ("data", "fsdp"), ("ring", "seq")))
    layouts = {
        length: Layout((1, 64 // length, length), sharding) for length in LENGTHS
    }
    stream = batches_in_order(
        rows.sampler.at, rows.rows, layouts, start_step=steps.start
    )
    with contextlib.closing(stream):
        batches = [next(stream) for _ in steps]
    return [
        {name: np.asarray(values)[0].tolist() for name, values in each.items()}
        for each in batches
    ]


def test_the_order_follows_from_the_seed_and_the_step_alone(tmp_path):
    """Over the ends of epochs and passes, of every source."""
    texts = ["ab" * n for n in SIZES] * 2
    for files in write_every_kind(tmp_path / "kinds", texts):
        rows = open_data(config_of(files)).by_length
        assert rows is not None and rows.sampler.steps_a_pass < 20
        whole = drawn(files, dict(data=4, seq=2), range(30))
        assert all(np.asarray(each["tokens"]).size == 64 for each in whole)
        assert {len(each["tokens"][0]) for each in whole} == set(LENGTHS)
        assert drawn(files, dict(data=2, seq=4), range(17, 25)) == whole[17:25]
    assert drawn(files, dict(data=4, seq=2), range(5), seed=1) != whole[:5]


def test_what_a_run_says_and_keeps(folder):
    config = config_of(folder)
    data = open_data(config)
    assert data.by_length is not None
    rows, order = data.by_length.rows, data.by_length.sampler
    said = "\n".join(data.notes)
    for length in LENGTHS:
        num = sum(order.at(i).length == length for i in range(30))
        assert (
            f"data.lengths: {num} of the run's steps have rows of {length} tokens, of "
            f"which there are {len(rows[length])}" in said
        )
    stream = data.train.stream
    used = sum(each.num_tokens for each in rows.values())
    part = 1 - used / stream.ends[-1]
    assert 0 < part and f"{part:.2%} of the training tokens are in no row" in said
    # The run is longer than a pass: lengths grow once a pass.
    assert data.meta["data.cycle_steps"] == order.steps_a_pass < 30
    for other in (
        config_of(folder, lengths=(8, 16)),
        config_of(folder, curriculum="uniform"),
        config_of(folder, cycle_steps=5),
    ):
        changed = "data.lengths was|data.curriculum was|data.cycle_steps was"
        with pytest.raises(ValueError, match=changed):
            refuse_other_data(data.meta, open_data(other).meta, other)


def test_the_cycle_is_the_run_where_a_pass_is_longer(folder):
    config = config_of(folder)
    training = dataclasses.replace(config.training, num_steps=5)
    data = open_data(dataclasses.replace(config, training=training))
    assert data.meta["data.cycle_steps"] == 5


def test_lengths_without_rows_are_named_and_the_remedy_works(folder):
    config = config_of(folder, lengths=(4, 16, 32, 64))
    with pytest.raises(ValueError, match="data.lengths 64: .* longest has 42") as met:
        open_data(config)
    assert re.search(r"4: \d+, 16: \d+, 32: [1-9]\d*, 64: 0\)", str(met.value))
    assert (
        "--data.lengths 4 16 32 --training.sequence-tokens 32 --training.batch-size 8"
        in str(met.value)
    )
    again = config_of(folder, lengths=(4, 16, 32))
    training = dataclasses.replace(again.training, batch_size=8)
    assert open_data(dataclasses.replace(again, training=training)).by_length
    with pytest.raises(ValueError, match="use powers of 2 of at most 42, or longer"):
        open_data(config_of(folder, lengths=(64, 128)))


def test_a_batch_of_more_rows_than_there_are_is_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 16 + b"b" * 8 + b"\n" * 20)
    config = config_of(tmp_path / "a.txt", lengths=(8, 16))
    data = open_data(config)
    assert any("tokens are 1, fewer than the" in note for note in data.notes)


def test_without_lengths_nothing_is_by_length(folder):
    config = dataclasses.replace(config_of(folder), data=Data(files=str(folder)))
    data = open_data(config)
    assert data.by_length is None
    assert not [name for name in data.meta if "length" in name or "cycle" in name]
