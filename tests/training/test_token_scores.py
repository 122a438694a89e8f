"""Each token's loss and its likeliest id against float64, spread over every axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from ulysses_jax import make_mesh
from ulysses_jax.sharding import activation, parameter
from ulysses_jax.training.loss import IGNORED
from ulysses_jax.training.token_scores import token_scores

B, T, D, V = 4, 12, 8, 20


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_scores(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(V, D)).astype(np.float32)
    head[17] = head[3]  # on another member of tensor
    x[0, 0] = 9 * head[3]
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    labels[1, 4:] = IGNORED
    logits = np.einsum("BTD,VD->BTV", x.astype(np.float64), head)
    total = np.log(np.exp(logits).sum(axis=-1))
    at_label = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    mesh = make_mesh(data=2, seq=2, tensor=2, axis_type=kind)
    with jax.set_mesh(mesh):
        bt = NamedSharding(mesh, activation("BT", mesh.shape))
        btd = NamedSharding(mesh, activation("BTD", mesh.shape))
        vd = NamedSharding(mesh, parameter("VD", head.shape, mesh.shape))
        arrays = jax.device_put((x, head, labels), (btd, vd, bt))
        score = jax.jit(lambda *arrays: token_scores(*arrays, tile_tokens=5))
        nats, likeliest = score(*arrays)
    assert nats.dtype == jnp.float32 and nats.sharding.is_equivalent_to(bt, 2)
    likeliest = np.asarray(likeliest)
    want = np.where(labels == IGNORED, 0, total - at_label)
    np.testing.assert_allclose(nats, want, rtol=2e-6, atol=2e-6)
    assert likeliest[0, 0] == 3  # the first of equal ones
    best = logits.argmax(axis=-1)
    np.testing.assert_array_equal(likeliest, np.where(best == 17, 3, best))
