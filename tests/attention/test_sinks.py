"""Sinks, a learned logit a head, with every kernel: float64's output and gradients."""

import functools

import jax
import jax.numpy as jnp
import mosaic_stand_in
import numpy as np
import pytest
from attention_cases import CASES, out_and_gradients
from slow import slow_but_for

from ulysses_jax.attention import mosaic
from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.parts import Parts, attention_of
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS

TILES = Parts(
    *(functools.partial(f, block_q=4, block_kv=3) for f in PARTS["blockwise"][:2])
)
# None outweighs all keys, and none is outweighed by them.
SINKS = jnp.array([-1.0, 2.0, 0.5, 3.0])


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    mosaic_stand_in.use(monkeypatch)
    monkeypatch.setattr(mosaic, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(mosaic, "TILES_AT_ONCE", 3)


def attention(kernel, case, **options):
    """`f(q, k, v, sinks)`."""
    options |= dict(mask=case.mask, scale=case.scale)
    if kernel == "reference":
        attend = reference_attention
    else:
        attend = attention_of(TILES if kernel == "blockwise" else PARTS[kernel])
    return lambda q, k, v, sinks: attend(q, k, v, sinks=sinks, **options)


def exact(case, *arrays, sinks=SINKS):
    seen = np.asarray(case.mask.visible(0, case.T, 0, case.S))
    return exact_attention(*arrays, seen, scale=case.scale, sinks=sinks)


def errors(got, want):
    """The greatest of out, dq, dk, dv and dsinks, of the greatest element of each."""
    assert len(got) == len(want) == 5
    pairs = zip(got, want, strict=True)
    return np.array(
        [
            np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
            for a, b in pairs
        ]
    )


@pytest.mark.parametrize(
    "kernel, name",
    slow_but_for(
        [
            ("blockwise", "cross causal, few keys"),
            ("mosaic", "blind by segment"),
            ("reference", "blind by segment"),
        ],
        ["blockwise", "mosaic", "reference"],
        ["scale", "multi-query", "cross causal, few keys", "blind by segment"],
    ),
)
def test_equals_float64(kernel, name):
    case = CASES[name]
    arrays = case.inputs()
    got = out_and_gradients(attention(kernel, case), *arrays, SINKS)
    want = exact(case, *arrays)
    for each, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=each)
    if name.startswith("blind"):
        blind = ~np.asarray(case.mask.visible(0, case.T, 0, case.S)).any(axis=2)
        assert blind.any()
        for x in got[:2]:
            assert not np.asarray(x)[blind].any()


@pytest.mark.parametrize("kernel", ["blockwise", "mosaic"])
def test_large_logits(kernel):
    """Near 100, of keys and of sinks: what the rounding of a logit leaves."""
    case = CASES["causal"]
    q, k, v, weights = case.inputs()
    q, k = q.at[..., 0].set(8**0.5), k.at[..., 0].set(100)
    sinks = SINKS + 100
    got = out_and_gradients(attention(kernel, case), q, k, v, weights, sinks)
    assert (errors(got, exact(case, q, k, v, weights, sinks=sinks)) < 1e-4).all()


@pytest.mark.parametrize(
    "name", slow_but_for(["blind by segment"], ["causal", "blind by segment"])
)
def test_the_logsumexp_has_the_sink_and_gradients(name):
    case = CASES[name]
    q, k, v, weights = case.inputs()
    options = dict(mask=case.mask, scale=case.scale)
    of_both = attention_of(TILES, with_logsumexp=True)

    def dense(q, k, v, sinks):
        keys = jnp.repeat(k, case.N // case.K, axis=2)
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, keys) * case.H**-0.5
        seen = case.mask.visible(0, case.T, 0, case.S)[:, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        column = jnp.broadcast_to(sinks[:, None, None], (*logits.shape[:3], 1))
        logsumexp = jax.nn.logsumexp(jnp.concatenate((logits, column), 3), axis=3)
        return reference_attention(q, k, v, sinks=sinks, **options), logsumexp

    def run(attend):
        def weighted(*arrays):
            out, logsumexp = attend(*arrays)
            rows = weights[..., 0].transpose(0, 2, 1)
            return (out * weights).sum() + (logsumexp * rows).sum(), logsumexp

        grad = jax.grad(weighted, (0, 1, 2, 3), has_aux=True)
        return jax.tree.leaves(jax.jit(grad)(q, k, v, SINKS))

    got = run(lambda q, k, v, sinks: of_both(q, k, v, sinks=sinks, **options))
    for a, b in zip(got, run(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "fault",
    slow_but_for(["another head's"], ["another head's", "half of a logit", "twice"]),
)
def test_the_tolerance_catches_faults(fault):
    case = CASES["causal"]
    arrays = case.inputs()
    want = exact(case, *arrays)
    wrong = {
        "another head's": lambda sinks: jnp.roll(sinks, 1),
        "half of a logit": lambda sinks: sinks / 2,
        "twice": lambda sinks: sinks + jnp.log(2),
    }[fault]
    attend = attention("blockwise", case)
    got = out_and_gradients(
        lambda q, k, v, sinks: attend(q, k, v, wrong(sinks)), *arrays, SINKS
    )
    assert (errors(got, want) > 1e-3).all()


def test_their_gradient_is_summed_in_float32():
    """Of results in bfloat16, as exact as one of results in float32."""
    rng = np.random.default_rng(0)
    out, dout = (
        jnp.asarray(rng.standard_normal((1, 64, 4, 8)), jnp.bfloat16) for _ in range(2)
    )
    logsumexp = jnp.asarray(3 + rng.random((1, 4, 64)), jnp.float32)
    got = jax.jit(PARTS["blockwise"].sinks_gradient)(SINKS, out, logsumexp, dout)
    shared = (np.asarray(out, np.float64) * np.asarray(dout, np.float64)).sum(axis=3)
    logits = np.asarray(SINKS, np.float64)[:, None] - np.asarray(logsumexp, np.float64)
    want = -(np.exp(logits) * shared.swapaxes(1, 2)).sum(axis=(0, 2))
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_remat_attention_keeps_what_has_the_sinks():
    """The forward pass, two loops in one another, runs once; not kept, twice."""
    case = CASES["causal"]
    q, k, v, _ = case.inputs()
    attend = attention("blockwise", case)

    def loops(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        run = jax.checkpoint(attend, policy=policy)
        grad = jax.grad(lambda *arrays: run(*arrays).sum(), (0, 1, 2, 3))
        return str(jax.make_jaxpr(grad)(q, k, v, SINKS)).count("while[")

    assert loops("attention_out", "attention_logsumexp") == 2
    assert loops("attention_out") == 3
