"""Parameters inside shard_map: gathered once, used often, gradients scattered once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ulysses_jax.models.linear import Gathered, all_gather, sum_gradient
from ulysses_jax.sharding import ZERO


def specs_of(parameters: Any) -> Any:
    """How global arrays lie on a mesh with Explicit axes."""
    return jax.tree.map(lambda w: jax.typeof(w).sharding.spec, parameters)


def gather(parameters: Any, specs: Any, dtype: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Inside shard_map: what to take gradients of, and how it becomes weights.

    Args:
      parameters: local float32 arrays, a pytree.
      specs: `specs_of` the global ones.
      dtype: of the products.

    Returns:
      `(leaves, weights)`. `weights(leaves)` is a tree like parameters with every matrix
      (a parameter that is cut over the ZeRO axes) gathered, as `linear.Gathered`, and
      every vector as it is. The cotangents of `leaves`, all float32, are the gradients
      over the device's tokens; `scatter` sums them over devices.
    """

    def whole(w, spec):
        zero, dim = _zero(spec)
        return all_gather(w.astype(dtype), zero, dim=dim) if zero else None

    def is_none(leaf):
        return leaf is None

    values = jax.tree.map(whole, parameters, specs)
    leaves = jax.tree.map(
        lambda value, w: w if value is None else jnp.zeros(value.shape, jnp.float32),
        values,
        parameters,
        is_leaf=is_none,
    )

    def weights(leaves):
        return jax.tree.map(
            lambda value, leaf: leaf if value is None else Gathered(value, leaf),
            values,
            leaves,
            is_leaf=is_none,
        )

    return leaves, weights


def scatter(gradients: Any, specs: Any) -> Any:
    """Inside shard_map: gradients summed over all tokens, sharded as the parameters."""

    def summed(g, spec):
        return sum_gradient(g, *_zero(spec), apart=_names(*spec))

    return jax.tree.map(summed, gradients, specs)


def _zero(spec: P) -> tuple[tuple[str, ...], int]:
    """The axes over which a parameter's D is cut, and the dim; none for a vector."""
    for dim, axes in enumerate(spec):
        names = _names(axes)
        if names and set(names) <= set(ZERO):
            return names, dim
    return (), 0


def _names(*dims: Any) -> tuple[str, ...]:
    """The axes of some dims of a spec."""
    each = ((dim,) if isinstance(dim, str) else dim or () for dim in dims)
    return tuple(axis for axes in each for axis in axes)
