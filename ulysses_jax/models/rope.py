"""Rotary position embedding whose angles stay right at millions of tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float64, Int

from ulysses_jax.config import Rope
from ulysses_jax.rotary import turned_features

_DIGIT_BITS = 8
_NUM_DIGITS = 4  # 32 bits: every non-negative int32


def frequencies(
    rope: Rope, head_size: int, num_tokens: int, *, kind: str = "full"
) -> tuple[Float64[np.ndarray, "half"], float]:
    """How far each pair turns a position, and what cosines and sines are multiplied by.

    Args:
      rope: as `complete.complete_model` leaves it.
      head_size: H.
      num_tokens: T, global: dynamic and longrope depend on it, whatever the positions
        that tokens are given.
      kind: of the layer.

    Returns:
      Float64 `[half]`, half the features that are turned; and the factor.

    Source: linear, arXiv 2306.15595; dynamic, its NTK form, with a base for the length;
    yarn, arXiv 2309.00071, section 3; longrope, arXiv 2402.13753; llama3, Llama 3.1's
    published code.
    """
    size = turned_features(rope, head_size)
    pairs = np.arange(size // 2, dtype=np.float64)
    if kind == "window" and rope.window_base is not None:
        return rope.window_base ** (-2 * pairs / size), 1.0
    factor, original = rope.factor, rope.original_tokens
    plain = rope.base ** (-2 * pairs / size)
    if rope.scaling == "none":
        return plain, 1.0
    if rope.scaling == "linear":
        return plain / factor, 1.0
    assert original is not None
    if rope.scaling == "dynamic":
        longer = max(num_tokens, original) / original
        base = rope.base * (factor * longer - (factor - 1)) ** (size / (size - 2))
        return base ** (-2 * pairs / size), 1.0
    if rope.scaling == "longrope":
        slower = rope.long_factors if num_tokens > original else rope.short_factors
        scale = 1.0
        if factor > 1:
            scale = math.sqrt(1 + math.log(factor) / math.log(original))
        return plain / np.asarray(slower), _given(rope.attention_factor, scale)
    turns = original * plain / (2 * math.pi)
    if rope.scaling == "llama3":
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        left = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (left + (1 - left) / factor), 1.0

    def pair_that_turns(times: float) -> float:
        at = original / (2 * math.pi * times)
        return size * math.log(at) / (2 * math.log(rope.base))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    slowed = np.clip((pairs - first) / (last - first or 1e-3), 0, 1)
    scale = _given(rope.attention_factor, 0.1 * math.log(factor) + 1)
    return plain * (1 - slowed + slowed / factor), scale


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def rope_angles(
    positions: Int[Array, "B T"],
    frequencies: Float64[np.ndarray, "half"],
    scale: float = 1.0,
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of `position * frequencies`, in float32, times scale.

    A position is read as four digits of eight bits. The angles of each digit are
    reduced in float64 on the host, once, into tables of 256 rows; the digits' cosines
    and sines are joined by the addition formulas. So the error does not grow with the
    position, as that of a float32 product does.

    Args:
      positions: int32, not negative; the array may be global or local, its numbers are
        global.
      frequencies: radians a position.

    Returns:
      (cosines, sines), float32 `[B, T, half]`, sharded as positions.

    Source: RoFormer, arXiv 2104.09864, equation 15.
    """
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
    return (cosine, sine) if scale == 1 else (cosine * scale, sine * scale)


def _rows(table: np.ndarray, indices: Int[Array, "B T"]) -> Float[Array, "B T half"]:
    sharding = jax.typeof(indices).sharding
    spec = None if sharding.mesh.empty else P(*sharding.spec, None)
    return jnp.asarray(table, jnp.float32).at[indices].get(out_sharding=spec)


def apply_rope(
    x: Float[Array, "B T N H"],
    angles: tuple[Float[Array, "B T half"], ...],
) -> Float[Array, "B T N H"]:
    """Turns pairs (x[i], x[i + half]) by their angles, in float32; returns x's dtype.

    Features from 2 half on stay as they are.

    Source: the half-split pairing of Llama's published checkpoints.
    """
    cosine, sine = (a[:, :, None, :] for a in angles)
    half = cosine.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = (part.astype(jnp.float32) for part in (first, second))
    parts = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate((*(part.astype(x.dtype) for part in parts), rest), axis=-1)
