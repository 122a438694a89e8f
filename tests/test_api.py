"""The interface for people with a model of their own: Flax's attention, ids, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax import attention_fn, make_mesh, ulysses_attention
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.reference import reference_attention

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


def inputs(num_heads=N, num_kv_heads=N):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((B, T, heads, H), np.float32))
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return q, k, v


SEGMENTS = np.asarray([[1] * 5 + [2] * 11, [1] * 9 + [2] * 7])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint32, list])
def test_ids_of_any_integer_type(dtype, axis_type):
    """Unsigned ones too: a window takes differences of positions."""
    q, k, v = inputs()
    positions = np.arange(T)[None].repeat(B, axis=0)
    mask = Mask(
        causal=True,
        window=4,
        q_segment_ids=jnp.asarray(SEGMENTS),
        kv_segment_ids=jnp.asarray(SEGMENTS),
    )
    want = reference_attention(q, k, v, mask=mask)
    segments, positions = (
        x.tolist() if dtype is list else x.astype(dtype) for x in (SEGMENTS, positions)
    )
    with jax.set_mesh(make_mesh(data=2, seq=4, axis_type=axis_type)):
        attend = functools.partial(
            ulysses_attention, segment_ids=segments, positions=positions, window=4
        )
        got = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(segment_ids=SEGMENTS.astype(float)),
            "segment_ids are integers, not float",
        ),
        (dict(positions=SEGMENTS + 2**31), "positions 2147483649 to .* exceed int32"),
        (
            dict(segment_ids=SEGMENTS[:1]),
            r"segment_ids has shape \(1, 16\), .*\(2, 16\)",
        ),
        (dict(segment_ids=(SEGMENTS,)), "segment_ids is an array or a pair, not 1"),
        (dict(positions=(SEGMENTS, SEGMENTS[:, :4])), r"positions has shape \(2, 4\)"),
    ],
)
def test_ids_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        ulysses_attention(*inputs(), mesh=make_mesh(data=2, seq=4), **given)


def test_ids_in_pairs_for_cross_attention():
    q, k, v = inputs()
    q, segments = q[:, :8], (SEGMENTS[:, 2:10], SEGMENTS)
    mask = Mask(q_segment_ids=segments[0], kv_segment_ids=segments[1])
    got = ulysses_attention(
        q, k, v, mesh=make_mesh(data=2, seq=4), causal=False, segment_ids=segments
    )
    want = reference_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("heads, kv_heads", [(12, 6), (10, 2), (6, 6)])
@pytest.mark.parametrize(
    "degrees", [dict(seq=4, tensor=2), dict(seq=2, tensor=2)], ids=str
)
def test_uneven_heads_under_tensor(heads, kv_heads, degrees):
    """Padding is within the heads of a tensor shard: 6, 5 or 3 of them over seq."""
    mesh = make_mesh(data=-1, **degrees)
    q, k, v = inputs(heads, kv_heads)

    def gradients(attend):
        return jax.jit(
            jax.grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv))), argnums=(0, 1, 2))
        )(q, k, v)

    got = gradients(functools.partial(ulysses_attention, mesh=mesh))
    want = gradients(functools.partial(reference_attention, mask=Mask(causal=True)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_two_meshes_at_once_are_refused():
    """The mesh that is set would win in silence."""
    with jax.set_mesh(make_mesh(data=2, seq=4)):
        with pytest.raises(ValueError, match="'seq': 8.* jax.set_mesh .*'seq': 4"):
            ulysses_attention(*inputs(8, 8), mesh=make_mesh(seq=8))
        out = ulysses_attention(*inputs(), mesh=make_mesh(data=2, seq=4))
    assert out.sharding.spec[1] in ("seq", ("ring", "seq"))


def test_the_attention_for_the_platform_is_called(monkeypatch):
    """The devices of the mesh decide, and q, k and the mask with them."""
    asked = []

    def spy(platform, q, k, mask):
        asked.append((platform, q.shape, k.shape, mask.causal))
        return reference_attention

    monkeypatch.setattr("ulysses_jax.attend.local_attention", spy)
    q, k, v = inputs(8, 4)
    ulysses_attention(q, k[:, :8], v[:, :8], mesh=make_mesh(seq=8), causal=False)
    assert asked == [("cpu", (B, T, 8, H), (B, 8, 4, H), False)]
