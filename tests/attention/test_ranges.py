"""A mask's ranges of keys are its visible pairs, or it is said that there are none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, GREATEST, LEAST, Case, both

from ulysses_jax.attention.ranges import key_ranges

# Padding 0 at the end; ids of any size; a part of a row in zigzag order; a row whose
# keys do not lie in order beside one whose do; a number of keys that bisection halves
# evenly, once more than any below it.
MORE = {
    "padding": Case(
        causal=True, arrays=both("segment_ids", [[1] * 4 + [2] * 6 + [0] * 3, [0] * 13])
    ),
    "padding, both sides": Case(
        arrays=both("segment_ids", [[5] * 5 + [9] * 8, [7] * 10 + [-1] * 3])
    ),
    "ids at the ends of int32": Case(
        causal=True,
        arrays=both("segment_ids", [[LEAST] * 5 + [0] * 4 + [GREATEST] * 4] * 2),
    ),
    "zigzag": Case(
        causal=True,
        window=4,
        arrays=both("positions", [[*range(3, 9), *range(20, 27)]] * 2)
        | both("segment_ids", [[1] * 5 + [2] * 6 + [0] * 2] * 2),
    ),
    "positions that restart": Case(
        causal=True,
        window=3,
        arrays=both("positions", [[*range(7), *range(6)]] * 2)
        | both("segment_ids", [[1] * 7 + [2] * 6] * 2),
    ),
    "a power of two": Case(
        T=16,
        S=16,
        causal=True,
        arrays=both("segment_ids", [[1] * 5 + [2] * 11, [3] * 16]),
    ),
    "one row of two": Case(
        causal=True,
        arrays=both("segment_ids", [[1] * 4 + [2] * 9, [1] * 4 + [2] * 4 + [1] * 5]),
    ),
}


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_ranges_are_what_the_mask_shows(name):
    case = (CASES | MORE)[name]
    mask = case.mask
    ranges = jax.jit(lambda mask: key_ranges(mask, case.B, case.T, case.S))(mask)
    seen = np.asarray(mask.visible(0, case.T, 0, case.S))
    seen = np.broadcast_to(seen, (case.B, case.T, case.S))
    key = np.arange(case.S)
    start, stop = (np.asarray(x)[..., None] for x in ranges[:2])
    assert (start >= 0).all() and (stop <= case.S).all() and (start <= stop).all()
    said = (key >= start) & (key < stop)
    for row in range(case.B):
        assert np.array_equal(said[row], seen[row]) or not ranges.in_order[row]
    shuffled = {"positions", "positions window", "all at once"}
    rows = [False, False] if name in shuffled else [True, name != "one row of two"]
    assert ranges.in_order.tolist() == rows


def test_cutting_out_a_part_keeps_what_is_seen():
    """As a ring does: some queries, some keys, of rows in order."""
    case = dataclasses.replace(MORE["positions that restart"], T=13, S=13)
    part = case.mask.between(jnp.int32(4), 6, jnp.int32(2), 7, causal=True)
    ranges = key_ranges(part, 2, 6, 7)
    seen = np.asarray(part.visible(0, 6, 0, 7))
    key = np.arange(7)
    said = (key >= ranges.start[..., None]) & (key < ranges.stop[..., None])
    assert np.array_equal(said, seen) and seen.any() and ranges.in_order.all()
