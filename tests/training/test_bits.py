"""The same config, seed and mesh: the same bits, run twice and gone on with."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from ulysses_jax.config import Config, Data, Mesh, Model, Run, Training
from ulysses_jax.training import train
from ulysses_jax.training.metrics import read_rows

CONFIG = Config(
    model=Model(
        vocab_size=264, width=32, num_layers=2, num_heads=4, compute_dtype="bfloat16"
    ),
    training=Training(
        num_steps=6,
        batch_size=4,
        sequence_tokens=64,
        learning_rate=1e-2,
        warmup_steps=2,
        validation_interval_steps=3,
        validation_batches=1,
        checkpoint_interval_steps=3,
        keep_checkpoints=9,
    ),
    mesh=Mesh(fsdp=2, seq=2, tensor=2),
    quiet=True,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in "ab":
        words = np.random.default_rng(ord(name)).choice(["one", "two", "three"], 2000)
        (folder / f"{name}.txt").write_text("\n".join(words))
    return str(folder / "*.txt")


def run(files, folder, **training):
    """The parameters' bits, and what the rows say that is no time."""
    config = dataclasses.replace(
        CONFIG,
        run=Run(folder=str(folder)),
        data=Data(files=files, validation_fraction=0.2),
        training=dataclasses.replace(CONFIG.training, **training),
    )
    model = train(config)
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    rows = [
        {k: v for k, v in row.items() if "second" not in k}
        for row in read_rows(folder / "metrics.jsonl")
    ]
    return [np.asarray(leaf).tobytes() for leaf in leaves], rows


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture(scope="module")
def whole(files, whole_folder):
    return run(files, whole_folder)


@pytest.mark.slow
def test_run_twice(files, tmp_path, whole):
    bits, rows = run(files, tmp_path / "run")
    assert rows == whole[1]
    assert bits == whole[0]


def test_gone_on_with(files, tmp_path, whole, whole_folder):
    """The last checkpoint is gone, as where a run was killed before it."""
    folder = tmp_path / "run"
    shutil.copytree(whole_folder, folder)
    last = folder / "checkpoints" / "6"
    shutil.rmtree(last)
    bits, rows = run(files, folder)
    assert rows == whole[1]
    assert bits == whole[0]
    assert last.is_dir()
