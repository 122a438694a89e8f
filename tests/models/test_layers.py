"""What a layer does in float32 whatever the compute dtype: norms, biases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ulysses_jax.config import Model
from ulysses_jax.models import Attention, Norm
from ulysses_jax.models.bias import add_bias

HALVES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_round_once(kind, dtype):
    """The result is float64's to half a unit in the last place."""
    model = Model(
        width=256, num_kv_heads=8, head_size=32, feed_forward_width=8, norm=kind
    )
    norm = Norm(model)
    x = 3 + jax.random.normal(jax.random.key(0), (1, 8, 256))
    x = x.astype(dtype)
    exact = np.asarray(x, np.float64)
    if kind == "layer":
        exact = exact - exact.mean(axis=-1, keepdims=True)
    variance = np.square(exact).mean(axis=-1, keepdims=True)
    exact = exact / np.sqrt(variance + model.norm_epsilon)
    got = norm(x)
    assert got.dtype == dtype
    half_a_unit = 0.501 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(
        np.asarray(got, np.float64), exact, rtol=half_a_unit, atol=1e-5
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_biases_are_added_in_float32(dtype):
    """257 units, which bfloat16 does not hold, and 4,097 tokens, which neither does."""
    y = jnp.full((1, 4097, 2), -256, dtype)

    def add(bias):
        return add_bias(y, nnx.Param(bias))

    out, pull = jax.vjp(add, jnp.full(2, 256 + 2**-4))
    np.testing.assert_array_equal(out, jnp.full_like(y, 2**-4))
    (gradient,) = pull(jnp.ones_like(y))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 4097)


def test_a_gate_of_attention_by_hand():
    """Each feature of each head by its own."""
    model = Model(
        width=16, num_heads=4, num_kv_heads=2, head_size=4, compute_dtype="float32"
    )
    plain = Attention(model, rngs=nnx.Rngs(0))
    gated = Attention(dataclasses.replace(model, attention_gate=True), rngs=nnx.Rngs(1))
    for name in "qkv":
        setattr(gated, name, getattr(plain, name))
    plain.out.set_value(jnp.eye(16).reshape(4, 4, 16))  # its heads, as they are
    gated.out_gate.set_value(gated.out_gate[...] * 50)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    heads = np.asarray(plain(x)).reshape(2, 6, 4, 4)
    gate = jax.nn.sigmoid(jnp.einsum("btd,dnh->btnh", x, gated.out_gate[...]))
    assert gate.std() > 0.1
    want = jnp.einsum("btnh,nhd->btd", heads * gate, gated.out[...])
    np.testing.assert_allclose(gated(x), want, atol=1e-6)
