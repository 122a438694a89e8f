"""Tokens prepared once: the same bytes however they were made, and read in part."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from corpus_cases import write
from source_cases import TEXTS, json_lines, write_every_kind, write_parquet
from tokenizers import models, pre_tokenizers
from word_tokenizer import END

from ulysses_jax.data import shards
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.ids import hold
from ulysses_jax.data.loader import read_box
from ulysses_jax.data.packed_rows import PackedRows
from ulysses_jax.data.prepare import prepare
from ulysses_jax.data.prepared import PreparedTokens, faults, is_prepared, read_index
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.sources import records
from ulysses_jax.data.tokenizer import Bytes, tokenizer_of
from ulysses_jax.data.tokens import TokenStream


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def all_ids(tokens):
    return [
        np.asarray(tokens.ids(start, stop)).tolist()
        for start, stop in zip([0, *tokens.ends[:-1]], tokens.ends, strict=True)
    ]


def write_texts(folder, num=40):
    """Two files of many short documents, some of them empty."""
    rng = np.random.default_rng(0)
    words = ["a", "long", "text", "?"]
    texts = [
        " ".join(rng.choice(words, rng.integers(0, 9)).tolist()) for _ in range(num)
    ]
    write(folder, {"a.jsonl": json_lines(texts[: num // 2]), "t.txt": b"a long text"})
    write_parquet(folder / "b.parquet", texts[num // 2 :])
    return texts


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_what_is_prepared_is_what_the_tokenizer_makes(tmp_path, words, tokenizer):
    write_every_kind(tmp_path / "in", TEXTS)
    write(tmp_path / "in", {"z.txt": b"a \xff long"})
    folder = None if tokenizer == "bytes" else words
    made = Bytes() if folder is None else tokenizer_of(folder)
    said = []
    index = prepare(
        str(tmp_path / "in"), tmp_path / "out", folder, shard_tokens=9, say=said.append
    )
    tokens = PreparedTokens(tmp_path / "out")
    expected = [[*made.encode(t), made.ends[0]] for t in 7 * TEXTS if t]
    last = b"a \xff long" if folder is None else "a \ufffd long"
    expected.append([*last, 256] if folder is None else [*made.encode(last), END])
    assert all_ids(tokens) == expected
    assert index["documents"] == len(expected) and index["skipped"] == 7
    assert index["tokens"] == sum(map(len, expected)) == tokens.ends[-1]
    assert len(index["shards"]) > 3 and index["dtype"] == "uint16"
    assert index["num_ids"] == made.num_ids and index["ends"] == list(made.ends)
    for first, last in ((0, 1), (3, 40), (8, 9), (9, 9)):
        flat = sum(expected, [])[first:last]
        assert first == last or tokens.ids(first, last).tolist() == flat
    # The folder has its tokenizer, and says the same as the one in memory.
    assert type(tokenizer_of(tmp_path / "out")) is type(made)
    assert tokenizer_of(tmp_path / "out").ends == made.ends
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert (
        not [n for n in names if n.endswith(".part")] and "unfinished.json" not in names
    )
    found = find_documents(str(tmp_path / "in")).documents
    data = (record.data for record in records(found, "text"))
    held = hold(data, made, made.ends[0])
    assert all_ids(held) == expected and held.num_empty == 7


def test_neither_processes_nor_an_end_in_the_middle_change_a_byte(
    tmp_path, words, monkeypatch
):
    """Ended after every shard, and in the middle of one; a shard that is lost or
    spoilt meanwhile is made again."""
    write_texts(tmp_path / "in")
    files, options = str(tmp_path / "in"), dict(shard_tokens=20)
    prepare(files, tmp_path / "whole", words, **options)
    whole = contents(tmp_path / "whole")
    assert len(whole) > 10
    monkeypatch.setattr("ulysses_jax.data.workers._CHUNK_RECORDS", 3)
    prepare(files, tmp_path / "two", words, num_workers=2, **options)
    assert contents(tmp_path / "two") == whole

    parts = tmp_path / "parts"
    said = []
    for number in range(20):
        with ended_at_shard(number), contextlib.suppress(Ended):
            prepare(files, parts, words, say=said.append, **options)
            break
        assert not (parts / "index.json").exists() and is_prepared(parts)
        with pytest.raises(ValueError, match="parts is not prepared to its end: the"):
            PreparedTokens(parts)
        if number == 3:
            (parts / "ids-00001.bin").write_bytes(b"lost")
        if number == 5:
            data = bytearray((parts / "ends-00002.bin").read_bytes())
            data[0] ^= 1
            (parts / "ends-00002.bin").write_bytes(data)
    assert contents(parts) == whole
    again = [line for line in said if "made again" in line]
    assert "ids-00001.bin has 4 bytes, and had" in again[0]
    assert "ends-00002.bin is not what was written" in again[1]


class Ended(Exception):
    pass


@contextlib.contextmanager
def ended_at_shard(number):
    """As by kill -9: what was open stays as it is on the disk."""
    add = shards.Shard.add

    def end(self, ids, counts):
        add(self, ids, counts)
        if self._number >= number and self.num_tokens > 10:
            raise Ended

    def leave(self):
        for file in self._files.values():
            file._file.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Shard, "add", end)
        patch.setattr(shards.Shard, "drop", leave)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9(tmp_path, words, workers):
    """The program itself, ended again and again; no process stays behind."""
    texts = ["a long text ? " * 400] * 600
    write(tmp_path, {"a.jsonl": json_lines(texts)})
    options = ["--shard-tokens", "100000", "--workers", str(workers)]
    line = ["prepare", "--files", str(tmp_path / "a.jsonl"), "--tokenizer", str(words)]
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "whole", words, shard_tokens=100_000)
    killed = 0
    for _ in range(40):
        process = start(*line, "--to", str(tmp_path / "parts"), *options, mark=tmp_path)
        begun = time.monotonic()
        before = len(list((tmp_path / "parts").glob("ids-*.bin")))
        while process.poll() is None and time.monotonic() - begun < 60:
            if len(list((tmp_path / "parts").glob("ids-*.bin"))) > before + 3:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.005)
        process.wait()
        if process.returncode == 0:
            break
    assert process.returncode == 0 and killed > 1
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert left_behind(tmp_path) == 0


def left_behind(mark):
    """Processes that live, seconds after, with this in their environment."""
    begun = time.monotonic()
    while (num := environments().count(f"MARK={mark}")) and (
        time.monotonic() - begun < 10
    ):
        time.sleep(0.1)
    return num


def environments():
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found.append(os.fsdecode(path.read_bytes()))
    return "".join(found)


def start(*argv, mark):
    return subprocess.Popen(
        [sys.executable, "-m", "ulysses_jax.data", *argv],
        env=os.environ | {"MARK": str(mark)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_other_work_is_not_mixed_in(tmp_path, words):
    write_texts(tmp_path / "in")
    files, out = str(tmp_path / "in"), tmp_path / "out"
    with ended_at_shard(1), contextlib.suppress(Ended):
        prepare(files, out, words, shard_tokens=20)
    for changes, message in (
        (dict(tokenizer_folder=None), "num_ids was 6, is 257; tokenizer was '.*bytes"),
        (dict(text_field="body"), "text_field was 'text', is 'body'"),
        (dict(shard_tokens=21), "shard_tokens was 20, is 21"),
    ):
        options = dict(tokenizer_folder=words, shard_tokens=20) | changes
        with pytest.raises(ValueError, match=f"out was begun with other .*{message}"):
            prepare(files, out, **options)
    write(tmp_path / "in", {"more.txt": b"a"})
    with pytest.raises(
        ValueError, match=r"begun with other arguments or files \(files"
    ):
        prepare(files, out, words, shard_tokens=20)
    (tmp_path / "in" / "more.txt").unlink()
    prepare(files, out, words, shard_tokens=20)
    before = contents(out)
    said = []
    prepare(files, out, words, shard_tokens=20, say=said.append)
    assert contents(out) == before and said == [f"{out} is prepared already"]
    with pytest.raises(ValueError, match="begun with other"):
        prepare(files, out, None, shard_tokens=20)
    with pytest.raises(ValueError, match="--to .* holds a.jsonl: give a new folder"):
        prepare(f"{files}/t.txt", tmp_path / "in", words)
    with pytest.raises(ValueError, match="t.txt is a file: give a folder"):
        prepare(files, tmp_path / "in" / "t.txt", words)


def test_one_at_a_time(tmp_path, words):
    write_texts(tmp_path / "in")
    files, out = str(tmp_path / "in"), tmp_path / "out"

    def second(*_):
        with pytest.raises(ValueError, match="another process is preparing --to"):
            prepare(files, out, words)
        raise Ended

    with pytest.raises(Ended):
        prepare(files, out, words, on_progress=second)
    prepare(files, out, words)


def test_a_folder_inside_of_its_files(tmp_path, words):
    """What it writes is none of what it reads, also when it goes on."""
    write_texts(tmp_path / "in")
    files, out = str(tmp_path / "in"), tmp_path / "in" / "out"
    with ended_at_shard(1), contextlib.suppress(Ended):
        prepare(files, out, words, shard_tokens=20)
    index = prepare(files, out, words, shard_tokens=20)
    names = ["a.jsonl", "b.parquet", "t.txt"]
    assert [each["name"] for each in index["files"]] == names
    # Nor is it text of a later preparation, or of a run.
    assert [each.name for each in find_documents(files).documents] == names


def test_refusals(tmp_path, words):
    write(tmp_path / "in", {"a.jsonl": json_lines(["", ""]), "b.jsonl": b"{}\n"})
    with pytest.raises(ValueError, match="none of 2 documents has a token"):
        prepare(str(tmp_path / "in" / "a.jsonl"), tmp_path / "out", words)
    with pytest.raises(ValueError, match="b.jsonl:1 has no field 'text'"):
        prepare(str(tmp_path / "in"), tmp_path / "out2", words, num_workers=2)
    # Nothing is left of either: what is mended is another preparation.
    assert not (tmp_path / "out").exists() and not (tmp_path / "out2").exists()
    write(tmp_path / "in", {"b.jsonl": json_lines(["a"])})
    prepare(str(tmp_path / "in"), tmp_path / "out2", words, num_workers=2)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none has no tokenizer.json: give a folder"):
        prepare(str(tmp_path / "in"), tmp_path / "out3", tmp_path / "none")
    with pytest.raises(ValueError, match="--workers 0: give 1 or more"):
        prepare(str(tmp_path / "in"), tmp_path / "out3", None, num_workers=0)


@pytest.fixture
def prepared(tmp_path, words):
    write_texts(tmp_path / "in")
    prepare(str(tmp_path / "in"), tmp_path / "out", words, shard_tokens=50)
    return tmp_path / "out"


def test_a_shard_that_is_not_as_it_was(prepared):
    index = read_index(prepared)
    good = (prepared / "ids-00001.bin").read_bytes()
    assert [faults(prepared, index, shard) for shard in range(3)] == [[], [], []]
    (prepared / "ids-00001.bin").write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"ids-00001.bin has \d+ bytes, and had"):
        PreparedTokens(prepared)
    (prepared / "ids-00001.bin").unlink()
    with pytest.raises(ValueError, match="ids-00001.bin is missing, and had"):
        PreparedTokens(prepared)
    (prepared / "ids-00001.bin").write_bytes(good[:-1] + b"\x07")
    PreparedTokens(prepared)
    (fault,) = faults(prepared, index, 1)
    assert "ids-00001.bin is not what was written: its sha256" in fault
    (prepared / "ids-00001.bin").write_bytes(good)
    tokens = PreparedTokens(prepared)
    tokens.ids(0, 1)
    good = (prepared / "ids-00000.bin").read_bytes()
    (prepared / "ids-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="ids-00000.bin has 0 bytes, and had"):
        tokens.ids(1, 2)
    (prepared / "ids-00000.bin").write_bytes(good)
    data = (prepared / "ends-00002.bin").read_bytes()
    (prepared / "ends-00002.bin").write_bytes(data[:-1] + b"\1")
    with pytest.raises(ValueError, match="ends-00002.bin is not what was written"):
        PreparedTokens(prepared)


def test_an_index_of_another_version(prepared):
    index = json.loads((prepared / "index.json").read_text())
    (prepared / "index.json").write_text(json.dumps(index | {"version": 2}))
    with pytest.raises(ValueError, match="version 2, and version 1 is read here"):
        PreparedTokens(prepared)
    for broken in ('{"format"', "[]", "[" * 100_000):
        (prepared / "index.json").write_text(broken)
        words = "index.json is no JSON.*: delete the folder and prepare the files again"
        with pytest.raises(ValueError, match=words):
            PreparedTokens(prepared)


GONE = object()
FIELDS = [
    ("dtype", "float32", "dtype is 'float32', not uint16 or uint32"),
    ("dtype", [], r"dtype is \[\], not uint16"),
    ("dtype", GONE, "has no field dtype"),
    ("num_ids", 0, "num_ids is 0, not 1 to 65,536"),
    ("num_ids", 70_000, "num_ids is 70000, not 1 to 65,536"),
    ("num_ids", True, "num_ids is True"),
    ("tokenizer", 3, "tokenizer is 3, not text"),
    ("ends", [6], r"ends is \[6\], not a list of ids below 6"),
    ("counts", None, "counts is None, not true or false"),
    ("text_field", 1, "text_field is 1, not text or null"),
    ("shard_tokens", -1, "shard_tokens is -1"),
    ("files", {}, "files is {}, not a list"),
    ("files.0", "a.txt", r"files\[0\] is 'a.txt', not an object"),
    ("files.0.bytes", 1.5, r"files\[0\].bytes is 1.5, not a whole number"),
    ("files.0.name", GONE, r"has no field files\[0\].name"),
    ("shards", GONE, "has no field shards"),
    ("shards.1", 3, r"shards\[1\] is 3, not an object"),
    ("shards.1.tokens", "9", r"shards\[1\].tokens is '9'"),
    ("shards.1.tokens", 2**70, r"shards\[1\].tokens is 118"),
    ("shards.1.tokens", 1, r"shards\[1\].documents is \d+, not at most its 1 tokens"),
    ("shards.1.documents", GONE, r"has no field shards\[1\].documents"),
    ("shards.1.sha256", [], r"shards\[1\].sha256 is \[\], not an object"),
    ("shards.1.sha256.ids", "../x", r"shards\[1\].sha256.ids is '../x', not 64 hex"),
    ("shards.1.sha256.ends", GONE, r"has no field shards\[1\].sha256.ends"),
]
OF_INDEX = [
    ("tokens", GONE, "has no field tokens"),
    ("tokens", 7, "tokens is 7, not [0-9]+, the sum of its shards'"),
    ("documents", "1", "documents is '1', not a whole number"),
    ("skipped", 99, r"skipped is 99, not \d+, the sum"),
    ("date", "today", "date is 'today', not a date"),
]
OF_BEGUN = [
    ("job", [], r"job is \[\], not object"),
    ("job", GONE, "has no field job"),
    ("shards.0.next", [1], r"shards\[0\].next is \[1\], not \[file, number\]"),
    ("shards.0.next", GONE, r"shards\[0\].next is None"),
]


def changed(said, field, value):
    said = json.loads(json.dumps(said))
    *path, last = [int(n) if n.isdigit() else n for n in field.split(".")]
    place = said
    for name in path:
        place = place[name]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return json.dumps(said)


def test_a_field_of_the_index_that_is_wrong(prepared):
    path = prepared / "index.json"
    index = json.loads(path.read_text())
    for field, value, message in FIELDS + OF_INDEX:
        path.write_text(changed(index, field, value))
        with pytest.raises(ValueError, match=f"^{path}:? {message}.*: delete the fol"):
            PreparedTokens(prepared)
    path.write_text(json.dumps(index))
    PreparedTokens(prepared)


def test_a_begun_folder_whose_file_is_wrong(tmp_path, words):
    write_texts(tmp_path / "in")
    files, out = str(tmp_path / "in"), tmp_path / "out"
    with ended_at_shard(2), contextlib.suppress(Ended):
        prepare(files, out, words, shard_tokens=50)
    path = out / "unfinished.json"
    begun = json.loads(path.read_text())
    of_job = [
        (f"job.{field}", value, message.replace("no field ", "no field job."))
        for field, value, message in FIELDS
        if not field.startswith("shards")
    ]
    of_shards = [each for each in FIELDS if each[0].startswith("shards")]
    for field, value, message in of_job + of_shards + OF_BEGUN:
        path.write_text(changed(begun, field, value))
        with pytest.raises(
            ValueError, match=f"^{path}:? (job.)?{message}.*: delete the"
        ):
            prepare(files, out, words, shard_tokens=50)
    for broken in ("{", "[1]"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="unfinished.json is no JSON.*: delete /"):
            prepare(files, out, words, shard_tokens=50)
    path.write_text(json.dumps(begun))
    prepare(files, out, words, shard_tokens=50)


@pytest.mark.parametrize("place, change", [(-1, 1), (-1, -1), (0, 0), (1, 99)])
def test_ends_that_are_none(prepared, place, change):
    """With a checksum that says so: they end elsewhere, or do not rise."""
    path, index_path = prepared / "ends-00001.bin", prepared / "index.json"
    ends = np.fromfile(path, "<i8")
    ends[place] = ends[place] + change if change else 0
    path.write_bytes(ends.tobytes())
    index = json.loads(index_path.read_text())
    index["shards"][1]["sha256"]["ends"] = hashlib.sha256(ends.tobytes()).hexdigest()
    index_path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="ends-00001.bin is no list of ends that rise"):
        PreparedTokens(prepared)


def test_an_id_that_its_tokenizer_has_not(prepared):
    """It would be no label of the model's, and left out of the loss without a word."""
    path = prepared / "ids-00001.bin"
    ids = np.fromfile(path, "<u2")
    ids[3] = 6
    path.write_bytes(ids.tobytes())
    tokens = PreparedTokens(prepared)
    first = int(tokens._tokens[1])
    tokens.ids(first, first + 3)
    with pytest.raises(
        ValueError, match="ids-00001.bin has the id 6, and its token.* 6"
    ):
        tokens.ids(first, first + 4)


