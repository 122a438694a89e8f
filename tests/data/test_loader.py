"""The same global batches on every mesh, from every step, read once and ahead."""

import contextlib
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ulysses_jax.data.stream
from ulysses_jax.data.balance import deal, work
from ulysses_jax.data.corpus import Document
from ulysses_jax.data.loader import (
    batches,
    local_boxes,
    read_box,
    refuse_uncounted,
    validation_batches,
)
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.stream import ByteStream
from ulysses_jax.mesh import make_mesh
from ulysses_jax.parallel.zigzag import zigzag_order, zigzag_ranges

SPEC = PartitionSpec(None, ("data", "fsdp"), ("ring", "seq"))
MESHES = [
    dict(data=2, seq=4),
    dict(seq=8),
    dict(data=8),
    dict(data=2, fsdp=2, tensor=2),
    dict(ring=4, tensor=2),
]


def make_rows(folder, *, num_documents=9, sequence_tokens=16, mask_documents=True):
    """Documents of unequal lengths, of 0 to 255 in turn."""
    documents, value = [], 0
    for i in range(num_documents):
        content = bytes((value + j) % 256 for j in range(7 + 11 * i))
        value += len(content)
        (folder / str(i)).write_bytes(content)
        documents.append(Document(str(i), folder / str(i), len(content)))
    return Rows(ByteStream(documents), sequence_tokens, mask_documents=mask_documents)


def take(rows, num, *, degrees, shape=(2, 8, 16), **kwargs):
    """The first `num` batches, as numpy arrays."""
    sharding = NamedSharding(make_mesh(**degrees), SPEC)
    kwargs = dict(seed=5) | kwargs
    with contextlib.closing(batches(rows, shape, sharding, **kwargs)) as stream:
        return [
            {name: np.asarray(values) for name, values in batch.items()}
            for batch in islice(stream, num)
        ]


def assert_equal(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_a_batch_is_global_arrays_of_the_promised_kind(tmp_path):
    sharding = NamedSharding(make_mesh(data=2, seq=4), SPEC)
    for mask_documents in (True, False):
        rows = make_rows(tmp_path, mask_documents=mask_documents)
        with contextlib.closing(batches(rows, (2, 8, 16), sharding, seed=0)) as stream:
            batch = next(stream)
        assert batch.keys() == set(rows.names)
        assert ("segment_ids" in batch) == mask_documents
        for values in batch.values():
            assert values.shape == (2, 8, 16) and values.dtype == np.int32
            assert values.sharding == sharding


def test_every_mesh_and_every_accumulation_sees_the_same_batches(tmp_path):
    rows = make_rows(tmp_path)
    first = take(rows, 4, degrees=MESHES[0])
    for degrees in MESHES[1:]:
        assert_equal(take(rows, 4, degrees=degrees), first)
    accumulated = take(rows, 4, degrees=MESHES[0], shape=(1, 16, 16))
    flat = [{n: v.reshape(1, 16, 16) for n, v in batch.items()} for batch in first]
    assert_equal(accumulated, flat)


def test_balanced_rows_are_those_of_the_step_dealt_by_their_work(tmp_path):
    rows = make_rows(tmp_path)
    by_tokens = {
        tuple(rows.read(i, 0, 16)["tokens"].tolist()): work(rows.lengths(i))
        for i in range(len(rows))
    }

    def works(batch):
        return [[by_tokens[tuple(row)] for row in part] for part in batch["tokens"]]

    plain = take(rows, 4, degrees=dict(data=4, seq=2))
    balanced = take(rows, 4, degrees=dict(data=4, seq=2), balanced_groups=4)
    before = after = 0.0
    for was, now in zip(plain, balanced, strict=True):
        order = deal(np.ravel(works(was)), 2, 4)
        for name, values in was.items():
            np.testing.assert_array_equal(now[name], values.reshape(16, 16)[order])
        groups = [np.reshape(works(each), (2, 4, 2)).sum(2) for each in (was, now)]
        before, after = (
            total + each.max(axis=1).sum()
            for total, each in zip((before, after), groups, strict=True)
        )
    assert after < 0.95 * before
    one = take(rows, 4, degrees=dict(seq=8), balanced_groups=1)
    assert_equal(one, plain)


@pytest.mark.parametrize("step", [1, 3, 10])
def test_resuming_on_another_mesh_goes_on_where_it_was(tmp_path, step):
    rows = make_rows(tmp_path)
    whole = take(rows, step + 2, degrees=MESHES[0])
    for degrees in MESHES:
        assert_equal(take(rows, 2, degrees=degrees, start_step=step), whole[step:])


def test_a_step_far_off_is_reached_at_once(tmp_path):
    rows = make_rows(tmp_path)
    far = take(rows, 2, degrees=MESHES[0], start_step=10**9)
    assert_equal(far[1:], take(rows, 1, degrees=MESHES[0], start_step=10**9 + 1))


def test_a_batch_of_one_row(tmp_path):
    shape = (1, 1, 16)
    rows = make_rows(tmp_path)
    assert len(take(rows, 3, degrees=dict(seq=8), shape=shape)) == 3


@pytest.mark.parametrize("num_documents", [1, 2, 9])
def test_an_epoch_has_every_row_once_and_the_next_another_order(
    tmp_path, num_documents
):
    rows = make_rows(tmp_path, num_documents=num_documents)
    first_tokens = {
        tuple(rows.read(i, 0, 16)["tokens"].tolist()): i for i in range(len(rows))
    }
    assert len(first_tokens) == len(rows)
    num = math.ceil(4 * len(rows) / 16)
    tokens = [b["tokens"].reshape(-1, 16) for b in take(rows, num, degrees=MESHES[0])]
    order = [first_tokens[tuple(row)] for row in np.concatenate(tokens).tolist()]
    epochs = [order[e * len(rows) : (e + 1) * len(rows)] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(rows)))
    if len(rows) > 8:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert epochs[0] != list(range(len(rows)))


