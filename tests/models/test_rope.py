"""Rotary angles stay right at every position that an int32 holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax import make_mesh
from ulysses_jax.config import Rope
from ulysses_jax.models import rope
from ulysses_jax.models.rope import apply_rope

# Also the error of a float64 product of a position and a frequency, at 2^31.
TOLERANCE = 1e-6
REGIONS = {
    "start": np.arange(0, 600),
    "2^24": np.arange(2**24 - 300, 2**24 + 300),
    "2^25": np.arange(2**25 - 300, 2**25 + 300),
    "end": np.arange(2**31 - 600, 2**31),
    "anywhere": np.random.default_rng(0).integers(0, 2**31, 600),
}


def frequencies(head_size, base):
    return [base ** (-2 * i / head_size) for i in range(head_size // 2)]


def rope_angles(positions, head_size, base):
    turns = rope.frequencies(Rope(base=base), head_size, positions.shape[1])
    return rope.rope_angles(positions, *turns)


def exact(positions, head_size, base):
    """Cosines and sines in float64."""
    angles = positions.astype(np.float64)[..., None] * frequencies(head_size, base)
    return np.cos(angles), np.sin(angles)


def naive(positions, head_size, base):
    """What most code does: a float32 product."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(
        frequencies(head_size, base), jnp.float32
    )
    return jnp.cos(angles), jnp.sin(angles)


def check(angles_of, region, head_size, base):
    positions = REGIONS[region].reshape(2, -1)
    got = angles_of(jnp.asarray(positions, jnp.int32), head_size, base)
    for a, b in zip(got, exact(positions, head_size, base), strict=True):
        assert a.dtype == jnp.float32 and a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize(
    "head_size, base", [(128, 5e5), (64, 1e4), (80, 1e6), (256, 5e5), (2, 1e4)]
)
def test_angles(region, head_size, base):
    check(rope_angles, region, head_size, base)


def test_longrope_is_long_past_its_first_length():
    """Not at it; its factor of cosines and sines is its paper's, or the one given."""
    stretched = Rope(
        base=100.0,
        scaling="longrope",
        factor=4.0,
        original_tokens=16,
        short_factors=(1.0, 2.0),
        long_factors=(3.0, 5.0),
    )
    plain = np.array([1, 0.1])
    for tokens, slower in ((16, (1, 2)), (17, (3, 5))):
        turns, scale = rope.frequencies(stretched, 4, tokens)
        np.testing.assert_allclose(turns, plain / slower)
        np.testing.assert_allclose(scale, (1 + np.log(4) / np.log(16)) ** 0.5)
    given = dataclasses.replace(stretched, attention_factor=1.5)
    assert rope.frequencies(given, 4, 17)[1] == 1.5


@pytest.mark.parametrize("region", ["2^24", "2^25", "end"])
def test_a_float32_product_would_be_seen(region):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(naive, region, 128, 5e5)


def test_angles_lie_as_their_positions():
    positions = REGIONS["2^25"][:32].reshape(2, 16).astype(np.int32)
    mesh = make_mesh(data=2, seq=4, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data", "seq"))
        sharded = jax.device_put(positions, sharding)
        got = jax.jit(lambda p: rope_angles(p, 8, 1e4))(sharded)
    for a, b in zip(got, exact(positions, 8, 1e4), strict=True):
        assert a.sharding.spec == P("data", "seq", None)
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turns_pairs_as_complex_numbers(dtype):
    """The pair (x[i], x[i + H/2]) is a complex number, turned by exp(i angle)."""
    positions = REGIONS["2^25"].reshape(2, -1)
    head_size, base = 16, 5e5
    shape = (*positions.shape, 3, head_size)
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    got = apply_rope(x, rope_angles(jnp.asarray(positions), head_size, base))

    numbers = np.asarray(x, np.float64)
    numbers = numbers[..., : head_size // 2] + 1j * numbers[..., head_size // 2 :]
    cosine, sine = exact(positions, head_size, base)
    turned = numbers * (cosine + 1j * sine)[:, :, None, :]
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    assert got.dtype == dtype
    # One rounding to the dtype, of values up to 4.
    tolerance = 4e-6 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=0, atol=tolerance
    )


def scores(angles_of, start):
    """Products of queries and keys at `start`, `start` + 1, ..."""
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 24, 2, 64))
    angles = angles_of(start + jnp.arange(24, dtype=jnp.int32)[None], 64, 5e5)
    return jnp.einsum("BTNH,BSNH->BNTS", apply_rope(q, angles), apply_rope(k, angles))


def test_products_depend_on_the_distance_alone():
    near = scores(rope_angles, 0)
    for start in (2**20, 2**25, 2**31 - 24):
        far = scores(rope_angles, start)
        np.testing.assert_allclose(far, near, rtol=0, atol=5e-5)
    assert float(jnp.abs(scores(naive, 2**25) - near).max()) > 0.1
