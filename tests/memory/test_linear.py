"""Memory grows with the tokens, not with their square: benchmarks/memory.py, short."""

import pytest
from files import module_of

from ulysses_jax.config import in_pieces
from ulysses_jax.placement import place

LENGTHS = [128 * 1024, 256 * 1024, 512 * 1024]


@pytest.fixture(scope="module")
def benchmark():
    return module_of("benchmarks/memory.py")


def measured(benchmark, rung):
    return {tokens: benchmark.temp_bytes(rung, tokens) for tokens in LENGTHS}


@pytest.mark.slow
def test_the_full_stack_is_linear(benchmark):
    points = measured(benchmark, benchmark.FULL_STACK)
    assert 0.95 < benchmark.exponent(points) <= 1.05
    assert benchmark.slope(points) <= 1.05
    # [T/P, D] in float32 is 32 bytes a token; the rows of the table are of this order.
    assert benchmark.bytes_a_token(points) < 1000


@pytest.mark.slow
def test_a_quadratic_path_is_seen(benchmark):
    assert benchmark.exponent(measured(benchmark, benchmark.CONTROL)) > 1.9


def test_every_rung_is_a_run(benchmark):
    degrees = dict(data=1, fsdp=1, ring=1, seq=8, tensor=1)
    placed = {
        rung: place(benchmark.make_config(rung, 8192), degrees)
        for rung in (*benchmark.RUNGS, benchmark.CONTROL)
    }
    memories = [config.memory for config in placed.values()]
    assert len(set(memories)) == len(benchmark.RUNGS)  # the control's is a rung's
    pieces = [in_pieces(config.model, config.memory) for config in placed.values()]
    assert pieces == [rung in ("+ sequence chunks", "+ head chunks") for rung in placed]


def test_exponents_of_known_curves(benchmark):
    """Whatever the constant part; a small square is seen where it starts to matter."""
    lengths = [1024 * 2**i for i in range(5)]
    for constant in (0, 10**9):
        for power in (0.5, 1, 1.5, 2):
            points = {t: constant + 7 * t**power for t in lengths}
            assert benchmark.exponent(points) == pytest.approx(power, abs=1e-3)
    assert benchmark.exponent({t: 1000 * t + t * t / 50 for t in lengths}) > 1.05
    with pytest.raises(ValueError, match="no more memory"):
        benchmark.exponent(dict.fromkeys(lengths, 5))
    with pytest.raises(ValueError, match="three or more doublings"):
        benchmark.exponent({1: 1, 2: 2, 8: 8})


def test_rungs_add_up(benchmark):
    rungs = list(benchmark.RUNGS)
    assert benchmark.options_of(rungs[0]) == benchmark.RUNGS[rungs[0]]
    assert set(benchmark.RUNGS[rungs[0]]) < set(benchmark.options_of(rungs[-1]))
    dense = benchmark.make_config(benchmark.CONTROL, 8192)
    stack = benchmark.make_config(benchmark.CONTROL_STACK, 8192)
    assert dense.memory == stack.memory and dense.model != stack.model
