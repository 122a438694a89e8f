"""Rows of several corpora: shares, epochs, order, resumption, what is refused."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ulysses_jax import make_mesh
from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Model, Run, Training
from ulysses_jax.data.loader import batches, validation_batches
from ulysses_jax.data.mixture import MixedRows
from ulysses_jax.data.open import open_data, refuse_other_data
from ulysses_jax.data.prepare import prepare
from ulysses_jax.training.step import batch_spec

T = 16
WEIGHTS = (3.0, 1.0)
LETTERS = list(b"abcdefgh")


@pytest.fixture
def folders(tmp_path):
    """Letters in one, digits in the other: a row tells its part."""
    for name, letters, num in (("a", "abcdefgh", 30), ("b", "012345", 7)):
        (tmp_path / name).mkdir()
        for i in range(num):
            text = "".join(itertools.islice(itertools.cycle(letters), i, i + 40))
            (tmp_path / name / f"{i}.txt").write_text(text)
    return str(tmp_path / "a"), str(tmp_path / "b")


def config_of(folders, **data):
    data = {"validation_fraction": 0.1, "weights": WEIGHTS} | data
    return complete(
        Config(
            model=Model(vocab_size=320),
            data=Data(mixture=folders, **data),
            training=Training(batch_size=4, sequence_tokens=T, num_steps=50),
            run=Run(folder="nowhere"),
        ),
        name="mixed",
    )


def parts_of(rows: MixedRows, numbers) -> np.ndarray:
    return np.searchsorted(np.cumsum([len(p) for p in rows.parts]), numbers, "right")


def test_each_part_has_its_share_and_its_epochs(folders):
    rows = open_data(config_of(folders)).train
    assert isinstance(rows, MixedRows)
    order = rows.shuffled(3)
    numbers = np.array([order[i] for i in range(16 * len(rows))])
    parts = parts_of(rows, numbers)
    share = np.cumsum(parts == 0) - 0.75 * np.arange(1, len(parts) + 1)
    assert np.abs(share).max() <= 2
    far = np.array([order[10**9 + i] for i in range(400)])
    assert abs((far < len(rows.parts[0])).sum() - 300) <= 2
    for part, own in enumerate(rows.parts):
        drawn = numbers[parts == part]
        epochs = drawn[: len(drawn) // len(own) * len(own)].reshape(-1, len(own))
        assert len(epochs) > 3
        first = sum(len(p) for p in rows.parts[:part])
        want = np.arange(first, first + len(own))
        assert (np.sort(epochs, axis=1) == want).all()
        assert (epochs[0] != epochs[1]).any()
    assert any(order[i] != rows.shuffled(4)[i] for i in range(10))


def test_parts_are_not_shuffled_alike(folders):
    (part, _) = open_data(config_of(folders)).train.parts
    order = MixedRows([part, part], [1, 1]).shuffled(0)
    numbers = np.array([order[i] for i in range(2 * len(part))])
    one, other = (numbers[numbers // len(part) == i] % len(part) for i in (0, 1))
    assert (np.sort(one) == np.sort(other)).all() and (one != other).any()


def test_batches_follow_from_seed_and_step_on_any_mesh(folders):
    rows = open_data(config_of(folders)).train

    def read(degrees, steps, start=0):
        mesh = make_mesh(**degrees)
        sharding = NamedSharding(mesh, batch_spec(mesh))
        stream = batches(rows, (1, 4, T), sharding, seed=5, start_step=start)
        return [np.asarray(next(stream)["tokens"]) for _ in range(steps)]

    whole = read(dict(data=2, seq=4), 30)  # past the end of both parts' epochs
    np.testing.assert_array_equal(read(dict(seq=8), 30), whole)
    np.testing.assert_array_equal(read(dict(data=4, ring=2), 6, start=24), whole[24:])
    letters = [np.isin(row, LETTERS).any() for batch in whole for row in batch[0]]
    assert np.mean(letters) == pytest.approx(0.75, abs=0.02)


def test_validation_reads_every_row_once_evenly(folders):
    data = open_data(config_of(folders, validation_fraction=0.5))
    rows = data.validation
    assert isinstance(rows, MixedRows)
    order = np.asarray(rows.in_order())
    assert sorted(order) == list(range(len(rows)))
    half = parts_of(rows, order[: len(rows) // 2])
    few, many = len(rows.parts[1]), len(rows.parts[0])
    assert abs((half == 1).sum() - few / 2) <= 1 < few < many
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, batch_spec(mesh))
    read = validation_batches(rows, (1, 4, T), sharding, num_batches=10**6)
    arrays = [{k: np.asarray(v) for k, v in batch.items()} for batch in read]
    counted = sum((each["segment_ids"] > 0).sum() for each in arrays)
    assert counted == rows.num_tokens


def test_what_is_said_and_what_a_checkpoint_knows(folders):
    config = config_of(folders)
    data = open_data(config)
    a, b = folders
    said = "\n".join(data.notes)
    assert f"75.0% of the rows are of {a}: an epoch of it in " in said
    assert f"25.0% of the rows are of {b}: an epoch of it in " in said
    refuse_other_data(data.meta, open_data(config).meta)
    for change in (dict(weights=(1.0, 1.0)), dict(mixture=(b, a))):
        mixture = change.pop("mixture", folders)
        other = open_data(config_of(mixture, **change)).meta
        with pytest.raises(ValueError, match="trained on other batches"):
            refuse_other_data(data.meta, other)


def test_a_prepared_part_is_as_its_files(folders, tmp_path):
    a, b = folders
    prepare(b, tmp_path / "ready")
    rows = open_data(config_of((a, str(tmp_path / "ready")))).train
    assert isinstance(rows, MixedRows) and not len(rows.parts[1]) == 0
    last = rows.read(len(rows) - 1, 0, T)["tokens"]
    assert not np.isin(last, LETTERS).any() and np.isin(last, list(b"012345")).any()
    assert not rows.read(len(rows), 0, T)["segment_ids"].any()


@pytest.mark.parametrize(
    "data, message",
    [
        (dict(mixture=("a", "b"), weights=(1.0,)), "has 2 parts and data.weights 1"),
        (dict(weights=(1.0,)), "has 0 parts and data.weights 1 numbers"),
        (dict(mixture=("a",), weights=(0.0,)), "weights are 0.0: give positive"),
        (dict(mixture=("a",), weights=(1.0,), files="c"), "files 'c' and .* both"),
    ],
)
def test_refused(data, message):
    with pytest.raises(ValueError, match=message):
        complete(Config(data=Data(**data)), name="x")
