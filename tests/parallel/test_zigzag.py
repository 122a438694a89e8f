"""The order of tokens, and the steps of a ring that a window leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulysses_jax.parallel.zigzag import seen_steps, zigzag_index, zigzag_order


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "queries, keys, members", [(32, 32, 4), (24, 48, 3), (48, 16, 4)]
)
def test_steps_in_which_a_window_shows_a_key(queries, keys, members, causal, zigzag):
    """Against every pair of tokens."""
    order = dict(causal=causal, zigzag=zigzag)
    q, k = (zigzag_order(n, members if zigzag else 1) for n in (queries, keys))
    away = q[:, None] - k
    for window in range(1, max(queries, keys) + 2):
        seen = (np.abs(away) < window) & ((away >= 0) | (not causal))
        blocks = seen.reshape(members, queries // members, members, keys // members)
        i, j = np.nonzero(blocks.any(axis=(1, 3)))
        want = tuple(sorted({int(step) for step in (i - j) % members} - {0}))
        assert seen_steps(queries, keys, members, window=window, **order) == want


def test_steps_without_a_window():
    order = dict(causal=True, zigzag=True)
    assert seen_steps(32, 32, 4, window=None, **order) == (1, 2, 3)
    assert seen_steps(32, 32, 1, window=3, **order) == ()


def test_zigzag_order_is_the_same_in_a_program():
    for tokens, members in ((40, 1), (32, 4), (60, 5)):
        index = jax.jit(zigzag_index, static_argnums=(1, 2))
        got = index(jnp.arange(tokens, dtype=jnp.int32), tokens, members)
        np.testing.assert_array_equal(got, zigzag_order(tokens, members))
        assert got.dtype == jnp.int32
