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
    assert of._limit_seconds() is None
    wait(of, "data", 1, 7200.0)
    assert of._limit_seconds() is None
    wait(of, "compute", 1, 60.0)
    assert of._limit_seconds() == 600.0
    wait(of, "compute", 2, 1200.0)
    wait(of, "compute", 3, 1.0)
    assert of._limit_seconds() == 6000.0
    assert Phases(0.5)._limit_seconds() == 30.0


def test_a_step_of_longer_rows_may_take_as_long_as_it_does(wait):
    """The steps before say nothing of it; afterwards it is one of them."""
    of = Phases()
    wait(of, "compute", 1, 1.0)
    of.unlike(3)
    wait(of, "compute", 2, 1.0)
    assert of._limit_seconds() is None
    wait(of, "compute", 3, 7200.0)
    assert of._limit_seconds() == 36000.0
