"""Attention to a few mixtures of keys: exact over shards, softmax's where R = T."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but_for
from strategy_cases import collectives, mesh_of, sent

from ulysses_jax import low_rank_attention, ulysses_attention
from ulysses_jax.parallel.bytes import low_rank_bytes

B, T, N, K, H, V, R = 2, 32, 4, 2, 4, 6, 3
NAMES = ("q", "k", "v", "projection")


def inputs(dtype=jnp.float32, tokens=T, rank=R):
    shapes = [(N, H), (K, H), (K, V), (K, rank)]
    keys = jax.random.split(jax.random.key(7), 4)
    arrays = [
        jax.random.normal(key, (B, tokens, *shape), dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    arrays[-1] = 3 * arrays[-1]  # some tokens count for much
    return dict(zip(NAMES, arrays, strict=True))


def results(function, given):
    """The output and the gradient of each input, as float64."""
    upstream = jax.random.normal(jax.random.key(1), (B, T, N, V))

    @jax.jit
    def both(given):
        def loss(given):
            out = function(**given)
            weights = upstream.astype(out.dtype).astype(jnp.float32)
            return (out.astype(jnp.float32) * weights).sum(), out

        gradients, out = jax.grad(loss, has_aux=True)(given)
        return {"out": out} | gradients

    return jax.tree.map(lambda x: np.asarray(x, np.float64), both(given))


@functools.cache
def oracle(dtype=jnp.float32):
    """By the formula, in float64, on one device."""
    given = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs(dtype))
    upstream = np.asarray(
        jax.random.normal(jax.random.key(1), (B, T, N, V)).astype(dtype), np.float64
    )

    def function(q, k, v, projection):
        weights = jax.nn.softmax(projection, axis=1)
        keys = jnp.repeat(jnp.einsum("btkr,btkh->brkh", weights, k), N // K, axis=2)
        values = jnp.repeat(jnp.einsum("btkr,btkv->brkv", weights, v), N // K, axis=2)
        scores = jnp.einsum("btnh,brnh->btnr", q, keys) / np.sqrt(H)
        return jnp.einsum("btnr,brnv->btnv", jax.nn.softmax(scores), values)

    with jax.enable_x64(True):
        out, pull = jax.vjp(lambda given: function(**given), given)
        found = {"out": out} | pull(jnp.asarray(upstream))[0]
        return jax.tree.map(np.asarray, found)


def assert_close(got, want, tolerance=2e-5):
    for name in want:
        most = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], atol=tolerance * most)


MESHES = [
    dict(),
    dict(seq=2),
    dict(seq=4),
    dict(seq=8),
    dict(ring=2, seq=4),
    dict(ring=4, seq=2),
    dict(data=2, ring=2, tensor=2),
    dict(fsdp=2, seq=2, tensor=2),
]


@pytest.mark.parametrize(
    "degrees",
    slow_but_for([dict(ring=2, seq=4), dict(data=2, ring=2, tensor=2)], MESHES),
)
def test_equals_float64(degrees):
    run = functools.partial(low_rank_attention, mesh=mesh_of(**degrees))
    assert_close(results(run, inputs()), oracle())


def test_bfloat16_on_explicit_axes():
    run = low_rank_attention
    with jax.set_mesh(mesh_of(data=2, seq=4, axis_type=AxisType.Explicit)):
        got = results(run, inputs(jnp.bfloat16))
    assert_close(got, oracle(jnp.bfloat16), 2**-6)


def test_a_token_each_is_softmax_attention():
    given = inputs(rank=T)
    chosen = jnp.where(jnp.eye(T, dtype=bool)[::-1], 0.0, -1e9)  # in any order
    given["projection"] = jnp.broadcast_to(chosen[None, :, None], (B, T, K, T))
    given["v"] = given["v"][..., :H]
    got = low_rank_attention(**given, mesh=mesh_of(seq=8))
    del given["projection"]
    want = ulysses_attention(**given, causal=False, mesh=mesh_of())
    np.testing.assert_allclose(got, want, atol=2e-6)


def what_it_sends(tokens, mesh, gradients):
    lies = NamedSharding(mesh, P(None, ("ring", "seq"), "tensor"))
    given = {
        name: jax.ShapeDtypeStruct((B, tokens, *x.shape[2:]), x.dtype, sharding=lies)
        for name, x in inputs().items()
    }

    def run(given):
        return low_rank_attention(**given, mesh=mesh)

    def both(given):
        return jax.vjp(run, given)[1](jnp.ones((B, tokens, N, V)))

    return sent(collectives(both if gradients else run, mesh, given))


@pytest.mark.parametrize("degrees", [dict(seq=8), dict(ring=2, seq=2, tensor=2)])
def test_bytes_are_the_formula_whatever_the_tokens(degrees):
    shards = degrees.get("ring", 1) * degrees["seq"]
    heads = K // degrees.get("tensor", 1)
    want = low_rank_bytes(
        shards=shards, num_kv_heads=heads, rank=R, mixture_size=H + V + 1
    )
    for tokens in (32, 64):
        found = what_it_sends(tokens, mesh_of(**degrees), gradients=False)
        assert {kind for kind, _ in found} == {"all-reduce"}
        assert sum(found.values()) == B * want["forward"]
        found = what_it_sends(tokens, mesh_of(**degrees), gradients=True)
        assert sum(found.values()) == B * (want["forward"] + want["backward"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(causal=True), "is not causal: .* Give causal=False"),
        (
            dict(k=jnp.ones((B, T, K, V))),
            r"q is \[B, T, N, H\].* got q \(2, 32, 4, 4\)",
        ),
        (dict(projection=jnp.ones((B, T, N, R))), r"projection \(2, 32, 4, 3\)"),
        (dict(q=jnp.ones((B, T, 3, H))), "2 heads of k do not divide the 3 of q"),
        (dict(q=jnp.ones((B, T, N, H), jnp.bfloat16)), "differ in dtype"),
        (dict(projection=jnp.ones((B, T, K, R), int)), "projection is float32"),
        (dict(scale=np.nan), "scale is a finite number"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        low_rank_attention(**inputs() | changes, mesh=mesh_of(seq=8))


def test_what_a_mesh_does_not_divide():
    with pytest.raises(ValueError, match="number of heads, 2, .* tensor degree 4"):
        low_rank_attention(**inputs(), mesh=mesh_of(tensor=4))
    with pytest.raises(ValueError, match="number of tokens, 30, .* pad it to 32"):
        low_rank_attention(**inputs(tokens=30), mesh=mesh_of(seq=4))
