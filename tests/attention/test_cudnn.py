"""What is done with cuDNN's results, by a stand-in for its kernels: the reference's."""

import dataclasses
import functools

import cudnn_stand_in
import jax
import jax.numpy as jnp
import mosaic_stand_in
import numpy as np
import pytest
from attention_cases import CASES, out_and_gradients

from ulysses_jax import attend as attend_module
from ulysses_jax import make_mesh
from ulysses_jax.attention.cudnn import cudnn_attention
from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    cudnn_stand_in.use(monkeypatch)


def even(name):
    """A case with an even number of queries and of keys."""
    case = CASES[name]
    return dataclasses.replace(case, T=case.T + case.T % 2, S=case.S + case.S % 2)


def exact(case, mask, *arrays):
    seen = np.asarray(mask.visible(0, case.T, 0, case.S))
    return exact_attention(*arrays, seen, scale=case.scale)


def assert_close(got, want, tolerance=0.0015):
    """float16 rounds to 2**-11 = 0.0005; relative to the greatest element."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == jnp.float16
        error = np.abs(np.asarray(a, np.float64) - b).max()
        assert error < tolerance * np.abs(b).max(), (name, error)


@pytest.mark.parametrize("name", ["scale", "cross, few keys"])
def test_the_whole(name):
    """Of `cudnn_attention`, whose pullback is taken apart and put together."""
    case = even(name)
    arrays = case.inputs(jnp.float16)
    attend = functools.partial(cudnn_attention, mask=case.mask, scale=case.scale)
    assert_close(out_and_gradients(attend, *arrays), exact(case, case.mask, *arrays))


@pytest.mark.parametrize("name", ["full", "scale", "multi-query"])
@pytest.mark.parametrize("fault", [None, "its own out", "its own logsumexp"])
def test_parts(name, fault):
    """Given out and logsumexp over all keys, the parts' gradients are the whole's."""
    case, parts = even(name), PARTS["cudnn"]
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
    case = even("full")
    q, k, v, _ = case.inputs(jnp.float16)
    _, logsumexp = PARTS["cudnn"].forward(q, k, v, mask=Mask())
    _, want = PARTS["blockwise"].forward(q, k, v, mask=Mask())
    assert logsumexp.dtype == jnp.float32
    np.testing.assert_allclose(logsumexp, want.sum(axis=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queries, keys", [(13, 13), (14, 13), (13, 14)])
def test_odd_numbers_of_tokens_have_no_gradient(queries, keys):
    """jax.nn says so as well, without a remedy; forward alone they have a result."""
    case = dataclasses.replace(CASES["full"], T=queries, S=keys)
    q, k, v, weights = case.inputs(jnp.float16)
    attend = functools.partial(cudnn_attention, mask=Mask())
    np.testing.assert_allclose(
        attend(q, k, v), reference_attention(q, k, v, mask=Mask()), atol=2e-3
    )
    parts = PARTS["cudnn"]
    statistics = q, jnp.zeros((case.B, case.N, queries)), q
    for call in (
        lambda: out_and_gradients(attend, q, k, v, weights),
        lambda: parts.forward(q, k, v, mask=Mask()),
        lambda: parts.gradients(q, k, v, *statistics, mask=Mask()),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        said = f"from {queries} queries to {keys} keys, as a number is odd"
        assert said in str(refusal.value)
        assert "model.attention auto or blockwise" in str(refusal.value)


@pytest.mark.parametrize("tokens", [12, 16])
def test_cudnn_by_name_over_a_ring(monkeypatch, tokens):
    """Over 4 members of 12 tokens each has 3; of 16, the remedy, it has 4."""
    mosaic_stand_in.use(monkeypatch)
    mesh = make_mesh(ring=4, devices=jax.devices()[:4])
    x = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float16)

    def loss(x, attention):
        options = dict(mesh=mesh, mask=Mask(causal=True))
        return attend_module.attend(x, x, x, attention=attention, **options).sum()

    if tokens == 16:
        jax.eval_shape(jax.grad(functools.partial(loss, attention="cudnn")), x)
        return
    with pytest.raises(ValueError, match="from 3 queries to 3 keys, as a number is od"):
        jax.eval_shape(jax.grad(functools.partial(loss, attention="cudnn")), x)
    jax.eval_shape(jax.grad(functools.partial(loss, attention="auto")), x)
