"""Rotary position embedding whose angles stay right at millions of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

_DIGIT_BITS = 8
_NUM_DIGITS = 4  # 32 bits: every non-negative int32


def rope_angles(
    positions: Int[Array, "B T"], head_size: int, base: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of `position * base**(-2i / H)`, i < H/2, in float32.

    A position is read as four digits of eight bits. The angles of each digit are
    reduced in float64 on the host, once, into tables of 256 rows; the digits' cosines
    and sines are joined by the addition formulas. So the error does not grow with the
    position, as that of a float32 product does.

    Args:
      positions: int32, not negative; the array may be global or local, its numbers are
        global.
      head_size: H, even.
      base: of the geometric series of wavelengths.

    Returns:
      (cosines, sines), float32 `[B, T, H/2]`, sharded as positions.

    Source: RoFormer, arXiv 2104.09864, equation 15.
    """
    frequencies = base ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    digits = np.arange(2**_DIGIT_BITS, dtype=np.float64)
    cosine = sine = None
    for place in range(_NUM_DIGITS):
        weight = float(2 ** (_DIGIT_BITS * place))
        angles = digits[:, None] * weight * frequencies
        digit = (positions >> (_DIGIT_BITS * place)) & (2**_DIGIT_BITS - 1)
        c = _rows(np.cos(angles), digit)
        s = _rows(np.sin(angles), digit)
        if cosine is None or sine is None:
            cosine, sine = c, s
        else:
            cosine, sine = cosine * c - sine * s, sine * c + cosine * s
    assert cosine is not None and sine is not None
    return cosine, sine


def _rows(table: np.ndarray, indices: Int[Array, "B T"]) -> Float[Array, "B T half"]:
    sharding = jax.typeof(indices).sharding
    spec = None if sharding.mesh.empty else P(*sharding.spec, None)
    return jnp.asarray(table, jnp.float32).at[indices].get(out_sharding=spec)


def apply_rope(
    x: Float[Array, "B T N H"],
    angles: tuple[Float[Array, "B T half"], ...],
) -> Float[Array, "B T N H"]:
    """Turns pairs (x[i], x[i + H/2]) by their angles, in float32; returns x's dtype.

    Source: the half-split pairing of Llama's published checkpoints.
    """
    cosine, sine = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
