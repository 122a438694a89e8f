"""Attention of one query over cached keys and its own: float64's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.one_query import one_query_attention

B, S, N, K, H = 2, 5, 4, 2, 8
# Of every query head another.
SINKS = jnp.array([-1.0, 2.0, 0.5, 3.0])


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("scale", [None, 0.6])
def test_equals_float64(sinks, scale):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((B, 1, N, H), np.float32)
    k, v = rng.standard_normal((2, B, S + 1, K, H), np.float32)
    seen = np.array([[True, False, True, True, False, True], [False] * 5 + [True]])
    got = jax.jit(one_query_attention, static_argnames="scale")(
        q,
        (k[:, :S], v[:, :S]),
        (k[:, S:], v[:, S:]),
        seen=seen[:, :S],
        scale=scale,
        sinks=sinks,
    )
    want = exact_attention(q, k, v, q, seen[:, None], scale=scale, sinks=sinks)[0]
    np.testing.assert_allclose(got, want, atol=1e-6)
