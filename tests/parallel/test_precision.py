"""What strategies join and sum is as exact as on one device."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from strategy_cases import (
    B,
    T,
    assert_close,
    compiled,
    mesh_of,
    out_and_gradients,
)

from ulysses_jax.attend import attend
from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.mask import Mask

# Where all logits are near 1, 100 and 2,000: what rounding these leaves.
LARGE_LOGITS = np.array([[1e-6], [3e-5], [1e-3]])

JOINED = [
    ("ring", dict(ring=4)),
    ("hybrid", dict(ring=2, seq=2)),
    ("all_gather", dict(seq=4)),
]


@pytest.mark.parametrize("strategy, degrees", [("ulysses", dict(seq=1)), *JOINED])
def test_large_logits(strategy, degrees):
    """The greatest error of out, dq, dk and dv, of the greatest element each, is the
    rounding of a logit, as on one device.

    All keys have a feature of that size. The softmax does not see it, and its part of
    dq is a sum that is 0: what joins parts by weights that are off is seen there.
    """
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        rng.standard_normal((B, T, heads, 8), np.float32) for heads in (4, 2, 2, 4)
    )
    q[..., 0] = 8**0.5
    mesh, mask = mesh_of(**degrees), Mask(causal=True)
    run = compiled(functools.partial(attend, mesh=mesh, mask=mask, strategy=strategy))
    rows = []
    for size in (1, 100, 2000):
        k[..., 0] = size
        want = exact_attention(q, k, v, weights, np.tri(T, dtype=bool))
        pairs = zip(run(q, k, v, weights), want, strict=True)
        rows.append([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])
    assert (np.asarray(rows) < LARGE_LOGITS).all()


@pytest.mark.parametrize("strategy, degrees", JOINED)
def test_gradients_are_summed_in_float32(strategy, degrees):
    """Of dk and dv over members: 257 queries' worth less 256, which bfloat16 cannot
    tell. Every weight is 1/T, and all else a power of two."""
    q = np.ones((1, T, 1, 1))
    k = np.zeros((1, T, 1, 1))
    v = np.resize([1, -1], T).reshape(1, T, 1, 1)
    upstream = np.zeros((1, T, 1, 1))
    upstream[0, 0], upstream[0, 1], upstream[0, T - 1] = 256, 1, -256
    attention = functools.partial(
        attend, mesh=mesh_of(**degrees), mask=Mask(), strategy=strategy, scale=1.0
    )
    got = out_and_gradients(
        attention, *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, upstream))
    )
    assert_close(got, (np.zeros_like(q), np.zeros_like(q), v / T, q / T), tolerance=0)
