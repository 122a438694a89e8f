"""Rows for Weights & Biases: what its package is given, by a stand-in for it."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from ulysses_jax.config import Config, Data, Mesh, Model, Run, Training
from ulysses_jax.training import train
from ulysses_jax.training.metrics import RunLog, read_rows
from ulysses_jax.training.wandb_run import WandbRun


class Package(ModuleType):
    """`wandb`, as far as it is called: it keeps what it is given.

    Attributes:
      calls: of `init`, its keyword arguments; rows: of `log`; ends: of `finish`.
      error: what init and log raise.
    """

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)  # as one that is installed
        self.Settings = SimpleNamespace
        self.calls, self.rows, self.ends, self.metrics = [], [], [], []
        self.error = None

    def init(self, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(options)
        return self

    def define_metric(self, name, *, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, row):
        if self.error is not None:
            raise self.error
        self.rows.append(row)

    def finish(self, *, exit_code):
        self.ends.append(exit_code)


@pytest.fixture
def package(monkeypatch):
    found = Package()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def config_of(folder, num_steps=2):
    files = folder.with_name("corpus.txt")
    files.write_text("some words and more words\n" * 500)
    return Config(
        run=Run(folder=str(folder), simulated_cpu_devices=8, wandb=True),
        model=Model(width=16, num_layers=1, num_heads=4),
        data=Data(files=str(files)),
        training=Training(
            num_steps=num_steps,
            batch_size=2,
            sequence_tokens=32,
            validation_interval_steps=2,
            validation_batches=1,
        ),
        mesh=Mesh(data=2, seq=4),
    )


@pytest.mark.slow
def test_a_run_and_what_goes_on_with_it_are_one(package, tmp_path):
    folder = tmp_path / "run"
    train(config_of(folder))
    train(config_of(folder, num_steps=3))
    first, second = package.calls
    assert first["id"] == second["id"] == (folder / "wandb_id").read_text().strip()
    assert len(first["id"]) == 16 and second["resume"] == "allow"
    assert first["name"] == first["dir"] == str(folder)
    assert first["config"]["training"]["num_steps"] == 2
    assert first["config"]["model"]["width"] == 16
    assert first["settings"].console == "off"
    assert package.metrics[0] == ("*", "step")
    assert package.ends == [0, 0]
    given: dict[int, dict] = {}
    for each in package.rows:
        given.setdefault(each["step"], {}).update(each)
    assert list(given) == [1, 2, 3]
    assert list(given.values()) == read_rows(folder / "metrics.jsonl")
    assert "validation_loss" in given[2]


def log_of(wandb, folder):
    how = dict(num_steps=9, quiet=True, is_main=True, wandb=wandb)
    return RunLog(folder, **how)


def test_a_run_that_fails_says_so_there(package, tmp_path):
    with (
        pytest.raises(OSError),
        WandbRun(config_of(tmp_path), is_main=True) as run,
    ):
        run.start()
        raise OSError("the disk is full")
    assert package.ends == [1]


def test_a_run_that_is_told_to_stop_does_not_fail(package, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        WandbRun(config_of(tmp_path), is_main=True) as run,
    ):
        run.start()
        raise KeyboardInterrupt
    assert package.ends == [0]


def test_other_processes_log_nothing(package, tmp_path):
    with WandbRun(config_of(tmp_path), is_main=False) as run:
        run.check(), run.start(), run.add({"step": 1})
    assert not package.calls and not package.rows and not package.ends
    assert not (tmp_path / "wandb_id").exists()


def test_that_it_fails_later_ends_no_run(package, tmp_path, capsys):
    with (
        WandbRun(config_of(tmp_path), is_main=True) as run,
        log_of(run, tmp_path) as log,
    ):
        run.start()
        log.log_step(1, 2.0, 9.0, 1.0)
        package.error = RuntimeError("its service ended")
        log.log_step(2, 2.0, 9.0, 1.0)
        log.log_step(3, 2.0, 9.0, 1.0)
    assert [row["step"] for row in package.rows] == [1]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("wandb: its service ended; the run goes on without it") == 1


def test_who_is_not_logged_in_hears_so_before_anything_is_compiled(
    package, tmp_path, capsys
):
    package.error = RuntimeError("api_key not configured")
    message = "wandb.init says: api_key not configured; log in .wandb login., set"
    with pytest.raises(ValueError, match=message):
        train(config_of(tmp_path / "run"))
    assert "compiled" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_the_package_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as one that is not installed
    with pytest.raises(ValueError, match="pip install wandb, or leave run.wandb false"):
        train(config_of(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
