"""Every way to lay 8 devices out on the mesh trains the same steps."""

import functools
import itertools
import math

import numpy as np
import pytest
from run_cases import assert_same, train

from ulysses_jax.mesh import AXES

NUM_DEVICES = 8
SWEPT = [
    axis
    for axis in AXES
    if axis != "ring"  # of degree 1 alone
]


def factorisations():
    """All degrees of the swept axes whose product is the number of devices."""
    divisors = [n for n in range(1, NUM_DEVICES + 1) if NUM_DEVICES % n == 0]
    for degrees in itertools.product(divisors, repeat=len(SWEPT)):
        if math.prod(degrees) == NUM_DEVICES:
            yield {axis: n for axis, n in zip(SWEPT, degrees, strict=True) if n > 1}


def slow_but_for_each(stride):
    """Cases in one order, of which every `stride`-th is not marked slow."""
    return [
        pytest.param(
            degrees,
            marks=[] if i % stride == stride // 2 else pytest.mark.slow,
            id=", ".join(f"{axis} {n}" for axis, n in degrees.items()),
        )
        for i, degrees in enumerate(factorisations())
    ]


@functools.cache
def on_one_device(dtype):
    return train({}, dtype=dtype)


def test_there_are_as_many_as_there_should_be():
    """Three factors of 2 over the axes: stars and bars."""
    found = list(factorisations())
    assert len(found) == math.comb(3 + len(SWEPT) - 1, 3)
    assert len({tuple(sorted(degrees.items())) for degrees in found}) == len(found)


@pytest.mark.parametrize("degrees", slow_but_for_each(4))
def test_float32(degrees):
    assert_same(train(degrees), on_one_device("float32"), 1e-5)


@pytest.mark.parametrize("degrees", slow_but_for_each(10))
def test_bfloat16(degrees):
    """Losses within 0.2 % of one device's: products round in another order."""
    got, want = train(degrees, dtype="bfloat16"), on_one_device("bfloat16")
    np.testing.assert_allclose(got.losses, want.losses, 2e-3)
    np.testing.assert_allclose(got.gradient_norms[:2], want.gradient_norms[:2], 5e-3)
