"""What a run's folder says, whatever state it was left in."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from run_folders import event, lines, row, write_run

from ulysses_jax.runs.goodput import Goodput, goodput
from ulysses_jax.runs.read import read_runs
from ulysses_jax.training.journal import Journal


def test_broken_lines_are_passed_over(tmp_path):
    run = write_run(tmp_path / "run", [row(1), row(2, gradient_norm=0.5)], [])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[3]\n{"event": "mine"}\n{"step": 3, "loss": 1.')
    kept = [event(1.0, 0, "started"), event(2.0, 1, "unheard_of", x=[1])]
    broken = '{"event": "done"}\n7\n{"unix_seconds": "x", "step": 1, "event": "y"}\n'
    broken += '{"unix_seconds": NaN, "step": 1, "event": "y"}\n'
    broken += '{"unix_seconds": 2, "step": 1, "event": "saved", "seconds": "long"}\n{"u'
    (run / "events.jsonl").write_text(lines(kept) + broken)
    (found,) = read_runs([run])
    assert found.num_rows() == 2
    np.testing.assert_array_equal(found.columns["gradient_norm"], [np.nan, 0.5])
    assert found.events == kept


def test_the_way_back_from_a_spike_is_read_however_many_rows_it_is_of(tmp_path):
    rows = [row(n, unix_seconds=float(n)) for n in (1, 2, 3)]
    run = write_run(tmp_path / "run", rows)
    passed_over = list(range(10**9, 10**9 + 20_000))
    journal = Journal(run)
    journal.add("started", 0, at=0.0)
    journal.add("rolled_back", 3, at=3.0, to_step=1, of_rows=passed_over)
    journal.close()
    (found,) = read_runs([run])
    _, back, *of = found.events
    assert (back["to_step"], back["num_rows"]) == (1, 20_000)
    assert {(each["event"], each["of"], each["step"]) for each in of} == {
        ("rows", "rolled_back", 3)
    }
    assert [n for each in of for n in each["rows"]] == passed_over
    parts = goodput(found.columns, found.events[:2])
    assert parts == Goodput(useful=1.0, lost=2.0)


@pytest.mark.parametrize("at_a_time", [1, 2, 100])
def test_each_step_once_in_order(tmp_path, monkeypatch, at_a_time):
    """Rows that were put together by hand: of one step the last counts."""
    monkeypatch.setattr("ulysses_jax.runs.read._ROWS_AT_A_TIME", at_a_time)
    rows = [row(1), row(2, 5.0), row(4, mfu=0.5), row(2, 3.0), row(3)]
    (found,) = read_runs([write_run(tmp_path / "run", rows)])
    assert found.columns["step"].tolist() == [1, 2, 3, 4]
    assert found.columns["loss"].tolist() == [2.0, 3.0, 2.0, 2.0]
    np.testing.assert_array_equal(found.columns["mfu"], [np.nan] * 3 + [0.5])


def test_an_old_run_has_no_events(tmp_path):
    (found,) = read_runs([write_run(tmp_path / "run", [row(1)])])
    assert found.events is None and "unix_seconds" not in found.columns


def test_config_fields_have_dotted_names(tmp_path):
    (found,) = read_runs([write_run(tmp_path / "run", [row(1)], rope={"base": 1e4})])
    assert found.config["model.rope.base"] == 1e4
    assert found.config["training.num_steps"] == 100


def test_stages_are_runs(tmp_path):
    for stage in (1, 2):
        write_run(tmp_path / "x" / f"stage_{stage}", [row(1)])
    found = read_runs([tmp_path / "x"])
    assert [run.name for run in found] == ["x/stage_1", "x/stage_2"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / "a/runs/x", tmp_path / "b/runs/x", tmp_path / "b/runs/y"]
    for folder in folders:
        write_run(folder, [row(1)])
    names = [run.name for run in read_runs(folders)]
    assert names == ["a/runs/x", "b/runs/x", "y"]


def state_of(folder, **how):
    (found,) = read_runs([write_run(folder, [row(1)], **how)])
    return found.state, found.goes_on


@pytest.mark.parametrize("end", ["done", "stopped", "failed"])
def test_a_run_that_said_how_it_ended(tmp_path, end):
    events = [event(1.0, 0, "started"), event(2.0, 1, end)]
    assert state_of(tmp_path / "run", events=events) == (end, False)


def test_a_run_that_goes_on(tmp_path):
    now = time.time()
    events = [event(now - 99, 0, "started"), event(now - 9, 1, "saved")]
    how = dict(events=events, is_at_work=True)
    assert state_of(tmp_path / "run", **how) == ("goes on", True)


def test_one_that_was_started_again_after_its_end_goes_on(tmp_path):
    now = time.time()
    events = [event(now - 99, 9, "done"), event(now - 9, 9, "started")]
    assert state_of(tmp_path / "run", events=events, is_at_work=True)[1]


def test_one_that_compiles_after_its_end_goes_on(tmp_path):
    """It writes its first event when it has compiled, and its lock before."""
    events = [event(time.time() - 3600, 9, "stopped")]
    run = write_run(tmp_path / "run", [row(1)], events, is_at_work=True)
    assert read_runs([run])[0].goes_on
    (run / "lock").unlink()
    assert read_runs([run])[0].state == "stopped"


def an_hour_ago(run):
    past = time.time() - 3600
    for file in run.iterdir():
        os.utime(file, (past, past))
    (found,) = read_runs([run])
    return found.state, found.goes_on


def test_a_run_that_was_killed(tmp_path):
    """Its lock is left, and since long there was no sign of life."""
    events = [event(time.time() - 3600, 0, "started")]
    run = write_run(tmp_path / "run", [row(1)], events, is_at_work=True)
    state, goes_on = an_hour_ago(run)
    assert "without a word" in state and not goes_on


def test_a_lock_that_a_process_of_this_host_left(tmp_path):
    """No ten minutes are waited for, and an end that was said stands."""
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
    )
    run = write_run(tmp_path / "run", [row(1)], is_at_work=True)
    for holder, host, goes_on in (
        (int(ended.stdout), socket.gethostname(), False),
        (int(ended.stdout), "another", True),
        (os.getpid(), socket.gethostname(), True),
        (1, socket.gethostname(), True),
    ):
        (run / "lock").write_text(
            f"process {holder} on {host} since 2026-01-01 00:00:00\n"
        )
        assert read_runs([run])[0].goes_on == goes_on


def test_steps_of_hours_are_no_silence(tmp_path):
    rows = [row(1, seconds=3000.0, unix_seconds=time.time() - 3600)]
    run = write_run(tmp_path / "run", rows, is_at_work=True)
    assert an_hour_ago(run)[1]


def test_old_runs(tmp_path):
    assert state_of(tmp_path / "one", num_steps=1) == ("done", False)
    assert state_of(tmp_path / "two") == ("ended before its last step", False)
    assert state_of(tmp_path / "three", is_at_work=True) == ("goes on", True)
    assert not an_hour_ago(tmp_path / "three")[1]


def test_what_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [row(1)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no run's folder"):
        read_runs([run, tmp_path / "empty"])
    with pytest.raises(ValueError, match="gone is not there"):
        read_runs([tmp_path / "gone"])
    with pytest.raises(ValueError, match="stands twice"):
        read_runs([run, tmp_path / "empty" / ".." / "run"])
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="neither a metrics.jsonl nor checkpoints/"):
        read_runs([run])


@pytest.mark.parametrize("text", [b"a: [1\n", b"just words\n", b"\xff\xfe: 1", b""])
def test_a_config_that_cannot_be_read(tmp_path, text):
    run = write_run(tmp_path / "run", [row(1)])
    (run / "config.yaml").write_bytes(text)
    with pytest.raises(
        ValueError, match="config.yaml (is not valid YAML|is no config)"
    ):
        read_runs([run])
