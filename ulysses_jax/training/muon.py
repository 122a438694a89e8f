"""Muon: the momentum of each layer's matrix, made orthogonal (arXiv 2502.16982)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh, reshard
from jaxtyping import Array, Float

from ulysses_jax.training.matrix import Matrix, map_matrices

RMS = 0.2
"""Of an update's elements, about what AdamW's are (section 2.2 of the paper)."""


def scale_by_muon(
    beta: float, matrices: dict[str, Any]
) -> optax.GradientTransformation:
    """`optax.contrib.muon` with `consistent_rms`, of matrices that lie cut in a stack.

    Its Nesterov momentum lies as the gradients do, and each device steps its own part.
    Five steps of Newton and Schulz need whole matrices: see `orthogonal`.
    """

    def init(params: Any) -> optax.EmaState:
        zeros = optax.tree.zeros_like(params)
        return optax.EmaState(jnp.zeros([], jnp.int32), zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(updates, state.ema, beta, 1)
        ahead = optax.tree.bias_correction(momentum, beta, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, beta, count)
        updates = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        updates = map_matrices(_update, matrices, updates)
        return updates, optax.EmaState(count, momentum)

    return optax.GradientTransformation(init, update)


def _update(x: Array, matrix: Matrix) -> Array:
    flat = matrix.flat(x)
    return RMS * math.sqrt(max(flat.shape[-2:])) * orthogonal(flat).reshape(x.shape)


def orthogonal(x: Float[Array, "*L M N"]) -> Float[Array, "*L M N"]:
    """Each matrix with singular values near 1; it lies as before.

    A stack cut over axes of Z devices in all is exchanged, so that each device has
    whole matrices of ceil(L / Z) layers, and back: it sends `2 ceil(L / Z) M N`
    elements for each dim that is cut, less what stays. One matrix is gathered, and
    each device makes the same of it.
    """
    spec = jax.typeof(x).sharding.spec
    axes = tuple(axis for each in spec for axis in _names(each))
    if not axes:
        return _orthogonal(x)
    if x.ndim == 2:
        return reshard(_orthogonal(reshard(x, P(None, None))), spec)
    num_layers = x.shape[0]
    degree = math.prod(get_abstract_mesh().shape[axis] for axis in axes)
    x = jnp.pad(x, ((0, -num_layers % degree), (0, 0), (0, 0)))
    # One dim at a time: each is an exchange over that dim's axes, and no gather.
    rows = P(_names(spec[1]) or None, None, spec[2])
    x = reshard(reshard(x, rows), P(axes, None, None))
    x = _orthogonal(x)
    return reshard(reshard(x, rows), spec)[:num_layers]


def _orthogonal(x: Array) -> Array:
    """Without a momentum of its own Optax's step is that of Newton and Schulz alone."""
    dims = optax.contrib.MuonDimensionNumbers(-2, -1)
    alone = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=dims
    )
    updates, _ = alone.update(x, alone.init(x))
    return updates  # pyright: ignore[reportReturnType]


def _names(axes: Any) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
