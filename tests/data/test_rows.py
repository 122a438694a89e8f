"""Rows against a plain walk over every token; exact bytes; only the bytes needed."""

import math

import numpy as np
import pytest

import ulysses_jax.data.stream
from ulysses_jax.data.corpus import Document
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.stream import ByteStream
from ulysses_jax.data.tokenizer import (
    END_OF_DOCUMENT,
    IGNORED,
    NUM_IDS,
    check_vocabulary,
)
from ulysses_jax.training import loss


def corpus(folder, contents):
    documents = []
    for i, content in enumerate(contents):
        path = folder / str(i)
        path.write_bytes(content)
        documents.append(Document(str(i), path, len(content)))
    return documents


def random_contents(seed, num=6, most=23):
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(rng.integers(1, most))) for _ in range(num)]


def walk(contents, sequence_tokens, padded_tokens, mask_documents):
    """All rows by one walk over the tokens, one at a time."""
    stream = []
    for number, content in enumerate(contents):
        stream += [(token, number) for token in (*content, END_OF_DOCUMENT)]
    rows = []
    for start in range(0, len(stream), sequence_tokens):
        row = []
        position, segment = 0, 1
        for i in range(start, min(start + sequence_tokens, len(stream))):
            token, number = stream[i]
            if mask_documents and i > start and stream[i - 1][1] != number:
                position, segment = 0, segment + 1
            label = IGNORED if token == END_OF_DOCUMENT else stream[i + 1][0]
            row.append((token, label, position, segment))
            position += 1
        row += [(0, IGNORED, 0, 0)] * (padded_tokens - len(row))
        columns = dict(
            zip(
                ("tokens", "labels", "positions", "segment_ids"),
                zip(*row, strict=True),
                strict=True,
            )
        )
        if not mask_documents:
            del columns["segment_ids"]
        rows.append({name: list(values) for name, values in columns.items()})
    return rows


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("sequence_tokens", [1, 5, 16, 17, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_range_of_every_row(tmp_path, sequence_tokens, seed, mask_documents):
    contents = random_contents(seed)
    padded = sequence_tokens + 3
    rows = Rows(
        ByteStream(corpus(tmp_path, contents)),
        sequence_tokens,
        mask_documents=mask_documents,
    )
    expected = walk(contents, sequence_tokens, padded, mask_documents)
    assert len(rows) == len(expected)
    bounds = range(padded + 1) if padded < 100 else (0, 1, 7, 33, 80, 999, 1003)
    for number, row in enumerate(expected):
        for start in bounds:
            for stop in (s for s in bounds if s >= start):
                read = rows.read(number, start, stop)
                assert {n: v.tolist() for n, v in read.items()} == {
                    name: values[start:stop] for name, values in row.items()
                }
                assert all(values.dtype == np.int32 for values in read.values())


@pytest.mark.parametrize("sequence_tokens", [1, 7, 64, 10_000])
def test_the_rows_hold_every_byte(tmp_path, sequence_tokens):
    contents = [
        bytes(range(256)),  # NUL, and bytes that are never UTF-8
        b"\xff\xfe\x00\xc3\x28",
        "ß €".encode()[:-1],  # cut within a letter
        b"\n",
        b"x" * 1000,
    ]
    rows = Rows(
        ByteStream(corpus(tmp_path, contents)), sequence_tokens, mask_documents=True
    )
    tokens, segments = (
        np.concatenate([rows.read(i, 0, sequence_tokens)[n] for i in range(len(rows))])
        for n in ("tokens", "segment_ids")
    )
    tokens = tokens[segments > 0]
    assert len(tokens) == rows.num_tokens == sum(len(c) + 1 for c in contents)
    ends = np.flatnonzero(tokens == END_OF_DOCUMENT)
    pieces = np.split(tokens, ends + 1)
    assert [bytes(p[:-1].astype(np.uint8)) for p in pieces[:-1]] == contents
    assert len(pieces[-1]) == 0


def test_every_token_but_a_documents_first_is_a_label_once(tmp_path):
    contents = random_contents(3)
    rows = Rows(ByteStream(corpus(tmp_path, contents)), 8, mask_documents=True)
    labels = np.concatenate([rows.read(i, 0, 8)["labels"] for i in range(len(rows))])
    expected = [[*content[1:], END_OF_DOCUMENT] for content in contents]
    assert labels[labels != IGNORED].tolist() == sum(expected, [])


def test_rows_past_the_end_are_padding(tmp_path):
    rows = Rows(ByteStream(corpus(tmp_path, [b"abc"])), 4, mask_documents=True)
    assert len(rows) == 1
    for row in (1, 2, 10**12):
        read = rows.read(row, 0, 5)
        assert read.pop("labels").tolist() == [IGNORED] * 5
        assert all(values.tolist() == [0] * 5 for values in read.values())


def test_offsets_past_31_bits(tmp_path):
    path = tmp_path / "sparse"
    size = 5 * 2**31 + 7
    with open(path, "wb") as file:  # a hole: takes no room on the disk
        file.seek(size - 3)
        file.write(b"abc")
    (tmp_path / "after").write_bytes(b"de")
    documents = [Document("a", path, size), Document("b", tmp_path / "after", 2)]
    rows = Rows(ByteStream(documents), 2**21, mask_documents=True)
    number, start = divmod(size - 3, 2**21)
    read = rows.read(number, start, start + 8)
    assert read["tokens"].tolist() == [*b"abc", 256, *b"de", 256, 0]
    assert read["labels"].tolist() == [*b"bc", 256, -1, *b"e", 256, -1, -1]
    assert read["positions"].tolist() == [
        start,
        start + 1,
        start + 2,
        start + 3,
        0,
        1,
        2,
        0,
    ]
    assert read["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert len(rows) == math.ceil((size + 4) / 2**21)


def test_reads_only_the_bytes_of_the_range(tmp_path, monkeypatch):
    reads = []
    original = ulysses_jax.data.stream.read_bytes

    def counted(document, offset, count):
        reads.append((document.name, offset, count))
        return original(document, offset, count)

    monkeypatch.setattr(ulysses_jax.data.stream, "read_bytes", counted)
    contents = [b"a" * 10, b"b" * 1000, b"c" * 10]
    rows = Rows(ByteStream(corpus(tmp_path, contents)), 500, mask_documents=True)
    for (row, start, stop), expected in {
        (0, 0, 5): [("0", 0, 6)],
        (0, 5, 11): [("0", 5, 5)],  # the label of a document's end takes no read
        (0, 100, 200): [("1", 89, 101)],
        (0, 400, 500): [("1", 389, 101)],  # one byte of the next row
        (1, 499, 510): [("1", 988, 2)],  # and no more than one
        (2, 0, 50): [("1", 989, 11), ("2", 0, 10)],
        (2, 30, 50): [],
        (0, 500, 504): [],
    }.items():
        reads.clear()
        rows.read(row, start, stop)
        assert reads == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"x" * 9), "had 10 bytes.*has 9: put the old"),
        (lambda path: path.write_bytes(b"x" * 11), "had 10 bytes.*has 11: put the old"),
        (lambda path: path.unlink(), "cannot read .*0 any more: No such.*of 10 bytes"),
    ],
)
def test_a_file_that_changed_is_an_error(tmp_path, change, message):
    rows = Rows(ByteStream(corpus(tmp_path, [b"x" * 10])), 4, mask_documents=True)
    rows.read(0, 0, 4)
    change(tmp_path / "0")
    with pytest.raises(ValueError, match=message):
        rows.read(0, 0, 4)


def test_short_reads_are_continued_and_a_sudden_end_is_an_error(tmp_path, monkeypatch):
    contents = [bytes(range(100))]
    rows = Rows(ByteStream(corpus(tmp_path, contents)), 100, mask_documents=True)
    pread = ulysses_jax.data.stream.os.pread
    monkeypatch.setattr("os.pread", lambda fd, n, offset: pread(fd, min(n, 7), offset))
    assert rows.read(0, 0, 100)["tokens"].tolist() == list(range(100))
    monkeypatch.setattr(
        "os.pread", lambda fd, n, offset: pread(fd, min(n, max(0, 50 - offset)), offset)
    )
    with pytest.raises(ValueError, match="had 100 bytes.*has 50"):
        rows.read(0, 0, 100)


def test_the_ids():
    assert END_OF_DOCUMENT == 256 and NUM_IDS == 257
    assert IGNORED == loss.IGNORED
    check_vocabulary(257)
    with pytest.raises(ValueError, match="vocab_size 256 is less than the 257 ids"):
        check_vocabulary(256)