def test_links_in_a_begun_folder_are_not_followed(tmp_path, words):
    """What they lead to stays as it is, be it a part, the index or the tokenizer."""
    write_texts(tmp_path / "in")
    out, kept = tmp_path / "out", tmp_path / "kept"
    prepare(str(tmp_path / "in"), tmp_path / "whole", words)
    whole = contents(tmp_path / "whole")
    out.mkdir()
    kept.write_text("precious")
    for name in [*whole, "unfinished.json"]:
        (out / f"{name}.part").symlink_to(kept)
    prepare(str(tmp_path / "in"), out, words)
    assert kept.read_text() == "precious" and contents(out) == whole
    for name in ("tokenizer.json", "generation_config.json"):
        (out / name).unlink()
        (out / name).symlink_to(kept)
    tokenizer_of(words).copy_to(out)
    assert kept.read_text() == "precious" and contents(out) == whole


class EveryOther:
    """Two ids a letter, of which the first counts where the letter is an a."""

    def __call__(self, data):
        letters = np.frombuffer(data, np.uint8)
        ids = np.repeat(letters, 2).astype(np.uint16)
        counts = np.zeros(len(ids), bool)
        counts[::2] = letters == ord("a")
        return ids, counts


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tokens_that_do_not_count_are_no_labels(tmp_path, workers):
    texts = ["abac", "b", "aaaaa", "cab"]
    write(tmp_path, {"a.jsonl": json_lines(texts)})
    prepare(
        str(tmp_path / "a.jsonl"),
        tmp_path / "out",
        shard_tokens=9,
        encoder=EveryOther(),
        with_counts=True,
        num_workers=workers,
    )
    assert len(read_index(tmp_path / "out")["shards"]) == 3
    tokens = PreparedTokens(tmp_path / "out")
    ids = sum(([ord(c), ord(c)] for text in texts for c in text), [])
    counts = [c and i == 97 for i, c in zip(ids, [True, False] * 13, strict=True)]
    for first in range(len(ids)):
        for last in range(first + 1, len(ids) + 1):
            found = tokens.counts(first, last)
            assert found is not None and found.tolist() == counts[first:last]
    rows = Rows(TokenStream(tokens), 5, mask_documents=True)
    starts = {0, 8, 10, 20}
    for row in range(len(rows)):
        labels = rows.read(row, 0, 5)["labels"].tolist()
        after = [row * 5 + i + 1 for i in range(5)]
        assert labels == [
            ids[i] if i < len(ids) and i not in starts and counts[i] else -1
            for i in after
        ]


