"""How long a run waits before it takes a wait to be without end."""

from types import SimpleNamespace

import pytest

from ulysses_jax.training import phases
from ulysses_jax.training.phases import Phases


@pytest.fixture
def wait(monkeypatch):
    """Waits in a phase of a step, by a clock that nothing else moves."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(phases, "time", clock)

    def in_phase(of, phase, step, seconds):
        with of(phase, step):
            clock.now += seconds

    return in_phase


def test_the_limit_is_of_the_longest_step(wait):
    of = Phases()
    assert of._limit_seconds("compute") is None
    wait(of, "data", 1, 7200.0)
    assert of._limit_seconds("compute") is None
    wait(of, "compute", 1, 60.0)
    assert of._limit_seconds("compute") == 600.0
    wait(of, "compute", 2, 1200.0)
    wait(of, "compute", 3, 1.0)
    assert of._limit_seconds("compute") == 6000.0
    assert Phases(0.5)._limit_seconds("compute") == 30.0


def test_a_step_of_longer_rows_may_take_as_long_as_it_does(wait):
    """The steps before say nothing of it; afterwards it is one of them."""
    of = Phases()
    wait(of, "compute", 1, 1.0)
    of.unlike(3)
    wait(of, "compute", 2, 1.0)
    assert of._limit_seconds("compute") is None
    wait(of, "compute", 3, 7200.0)
    assert of._limit_seconds("compute") == 36000.0


def test_a_save_may_take_what_a_slow_disk_needs(wait):
    """Also the first one, of which nothing is known yet."""
    of = Phases(saved_bytes=10**12)
    assert of._limit_seconds("checkpoint") == 1800 + 20_000
    wait(of, "compute", 1, 1e6)
    assert of._limit_seconds("checkpoint") == 1800 + 20_000
    assert Phases()._limit_seconds("checkpoint") == 1800
    assert Phases(2.0, saved_bytes=10**12)._limit_seconds("checkpoint") == 120.0


def test_all_that_is_taken_adds_up_to_the_time_that_has_passed(monkeypatch):
    """Whatever is in no phase, or in one inside of another; and each second once."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(phases, "time", clock)

    def passes(seconds):
        clock.now += seconds

    of = Phases()
    passes(1.0)
    with of("data", 1):
        passes(2.0)
    with of("validation", 1, is_one_wait=False):
        passes(4.0)
        with of("validation", 1):
            passes(8.0)
        with of("checkpoint", 1):
            passes(16.0)
        assert of.take("checkpoint") == {"checkpoint_seconds": 16.0}
        passes(32.0)
    passes(64.0)
    assert of.take("checkpoint", "validation") == {"validation_seconds": 44.0}
    assert of.take("validation") == {}
    with of("compute", 2):
        passes(128.0)
    row = {"data_seconds": 2.0, "compute_seconds": 128.0, "other_seconds": 65.0}
    assert of.take() == row and of.take() == {"other_seconds": 0.0}
    assert 16 + 44 + sum(row.values()) == clock.now - 100


def test_what_is_no_one_wait_is_not_watched(wait):
    """A validation of an hour is many waits."""
    of = Phases()
    wait(of, "compute", 1, 1.0)
    with of("validation", 1, is_one_wait=False):
        assert of._now is None
        with of("validation", 1):
            assert of._now is not None and of._now[0] == "validation"
            with of("checkpoint", 1):
                assert of._now[0] == "checkpoint"
            assert of._now[0] == "validation"
        assert of._now is None
