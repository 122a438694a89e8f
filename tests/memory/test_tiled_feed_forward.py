"""The feed-forward in tiles is the feed-forward, and never holds [T, F]."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from memory_cases import (
    FAMILIES,
    MESHES,
    assert_same,
    compiled,
    loss_and_gradients,
    make_config,
    mesh_of,
    plain,
)
from slow import slow_but_for

from ulysses_jax import Transformer, make_mesh
from ulysses_jax.config import Memory, Model
from ulysses_jax.memory.saving import Saving
from ulysses_jax.memory.tiled import Tiled
from ulysses_jax.memory.tiles import over_tiles
from ulysses_jax.models import FeedForward
from ulysses_jax.sharding import activation
from ulysses_jax.weights.whole import unbind


@pytest.mark.parametrize(
    "family, mesh_name",
    slow_but_for(
        [("llama", "fsdp 2, seq 2, tensor 2"), ("gpt", "data 2, seq 4")],
        FAMILIES,
        MESHES,
    ),
)
def test_same_loss_and_gradients(family, mesh_name):
    """A tile of 9 divides no device's tokens (224, 28, 28, 56)."""
    config = make_config(family, MESHES[mesh_name], remat="none", mlp_tile_tokens=9)
    assert_same(loss_and_gradients(config), plain(family, mesh_name))


@pytest.mark.parametrize(
    "remat, tile",
    slow_but_for([("none", 7), ("full", 8)], ["none", "full"], [1, 7, 8, 56]),
)
def test_any_tile(tile, remat):
    config = make_config("llama", mlp_tile_tokens=tile, remat=remat)
    assert_same(loss_and_gradients(config), plain("llama", "one device"))


def hidden_shapes(config, width):
    """The numbers of tokens of the program's arrays whose last dim is F."""
    found = re.findall(rf"\b[a-z]+\d+\[([\d,]*\b{width})\]", compiled(config).text)
    dims = [list(map(int, each.split(","))) for each in found]
    weights = ([config.model.width, width], [width, config.model.width])
    return {np.prod(d[:-1]) for d in dims if d[-2:] not in weights}


@pytest.mark.parametrize(
    "remat", [pytest.param("none", marks=pytest.mark.slow), "full"]
)
def test_hidden_activations_are_a_tile(remat):
    """T F exists in the untiled program, and in the tiled one nothing beyond a tile."""
    options = dict(tokens=776, model=dict(feed_forward_width=136), remat=remat)
    degrees = dict(data=2, seq=4)
    local = 4 // 2 * 776 // 4
    assert local in hidden_shapes(make_config("llama", degrees, **options), 136)
    tiled = make_config("llama", degrees, mlp_tile_tokens=48, **options)
    # 64 of the 136 x 16 weights of 4 layers lie on a device: shapes of their own.
    assert 48 in hidden_shapes(tiled, 136)
    assert max(hidden_shapes(tiled, 136)) < local / 2


@pytest.mark.slow
def test_a_device_with_no_more_tokens_than_a_tile_has_none():
    degrees = dict(data=2, seq=4)  # 28 tokens a device
    without = num_loops(make_config("llama", degrees))
    assert num_loops(make_config("llama", degrees, mlp_tile_tokens=28)) == without
    assert num_loops(make_config("llama", degrees, mlp_tile_tokens=13)) > without


def num_loops(config):
    return compiled(config).text.count(" while(")


def test_weight_gradients_are_summed_in_float32():
    """Ones: 2056 is no bfloat16, and a bfloat16 sum of tiles stops at 256."""
    model = Model(
        width=8, num_heads=2, feed_forward_width=4, feed_forward="gelu", biases=True
    )
    mesh = mesh_of(data=2, seq=2, tensor=2)
    with jax.set_mesh(mesh):
        feed_forward = FeedForward(model, rngs=nnx.Rngs(0))
        for name, value in (("up", 2.0), ("down", 1 / 16)):
            parameter = getattr(feed_forward, name)
            parameter[...] = jnp.full_like(parameter[...], value)
        sharding = NamedSharding(mesh, activation("BTD", mesh.shape))
        x = jax.device_put(jnp.ones((4, 514, 8), jnp.bfloat16), sharding)
        module, values = unbind(feed_forward)

        @jax.jit
        def backward(x, values):
            y, pull = jax.vjp(lambda x, w: Tiled(module.bind(w), 5)(x), x, values)
            return y, *pull(jnp.ones_like(y))

        y, dx, gradients = backward(x, values)
        dw = module.bind(gradients)
    assert y.dtype == dx.dtype == jnp.bfloat16
    # gelu(16) = 16: down's gradient is 16 a token, up's sum over D of 1/16: a half.
    np.testing.assert_array_equal(np.asarray(y, np.float32), 4)
    np.testing.assert_array_equal(np.asarray(dx, np.float32), 4)
    np.testing.assert_array_equal(np.asarray(dw.down[...]), 16 * 2056)
    np.testing.assert_array_equal(np.asarray(dw.up[...]), 2056 / 2)
    np.testing.assert_array_equal(np.asarray(dw.up_bias[...]), 2056 / 2)
    np.testing.assert_array_equal(np.asarray(dw.down_bias[...]), 2056)
    for gradient, w in zip(gradients, values, strict=True):
        assert gradient.dtype == jnp.float32 and gradient.sharding == w.sharding


@pytest.mark.parametrize("num_tokens, tile", [(12, 4), (13, 4), (3, 4), (4, 4), (5, 1)])
def test_over_tiles_reads_and_writes_every_row_once(num_tokens, tile):
    sizes = []

    def body(total, x, old):
        sizes.append(x.shape[0])
        again, ones = old
        return total + x.sum(axis=0), (x + again, ones + x[:, :1])

    rows = jnp.arange(num_tokens * 3).reshape(num_tokens, 3)
    outputs = (rows, jnp.ones((num_tokens, 1), rows.dtype))
    total, (twice, first) = over_tiles(
        body, jnp.zeros(3, rows.dtype), rows, outputs, tile_tokens=tile
    )
    np.testing.assert_array_equal(total, rows.sum(axis=0))
    np.testing.assert_array_equal(twice, rows * 2)
    np.testing.assert_array_equal(first, rows[:, :1] + 1)
    assert set(sizes) <= {min(tile, num_tokens), num_tokens % tile}


def test_of_a_model_made_on_no_mesh():
    """Whose matrices' types do not say that tensor cuts them."""
    model = Transformer(
        Model(
            vocab_size=32,
            width=16,
            num_layers=1,
            num_heads=2,
            compute_dtype="float32",
        ),
        rngs=nnx.Rngs(0),
    )
    tokens = jnp.arange(32)[None]

    def features(memory):
        run = Saving(memory)
        return nnx.jit(lambda model: model.features(tokens, run=run))(model)

    want = features(Memory())
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2], axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        got = features(Memory(mlp_tile_tokens=8))
    np.testing.assert_allclose(got, want, atol=2e-5)
