"""Numbers are read one step late, and none that is not finite is logged or saved."""

from types import SimpleNamespace

import pytest

from ulysses_jax.training import in_flight, phases
from ulysses_jax.training.in_flight import InFlight, check_finite, one_behind
from ulysses_jax.training.phases import Phases


class Clock:
    """Devices that take two seconds a step, and a host that waits only to read."""

    def __init__(self, monkeypatch):
        self.now, self.ready, self.read = 0.0, 0.0, []
        time = SimpleNamespace(monotonic=lambda: self.now)
        for module in (in_flight, phases):
            monkeypatch.setattr(module, "time", time)

    def dispatch(self, number, loss=1.0):
        self.ready = max(self.ready, self.now) + 2.0
        ready, clock = self.ready, self

        class Loss:
            def __float__(self):
                clock.now = max(clock.now, ready)
                clock.read.append(number)
                return loss

        return {"loss": Loss()}


def test_one_step_is_in_flight_and_seconds_are_of_a_step(monkeypatch):
    clock, rows = Clock(monkeypatch), []
    steps = InFlight(100, lambda number, **row: rows.append((number, row)), Phases())
    for number in range(1, 5):
        started = clock.now
        steps.add(number, clock.dispatch(number), started)
        assert clock.read == list(range(1, number))
    steps.settle()
    clock.now += 50  # a validation
    steps.add(5, clock.dispatch(5), clock.now)
    steps.settle()
    steps.settle()
    assert [number for number, _ in rows] == clock.read == [1, 2, 3, 4, 5]
    for _, row in rows:
        numbers = {"loss": 1.0, "seconds": 2.0, "tokens_per_second": 50.0}
        other = 50.0 if row is rows[4][1] else 0.0
        assert row == numbers | {"compute_seconds": 2.0, "other_seconds": other}


def test_the_end_of_the_step_added_last(monkeypatch):
    """While the one before is waited for, as nearly always."""
    clock, left = Clock(monkeypatch), []
    steps = InFlight(100, lambda number, **row: None, Phases())
    assert steps.seconds_left() is None

    class Seen:
        def __init__(self, loss):
            self.loss = loss

        def __float__(self):
            left.append(steps.seconds_left())
            return float(self.loss)

    for number in range(1, 5):
        steps.add(number, {"loss": Seen(clock.dispatch(number)["loss"])}, clock.now)
    assert left == [None, 4.0, 4.0] and steps.seconds_left() == 2.0
    clock.now += 50
    assert steps.seconds_left() == 0.0


def test_a_wait_for_data_is_part_of_the_step(monkeypatch):
    clock, rows = Clock(monkeypatch), []
    steps = InFlight(100, lambda number, **row: rows.append(row["seconds"]), Phases())
    for number in range(1, 4):
        started = clock.now
        clock.now += 7  # the batch comes late
        steps.add(number, clock.dispatch(number), started)
    steps.settle()
    assert sum(rows) == clock.now == 23


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_logged(monkeypatch, loss):
    """Its row is handed over before that is said."""
    clock, rows, last = Clock(monkeypatch), [], []
    steps = InFlight(
        100,
        lambda number, **row: rows.append(number),
        Phases(),
        on_last=lambda number, row: last.append((number, str(row["loss"]))),
    )
    steps.add(1, clock.dispatch(1), 0.0)
    steps.add(2, clock.dispatch(2, loss), 0.0)
    with pytest.raises(ValueError, match=rf"loss is {loss} at step 2: lower training"):
        steps.add(3, clock.dispatch(3), 0.0)
    assert rows == [1] and last == [(2, str(loss))]


def test_every_number_is_looked_at():
    check_finite(1, {"loss": 1.0, "validation_loss": 2.0})
    with pytest.raises(ValueError, match="validation_loss is nan at step 3"):
        check_finite(3, {"loss": 1.0, "validation_loss": float("nan")})


def test_one_behind():
    made = []

    def items():
        for i in range(3):
            made.append(i)
            yield i

    assert [(item, len(made)) for item in one_behind(items())] == [
        (0, 2),
        (1, 3),
        (2, 3),
    ]
    assert list(one_behind([])) == []


def test_a_step_in_which_no_token_counts_has_no_loss():
    rows = []
    steps = InFlight(100, lambda number, **row: rows.append(row), Phases())
    means = {"loss": 0.0, "objective": 0.0, "gradient_norm": 0.0}
    for number, counted in ((1, 3), (2, 0)):
        steps.add(number, means | {"counted_tokens": counted}, 0.0)
    steps.settle()
    assert rows[0]["loss"] == rows[0]["objective"] == 0
    assert rows[1]["loss"] is None and "objective" not in rows[1]
    assert rows[1]["counted_tokens"] == 0


def test_a_skipped_step_has_no_loss_and_only_those_in_a_row_are_counted():
    """Also where the loss is finite and a gradient is not: it is no spike's."""
    rows, told, inf = {}, [], float("inf")
    steps = InFlight(
        100,
        lambda number, **row: rows.update({number: row}),
        Phases(),
        most_skipped=2,
        on_skipped=lambda *what: told.append(what),
    )
    good = {"loss": 5.0, "gradient_norm": 1.0, "skipped": 0}
    bad = good | {"gradient_norm": inf, "skipped": 1}
    for number, metrics in enumerate([good, bad, bad, good, bad, bad, bad], 1):
        steps.add(number, metrics, 0.0)
    assert told == [(number, "gradient_norm is inf") for number in (2, 3, 5, 6)]
    with pytest.raises(ValueError, match="norm is inf at step 7, after 2 that were sk"):
        steps.settle()
    assert [rows[number]["loss"] for number in rows] == [5, None, None, 5, None, None]
    assert [n for n, row in rows.items() if row.get("skipped")] == [2, 3, 5, 6]
    assert "gradient_norm" not in rows[2] and rows[4]["gradient_norm"] == 1