def test_the_seed_sets_the_order_for_good(tmp_path):
    rows = make_rows(tmp_path)
    a, b = (
        take(rows, 1, degrees=MESHES[0], seed=seed)[0]["tokens"] for seed in (0, 10**30)
    )
    assert (a != b).any()
    again = take(rows, 1, degrees=MESHES[0], seed=0)[0]["tokens"]
    np.testing.assert_array_equal(a, again)
    # Fixed values: another order would break the resumption of runs that exist.
    assert a[0, :4, 0].tolist() == FIXED_ORDER


FIXED_ORDER = [218, 234, 171, 120]


def test_a_seed_does_not_begin_with_its_neighbours_second_epoch(tmp_path):
    rows = make_rows(tmp_path)
    shape = (1, len(rows), 16)
    second = take(rows, 1, degrees=dict(seq=8), shape=shape, seed=4, start_step=1)
    first = take(rows, 1, degrees=dict(seq=8), shape=shape, seed=5)
    assert (second[0]["tokens"] != first[0]["tokens"]).any()


def test_a_length_that_does_not_divide_is_padded_with_masked_tokens(tmp_path):
    rows = make_rows(tmp_path, sequence_tokens=13)
    plain = take(rows, 2, degrees=dict(data=8), shape=(1, 8, 13))
    padded = take(rows, 2, degrees=dict(seq=8), shape=(1, 8, 16))
    for short, long in zip(plain, padded, strict=True):
        for name, values in short.items():
            np.testing.assert_array_equal(long[name][..., :13], values)
            assert (long[name][..., 13:] == (-1 if name == "labels" else 0)).all()


def test_validation_reads_the_first_rows_in_order_every_time(tmp_path):
    rows = make_rows(tmp_path)
    sharding = NamedSharding(make_mesh(data=2, seq=4), SPEC)

    def tokens(shape, num_batches):
        stream = validation_batches(rows, shape, sharding, num_batches=num_batches)
        with contextlib.closing(stream):
            batches = [np.asarray(batch["tokens"]) for batch in stream]
        assert all(b.shape == (1, *shape[1:]) for b in batches)
        return np.concatenate(batches, axis=1)[0]

    expected = np.stack([rows.read(i, 0, 16)["tokens"] for i in range(len(rows))])
    for _ in range(2):
        np.testing.assert_array_equal(tokens((1, 8, 16), 2), expected[:16])
    np.testing.assert_array_equal(tokens((2, 4, 16), 2), expected[:16])
    # Where the rows end: all of them, and padding up to a whole batch.
    everything = tokens((2, 4, 16), 1000)
    assert len(everything) == math.ceil(len(rows) / 4) * 4 > len(rows)
    np.testing.assert_array_equal(everything[: len(rows)], expected)
    assert (everything[len(rows) :] == 0).all()
    stream = validation_batches(rows, (1, 8, 16), sharding, num_batches=0)
    assert list(stream) == []


class SomeDevices:
    """A sharding of which this process has some devices only."""

    def __init__(self, degrees, devices):
        self.whole = NamedSharding(make_mesh(**degrees), SPEC)
        self.devices = devices

    def addressable_devices_indices_map(self, shape):
        indices = self.whole.devices_indices_map(shape)
        return {jax.devices()[i]: indices[jax.devices()[i]] for i in self.devices}


