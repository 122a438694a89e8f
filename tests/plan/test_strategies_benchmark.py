"""benchmarks/strategies.py: every program computes one thing, and times become rows."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """strategies, strategies_worker, side_by_side: they import each other by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("strategies", "strategies_worker", "side_by_side")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name, None)


class InThisProcess:
    """A worker without a process, whose runs take what it is told."""

    def __init__(self, make, seconds):
        self.compile, self.seconds = make, iter(seconds)

    def make(self, description):
        return [float(np.linalg.norm(np.ravel(x))) for x in self.compile(description)()]

    def run(self, description):
        return next(self.seconds)

    def drop(self):
        pass


def test_every_strategy_computes_the_same_and_has_a_row(modules):
    strategies, worker, side = modules
    one, ulysses = [(2.0, 2.0), (4.0, 2.0), (6.0, 2.0)], [(1, 3), (1, 3), (9, 4)]
    times = dict.fromkeys(["unsharded", *strategies.SPREAD], one) | {"ulysses": ulysses}
    workers = {
        name: InThisProcess(worker.make, [side.Seconds(*x) for x in each])
        for name, each in times.items()
    }
    # The zigzag order of 8 members needs 16 half-blocks.
    rows = strategies.measure("attention", 32, workers, seconds=0, least=3)
    assert [each["strategy"] for each in rows] == list(times)
    assert rows[1] == {
        "kind": "attention",
        "strategy": "ulysses",
        "tokens": 32,
        "seconds": 1,
        "ratio_to_unsharded": 0.5,  # the median of 1/2, 1/4, 9/6
        "ratio_to_ulysses": 1,
        "busy_ratio_to_unsharded": 1.5,
        "rounds": 3,
    }
    assert rows[2]["ratio_to_ulysses"] == 2
    strategies.print_table(rows, [32])


def test_programs_that_differ_are_not_compared(modules):
    strategies, _, side = modules
    workers = {
        name: InThisProcess(lambda _, x=x: lambda: [np.float32(x)], [])
        for name, x in {"unsharded": 1.0, "ring": 1.001}.items()
    }
    with pytest.raises(RuntimeError, match="step, 8 tokens: ring computed .1.001"):
        strategies.measure("step", 8, workers, seconds=0)


def test_a_worker_answers_and_its_end_is_an_error(modules, tmp_path):
    _, _, side = modules
    file = tmp_path / "worker.py"
    file.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from side_by_side import serve\n"
        "def make(asked):\n"
        "    print('not an answer')\n"
        "    return lambda: [[3.0, asked['x']]] if asked['x'] else exit(7)\n"
        "serve(make)\n"
    )
    with side.Worker([sys.executable, str(file), str(FOLDER)]) as worker:
        assert worker.make({"x": 4.0}) == [5.0]
        assert 0 <= worker.run({"x": 4.0}).passed < 1
        worker.drop()
        with pytest.raises(RuntimeError, match="ended with 7 at make"):
            worker.make({"x": 0})


def test_rounds_begin_one_program_later_each_time(modules):
    _, _, side = modules
    order = []

    def program(name):
        def run():
            order.append(name)
            return side.Seconds(1.0, 1.0)

        return run

    programs = {name: program(name) for name in "abc"}
    times = side.time_in_turn(programs, seconds=9, least=2, most=5)
    assert "".join(order) == "abcbcacab"  # 9 seconds are three rounds
    assert {len(each) for each in times.values()} == {3}
