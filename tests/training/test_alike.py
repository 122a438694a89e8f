"""What processes have in common, and what is said of one that has not."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Distributed, Mesh, Model, Training
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.roll_call import Absent
from ulysses_jax.training import alike, run
from ulysses_jax.training.alike import facts_of, refuse_mixed_devices, unlike


def test_processes_of_one_command_are_alike():
    one, other = (
        facts_of([Config(distributed=Distributed(coordinator, 2, process))])
        for process, coordinator in enumerate(["localhost:1", "a:1"])
    )
    assert unlike(one | {"host": "a"}, other | {"host": "b"}) == []
    assert {"jax", "jaxlib", "python", "the code of ulysses_jax"} < set(one)


def test_what_differs_is_named():
    first = [Config(), Config()]
    training = Training(learning_rate=1e-3)
    here = facts_of([Config(), dataclasses.replace(Config(), training=training)])
    assert unlike(here | {"jax": "0.0.1"}, facts_of(first) | {"jax": "0.0.2"}) == [
        "jax is 0.0.1, there 0.0.2",
        "stage 2: training.learning_rate is 0.001, there 0.0003",
    ]
    assert len(unlike(facts_of(first[:1]), facts_of(first))) > 50


def test_process_0_says_nothing(monkeypatch):
    """It may hang, before it has said what it is to run: words, and no traceback."""
    store = SimpleNamespace(
        this_process=lambda: 1,
        coordinator=lambda: ("host0", 1234),
        set_again=lambda *_: None,
    )

    def wait(key, seconds):
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")

    store.wait = wait
    monkeypatch.setattr(alike, "store", store)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(Absent, match="process 0 on host0 .* did not say within 60 s"):
        alike.refuse_others([Config()])


def test_a_run_asks_for_devices_of_one_kind(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "refuse_mixed_devices", asked.append)
    model = Model(vocab_size=264, width=16, num_layers=1, num_heads=8)
    config = complete(Config(model=model, mesh=Mesh(seq=8)), name="test")
    _, mesh, _ = run.on_mesh(config, Transformer)
    assert asked == [mesh]


def test_devices_of_two_kinds():
    devices = [
        SimpleNamespace(device_kind=kind, process_index=index)
        for index, kind in enumerate(["H100", "H100", "A100"])
    ]
    with pytest.raises(ValueError, match=r"2 kinds .* \[0, 1\]; A100: .* \[2\]"):
        refuse_mixed_devices(SimpleNamespace(devices=np.array(devices)))
    refuse_mixed_devices(SimpleNamespace(devices=np.array(devices[:2])))
