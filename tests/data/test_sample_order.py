"""Samples follow from the seed and the step alone, of every source."""

import contextlib
import itertools

import jax
import numpy as np
import pytest
from corpus_cases import write
from jax.sharding import NamedSharding
from source_cases import json_lines, write_arrow, write_dataset, write_parquet
from test_loader import MESHES, SPEC, SomeDevices
from test_open import make_config

from ulysses_jax.config import Data, Model, Run, Training
from ulysses_jax.data.loader import batches, local_boxes, read_box
from ulysses_jax.data.open import open_data
from ulysses_jax.data.prepare import prepare
from ulysses_jax.mesh import make_mesh

T, BATCH = 16, 16
SHAPE = (2, 8, T)
LETTERS = np.random.default_rng(0).integers(33, 127, 60 * 64).astype(np.uint8).tobytes()
TEXTS = [LETTERS[64 * i : 65 * i + 5].decode() for i in range(60)]


def source(kind, folder):
    """The fields of `data` by which a run reads these texts."""
    path = folder / kind
    if kind == "text":
        write(path, {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)})
    elif kind == "jsonl":
        write(
            path, {"a.jsonl": json_lines(TEXTS[:9]), "b.jsonl": json_lines(TEXTS[9:])}
        )
    elif kind == "parquet":
        path.mkdir()
        write_parquet(path / "a.parquet", TEXTS)
    elif kind == "arrow":
        path.mkdir()
        write_arrow(path / "a.arrow", TEXTS)
    elif kind == "dataset":
        write_dataset(path, TEXTS)
    elif kind == "prepared":
        inner = source("jsonl", folder)["files"]
        prepare(inner, path, shard_tokens=100)
    elif kind == "whole":
        return source("prepared", folder) | {"packing": "whole"}
    elif kind == "mixture":
        names = [source(each, folder)["files"] for each in ("prepared", "text")]
        return {"mixture": tuple(names), "weights": (2.0, 1.0)}
    return {"files": str(path)}


def rows_of(fields, seed=5):
    """As a process that starts finds them."""
    data = Data(validation_fraction=0.1, **fields)
    training = Training(sequence_tokens=T, batch_size=BATCH)
    config = make_config(
        "",
        data=data,
        training=training,
        run=Run(seed=seed),
        model=Model(vocab_size=320),
    )
    return open_data(config).train


def taken(fields, degrees, start, num, seed=5):
    sharding = NamedSharding(make_mesh(**degrees), SPEC)
    stream = batches(rows_of(fields), SHAPE, sharding, seed=seed, start_step=start)
    with contextlib.closing(stream):
        return [
            {name: np.asarray(values) for name, values in batch.items()}
            for batch in itertools.islice(stream, num)
        ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name])


def read_by(rows, step, num_processes, degrees, seed=5):
    """A step's batch, of which each of some processes reads its own devices' boxes."""
    order, size = rows.shuffled(seed), SHAPE[0] * SHAPE[1]
    numbers = [order[i] for i in range(step * size, (step + 1) * size)]
    numbers = np.array(numbers).reshape(SHAPE[:2])
    whole = {name: np.full(SHAPE, -9, np.int32) for name in rows.names}
    per = len(jax.devices()) // num_processes
    for process in range(num_processes):
        own = range(process * per, (process + 1) * per)
        for box in local_boxes(SomeDevices(degrees, own), SHAPE):  # pyright: ignore
            where = tuple(slice(*bounds) for bounds in box)
            for name, values in read_box(rows, numbers, box).items():
                whole[name][where] = values
    return whole


KINDS = ("text", "jsonl", "parquet", "arrow", "dataset", "prepared", "whole", "mixture")


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_from_seed_and_step_over_an_epochs_end(tmp_path, kind):
    """On every mesh, of 1, 2 and 4 processes, and gone on from anywhere: the same."""
    fields = source(kind, tmp_path)
    rows = rows_of(fields)
    last = -(-len(rows) // BATCH)  # the step in which the first epoch has ended
    num = 2 * last + 2
    whole = taken(fields, MESHES[0], 0, num)
    for start, degrees in zip((1, last - 1, last, num - 2), MESHES[1:], strict=True):
        assert_same(taken(fields, degrees, start, num - start), whole[start:])
    for num_processes, degrees in itertools.product((1, 2, 4), MESHES[:2]):
        for step in (0, last - 1, num - 1):
            found = read_by(rows, step, num_processes, degrees)
            assert_same([found], whole[step : step + 1])
    if kind != "mixture":  # each of whose parts has epochs of its own
        read = [rows.read(i, 0, T)["tokens"].tolist() for i in range(len(rows))]
        numbers = {tuple(row): i for i, row in enumerate(read)}
        assert len(numbers) == len(rows) > 4 * BATCH
        tokens = np.concatenate([batch["tokens"].reshape(-1, T) for batch in whole])
        order = [numbers[tuple(row)] for row in tokens.tolist()]
        for epoch in range(2):
            own = order[epoch * len(rows) : (epoch + 1) * len(rows)]
            assert sorted(own) == list(range(len(rows)))
        assert order[: len(rows)] != order[len(rows) : 2 * len(rows)]
    other = taken(fields, MESHES[0], 0, 2, seed=6)
    assert any(
        (a["tokens"] != b["tokens"]).any() for a, b in zip(other, whole, strict=False)
    )
