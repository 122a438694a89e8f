"""Which rows a step reads: what is said of it is what is in its batch."""

import contextlib
import itertools

import numpy as np
import pytest

from ulysses_jax.config import Data, Model, Run, Training
from ulysses_jax.config import Mesh as Degrees
from ulysses_jax.config.run import Config
from ulysses_jax.data.open import open_data
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training.by_length import rows_of_steps, training_batches
from ulysses_jax.training.run import on_mesh

T, BATCH, STEPS = 16, 4, 18
KINDS = {
    "stream": Data(mask_documents=True),
    "balanced": Data(mask_documents=True, packing="whole", balance=True),
    "by length": Data(lengths=(4, 8, 16)),
}


@pytest.fixture
def files(tmp_path):
    letters = np.random.default_rng(0).integers(33, 127, 3000).astype(np.uint8)
    for i, size in enumerate([40, 7, 19, 70, 33, 16, 9, 55] * 4):
        start = 31 * i
        (tmp_path / f"{i}.txt").write_bytes(letters[start : start + size].tobytes())
    return str(tmp_path / "*.txt")


def opened(files, data, degrees):
    config = Config(
        run=Run(seed=3, folder="unused"),
        model=Model(vocab_size=320, width=16, num_layers=1, num_heads=4),
        data=Data(**(vars(data) | {"files": files, "validation_fraction": 0.0})),
        training=Training(num_steps=STEPS, batch_size=BATCH, sequence_tokens=T),
        mesh=Degrees(**degrees),
    )
    config, _, splits = on_mesh(config, Transformer)
    return open_data(config), splits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degrees", [dict(data=4, seq=2), dict(data=2, seq=4)], ids=str)
def test_they_are_the_rows_of_its_batch(files, kind, degrees):
    """In the batch's own order, past the end of an epoch, and from any step on."""
    data, splits = opened(files, KINDS[kind], degrees)
    order = rows_of_steps(data, splits)
    seen = {}
    with contextlib.closing(training_batches(data, splits, start_step=2)) as stream:
        for step, batch in enumerate(itertools.islice(stream, STEPS), 2):
            length, numbers = order(step)
            rows = data.by_length.rows[length] if data.by_length else data.train
            found = np.asarray(batch["tokens"]).reshape(len(numbers), -1)
            for number, tokens in zip(numbers.tolist(), found[:, :length], strict=True):
                expected = rows.read(number, 0, length)["tokens"]
                np.testing.assert_array_equal(tokens, expected)
            seen.setdefault(length, []).extend(numbers.tolist())
    if kind == "by length":
        assert set(seen) == {4, 8, 16}
    else:
        assert len(seen[T]) == STEPS * BATCH > len(data.train)


@pytest.mark.parametrize("kind", ["stream", "by length"])
def test_every_mesh_and_accumulation_has_the_same(files, kind):
    one, other = (
        rows_of_steps(*opened(files, KINDS[kind], degrees))
        for degrees in (dict(data=2, seq=4), dict(fsdp=4, ring=2))
    )
    for step in range(STEPS):
        assert one(step).length == other(step).length
        assert one(step).rows.tolist() == other(step).rows.tolist()
