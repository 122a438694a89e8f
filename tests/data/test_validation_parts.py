"""Documents by number: the fraction of tokens, and the order of the others."""

import numpy as np
import pytest

from ulysses_jax.data.parts import parts


def ends_of(num, seed=0):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.integers(1, 50, num))


def tokens_of(pieces):
    return [
        token
        for start, stop in zip(*pieces, strict=True)
        for token in range(start, stop)
    ]


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("num", [1, 2, 300])
def test_exactly_the_fraction_validates(num, fraction):
    """No token in both parts, none in neither; whole documents but for one's end."""
    ends = ends_of(num)
    total = int(ends[-1])
    train, validation = parts(ends, fraction, 3)
    assert validation is not None
    first, last = tokens_of(train), tokens_of(validation)
    assert sorted(first + last) == list(range(total))
    assert len(last) == min(max(np.ceil(round(fraction * total, 6)), 1), total - 1)
    cut = [stop for stop in train.stops.tolist() if stop not in ends]
    assert len(cut) <= 1 and cut == [s for s in validation.starts if s in cut]
    # The seed turns the order of training around, and moves no token.
    other, same = parts(ends, fraction, 4)
    assert tokens_of(same) == last and sorted(tokens_of(other)) == sorted(first)
    assert len(train.starts) < 3 or tokens_of(other) != first


def test_fixed_values():
    """Another hash would break the resumption of runs that exist."""
    ends = np.arange(1, 11) * 10
    train, validation = parts(ends, 0.25, 0)
    assert train.starts.tolist() == FIXED_TRAIN
    assert validation.starts.tolist() == FIXED_VALIDATION


FIXED_TRAIN = [90, 10, 0, 30, 80, 40, 70, 20]
FIXED_VALIDATION = [60, 50, 85]


def test_nothing_validates():
    train, validation = parts(ends_of(20), 0, 1)
    assert validation is None and len(train.starts) == 20
    with pytest.raises(ValueError, match="of 1 token: use data.validation_fraction 0"):
        parts(np.array([1]), 0.05, 0)
