"""What a run's rows and events say of its time, its saves and its end."""

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
from shared_programs import shared_programs as shared_programs

from ulysses_jax.config import Config, Data, Mesh, Model, Run, Training
from ulysses_jax.runs.goodput import goodput
from ulysses_jax.runs.read import read_runs
from ulysses_jax.training import loop, metrics, train
from ulysses_jax.training.by_length import Steps
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.loop import Loop
from ulysses_jax.training.metrics import RunLog, read_rows
from ulysses_jax.training.phases import PARTS, whole_seconds
from ulysses_jax.training.step import make_validation_step
from ulysses_jax.training.together import Together

pytestmark = pytest.mark.usefixtures("shared_programs")

CONFIG = Config(
    model=Model(vocab_size=264, width=16, num_layers=1, num_heads=4),
    training=Training(
        num_steps=6,
        batch_size=2,
        sequence_tokens=64,
        validation_interval_steps=2,
        validation_batches=1,
        checkpoint_interval_steps=2,
    ),
    mesh=Mesh(fsdp=2, seq=4),
    quiet=True,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("one two three\n" * 400)
    return str(path)


@pytest.fixture
def config(files, tmp_path):
    return dataclasses.replace(
        CONFIG,
        run=Run(folder=str(tmp_path / "run")),
        data=Data(files=files, validation_fraction=0.1),
    )


def with_training(config, **fields):
    training = dataclasses.replace(config.training, **fields)
    return dataclasses.replace(config, training=training)


def folder_of(config):
    return Path(config.run.folder)


def rows_of(config):
    return read_rows(folder_of(config) / "metrics.jsonl")


def events_of(config, *names):
    with open(folder_of(config) / "events.jsonl") as file:
        found = [json.loads(line) for line in file]
    return [each for each in found if not names or each["event"] in names]


class Killed(BaseException):
    """Past all that a process that is killed does not do either."""


def killed_at(monkeypatch, step):
    log_step = RunLog.log_step

    def log(self, number, *args, **options):
        log_step(self, number, *args, **options)
        if number == step:
            raise Killed

    monkeypatch.setattr(RunLog, "log_step", log)


def slow(monkeypatch, owner, name, seconds):
    function = getattr(owner, name)

    def later(*args, **options):
        time.sleep(seconds)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, later)


@pytest.fixture
def slow_parts(monkeypatch):
    """Seconds of a validation's reading, of what it compiles, and of its picture; of a
    save."""
    slow(monkeypatch, loop, "validation_batches", 0.1)
    slow(monkeypatch, metrics, "draw_loss", 0.1)
    slow(monkeypatch, Checkpointer, "save", 0.1)

    def made(config, make_model):
        step = make_validation_step(config, make_model)

        def traced(*args):
            time.sleep(0.3)
            return step(*args)

        return traced

    monkeypatch.setattr(loop, "make_validation_step", made)


def test_the_parts_of_rows_are_all_the_time_between_them(config, slow_parts):
    """To what a busy machine may put between two looks at a clock: `test_phases` has
    it exactly."""
    train(config)
    rows = rows_of(config)
    for row in rows:
        assert {"compute_seconds", "other_seconds"} <= set(row)
    after = [
        row.get("checkpoint_seconds", 0.0) + row.get("validation_seconds", 0.0)
        for row in rows
    ]
    passed = rows[-1]["unix_seconds"] - rows[0]["unix_seconds"]
    parts = sum(map(whole_seconds, rows[1:])) - after[-1] + after[0]
    assert parts == pytest.approx(passed, abs=0.25)  # 0.9 s are made to pass
    # Of its own step, all that it takes: the first compiles.
    took = [row.get("validation_seconds", 0.0) for row in rows]
    assert took[1] > 0.5 and min(took[3], took[5]) > 0.2
    assert took[0] == took[2] == took[4] == 0
    saved = [row.get("checkpoint_seconds", 0.0) for row in rows]
    assert min(saved[1::2]) > 0.1 and saved[0] == saved[2] == saved[4] == 0
    assert (
        0
        < sum(row.get("dispatch_seconds", 0.0) for row in rows)
        < sum(row["seconds"] for row in rows)
    )
    steps = [row["seconds"] for row in rows]
    assert sum(steps) < sum(map(whole_seconds, rows)) - 1.0


def test_goodput_of_a_run_that_was_killed(config, slow_parts, monkeypatch):
    """Lost is the time of the rows that were taken again, validations among it; saves
    are those of the steps that count, as the page says in one place."""
    config = with_training(config, checkpoint_interval_steps=3)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at(patched, 5)
        train(config)
    cut = [row for row in rows_of(config) if row["step"] > 3]
    train(config)
    (run,) = read_runs([folder_of(config)])
    found = goodput(run.columns, run.events)
    lost = sum(map(whole_seconds, cut))
    assert [row["step"] for row in cut] == [4, 5] and cut[0]["validation_seconds"] > 0.2
    assert found.lost == pytest.approx(lost)
    assert lost > sum(row["seconds"] for row in cut) + 0.2
    rows = rows_of(config)
    for part in ("checkpoint", "validation"):
        own = sum(row.get(f"{part}_seconds", 0.0) for row in rows)
        assert getattr(found, part) == pytest.approx(own)
    began, ended = run.events[0]["unix_seconds"], run.events[-1]["unix_seconds"]
    assert found.whole() == pytest.approx(ended - began, abs=1e-3)
    assert found.other < 0.5 * found.validation


