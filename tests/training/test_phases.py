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