@pytest.mark.parametrize(
    ("degrees", "devices", "expected"),
    [
        (dict(data=2, seq=4), [0], [((0, 2), (0, 4), (0, 4))]),
        (dict(data=2, seq=4), [5], [((0, 2), (4, 8), (4, 8))]),
        (dict(seq=8), [2, 3], [((0, 2), (0, 8), (4, 6)), ((0, 2), (0, 8), (6, 8))]),
        # Devices along tensor hold the same box: it is read once.
        (dict(seq=4, tensor=2), [2, 3], [((0, 2), (0, 8), (4, 8))]),
        # Rectangles that touch nowhere.
        (
            dict(data=2, seq=4),
            [1, 6],
            [((0, 2), (0, 4), (4, 8)), ((0, 2), (4, 8), (8, 12))],
        ),
    ],
)
def test_a_process_reads_its_boxes_and_no_more(
    tmp_path, monkeypatch, degrees, devices, expected
):
    shape = (2, 8, 16)
    boxes = local_boxes(SomeDevices(degrees, devices), shape)  # pyright: ignore
    assert boxes == expected

    num_bytes = []
    original = ulysses_jax.data.stream.read_bytes

    def counted(document, offset, count):
        num_bytes.append(count)
        return original(document, offset, count)

    rows = make_rows(tmp_path)
    order = np.random.default_rng(0).integers(0, len(rows), shape[:2])
    whole = read_box(rows, order, ((0, 2), (0, 8), (0, 16)))
    monkeypatch.setattr(ulysses_jax.data.stream, "read_bytes", counted)
    for box in boxes:
        where = tuple(slice(*bounds) for bounds in box)
        num_bytes.clear()
        for name, values in read_box(rows, order, box).items():
            np.testing.assert_array_equal(values, whole[name][where])
        num_rows, num_tokens = (
            whole["tokens"][where][..., 0].size,
            box[2][1] - box[2][0],
        )
        assert 0 < sum(num_bytes) <= num_rows * (num_tokens + 1)


def test_the_loader_reads_each_distinct_box_once(tmp_path, monkeypatch):
    rows = make_rows(tmp_path)
    reads = Counter()
    original = rows.read
    monkeypatch.setattr(
        rows, "read", lambda *range_: (reads.update([range_]), original(*range_))[1]
    )
    # 4 boxes of 8 devices; 16 different rows a batch.
    take(rows, 1, degrees=dict(seq=4, tensor=2), shape=(1, 8, 16))
    ranges = {range_[1:] for range_ in reads}
    assert ranges == {(0, 4), (4, 8), (8, 12), (12, 16)}
    assert len(rows) > 3 * 8 and set(reads.values()) == {1}


def test_reading_runs_ahead_in_threads(tmp_path, monkeypatch):
    rows = make_rows(tmp_path)
    ahead = threading.Event()
    threads = set()
    original = rows.read

    def read(row, start, stop):
        threads.add(threading.current_thread())
        ahead.set()
        return original(row, start, stop)

    monkeypatch.setattr(rows, "read", read)
    sharding = NamedSharding(make_mesh(data=8), SPEC)
    with contextlib.closing(batches(rows, (1, 8, 16), sharding, seed=0)):
        assert ahead.wait(timeout=30)  # without a batch having been asked for
    assert threading.main_thread() not in threads


def test_a_file_that_changes_stops_the_run(tmp_path):
    rows = make_rows(tmp_path)
    sharding = NamedSharding(make_mesh(data=8), SPEC)
    with contextlib.closing(batches(rows, (1, 8, 16), sharding, seed=0)) as stream:
        next(stream)
        (tmp_path / "8").write_bytes(b"")
        with pytest.raises(ValueError, match=r"8 had 95 bytes .* has 0"):
            for _ in range(20):
                next(stream)


PROGRAM = """
import jax, pathlib, sys
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.loader import batches
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.stream import ByteStream
from ulysses_jax.mesh import make_mesh

stream = ByteStream(find_documents(sys.argv[1]).documents)
rows = Rows(stream, 1 << 16, mask_documents=True)
sharding = NamedSharding(make_mesh(data=8), PartitionSpec(None, "data"))
stream = batches(rows, (1, 8, 1 << 16), sharding, seed=0)
next(stream)
if sys.argv[2] == "close":
    stream.close()
"""


