"""Documents of every kind of file, and what of them is refused, by file and line."""

import gzip
import json
import os
import sys
import tracemalloc

import numpy as np
import pyarrow
import pytest
from corpus_cases import write
from pyarrow import parquet
from source_cases import (
    TEXTS,
    json_lines,
    write_arrow,
    write_dataset,
    write_every_kind,
    write_parquet,
)

from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.sources import records


def texts_of(files, after=(0, 0), field="text"):
    documents, _ = find_documents(str(files))
    return [record.data.decode() for record in records(documents, field, after)]


def test_every_kind_gives_the_same_documents(tmp_path):
    for path in write_every_kind(tmp_path / "all", TEXTS):
        assert texts_of(path) == TEXTS, path
    # All of one folder, in the order of their names, with text beside them.
    write(tmp_path / "all", {"z.txt": b"\xef\xbb\xbfwhole\r\nfile"})
    assert texts_of(tmp_path / "all") == 7 * TEXTS + ["whole\r\nfile"]


def test_any_record_is_gone_on_from(tmp_path):
    write_every_kind(tmp_path, TEXTS)
    write(tmp_path, {"z.txt": b"text"})
    documents, _ = find_documents(str(tmp_path))
    whole = list(records(documents, "text"))
    for at, record in enumerate(whole):
        rest = list(records(documents, "text", (record.file, record.number)))
        assert [each[:3] for each in rest] == [each[:3] for each in whole[at + 1 :]]
    shares = [record.share for record in whole]
    assert all(0 <= share <= 1 for share in shares) and shares[-1] == 1


def test_lines_as_programs_write_them(tmp_path):
    """A byte-order mark, CRLF, blank lines, null, and no line's end at the end."""
    lines = b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n\r\n  \n{"text": null}\n{"text":"b"}'
    write(tmp_path, {"a.jsonl": lines})
    assert texts_of(tmp_path) == ["a\r\n", "", "b"]
    documents, _ = find_documents(str(tmp_path))
    assert [r.number for r in records(documents, "text")] == [1, 4, 5]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "jsonl:2 is not JSON: .*: mend the line or take it out"),
        (b"[" * 100_000, "jsonl:2 is not JSON"),
        (b'{"body": 1, "id": 2}', "jsonl:2 has no field 'text' .'body', 'id'.: name"),
        (b"[1]", "jsonl:2 has no field 'text' .it has none"),
        (b'{"text": ["a"]}', "jsonl:2: field 'text' is a list, not a string"),
        (b'{"text": 3}', "jsonl:2: field 'text' is a number, not a string"),
        (b'{"text": "\xff"}', "jsonl:2 is not UTF-8 .*iconv"),
        (rb'{"text": "\ud800"}', "jsonl:2: field 'text' has half of a pair"),
        (b'{"text": "%s"}' % (b"x" * 200), "jsonl:2 is a line of more than 100 bytes"),
    ],
)
def test_a_line_that_cannot_be_read(tmp_path, monkeypatch, line, message):
    if b"xxx" in line:
        monkeypatch.setattr("ulysses_jax.data.json_lines.MOST_BYTES", 100)
    write(tmp_path, {"a.jsonl": json_lines(["a"]) + line + b"\n" + json_lines(["b"])})
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path)


def test_another_field(tmp_path):
    write(tmp_path, {"a.jsonl": json_lines(["a", "b"], field="body")})
    assert texts_of(tmp_path, field="body") == ["a", "b"]


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def spoilt(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("num_bytes", [1, 8, 60])
@pytest.mark.parametrize("name", ["b.jsonl.gz", "d.parquet", "e.arrow", "f.arrow"])
def test_a_file_that_is_cut_short(tmp_path, name, num_bytes):
    """Wherever it is cut, an arrow stream between two batches too."""
    write_every_kind(tmp_path, TEXTS)
    cut(tmp_path / name, num_bytes)
    with pytest.raises(ValueError, match=f"{name} is no whole "):
        texts_of(tmp_path / name)


def test_a_stream_that_ends_between_batches(tmp_path):
    write_arrow(tmp_path / "a.arrow", TEXTS)
    with pyarrow.memory_map(str(tmp_path / "a.arrow")) as mapped:
        reader = pyarrow.ipc.open_stream(mapped)
        reader.read_next_batch()
        at = mapped.tell()
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[:at])
    with pytest.raises(ValueError, match="a.arrow is no whole table.*end is missing"):
        texts_of(tmp_path)


def test_a_spoilt_page_of_parquet(tmp_path):
    texts = [f"{i:05d}" * 50 for i in range(20)]
    write_parquet(tmp_path / "a.parquet", texts, row_group_rows=10)
    at = (tmp_path / "a.parquet").read_bytes().index(b"00015" * 10)
    spoilt(tmp_path / "a.parquet", at + 7)
    with pytest.raises(ValueError, match="no whole table, after row 10: .*CRC"):
        texts_of(tmp_path)


