"""Parameters inside shard_map: gathered once, used often, gradients scattered once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ulysses_jax.models.linear import all_gather, sum_gradient
from ulysses_jax.models.weights import Gathered, as_cotangent, is_matrix
from ulysses_jax.sharding import zero_cut


def specs_of(parameters: Any) -> Any:
    """How global arrays lie on a mesh with Explicit axes."""
    return jax.tree.map(lambda w: jax.typeof(w).sharding.spec, parameters)


def gradient_specs(specs: Any) -> Any:
    """How the gradients lie of parameters with these `specs_of`."""
    return jax.tree.map(
        lambda spec: as_cotangent(spec, _of_gradient(spec)), specs, is_leaf=_is_weight
    )


def gather(parameters: Any, specs: Any, dtype: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Inside shard_map: what to take gradients of, and how it becomes weights.

    Args:
      parameters: local float32 arrays, or `Gathered` ones, a pytree.
      specs: `specs_of` the global ones.
      dtype: of the products.

    Returns:
      `(leaves, weights)`. `weights(leaves)` is a tree like parameters with every matrix
      (`linear.is_matrix`) gathered, as `linear.Gathered`, and every vector as it is.
      The cotangents of `leaves`, all float32, are the gradients over the device's
      tokens; `scatter` sums them over devices.
    """

    def whole(path, w, spec):
        if not is_matrix(path):
            return None
        if isinstance(w, Gathered):
            return w.value.astype(dtype)
        return all_gather(w.astype(dtype), *zero_cut(spec))

    def is_none(leaf):
        return leaf is None

    values = jax.tree_util.tree_map_with_path(
        whole, parameters, specs, is_leaf=_is_weight
    )
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
    """Inside shard_map: gradients summed over all tokens, as `gradient_specs` says."""

    def scattered(gradient, spec):
        return as_cotangent(spec, sum_gradient(gradient, _of_gradient(spec)))

    return jax.tree.map(scattered, gradients, specs)


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Gathered)


def _of_gradient(spec: Any) -> Any:
    return spec.gradient if isinstance(spec, Gathered) else spec