@pytest.mark.parametrize("how", ["close", "leave"])
def test_the_interpreter_ends_cleanly(tmp_path, how):
    (tmp_path / "a").write_bytes(bytes(range(1, 256)) * 10_000)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.parametrize(
    "degrees, members", [(dict(ring=4, seq=2), 4), (dict(data=2, seq=4), 4)], ids=str
)
def test_zigzag_order_is_the_same_tokens_elsewhere(tmp_path, degrees, members):
    """Every array of the batch alike: a token keeps its label, position and segment."""
    rows = make_rows(tmp_path)
    natural = take(rows, 3, degrees=degrees)
    zigzag = take(rows, 3, degrees=degrees, zigzag_members=members)
    order = zigzag_order(16, members)
    assert order.tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    permuted = [{n: v[..., order] for n, v in batch.items()} for batch in natural]
    assert_equal(zigzag, permuted)


def test_zigzag_reads_only_the_ranges_of_a_box(tmp_path, monkeypatch):
    rows, asked = make_rows(tmp_path), []
    read = Rows.read

    def spy(self, row, start, stop):
        asked.append((start, stop))
        return read(self, row, start, stop)

    monkeypatch.setattr(Rows, "read", spy)
    # The second of two devices of the first of two ring members: half-block 3.
    ranges = zigzag_ranges(4, 8, 16, 2)
    box = ((0, 1), (0, 1), (4, 8))
    found = read_box(rows, np.array([[1]]), box, ranges)
    assert asked == ranges == [(12, 16)]
    whole = read(rows, 1, 0, 16)
    for name, values in found.items():
        np.testing.assert_array_equal(values[0, 0], whole[name][12:16])


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_zigzag_ranges_join(members):
    """However a row is cut, the pieces are those of the whole order."""
    tokens = 24
    order = zigzag_order(tokens, members)
    assert sorted(order) == list(range(tokens))
    for start in range(0, tokens, 3):
        for stop in range(start + 1, tokens + 1, 4):
            pieces = zigzag_ranges(start, stop, tokens, members)
            found = [i for piece in pieces for i in range(*piece)]
            assert found == order[start:stop].tolist()
    with pytest.raises(ValueError, match="22 tokens are not 4 half-blocks .* to 24"):
        zigzag_ranges(0, 22, 22, 2)


class Counting(ByteStream):
    """Of whose tokens those count that are in `counted`."""

    counted: tuple[int, ...] = ()

    def counts(self, first, last):  # pyright: ignore
        return np.isin(np.arange(first, last), self.counted)


def test_rows_that_validate_without_a_token_that_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("ulysses_jax.data.loader._CHECKED_TOKENS", 4)
    plain = make_rows(tmp_path)
    refuse_uncounted(plain, 1)
    stream = Counting(plain.stream.documents)
    rows = Rows(stream, 16, mask_documents=True)
    words = "none of the tokens of the 3 rows of 16 that would validate counts"
    with pytest.raises(ValueError, match=words):
        refuse_uncounted(rows, 3)
    # One token in the third of these rows; a document's first one is no label.
    stream.counted = (int(stream.ends[0]), 45)
    refuse_uncounted(rows, 3)
    with pytest.raises(ValueError, match="use training.validation_batches 0"):
        refuse_uncounted(rows, 2)


class Slow(Rows):
    """A disk on which a read takes its time."""

    seconds = 0.0

    def read(self, row, start, stop):
        time.sleep(self.seconds)
        return super().read(row, start, stop)


@pytest.mark.parametrize("read_seconds, step_seconds", [(0.2, 0.3), (0.5, 0.1)])
def test_no_step_waits_for_what_the_next_one_reads(
    tmp_path, read_seconds, step_seconds
):
    """A source that takes less than a step adds nothing to it; one that takes more is
    waited for, as long as two threads take together and no longer."""
    rows = Slow(make_rows(tmp_path).stream, 16, mask_documents=True)
    rows.seconds = read_seconds / 8  # a batch is a row in eight boxes, one by one
    sharding = NamedSharding(make_mesh(seq=8), SPEC)
    with contextlib.closing(batches(rows, (1, 1, 16), sharding, seed=0)) as stream:
        next(stream)
        time.sleep(2 * read_seconds)  # a first step compiles
        begun, waits = time.monotonic(), []
        for _ in range(8):
            asked = time.monotonic()
            next(stream)
            waits.append(time.monotonic() - asked)
            time.sleep(step_seconds)
        whole = time.monotonic() - begun
    if read_seconds < step_seconds:
        assert np.median(waits) < 0.1 * read_seconds
    else:
        assert sum(waits) > 0.5
    assert whole < 8 * (step_seconds + 0.7 * read_seconds)