def test_each_save_is_whole_once(config):
    train(config)
    saved, committed = events_of(config, "saved"), events_of(config, "committed")
    assert [each["step"] for each in saved] == [2, 4, 6]
    assert [each["step"] for each in committed] == [2, 4, 6]
    for began, whole in zip(saved, committed, strict=True):
        assert whole["unix_seconds"] >= began["unix_seconds"]
        assert whole["seconds"] > 0
        folder = folder_of(config) / "checkpoints" / str(whole["step"])
        if folder.is_dir():
            files = [each for each in folder.rglob("*") if each.is_file()]
            size = sum(each.stat().st_size for each in files)
            assert 0.5 * size < whole["bytes"] < size
            assert began["bytes"] < whole["bytes"]
    assert events_of(config)[-1]["event"] == "done"


def test_a_long_validation_is_asked_to_save_its_step_once(config, monkeypatch):
    """Each batch of it is longer than the time from save to save."""
    asked = []
    ask = Together.ask
    monkeypatch.setattr(
        Together, "ask", lambda self, act: asked.append(act) or ask(self, act)
    )
    train(
        with_training(
            config,
            num_steps=2,
            validation_batches=4,
            checkpoint_interval_steps=9,
            checkpoint_interval_minutes=1e-9,
        )
    )
    assert asked == ["save"] * 2  # of steps 1 and 2
    assert [each["step"] for each in events_of(config, "saved")] == [1, 2]


@pytest.fixture
def bad_step(monkeypatch):
    """The third, whose loss is no number."""
    take = Steps.__call__

    def taken(self, state, batch, say):
        state, numbers = take(self, state, batch, say)
        self.num_taken = getattr(self, "num_taken", 0) + 1
        return state, numbers | ({"loss": math.nan} if self.num_taken == 3 else {})

    monkeypatch.setattr(Steps, "__call__", taken)


def test_a_save_is_whole_before_an_error_ends_the_run(config, bad_step, monkeypatch):
    slow(monkeypatch, Checkpointer, "_write_commit", 0.3)
    with pytest.raises(ValueError, match="loss is nan at step 3"):
        train(with_training(config, validation_batches=0))
    names = [each["event"] for each in events_of(config)]
    assert names == [
        "started",
        "compiled",
        "saved",
        "not_finite",
        "rows",
        "committed",
        "failed",
    ]


def test_a_kill_in_a_save_leaves_it_begun(config, monkeypatch):
    slow(monkeypatch, Checkpointer, "_write_commit", 1.0)
    killed_at(monkeypatch, 3)
    with pytest.raises(Killed):
        train(config)
    assert [each["step"] for each in events_of(config, "saved")] == [2]
    assert events_of(config, "committed") == []


def test_stopped_right_after_a_save_it_is_saved_once(config, monkeypatch):
    happened = RunLog.happened

    def stop(self, event, step, **fields):
        happened(self, event, step, **fields)
        if event == "saved":
            loop_of_this_run[0]._together.ask("stop")

    loop_of_this_run = []
    run = Loop.run
    monkeypatch.setattr(
        Loop, "run", lambda self: loop_of_this_run.append(self) or run(self)
    )
    monkeypatch.setattr(RunLog, "happened", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2"):
        train(config)
    names = [(each["event"], each["step"]) for each in events_of(config)]
    assert names[2:] == [("saved", 2), ("committed", 2), ("stopped", 2)]
    assert [row["step"] for row in rows_of(config)] == [1, 2]


def test_the_step_that_ends_a_run_leaves_its_numbers(config, bad_step):
    """On disk, in JSON that any reader takes."""
    with pytest.raises(ValueError, match="loss is nan at step 3"):
        train(config)
    assert [row["step"] for row in rows_of(config)] == [1, 2]

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    lines = (folder_of(config) / "events.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    (bad,) = [each for each in found if each["event"] == "not_finite"]
    assert (bad["step"], bad["loss"]) == (3, "nan")
    assert {"gradient_norm", "learning_rate", "counted_tokens"} < set(bad)
    assert bad["num_rows"] == 2
    (of,) = [each for each in found if each["event"] == "rows"]
    assert (of["step"], of["of"]) == (3, "not_finite")
    assert len(of["rows"]) == 2 and all(type(n) is int for n in of["rows"])
    assert found[-1]["event"] == "failed" and found[-1]["why"].startswith("loss is nan")


def test_a_validation_that_ends_a_run_leaves_its_number(config, monkeypatch):
    monkeypatch.setattr(Loop, "_validation_loss", lambda self: math.inf)
    with pytest.raises(ValueError, match="validation_loss is inf at step 2"):
        train(config)
    (bad,) = events_of(config, "not_finite")
    assert (bad["step"], bad["validation_loss"]) == (2, "inf")
    assert [row["step"] for row in rows_of(config)] == [1, 2]


def test_parts_are_what_rows_have():
    row = {f"{part}_seconds": float(10**n) for n, part in enumerate(PARTS)}
    assert whole_seconds(row | {"seconds": 7.0, "unix_seconds": 9.0}) == 111_111.0
    assert whole_seconds({"seconds": 2.0, "data_seconds": 1.0}) == 2.0
