"""A profile of steps N to M: what is in it, and what it refuses."""

import dataclasses
import gzip
import json
import os
import signal
import time

import jax
import pytest
from shared_programs import shared_programs as shared_programs

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Data, Mesh, Model, Run, Training
from ulysses_jax.training import train
from ulysses_jax.training.metrics import RunLog, read_rows

CONFIG = Config(
    model=Model(vocab_size=264, width=16, num_layers=1, num_heads=4),
    training=Training(
        num_steps=5,
        batch_size=2,
        sequence_tokens=64,
        validation_batches=0,
        checkpoint_interval_steps=2,
    ),
    mesh=Mesh(fsdp=2, seq=4),
    quiet=True,
)


def config_of(tmp_path, *profile):
    (tmp_path / "text.txt").write_text("one two three " * 200)
    return dataclasses.replace(
        CONFIG,
        run=Run(folder=str(tmp_path / "run")),
        data=Data(files=str(tmp_path / "text.txt"), validation_fraction=0.0),
        profile=profile,
    )


def test_the_trace_has_these_steps(tmp_path, capsys):
    train(config_of(tmp_path, 3, 4))
    folder = tmp_path / "run" / "profile"
    (perfetto,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
    assert {int(step) for step in steps} == {3, 4}
    # What the devices did: an exchange before attention and one after it, at least.
    exchanges = [e for e in events if "all-to-all" in e.get("name", "")]
    assert len(exchanges) >= 2 * 2 * 2
    (xprof,) = folder.rglob("*.xplane.pb")
    assert xprof.stat().st_size > 10_000
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    (said,) = [e for e in map(json.loads, lines) if e["event"] == "profiled"]
    assert said["step"] == 4 and said["folder"] == str(xprof.parent)
    assert f"traced up to step 4: {perfetto.parent}\n" in capsys.readouterr().out


def test_a_run_that_is_resumed_traces_the_rest(tmp_path, monkeypatch, capsys):
    """And says where there is none; the steps around it have ended."""
    begun, ended = [], []

    def last(*_, **__):
        return read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"]

    for name, steps in (("start_trace", begun), ("stop_trace", ended)):
        monkeypatch.setattr(
            jax.profiler, name, lambda *a, steps=steps, **k: steps.append(last())
        )
    log_step = RunLog.log_step

    def killed(self, number, *args, **options):
        log_step(self, number, *args, **options)
        if number == 4:
            raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "log_step", killed)
        for profile in ((2, 4), (1, 2)):
            with pytest.raises(RuntimeError):
                train(config_of(tmp_path, *profile))
        assert begun == [1] and ended == [4]
    assert "profile 1 2: nothing is traced after step 2\n" in capsys.readouterr().out
    train(config_of(tmp_path, 2, 4))
    assert begun == [1, 2] and ended == [4, 4]
    assert "nothing is traced" not in capsys.readouterr().out


def test_a_stop_within_the_steps_writes_what_there_is(tmp_path, monkeypatch, capsys):
    log_step = RunLog.log_step

    def stop(self, number, *args, **options):
        log_step(self, number, *args, **options)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    monkeypatch.setattr(RunLog, "log_step", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2"):
        train(config_of(tmp_path, 2, 5))
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    (said,) = [e for e in map(json.loads, lines) if e["event"] == "profiled"]
    (trace,) = (tmp_path / "run" / "profile" / "plugins" / "profile").iterdir()
    assert (said["step"], said["folder"]) == (2, str(trace))
    assert list(trace.glob("*.xplane.pb"))
    assert f"traced up to step 2: {trace}\n" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [(3,), (0, 2), (4, 3), (2, 6), (1, 2, 3)])
def test_what_is_no_range_of_steps(steps):
    with pytest.raises(ValueError, match="profile .* of 1 to training.num_steps 5"):
        complete(dataclasses.replace(CONFIG, profile=steps), name="x")
