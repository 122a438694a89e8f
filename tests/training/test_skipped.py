"""Numbers that are not finite: a step that is skipped changes nothing, and is told."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizer_cases import OPTIMIZERS, begun, config_of, grown, put_like
from run_cases import mesh_of
from shared_programs import shared_programs as shared_programs
from slow import slow_but_for

from ulysses_jax.config import Config, Data, Mesh, Model, Run, Training
from ulysses_jax.data.open import open_data
from ulysses_jax.training import run, train
from ulysses_jax.training.metrics import read_rows
from ulysses_jax.training.state import abstract_state, lay, optimizer_of
from ulysses_jax.training.update import update

DEGREES = dict(fsdp=2, seq=2, tensor=2)
MEMORY = {"device": {}, "host": dict(offload=["optimizer", "parameters"])}
QUICK = [("adamw", "device"), ("adafactor", "host")]


@functools.cache
def compiled_update(name, where):
    config = config_of(DEGREES, optimizer=name, memory=MEMORY[where])
    with jax.set_mesh(mesh_of(**DEGREES)):
        optimizer, shapes = optimizer_of(config), abstract_state(config)

        @jax.jit
        def step(gradients, parameters, state, finite):
            gradients = lay("moments", gradients, config)
            parameters = lay("moments", parameters, config)
            one = jnp.float32(1)
            return update(optimizer, gradients, one, parameters, state, finite)[:2]

        of = shapes.parameters, shapes.parameters, shapes.optimizer, jnp.bool(True)
        return config, shapes, step.trace(*of).lower().compile()


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name, where", slow_but_for(QUICK, OPTIMIZERS, MEMORY))
def test_all_stays_to_the_bit(name, where):
    """A NaN in one gradient of one device, or a loss that is not finite."""
    config, shapes, step = compiled_update(name, where)
    mesh, before = mesh_of(**DEGREES), grown()
    whole = jax.tree.map(lambda x: np.full_like(x, 0.1), before)
    broken = jax.tree.map(np.copy, whole)
    broken["layers"][0]["attention"]["q"].flat[-1] = np.nan
    with jax.set_mesh(mesh):
        state = begun(config, mesh, before)
        now = state.parameters, state.optimizer
        put = functools.partial(put_like, shapes.parameters, mesh)
        assert bits(step(put(broken), *now, jnp.bool(True))) == bits(now)
        assert bits(step(put(whole), *now, jnp.bool(False))) == bits(now)
        after = bits(step(put(whole), *now, jnp.bool(True)))
        # Every array, counts among them, but for what is zero and stays so.
        assert sum(a != b for a, b in zip(after, bits(now), strict=True)) > 10


CONFIG = Config(
    model=Model(vocab_size=264, width=16, num_layers=1, num_heads=4),
    training=Training(
        num_steps=8,
        batch_size=2,
        sequence_tokens=64,
        validation_batches=0,
        checkpoint_interval_steps=2,
        keep_checkpoints=9,
        skipped_steps=2,
    ),
    mesh=Mesh(fsdp=2, seq=4),
    quiet=True,
)


@pytest.fixture
def infinite(monkeypatch, shared_programs):
    """A run whose embedding of the letter Z is infinite."""
    first = run.first_state

    def first_state(*args):
        state = first(*args)
        table = state.parameters["embedding"]
        broken = np.array(table)
        broken[ord("Z")] = np.inf
        broken = jax.device_put(broken, table.sharding)
        return dataclasses.replace(
            state, parameters=state.parameters | {"embedding": broken}
        )

    monkeypatch.setattr(run, "first_state", first_state)


def config_of_run(tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    return dataclasses.replace(
        CONFIG,
        run=Run(folder=str(tmp_path / "run")),
        data=Data(files=str(tmp_path / "text.txt"), validation_fraction=0.0),
    )


def told(folder, *names):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] in names]


def test_the_step_is_passed_over_and_its_rows_are_told(infinite, tmp_path, capsys):
    """Z stands in one row of ten, which comes once in five steps."""
    text = "one two three four " * 34
    config = config_of_run(tmp_path, text[:300] + "Z" + text[301:])
    folder = tmp_path / "run"
    train(config)
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert 1 <= len(skipped) <= 2 and all(
        ("loss" in row) == (row["step"] not in skipped)
        and np.isfinite(list(row.values())).all()
        for row in rows
    )
    data = open_data(run.prepared(config, run.Transformer)).train
    has = [
        (data.read(row, 0, 64)["tokens"] == ord("Z")).any() for row in range(len(data))
    ]
    events = told(folder, "skipped", "failed")
    assert [event["step"] for event in events] == skipped
    of = told(folder, "rows")
    for event, its in zip(events, of, strict=True):
        assert event["event"] == its["of"] == "skipped"
        assert "loss is nan" in event["why"] and event["step"] == its["step"]
        assert event["num_rows"] == len(its["rows"]) == 2
        assert sum(has[row] for row in its["rows"]) == 1
    what = "gradient_norm is nan and loss is nan"
    said = f"step {skipped[0]} is skipped: {what}; its rows"
    assert said in capsys.readouterr().out
    # The learning rate goes on from where it was.
    rates = {row["step"]: row["learning_rate"] for row in rows}
    assert rates[skipped[0]] == rates[skipped[0] + 1] < rates[skipped[0] + 2]
    # And so does a run that is resumed at another one, which it says.
    other = dict(num_steps=9, learning_rate=2 * config.training.learning_rate)
    training = dataclasses.replace(config.training, **other)
    train(dataclasses.replace(config, training=training))
    rate = read_rows(folder / "metrics.jsonl")[-1]["learning_rate"]
    said = f"from {rates[8]:.3g} at step 8 to {rate:.3g} at step 9: training"
    assert f"the learning rate goes {said}" in capsys.readouterr().out


def test_so_many_in_a_row_and_no_more(infinite, tmp_path):
    config = config_of_run(tmp_path, "Z to A " * 200)
    with pytest.raises(ValueError, match="loss is nan at step 3, after 2 that were sk"):
        train(config)
    folder = tmp_path / "run"
    assert [e["step"] for e in told(folder, "skipped")] == [1, 2]
    assert told(folder, "failed")[0]["step"] == 2
    assert len(read_rows(folder / "metrics.jsonl")) == 2
