"""A run from Python: what it returns and raises, and all that it leaves as it was."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from files import ROOT
from flax import nnx
from shared_programs import shared_programs as shared_programs

from ulysses_jax import make_mesh
from ulysses_jax.config import Data, Distributed, Mesh, Model, Run, Training
from ulysses_jax.training import train
from ulysses_jax.training.journal import Journal
from ulysses_jax.training.metrics import RunLog, read_rows
from ulysses_jax.training.signals import Stopped

NAMES = [signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of docs/trainer.md, as it stands, among settings that are not its own.

    Of its corpus it names one file, whose name is no text.

    Returns:
      What the page's names are after it.
    """
    folder = tmp_path_factory.mktemp("whole")
    page = (ROOT / "docs" / "trainer.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (block,) = (each for each in blocks if "train(config)" in each)
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "docs" / os.fsdecode(b"caf\xe9.md")).touch()
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    theirs = make_mesh(seq=2, devices=jax.devices()[:2])
    found: dict[str, Any] = {}
    with (
        pytest.MonkeyPatch.context() as patched,
        jax.set_mesh(theirs),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        patched.chdir(folder)
        patched.setattr(sys, "stdout", output)
        exec(block, found)
        assert jax.sharding.get_mesh() == theirs
        with pytest.raises(ValueError, match="rank_promotion"):
            jax.numpy.ones((2, 2)) + jax.numpy.ones(2)
    assert output.errors == "strict"
    assert rb"caf\udce9.md" in output.buffer.getvalue()
    return SimpleNamespace(**found, folder=folder / "runs" / "small")


@pytest.fixture(scope="module")
def config(whole):
    """The page's, without validation, from anywhere."""
    training = dataclasses.replace(whole.config.training, validation_batches=0)
    files = str(whole.folder.parents[1] / "docs" / "*.md")
    data = dataclasses.replace(whole.config.data, files=files)
    return dataclasses.replace(whole.config, data=data, training=training, run=Run())


def at(config, folder, **changed):
    return dataclasses.replace(config, run=Run(folder=str(folder)), **changed)


def assert_same(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        parameters(got),
        parameters(want),
    )


def killed_at(monkeypatch, step, *numbers):
    """Sends signals while a step is logged, which is when the next one is under way."""
    log_step = RunLog.log_step

    def log(self, number, *args, **options):
        log_step(self, number, *args, **options)
        if number == step:
            for each in numbers:
                os.kill(os.getpid(), each)
                time.sleep(0.2)  # two of one signal at once may be one

    monkeypatch.setattr(RunLog, "log_step", log)


def read_events(folder):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_it_returns_the_trained_model(config, whole, capsys):
    rows = read_rows(whole.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    events = read_events(whole.folder)
    assert [e["event"] for e in events if e["event"] not in ("saved", "committed")] == [
        *("started", "compiled", "done")
    ]
    assert {"num_devices": 8, "device_kind": "cpu", "lost_steps": 0}.items() <= events[
        0
    ].items()
    assert (
        0
        < events[1]["seconds"]
        < events[1]["unix_seconds"] - (events[0]["unix_seconds"])
    )
    for leaf in jax.tree.leaves(parameters(whole.model)):
        assert dict(leaf.sharding.mesh.shape)["seq"] == 4
    assert whole.logits.shape == (2, 128, 320)
    again = train(at(config, whole.folder))
    assert "nothing left to do" in capsys.readouterr().out
    assert_same(again, whole.model)


@pytest.mark.parametrize("number", NAMES[:2], ids=lambda number: number.name)
def test_a_signal_is_an_exception_after_its_step(
    config, whole, tmp_path, monkeypatch, number
):
    def mine(*_) -> None:
        pytest.fail("the run was not told")

    before = signal.signal(number, mine)
    try:
        with monkeypatch.context() as patched:
            killed_at(patched, 1, number)
            with pytest.raises(KeyboardInterrupt, match="at step 2; .* it is saved"):
                train(at(config, tmp_path))
        assert signal.getsignal(number) == mine
    finally:
        signal.signal(number, before)
    assert not (tmp_path / "lock").exists()
    model = train(at(config, tmp_path))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert_same(model, whole.model)


def test_a_second_ctrl_c_is_the_caller_s(config, tmp_path, monkeypatch):
    # A shell's background jobs ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    killed_at(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt) as met:
            train(at(config, tmp_path))
        assert not isinstance(met.value, Stopped)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "lock").exists()


def test_a_signal_in_the_last_step_is_not_lost(config, whole, tmp_path, monkeypatch):
    killed_at(monkeypatch, 10, signal.SIGTERM)
    with pytest.raises(Stopped, match="is done"):
        train(at(config, tmp_path))
    assert_same(train(at(config, tmp_path)), whole.model)


def test_a_signal_is_heard_where_it_cannot_be_written_down(
    config, tmp_path, monkeypatch, capsys
):
    def add(self, event, step, **fields):
        if event == "told":
            raise OSError("the disk is full")

    monkeypatch.setattr(Journal, "add", add)
    killed_at(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(at(config, tmp_path))
    assert "SIGTERM: step 2 " in capsys.readouterr().out


def test_in_another_thread(config, whole, tmp_path, monkeypatch):
    """Where Python has no signals to give; and without a name it is runs/run."""
    monkeypatch.chdir(tmp_path)
    handlers = []
    log_step = RunLog.log_step

    def log(*args, **options):
        assert threading.current_thread() is not threading.main_thread()
        handlers.append([signal.getsignal(each) for each in NAMES])
        log_step(*args, **options)

    monkeypatch.setattr(RunLog, "log_step", log)
    with ThreadPoolExecutor(1) as pool:
        model = pool.submit(train, config).result()
    assert handlers == [[signal.getsignal(each) for each in NAMES]] * 10
    assert (Path("runs") / "run" / "checkpoints" / "10").is_dir()
    assert_same(model, whole.model)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(mesh=Mesh(seq=3)), "takes 3 devices, but there are 8: choose"),
        (dict(model=Model(num_heads=3)), "model.width 256 does not divide by"),
        (dict(data=Data(files="/nowhere")), "/nowhere"),
        (dict(distributed=Distributed("a:1", 2, 0)), "is 2, but JAX knows of 1: "),
        (dict(training=Training(learning_rate=-1)), "not negative, not -1"),
    ],
    ids=str,
)
def test_what_cannot_run_is_a_value_error(config, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        train(at(config, tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists()


def test_simulated_devices_that_come_too_late(config, whole, tmp_path):
    run = Run(folder=str(tmp_path), simulated_cpu_devices=4)
    with pytest.raises(ValueError, match="4 comes too late: .* on 8 cpu devices"):
        train(dataclasses.replace(config, run=run))
    # As many as there are do not: the same run again in one process.
    run = Run(folder=str(whole.folder), simulated_cpu_devices=8)
    assert_same(train(dataclasses.replace(config, run=run)), whole.model)
