"""Sinks under every strategy: each head's own, and their gradient over all queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from slow import slow_but_for
from strategy_cases import MASKS, SMALL_TILES, TOLERANCE, T, inputs, mesh_of

from ulysses_jax import ulysses_attention
from ulysses_jax.attend import attend
from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.parallel.zigzag import zigzag_order
from ulysses_jax.strategies import num_members

NAMES = "out", "dq", "dk", "dv", "dsinks"


def sinks_of(heads):
    """Of every head another, in no order."""
    return jnp.asarray(np.random.default_rng(heads).permutation(heads) * 0.7 - 1)


@functools.cache
def oracle(mask_name, heads, kv_heads):
    seen = np.asarray(MASKS[mask_name].visible(0, T, 0, T))
    return exact_attention(*inputs(heads, kv_heads), seen, sinks=sinks_of(heads))


def results(attention, q, k, v, weights, sinks):
    """out, and the gradients of a weighted sum of it."""

    def weighted(*arrays):
        out = attention(*arrays)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    grad = jax.jit(jax.grad(weighted, (0, 1, 2, 3), has_aux=True))
    gradients, out = grad(q, k, v, sinks)
    return out, *gradients


def assert_close(got, want):
    for name, a, b in zip(NAMES, got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def spread_results(
    strategy,
    heads,
    mask,
    *,
    zigzag=False,
    head_chunks=1,
    axis_type=AxisType.Auto,
    **degrees,
):
    """In the sequence's own order; tokens go in as they must lie."""
    ring, seq = (degrees.get(axis, 1) for axis in ("ring", "seq"))
    order = np.arange(T)
    if zigzag:
        order = zigzag_order(T, num_members(strategy, ring, seq))
    mesh = mesh_of(axis_type, **degrees)

    def attention(q, k, v, sinks):
        return attend(
            q,
            k,
            v,
            mesh=mesh,
            mask=jax.tree.map(lambda ids: ids[:, order], MASKS[mask]),
            strategy=strategy,
            zigzag=zigzag,
            attention=SMALL_TILES,
            head_chunks=head_chunks,
            sinks=sinks,
        )

    arrays = (x[:, order] for x in inputs(*heads))
    *tokens, dsinks = results(attention, *arrays, sinks_of(heads[0]))
    back = np.argsort(order)
    return *(np.asarray(x)[:, back] for x in tokens), dsinks


ALL, EXPLICIT = dict(data=2, ring=2, seq=2), dict(axis_type=AxisType.Explicit)
ONE = [
    ("ulysses", (8, 2), "causal", dict(data=2, seq=4)),  # keys are repeated
    ("ulysses", (6, 3), "segments", dict(seq=4, tensor=1)),  # slots are padded
    ("ulysses", (8, 4), "causal", dict(seq=2, tensor=2, head_chunks=2)),
    ("all_gather", (4, 2), "causal", dict(seq=4, tensor=2, zigzag=True)),
    ("megatron", (8, 4), "segments", dict(data=2, seq=2, tensor=2)),
]
MORE = [
    ("ulysses", (12, 4), "causal", dict(seq=8)),
    ("ulysses", (8, 2), "causal", dict(seq=2, fsdp=2, head_chunks=4)),
    ("ring", (4, 2), "segments", dict(ring=2, tensor=2, zigzag=True)),
    ("hybrid", (8, 8), "causal", dict(ring=2, seq=2, tensor=2, head_chunks=2)),
    ("ulysses", (4, 2), "causal", dict(fsdp=2, seq=4) | EXPLICIT),
    ("megatron", (8, 4), "causal", dict(data=2, seq=2, tensor=2) | EXPLICIT),
]


@pytest.mark.parametrize(
    "strategy, heads, mask, options",
    [*ONE, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
    ids=str,
)
def test_equals_float64(strategy, heads, mask, options):
    got = spread_results(strategy, heads, mask, **options)
    assert_close(got, oracle(mask, *heads))


def test_every_chunk_has_the_sinks_of_its_own_heads():
    """Chunks over the key heads of a device, and over the queries of each."""
    q, k, v, _ = inputs(8, 4)
    attention = functools.partial(
        attend,
        mesh=mesh_of(seq=2),
        mask=MASKS["causal"],
        attention="reference",
        head_chunks=4,
    )
    out = jax.jit(attention)(q, k, v, sinks=sinks_of(8))
    np.testing.assert_allclose(out, oracle("causal", 8, 4)[0], atol=TOLERANCE)


@pytest.mark.parametrize(
    "degrees", slow_but_for([dict(ring=2, seq=2)], [dict(ring=2, seq=2), dict(seq=4)])
)
def test_the_logsumexp_has_the_sink_and_a_gradient(degrees):
    q, k, v, weights = inputs(4, 2)
    sinks, mask = sinks_of(4), MASKS["causal"]

    def dense(q, k, v, sinks):
        out = reference_attention(q, k, v, mask=mask, sinks=sinks)
        logits = jnp.einsum("BTNH,BSNH->BTNS", q, jnp.repeat(k, 2, axis=2)) / 2
        seen = mask.visible(0, T, 0, T)[:, :, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        logsumexp = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), sinks)
        return out + logsumexp[..., None]

    def spread(q, k, v, sinks):
        out, logsumexp = ulysses_attention(
            q, k, v, mesh=mesh_of(**degrees), sinks=sinks, return_logsumexp=True
        )
        return out + logsumexp[..., None]

    arrays = q, k, v, weights, sinks
    assert_close(results(spread, *arrays), results(dense, *arrays))


@pytest.mark.parametrize(
    "degrees, check_vma",
    slow_but_for(
        [(ALL, True)],
        [ALL, dict(data=2, seq=2, tensor=2)],
        [True, False],
    ),
)
def test_inside_a_shard_map_over_another_axis(degrees, check_vma):
    """Whose members have the same sinks: their gradient is a sum over it, too."""

    def attention(*arrays):
        return jax.shard_map(
            lambda q, k, v, sinks: ulysses_attention(q, k, v, sinks=sinks),
            in_specs=(*[P("data")] * 3, P()),
            out_specs=P("data"),
            axis_names={"data"},
            check_vma=check_vma,
        )(*arrays)

    with jax.set_mesh(mesh_of(**degrees)):
        got = results(attention, *inputs(4, 2), sinks_of(4))
    assert_close(got, oracle("causal", 4, 2))


def test_without_a_mesh_in_bfloat16():
    """Sinks as they are given, their gradient in their dtype."""
    q, k, v, weights = inputs(4, 2)
    sinks = sinks_of(4).astype(jnp.bfloat16)

    def attention(q, k, v, sinks):
        none = jax.sharding.get_abstract_mesh()
        return attend(q, k, v, mesh=none, mask=MASKS["causal"], sinks=sinks)

    got = results(attention, q, k, v, weights, sinks)
    want = exact_attention(q, k, v, weights, np.tri(T, dtype=bool), sinks=sinks)
    for a, b in zip(got[:4], want[:4], strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    assert got[4].dtype == jnp.bfloat16
    np.testing.assert_allclose(got[4].astype(jnp.float32), want[4], rtol=2**-8)
