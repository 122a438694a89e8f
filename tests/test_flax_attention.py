"""Flax's attention is the same with this library's function inside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax import attention_fn, make_mesh

B, T, N, H = 2, 16, 4, 8
WIDTH = N * H


def module(**changes):
    return nnx.MultiHeadAttention(N, WIDTH, decode=False, rngs=nnx.Rngs(0), **changes)


def out_and_gradients(attention, x, **call):
    """The module's output, and the gradients of its parameters and its input."""
    graph, parameters = nnx.split(attention)
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def weighted(parameters, x):
        out = nnx.merge(graph, parameters)(x, **call)
        return (out.astype(jnp.float32) * weights).sum(), out

    grad = jax.grad(weighted, argnums=(0, 1), has_aux=True)
    gradients, out = jax.jit(grad)(parameters, x)
    return out, gradients


@pytest.mark.parametrize("causal", [False, True, "in the call"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_flax_attention_is_the_same_with_it(causal, axis_type):
    mesh = make_mesh(data=2, seq=4, axis_type=axis_type)
    x = jax.random.normal(jax.random.key(0), (B, T, WIDTH))
    mine = attention_fn(mesh, causal=causal is True)
    call = dict(is_causal=True) if causal == "in the call" else {}
    want = out_and_gradients(module(), x, is_causal=bool(causal))
    if axis_type == AxisType.Auto:
        x = jax.device_put(x, NamedSharding(mesh, P("data", "seq")))
    got = out_and_gradients(module(attention_fn=mine), x, **call)
    same = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(same, got, want)
    other = out_and_gradients(module(), x, is_causal=not causal)
    assert not np.allclose(other[0], want[0], rtol=1e-3, atol=1e-3)


def test_flax_attention_on_an_explicit_mesh():
    mesh = make_mesh(data=2, seq=4, axis_type=AxisType.Explicit)
    x = jax.random.normal(jax.random.key(0), (B, T, WIDTH))
    want = out_and_gradients(module(), x, is_causal=True)
    spec = P(("data", "fsdp"), ("ring", "seq"), None)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, spec))
        mine = module(attention_fn=attention_fn(causal=True))
        got = jax.jit(lambda x: x + mine(x))(x)
    assert jax.typeof(got).sharding.spec == spec
    np.testing.assert_allclose(got, x + np.asarray(want[0]), rtol=2e-5, atol=2e-5)


def test_in_the_layers_of_a_scanned_and_rematerialised_model():
    mesh = make_mesh(seq=4, data=2)
    x = jax.random.normal(jax.random.key(0), (B, T, WIDTH))

    class Model(nnx.Module):
        def __init__(self, **changes):
            @nnx.vmap
            def layers(rngs):
                return nnx.MultiHeadAttention(
                    N, WIDTH, decode=False, rngs=rngs, **changes
                )

            self.layers = layers(nnx.Rngs(0).split(2))

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def layer(x, attention):
                return x + attention(x, is_causal=True)

            return layer(x, self.layers)

    got = out_and_gradients(Model(attention_fn=attention_fn(mesh)), x)
    want = out_and_gradients(Model(), x)
    same = functools.partial(np.testing.assert_allclose, rtol=5e-5, atol=5e-5)
    jax.tree.map(same, got, want)


def test_flax_bfloat16_and_mesh_of_the_context():
    x = jax.random.normal(jax.random.key(0), (B, T, WIDTH))
    with jax.set_mesh(make_mesh(seq=4, data=2)):
        mine = module(attention_fn=attention_fn(causal=True), dtype=jnp.bfloat16)
        out = jax.jit(lambda x: mine(x))(x)
    assert out.dtype == jnp.bfloat16
    want = module()(x, is_causal=True)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.05)


@pytest.mark.parametrize(
    "made, call, message",
    [
        (
            {},
            dict(mask=jnp.ones((1, 1, T, T), bool)),
            "mask: a dense .* is_causal=True",
        ),
        (
            dict(dropout_rate=0.1),
            dict(deterministic=False),
            "dropout: .*dropout_rate=0",
        ),
        ({}, dict(sow_weights=True), "module: .* sow_weights=False"),
        (dict(precision="highest"), {}, "precision: give attention_fn"),
    ],
)
def test_what_flax_may_ask_for_in_vain(made, call, message):
    mine = attention_fn(make_mesh(seq=4, data=2), causal=True)
    layer = module(attention_fn=mine, **made)
    with pytest.raises(ValueError, match=f"cannot honour {message}"):
        layer(jnp.ones((B, T, WIDTH)), rngs=nnx.Rngs(0), **call)


def test_bias_is_refused_and_silent_dropout_is_not():
    mine = attention_fn(make_mesh(seq=4, data=2))
    q = jnp.ones((B, T, N, H))
    with pytest.raises(ValueError, match="cannot honour bias: leave it out"):
        mine(q, q, q, jnp.zeros((1, 1, T, T)))
    layer = module(attention_fn=mine, dropout_rate=0.1)
    assert layer(jnp.ones((B, T, WIDTH)), deterministic=True).shape == (B, T, WIDTH)


@pytest.mark.parametrize("precision", ["default", jax.lax.Precision.DEFAULT])
def test_flax_precision_that_changes_nothing(precision):
    mine = attention_fn(make_mesh(seq=4, data=2), causal=True)
    layer = module(attention_fn=mine, precision=precision)
    assert layer(jnp.ones((B, T, WIDTH))).shape == (B, T, WIDTH)
