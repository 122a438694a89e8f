"""What is done with cuDNN's results, by a stand-in for its kernels: the reference's."""

import functools

import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, out_and_gradients
from float64 import exact_attention

from ulysses_jax.attention.blockwise import blockwise_attention_with_logsumexp
from ulysses_jax.attention.cudnn import cudnn_attention
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import PARTS


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    cudnn_stand_in.use(monkeypatch)


def exact(case, mask, *arrays):
    seen = np.asarray(mask.visible(0, case.T, 0, case.S))
    return exact_attention(*arrays, seen, scale=case.scale)


def assert_close(got, want, tolerance=0.0015):
    """float16 rounds to 2**-11 = 0.0005; relative to the greatest element."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == jnp.float16
        error = np.abs(np.asarray(a, np.float64) - b).max()
        assert error < tolerance * np.abs(b).max(), (name, error)


@pytest.mark.parametrize(
    "name", ["full", "causal window", "scale", "multi-query", "cross, few keys"]
)
def test_the_whole(name):
    """Of `cudnn_attention`, whose pullback is taken apart and put together."""
    case = CASES[name]
    arrays = case.inputs(jnp.float16)
    attend = functools.partial(cudnn_attention, mask=case.mask, scale=case.scale)
    assert_close(out_and_gradients(attend, *arrays), exact(case, case.mask, *arrays))


@pytest.mark.parametrize("name", ["full", "scale", "multi-query"])
@pytest.mark.parametrize("fault", [None, "its own out", "its own logsumexp"])
def test_parts(name, fault):
    """Given out and logsumexp over all keys, the parts' gradients are the whole's."""
    case, parts = CASES[name], PARTS["cudnn"]
    *arrays, weights = case.inputs(jnp.float16)
    weights = weights.astype(jnp.float16)
    cuts = slice(0, 4), slice(4, 6), slice(6, None)
    options = dict(mask=Mask(), scale=case.scale)

    def run(q, k, v):
        each = [parts.statistics(q, k[:, at], v[:, at], **options) for at in cuts]
        out, logsumexp = functools.reduce(parts.join, each)
        out, logsumexp = out.astype(q.dtype), logsumexp.sum(axis=0)
        gradients = []
        for at, (own_out, own_logsumexp) in zip(cuts, each, strict=True):
            dq, dk, dv = parts.gradients(
                q,
                k[:, at],
                v[:, at],
                own_out.astype(q.dtype) if fault == "its own out" else out,
                own_logsumexp[0] if fault == "its own logsumexp" else logsumexp,
                weights,
                **options,
            )
            gradients.append((dq.astype(jnp.float32), dk, dv))
        dqs, dks, dvs = zip(*gradients, strict=True)
        dk, dv = (jnp.concatenate(x, axis=1) for x in (dks, dvs))
        return out, sum(dqs).astype(q.dtype), dk, dv

    got, want = jax.jit(run)(*arrays), exact(case, Mask(), *arrays, weights)
    if fault is None:
        assert_close(got, want)
    else:
        with pytest.raises(AssertionError):
            assert_close(got, want, tolerance=0.05)


def test_the_logsumexp_is_float32():
    case = CASES["full"]
    q, k, v, _ = case.inputs(jnp.float16)
    _, logsumexp = PARTS["cudnn"].forward(q, k, v, mask=Mask())
    _, want = blockwise_attention_with_logsumexp(q, k, v, mask=Mask())
    assert logsumexp.dtype == jnp.float32
    np.testing.assert_allclose(logsumexp, want, rtol=1e-6, atol=1e-6)
