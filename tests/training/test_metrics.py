"""What a run shows and leaves behind: rows, resumed rows, plain lines, the picture."""

import io
import json
import resource
import struct
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from ulysses_jax.training import metrics
from ulysses_jax.training.metrics import RunLog, read_rows
from ulysses_jax.training.picture import Losses, _smooth, draw_loss

CONTROL = [chr(i) for i in range(32) if chr(i) != "\n"]


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What was drawn, in place of the picture, which takes its time."""
    drawn = []

    def draw(losses, path, *, title):
        steps, _ = losses.arrays()
        drawn.append((steps[-1], len(steps), title))

    monkeypatch.setattr(metrics, "draw_loss", draw)
    return drawn


def run(folder, steps, *, num_steps=10, validate_every=5, finish=False, **options):
    options = dict(quiet=True, is_main=True) | options
    with RunLog(folder, num_steps=num_steps, **options) as log:
        for step in steps:
            log.log_step(step, loss(step), 1000.0, 0.5, gradient_norm=1.5)
            if step % validate_every == 0:
                log.log_validation(step, loss(step) + 0.25)
        if finish:
            log.finish()


def loss(step):
    return 6.0 / step


def losses_of(rows):
    losses = Losses()
    for row in rows:
        losses.add(row)
    return losses


def rows_of(folder):
    """Every line must be a whole row."""
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """(step, tag, value) of the scalars, and the steps from which events are void."""
    scalars, purged = [], []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.name):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]
            if event.HasField("session_log"):
                purged.append(event.step)
            for value in event.summary.value:
                scalars.append((event.step, value.tag, value.simple_value))
    return scalars, purged


def test_one_row_a_step(tmp_path):
    run(tmp_path, range(1, 11))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    began, now = min(r["unix_seconds"] for r in rows), time.time()
    assert now - 60 < began <= rows[0].pop("unix_seconds") <= now
    assert rows[0] == {
        "step": 1,
        "loss": 6.0,
        "tokens_per_second": 1000.0,
        "seconds": 0.5,
        "gradient_norm": 1.5,
    }
    assert {
        r["step"]: r["validation_loss"] for r in rows if "validation_loss" in r
    } == {
        5: 1.45,
        10: 0.85,
    }


def test_rows_are_on_disk_at_once(tmp_path):
    with RunLog(tmp_path, num_steps=9, quiet=True, is_main=True) as log:
        for step in (1, 2):
            log.log_step(step, 0.5, 1.0, 1.0)
            assert rows_of(tmp_path)[-1]["step"] == step
        log.log_validation(2, 3.0)
        assert rows_of(tmp_path)[-1]["validation_loss"] == 3.0
        with pytest.raises(ValueError, match="step 2 comes after step 2"):
            log.log_step(2, 1.0, 1.0, 1.0)
        with pytest.raises(ValueError, match=r"comes after log_step\(3\)"):
            log.log_validation(3, 1.0)


def test_seconds_after_a_step_are_added_to_its_row(tmp_path):
    """A row that becomes shorter leaves nothing of itself behind."""
    with RunLog(tmp_path, num_steps=9, quiet=True, is_main=True) as log:
        log.log_step(1, 0.5, 1.0, 1.0, checkpoint_seconds=0.123456789)
        log.add_seconds({"checkpoint_seconds": 0.876543211})
        assert rows_of(tmp_path)[0]["checkpoint_seconds"] == 1.0
        log.add_seconds({"validation_seconds": 2.0})
        log.add_seconds({})
        (row,) = rows_of(tmp_path)
        assert row["checkpoint_seconds"] == 1.0 and row["validation_seconds"] == 2.0
        log.log_step(2, 0.5, 1.0, 1.0)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


def test_seconds_are_added_to_no_row_of_an_earlier_start(tmp_path):
    for first_step in (0, 1):
        options = dict(quiet=True, first_step=first_step, is_main=True)
        with RunLog(tmp_path, num_steps=9, **options) as log:
            before = rows_of(tmp_path)
            log.add_seconds({"checkpoint_seconds": 1.0})
            assert rows_of(tmp_path) == before
            log.log_step(first_step + 1, 0.5, 1.0, 1.0)


def test_a_resumed_run_reads_its_rows_once(tmp_path, drawn, monkeypatch, capfd):
    """And not for each picture, nor for its last words."""
    run(tmp_path, range(1, 6))
    with RunLog(tmp_path, num_steps=10, quiet=True, is_main=True, first_step=5) as log:
        for name in ("rows_in", "read_rows", "objects_in_lines"):
            monkeypatch.setattr(metrics, name, None)
        for step in range(6, 11):
            log.log_step(step, loss(step), 1000.0, 0.5)
        log.log_validation(10, 2.0)
        log.finish()
    assert drawn[-1][:2] == (10, 10)
    assert "best validation loss 1.4500 at step 5" in capfd.readouterr().out


def test_rows_that_are_taken_again_are_lost_with_all_their_time(tmp_path):
    parts = dict(data_seconds=0.25, compute_seconds=0.25, other_seconds=1.0)
    with RunLog(tmp_path, num_steps=9, quiet=True, is_main=True) as log:
        log.log_step(1, 0.5, 1.0, 0.5, **parts)
        log.log_step(2, 0.5, 1.0, 0.5)  # of an older run
        log.log_step(3, 0.5, 1.0, 0.5, **parts)
        log.add_seconds({"validation_seconds": 2.0, "checkpoint_seconds": 4.0})
    with RunLog(tmp_path, num_steps=9, quiet=True, is_main=True, first_step=1) as log:
        log.started(1.0)
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["lost_steps"], event["lost_seconds"]) == (2, 8.0)


def test_resume_cuts_what_came_after(tmp_path):
    run(tmp_path, range(1, 8))
    before = rows_of(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a row
    assert read_rows(tmp_path / "metrics.jsonl") == before
    run(tmp_path, range(6, 11), first_step=5)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[:5] == before[:5]
    _, purged = events(tmp_path)
    assert 6 in purged


def test_rows_are_not_held_at_the_start(tmp_path):
    rows = [{"step": step, "loss": 1.0, "seconds": 0.5} for step in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    run(tmp_path, [])  # what is made once is made
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tracemalloc.start()
    with RunLog(tmp_path, num_steps=9999, first_step=4990, quiet=True, is_main=True):
        held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 500_000 and rows_of(tmp_path) == rows[:4990]


def test_resume_at_zero_starts_afresh(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, [])
    assert rows_of(tmp_path) == []


def test_resume_may_not_log_a_step_again(tmp_path):
    with pytest.raises(ValueError, match="step 5 comes after step 5"):
        run(tmp_path, [5], first_step=5)


def test_tensorboard(tmp_path):
    run(tmp_path, range(1, 6))
    scalars, _ = events(tmp_path)
    assert (5, "validation_loss", pytest.approx(1.45)) in scalars
    for step in range(1, 6):
        assert (step, "loss", pytest.approx(loss(step))) in scalars
        assert (step, "gradient_norm", 1.5) in scalars


def test_other_processes_write_nothing(tmp_path, capfd):
    run(tmp_path / "run", range(1, 6), is_main=False, finish=True)
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_quiet_lines_are_plain(tmp_path, capfd):
    run(tmp_path / "tiny", range(1, 11), finish=True)
    out, err = capfd.readouterr()
    assert not any(c in out for c in CONTROL) and err == ""
    lines = out.splitlines()
    assert lines[0] == "step 1/10  loss 6.0000  1,000 tokens/s"
    assert "step 5/10  loss 1.2000  validation loss 1.4500" in lines
    assert str(tmp_path / "tiny") in lines[-1]
    assert "final loss 0.6000 at step 10" in lines[-1]
    assert "best validation loss 0.8500 at step 10" in lines[-1]
    assert len(lines) == 4  # the first step, two validations, the last word


def test_quiet_lines_come_every_so_often(tmp_path, capfd, monkeypatch):
    clock = iter(np.arange(0.0, 1000.0, 4.0))
    monkeypatch.setattr(
        metrics, "time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time)
    )
    run(tmp_path, range(1, 11), num_steps=100, validate_every=1000)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == [
        f"step {s}" for s in (1, 4, 7, 10)
    ]
    assert lines[-1].endswith("6m 00s left")  # 90 steps of 4 seconds


@pytest.fixture
def terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        metrics,
        "Console",
        lambda **options: Console(
            file=screen, force_terminal=True, width=100, **options
        ),
    )
    return screen


def test_live_bar(tmp_path, terminal):
    with RunLog(tmp_path / "lr[a]", num_steps=10, quiet=False, is_main=True) as log:
        for step in range(1, 11):
            log.log_step(step, loss(step), 1000.0, 0.5)
        log.log_validation(10, 0.75)
        log.say("[saved] a line")
        log.finish()
    shown = terminal.getvalue()
    for part in ("lr[a]", "10/10", "loss 0.6000", "1,000 tokens/s", "left"):
        assert part in shown
    assert "[saved] a line" in shown and "validation loss 0.7500" in shown


def test_terminal_is_given_back_on_an_error(tmp_path, terminal):
    with pytest.raises(KeyError):
        with RunLog(tmp_path, num_steps=10, quiet=False, is_main=True) as log:
            log.log_step(1, 1.0, 1.0, 1.0)
            raise KeyError
    hide, show = "\x1b[?25l", "\x1b[?25h"
    shown = terminal.getvalue()
    assert hide in shown and shown.rindex(show) > shown.rindex(hide)
    assert len(rows_of(tmp_path)) == 1


def test_picture_shows_the_whole_resumed_run(tmp_path, drawn, monkeypatch):
    """At every validation, when interrupted, and at the end; once for what is new."""
    with pytest.raises(KeyError):
        with RunLog(tmp_path / "tiny", num_steps=10, quiet=True, is_main=True) as log:
            for step in range(1, 8):
                log.log_step(step, loss(step), 1000.0, 0.5)
                if step == 5:
                    log.log_validation(5, 1.45)
            raise KeyError
    assert drawn == [(5, 5, "tiny"), (7, 7, "tiny")]
    run(tmp_path / "tiny", range(6, 10), first_step=5, finish=True)
    assert drawn[2:] == [(9, 9, "tiny")]
    monkeypatch.setattr(metrics, "draw_loss", draw_loss)
    run(tmp_path / "tiny", [10], first_step=9)
    picture = imread(tmp_path / "tiny" / "loss.png")
    assert picture.shape[:2] == (720, 1280)
    blue, orange = (0x2F, 0x6F, 0xB0), (0xD9, 0x62, 0x2B)
    for color in (blue, orange):  # both curves are there
        near = np.abs(picture[..., :3] * 255 - color).max(axis=-1) < 8
        assert near.sum() > 200


def test_a_name_is_no_tex(tmp_path):
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    name = "lr$1$ $\\frac$ $a__$ ^_{ 100% \udcff\nnext"
    draw_loss(losses_of(rows), tmp_path / "loss.png", title=name)
    assert imread(tmp_path / "loss.png").shape[:2] == (720, 1280)


def test_no_picture_ends_no_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(metrics, "draw_loss", draw_loss)
    (tmp_path / "loss.png").mkdir()
    run(tmp_path, range(1, 6), finish=True)
    said = capfd.readouterr().out
    assert f"{tmp_path}/loss.png could not be drawn: [Errno 21] Is a directory" in said
    assert "final loss 1.2000 at step 5" in said


def test_rows_of_others_are_passed_over(tmp_path):
    """What is no row of ours ends nothing; a run that goes on drops it."""
    others = ['{"step": "3"}', '{"step": null}', "[1]", "7", '{"eval": 1.0, "step": 2}']
    others += ['{"step": 1, "loss": "low"}', '{"step": 2.5, "loss": 1}', '"\u00b2"']
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*others, '{"step": 1, "loss": 6.0}', "no JSON", ""]))
    assert [row["step"] for row in read_rows(path)] == [1]
    run(tmp_path, range(2, 6), first_step=1, finish=True)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_events_are_kept_and_say_what_is_taken_again(tmp_path):
    """Of a run that was killed after its fifth step, and goes on from its third."""
    options = dict(num_steps=9, quiet=True, is_main=True)
    with RunLog(tmp_path, **options) as log:
        log.started(10.5, num_devices=8)
        for step in range(1, 6):
            log.log_step(step, 1.0, 1.0, 0.5)
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"unix_sec')  # as a full disk leaves it
    with pytest.raises(KeyboardInterrupt):
        with RunLog(tmp_path, first_step=3, **options) as log:
            log.started(20.5)
            log.happened("saved", 4, seconds=0.25)
            raise KeyboardInterrupt
    with pytest.raises(ValueError), RunLog(tmp_path, first_step=4, **options):
        raise ValueError("loss is nan")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines.pop(1) == '{"unix_sec'
    events = [json.loads(line) for line in lines]
    times = [event.pop("unix_seconds") for event in events]
    assert times[:2] == [10.5, 20.5] and times[2:] == sorted(times[2:])
    assert abs(times[-1] - time.time()) < 60
    nothing = {"lost_steps": 0, "lost_seconds": 0}
    assert events == [
        {"step": 0, "event": "started", "num_devices": 8, **nothing},
        {"step": 3, "event": "started", "lost_steps": 2, "lost_seconds": 1.0},
        {"step": 4, "event": "saved", "seconds": 0.25},
        {"step": 3, "event": "stopped"},
        {"step": 4, "event": "failed", "why": "loss is nan"},
    ]


@pytest.mark.parametrize("which", ["metrics.jsonl", "tensorboard"])
def test_a_file_that_cannot_grow_is_an_error_at_once(tmp_path, which):
    """A limit on file sizes, as by a quota; a full disk is alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 20_000
    if which == "metrics.jsonl":  # events take more room than rows
        row = {"step": 0, "loss": 1.0} | {f"number_{i}": 1.0 for i in range(limit // 9)}
        (tmp_path / which).write_text(json.dumps(row) + "\n")
    with pytest.raises(
        OSError, match="step .* could not be written.*too large"
    ) as error:
        with RunLog(tmp_path, num_steps=9, quiet=True, is_main=True) as log:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                for step in range(1, 1000):
                    log.log_step(step, 1.0, 1.0, 1.0)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the same command resumes" in str(error.value)
    files = [p for p in tmp_path.rglob("*") if p.stat().st_size >= limit]
    assert [p.relative_to(tmp_path).parts[0] for p in files] == [which]


@pytest.mark.parametrize("num_rows", [1, 2, 500])
def test_picture_of_any_length(tmp_path, num_rows):
    rows = [
        {"step": s + 1, "loss": float("nan") if s == 3 else 1.0}
        for s in range(num_rows)
    ]
    draw_loss(losses_of(rows), tmp_path / "loss.png", title="x")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_smoothing_keeps_a_line_and_takes_noise(tmp_path):
    steps = np.arange(600)
    ramp = _smooth(steps.astype(float))
    np.testing.assert_allclose(ramp[:580], steps[:580])
    noise = np.random.default_rng(0).normal(size=600)
    assert _smooth(noise)[50:].std() < 0.4


def test_no_step_taken(tmp_path, capfd):
    run(tmp_path, [], finish=True)
    assert "no step was taken" in capfd.readouterr().out


@pytest.mark.parametrize("losses", [(2.0, None), (None, None)])
def test_a_step_without_a_loss(tmp_path, capsys, losses):
    """It is said, its row is one, and it is no loss of 0 in what comes after."""
    options = dict(num_steps=2, quiet=True, is_main=True)
    with RunLog(tmp_path, **options) as log:
        for step, loss in enumerate(losses, 1):
            counted = 0.0 if loss is None else 9.0
            log.log_step(step, loss, 1.0, 1.0, counted_tokens=counted)
        log.log_validation(2, 3.0)
        log.finish()
    assert ["loss" in row for row in rows_of(tmp_path)] == [
        x is not None for x in losses
    ]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2
    out = capsys.readouterr().out
    assert "step 2: none of its tokens counts, so it has no loss" in out
    last = "no step has a loss" if losses[0] is None else "final loss 2.0000 at step 1"
    assert last in out and "step 2/2  no loss  validation loss 3.0000" in out
    losses = losses_of(read_rows(tmp_path / "metrics.jsonl"))
    draw_loss(losses, tmp_path / "x.png", title="x")
