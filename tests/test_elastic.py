"""A run that goes on, on other processes and meshes, with every sample once."""

import dataclasses
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from pod_cases import CONFIG, RECORD, Pod, batches_in

from ulysses_jax.config import Mesh
from ulysses_jax.config_file import load
from ulysses_jax.data.open import open_data
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training.by_length import rows_of_steps
from ulysses_jax.training.endings import LOST
from ulysses_jax.training.metrics import read_rows
from ulysses_jax.training.run import on_mesh

pytestmark = pytest.mark.slow
STEPS, T, BATCH = 18, 64, 8
ROWS = {
    "documents": {"mask_documents": True},
    "by length": {"lengths": [16, 32, 64]},
}
# Processes, devices of each, and their mesh; the step in which one is killed, and the
# step that this start goes on from.
STARTS = [
    (2, 4, {"seq": 8}, 7, 0),
    (1, 8, {"fsdp": 2, "ring": 2, "seq": 2}, 14, 4),
    (4, 2, {"data": 2, "seq": 4}, None, 12),
]


@pytest.fixture(params=ROWS)
def config_file(request, tmp_path):
    """Letters at random: a row is known by its tokens, in whatever order they lie."""
    random = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for i, size in enumerate(random.integers(20, 200, 70)):
        letters = random.integers(33, 127, size).astype(np.uint8).tobytes()
        (tmp_path / "text" / f"{i}.txt").write_bytes(letters)
    training = CONFIG["training"] | {
        "num_steps": STEPS,
        "batch_size": BATCH,
        "sequence_tokens": T,
    }
    data = ROWS[request.param] | {
        "files": str(tmp_path / "text"),
        "validation_fraction": 0.0,
    }
    path = tmp_path / "config.yaml"
    model = CONFIG["model"] | {"num_heads": 8}
    config = {k: v for k, v in CONFIG.items() if k not in ("mesh", "run")}
    config |= {"model": model, "training": training, "data": data}
    path.write_text(yaml.safe_dump(config))
    return path


def started(config_file, folder, start, record):
    num, devices, mesh, *_ = start
    degrees = [f"--mesh.{axis}={degree}" for axis, degree in mesh.items()]
    return Pod(
        config_file,
        folder,
        num,
        silent=30,
        arguments=[f"--run.simulated-cpu-devices={devices}", *degrees],
        prelude=RECORD.format(path=str(record)),
        at_step=f"record(number, batch); time.sleep(60 * (number == {start[3]}))",
    )


def samples(batch, data):
    """(length, number) of each row of a batch."""
    assert (batch >= 0).all()  # some process held each part
    rows = batch.reshape(-1, batch.shape[-1])
    length = rows.shape[1]
    of = data.by_length.rows[length] if data.by_length else data.train
    numbers = {}
    for number in range(len(of)):
        tokens = of.read(number, 0, length)["tokens"]
        assert numbers.setdefault(tuple(sorted(tokens.tolist())), number) == number
    return [(length, numbers[tuple(sorted(row))]) for row in rows.tolist()]


def test_every_sample_comes_once(config_file, tmp_path):
    """In the order of a run that nothing happened to, whose losses it has."""
    whole = STARTS[1][:3] + (None, 0)
    with started(config_file, tmp_path / "whole", whole, tmp_path / "record-w-") as pod:
        assert pod.ended(0, seconds=300)[0] == [0], pod.said(0)
        unbroken = pod.losses()
    for place, start in enumerate(STARTS):
        record = tmp_path / f"record-{place}-"
        with started(config_file, tmp_path / "run", start, record) as pod:
            others = range(len(pod) - 1)
            if start[3] is None:
                codes, _ = pod.ended(*range(len(pod)), seconds=300)
                assert codes == [0] * len(pod), pod.said(0)
            else:
                pod.until(len(pod) - 1, f"step {start[3]}\n", seconds=300)
                pod.send(len(pod) - 1, signal.SIGKILL)
                assert pod.ended(*others, seconds=90)[0] == [LOST] * len(others)
            found = re.search(r"resuming after step (\d+) of", pod.said(0))
            assert start[4] == (int(found[1]) if found else 0)
    np.testing.assert_allclose(losses_in(tmp_path / "run"), unbroken, rtol=1e-6)
    check_samples(config_file, tmp_path)


def check_samples(config_file, tmp_path):
    taken = {}
    for place, start in enumerate(STARTS):
        for step, batch in batches_in(tmp_path / f"record-{place}-").items():
            assert step > start[4]
            taken[step] = batch  # a step that was lost is taken again
    config = dataclasses.replace(load(config_file), mesh=Mesh(data=2, seq=4))
    config, _, splits = on_mesh(config, Transformer)
    data = open_data(config)
    order = rows_of_steps(data, splits)
    whole = batches_in(tmp_path / "record-w-")
    assert sorted(taken) == sorted(whole) == list(range(1, STEPS + 1))
    read = {}
    for step in taken:
        length, numbers = order(step - 1)
        expected = sorted((length, number) for number in numbers.tolist())
        assert sorted(samples(taken[step], data)) == expected
        assert sorted(samples(whole[step], data)) == expected
        read.setdefault(length, []).extend(numbers.tolist())
    for length, numbers in read.items():
        of = data.by_length.rows[length] if data.by_length else data.train
        times = np.bincount(numbers, minlength=len(of))
        assert times.max() - times.min() <= 1, "one came again before all had come"
        print(f"rows of {length}: {len(numbers)} samples of {len(of)}")


def losses_in(folder: Path):
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]
