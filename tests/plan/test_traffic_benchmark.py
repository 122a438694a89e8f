"""benchmarks/traffic.py: a strategy's bytes, off the program, beside a hand count."""

import pytest
from files import module_of
from matplotlib.image import imread


@pytest.fixture(scope="module")
def benchmark():
    return module_of("benchmarks/traffic.py")


@pytest.mark.parametrize(
    "strategy, group, elements",
    [
        # Of T D mu, forward and backward; 4 devices.
        ("megatron", 1, 2 * 4),
        ("ulysses", 8, 2 * (2 + 2 / 8) / 4),
    ],
)
def test_a_point_is_the_formula(benchmark, tmp_path, strategy, group, elements):
    row = benchmark.row(strategy, 4, "weak", group)
    assert (row["strategy"], row["devices"], row["tokens"]) == (strategy, 4, 256)
    assert row["ratio"] == pytest.approx(1, abs=0.01)
    by_hand = elements * 256 * 128 * 3 / 4 * 4
    assert row["formula_bytes"] == pytest.approx(by_hand)
    benchmark.plot([row], tmp_path / "traffic.png")
    assert imread(tmp_path / "traffic.png").shape[0] > 500


def test_what_a_strategy_cannot_cut_has_no_point(benchmark):
    assert benchmark.row("megatron", 8, "strong", 8) is None
    assert benchmark.row("hybrid", 2, "strong", 1) is None
