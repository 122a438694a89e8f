"""Attention to a few mixtures of keys: softmax's where R = T; bytes; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from recurrences import B, H, K, N, R, T, V, inputs
from strategy_cases import collectives, mesh_of, sent

from ulysses_jax import low_rank_attention, ulysses_attention
from ulysses_jax.parallel.bytes import low_rank_bytes


def test_a_token_each_is_softmax_attention():
    given = inputs("low_rank")
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
        for name, x in inputs("low_rank").items()
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
            r"q is \[B, T, N, H\].* got q \(2, 32, 4, 6\)",
        ),
        (dict(projection=jnp.ones((B, T, N, R))), r"projection \(2, 32, 4, 3\)"),
        (
            dict(q=jnp.ones((B, T, 3, H))),
            r"2 heads of k .* k one of \[1, 3\] heads, or q 4",
        ),
        (dict(q=jnp.ones((B, T, N, H), jnp.bfloat16)), "differ in dtype"),
        (dict(projection=jnp.ones((B, T, K, R), int)), "projection is float32"),
        (dict(scale=np.nan), "scale is a finite number"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        low_rank_attention(**inputs("low_rank") | changes, mesh=mesh_of(seq=8))


def test_what_a_mesh_does_not_divide():
    with pytest.raises(ValueError, match="number of heads, 2, .* tensor degree 4"):
        low_rank_attention(**inputs("low_rank"), mesh=mesh_of(tensor=4))
    with pytest.raises(ValueError, match="number of tokens, 30, .* pad it to 32"):
        cut = {name: x[:, :30] for name, x in inputs("low_rank").items()}
        low_rank_attention(**cut, mesh=mesh_of(seq=4))