@pytest.mark.parametrize("num_documents", [1, 300])
def test_eight_processes_read_an_eighth_each(tmp_path, num_documents):
    """Of one batch [A, B, T] of 1M tokens a row; and what they read is the whole's."""
    total, span, shape = 2**22, 2**20, (2, 2)
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(total, num_documents - 1, replace=False))
    data = rng.integers(32, 127, total, np.uint8).tobytes()
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    folder = tmp_path / "in"
    write(folder, {f"{i:03d}.txt": piece for i, piece in enumerate(pieces) if piece})
    prepare(str(folder), tmp_path / "out", shard_tokens=2**21)
    tokens = PreparedTokens(tmp_path / "out")
    rows = Rows(TokenStream(tokens), span, mask_documents=True)
    numbers = np.arange(4).reshape(shape)
    whole = read_box(rows, numbers, ((0, 2), (0, 2), (0, span)))
    one = tokens.num_read_bytes
    assert one >= 2 * 4 * (span - 1)
    for part in range(8):
        tokens.num_read_bytes = 0
        where = (part * span // 8, (part + 1) * span // 8)
        box = read_box(rows, numbers, ((0, 2), (0, 2), where))
        assert abs(tokens.num_read_bytes / one - 1 / 8) <= 0.05 / 8
        for name, values in box.items():
            np.testing.assert_array_equal(values, whole[name][..., slice(*where)])


@pytest.mark.parametrize("kind", [Rows, PackedRows])
def test_eight_processes_read_an_eighth_of_rows_laid_out_either_way(tmp_path, kind):
    """The rows' own tokens, each once, and up to a label more a piece of a document."""
    span, sizes = 2**12, [9000, 3000, 2500, 1500, 1100, 800, 300, 40] * 3
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, 123, size, np.uint8).tobytes() for size in sizes]
    write(tmp_path / "in", {f"{i:02d}.txt": text for i, text in enumerate(texts)})
    prepare(str(tmp_path / "in"), tmp_path / "out", shard_tokens=2**14)
    tokens = PreparedTokens(tmp_path / "out")
    rows = kind(TokenStream(tokens), span, mask_documents=True)
    numbers = np.arange(12).reshape(2, 6)
    whole = read_box(rows, numbers, ((0, 2), (0, 6), (0, span)))
    pieces = sum(len(rows.lengths(int(row))) for row in numbers.flat)
    for part in range(8):
        where = (part * span // 8, (part + 1) * span // 8)
        tokens.num_read_bytes = 0
        box = read_box(rows, numbers, ((0, 2), (0, 6), where))
        own = (whole["segment_ids"][..., slice(*where)] > 0).sum()
        assert 0 < own <= tokens.num_read_bytes / 2 <= own + pieces
        for name, values in box.items():
            np.testing.assert_array_equal(values, whole[name][..., slice(*where)])


def test_ids_of_more_than_16_bits(tmp_path):
    """Of a vocabulary of 70,000: ids that differ in their upper half alone, too."""
    texts = ["w0 w65536 w65535", "w69999 w4463", "w65537 w1"]
    model = tmp_path / "model"
    model.mkdir()
    vocabulary = {f"w{i}": i for i in range(70_000)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(model / "tokenizer.json"))
    write(tmp_path, {"a.jsonl": json_lines(texts)})
    index = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", model, shard_tokens=3)
    assert index["dtype"] == "uint32" and index["num_ids"] == 70_000
    expected = [[0, 65_536, 65_535], [69_999, 4463], [65_537, 1]]
    tokens = PreparedTokens(tmp_path / "out")
    assert all_ids(tokens) == expected
    data = (tmp_path / "out" / "ids-00000.bin").read_bytes()
    assert data == np.array(expected[0], "<u4").tobytes()
    rows = Rows(TokenStream(tokens), 4, mask_documents=True)
    assert rows.read(0, 0, 4)["tokens"].tolist() == [0, 65_536, 65_535, 69_999]
    assert rows.read(0, 0, 4)["labels"].tolist() == [65_536, 65_535, -1, 4463]