def test_a_table_whose_text_is_none(tmp_path):
    """Whole in its pages, but the bytes of a string are no UTF-8."""
    bad = pyarrow.array([b"a", b"\xff\xfe", b"b"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, bad.buffers())
    table = pyarrow.table({"text": column})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(ValueError, match=f"{name} is no whole table.*UTF8"):
            texts_of(tmp_path / name)


def test_an_arrow_file_whose_strings_lie_elsewhere(tmp_path):
    """An offset that is spoilt points out of what is there: nothing is read there."""
    write_arrow(tmp_path / "a.arrow", ["abcd" * 9, "efgh" * 9])
    data = (tmp_path / "a.arrow").read_bytes()
    offsets = np.array([0, 36, 72], "<i4").tobytes()
    assert data.count(offsets) == 1
    spoilt = np.array([0, 36, 2**30], "<i4").tobytes()
    (tmp_path / "a.arrow").write_bytes(data.replace(offsets, spoilt))
    with pytest.raises(ValueError, match="a.arrow is no whole table"):
        texts_of(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_what_is_none_of_its_kind(tmp_path, name):
    write(tmp_path, {name: b"just text\n" * 9})
    with pytest.raises(ValueError, match=f"{name} is no whole"):
        texts_of(tmp_path)


def test_columns(tmp_path):
    for type in (pyarrow.large_string(), pyarrow.string_view()):
        write_parquet(tmp_path / "a.parquet", ["a", None, "b"], type=type)
        assert texts_of(tmp_path) == ["a", "", "b"]
    table = pyarrow.table({"text": pyarrow.array(["a", "a"]).dictionary_encode()})
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts_of(tmp_path / "b.arrow") == ["a", "a"]
    with pytest.raises(ValueError, match=r"no column 'body' \(id, text\): name"):
        texts_of(tmp_path, field="body")
    with pytest.raises(ValueError, match="column 'id' is int64, not strings: name"):
        texts_of(tmp_path, field="id")


def test_without_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="a.parquet is read by pyarrow.*pip install"):
        texts_of(tmp_path)


def test_a_dataset_is_what_its_state_lists(tmp_path):
    write_dataset(tmp_path / "in" / "ds", TEXTS)
    write_arrow(tmp_path / "in" / "ds" / "cache-1.arrow", ["of a filter"])
    for path in (tmp_path / "in", tmp_path / "in" / "ds"):
        corpus = find_documents(str(path))
        assert len(corpus.documents) == 2
        assert "no state.json of a dataset lists: " in corpus.notes[0]
        assert "cache-1.arrow" in corpus.notes[0]
        assert texts_of(path) == TEXTS
    os.unlink(tmp_path / "in" / "ds" / "data-00001-of-00002.arrow")
    with pytest.raises(ValueError, match="lists ds/data-00001.*is not there"):
        texts_of(tmp_path / "in")


@pytest.mark.parametrize("state", ["{", "[" * 100_000, "[]", '{"_data_files": [1]}'])
def test_a_dataset_with_a_broken_state(tmp_path, state):
    write_dataset(tmp_path, TEXTS)
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(ValueError, match="state.json (is no JSON|lists no files)"):
        texts_of(tmp_path)


def test_a_dataset_of_splits(tmp_path):
    for split in ("train", "test"):
        write_dataset(tmp_path / split, TEXTS)
    said = json.dumps({"splits": ["train", "test"]})
    (tmp_path / "dataset_dict.json").write_text(said)
    with pytest.raises(ValueError, match="splits train, test .*such as .*/train"):
        texts_of(tmp_path)
    assert texts_of(tmp_path / "test") == TEXTS


@pytest.mark.parametrize("splits", ["train", {"train": 1}, [], [1, "a"], 3, None])
def test_splits_that_are_none(tmp_path, splits):
    write_dataset(tmp_path / "train", TEXTS)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(
        ValueError, match="dataset_dict.json names no splits, a list of"
    ):
        texts_of(tmp_path)


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        with pytest.raises(
            ValueError, match=f"{name} has 2 columns 'text', and one is"
        ):
            texts_of(tmp_path / name)


def test_a_file_that_is_written_meanwhile(tmp_path):
    write_every_kind(tmp_path, TEXTS)
    for name in ("a.jsonl", "d.parquet", "e.arrow"):
        documents, _ = find_documents(str(tmp_path / name))
        with open(tmp_path / name, "ab") as file:
            file.write(b"\n\n")
        with pytest.raises(ValueError, match=f"{name} had .* when it was found"):
            list(records(documents, "text"))


def test_a_text_file_too_long_for_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr("ulysses_jax.data.json_lines.MOST_BYTES", 100)
    write(tmp_path, {"a.txt": b"x" * 101})
    with pytest.raises(ValueError, match="a.txt of 101 bytes is one document"):
        texts_of(tmp_path)


def test_lines_stream(tmp_path):
    """A file of many lines is never held; a long line a few times."""
    many, long = [b"x" * 1000] * 4000, 4_000_000
    data = b"".join(b'{"text": "%s"}\n' % each for each in many)
    write(tmp_path, {"many.jsonl": data, "many.jsonl.gz": gzip.compress(data, 1)})
    write(tmp_path, {"long.jsonl": b'{"text": "%s"}\n' % (b"y" * long)})
    for name, most in (("many.jsonl", 500_000), ("long.jsonl", 4.5 * long)):
        documents, _ = find_documents(str(tmp_path / name))
        tracemalloc.start()
        num = sum(len(record.data) for record in records(documents, "text"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num == 4_000_000 and peak < most, (name, peak)
