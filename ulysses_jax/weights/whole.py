"""A module's parameters inside shard_map: gathered once, used often, scattered once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ulysses_jax import layout
from ulysses_jax.sharding import zero_cut
from ulysses_jax.weights.gathered import (
    Gathered,
    Weight,
    as_cotangent,
    is_frozen,
    value_of,
)
from ulysses_jax.weights.parameter import has_letters, is_matrix, spec_of

Values = tuple[Any, ...]


@dataclass(frozen=True)
class Unbound:
    """A module without its parameters' values; of a stack, one layer of it.

    Attributes:
      graph, tree: of the module and of its state.
      variables: the parameters, whose values are others'.
    """

    graph: Any
    tree: Any
    variables: tuple[Any, ...] = field(compare=False)  # the graph knows their metadata

    def bind(self, values: Values) -> Any:
        """The module with these values."""
        pairs = zip(self.variables, values, strict=True)
        bound = [variable.copy(value) for variable, value in pairs]
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, bound))


def unbind(module: Any) -> tuple[Unbound, Values]:
    """A module apart from its parameters' values, each an array or a `Gathered`.

    Raises:
      ValueError: it has variables that are no parameters.
    """
    graph, state = nnx.split(module)
    variables, tree = jax.tree.flatten(state, is_leaf=_is_variable)
    for variable in variables:
        if not isinstance(variable, nnx.Param):
            raise ValueError(
                f"{type(module).__name__} has a {type(variable).__name__}, which is no "
                "nnx.Param: what a call changes in a layer would be lost; make it "
                "without (no dropout, no batch statistics)"
            )
    values = tuple(variable.get_value() for variable in variables)
    bare = tuple(variable.copy(None) for variable in variables)
    return Unbound(graph, tree, bare), values


def specs_of(module: Unbound, values: Values) -> tuple[Any, ...]:
    """How global values lie, and, of a `Gathered`, its gradient."""

    def of(variable: Any, value: Any) -> Any:
        return jax.tree.map(lambda x: spec_of(variable, x), value)

    return tuple(map(of, module.variables, values))


def gradient_specs(specs: tuple[Any, ...]) -> tuple[Any, ...]:
    """How the gradients lie of values with these `specs_of`; None: it is frozen."""
    return tuple(
        None if is_frozen(spec) else as_cotangent(spec, _of_gradient(spec))
        for spec in specs
    )


def gather(
    module: Unbound, values: Values, specs: tuple[Any, ...], dtype: Any
) -> tuple[list[Array | None], Callable[[list[Array | None]], Any]]:
    """Inside shard_map: what to take gradients of, and how it becomes the module.

    Args:
      values: local float32 arrays, or `Gathered` ones.
      specs: `specs_of` the global ones.
      dtype: of the products.

    Returns:
      `(leaves, bound)`. `bound(leaves)` is the module with every matrix gathered, as a
      `Gathered`, and every vector as it is; a parameter of another library's is whole,
      in float32. A frozen matrix has None among the leaves. The cotangents of `leaves`,
      all float32, are the gradients over the device's tokens; `scatter` sums them over
      devices.
    """
    wholes: list[Array | None] = []
    leaves: list[Array | None] = []
    for variable, w, spec in zip(module.variables, values, specs, strict=True):
        if not is_matrix(variable, value_of(w)):
            wholes.append(None)
            leaves.append(w)
            continue
        # Cast first: what is sent is in the products' dtype.
        whole = value_of(w).astype(dtype) if has_letters(variable) else value_of(w)
        whole = layout.all_gather(whole, *zero_cut(_of_value(spec)))
        if has_letters(variable):
            wholes.append(whole)
            zeros = None if is_frozen(w) else jnp.zeros(whole.shape, jnp.float32)
            leaves.append(zeros)
        else:
            wholes.append(None)
            leaves.append(whole)

    def bound(leaves: list[Array | None]) -> Any:
        pairs = zip(wholes, leaves, strict=True)
        return module.bind(
            tuple(
                leaf if whole is None else Gathered(whole, leaf)
                for whole, leaf in pairs
            )
        )

    return leaves, bound


def laid_as(values: Values, gradients: Values) -> Values:
    """Cotangents with their values' types, which may lie otherwise than in use."""
    pairs = zip(values, gradients, strict=True)
    return tuple(
        gradient if isinstance(w, Gathered) else layout.lay_like(gradient, w)
        for w, gradient in pairs
    )


def scatter(
    module: Unbound, gradients: list[Array | None], specs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Inside shard_map: gradients summed over all tokens, as `gradient_specs` says."""

    def of(variable: Any, gradient: Array | None, spec: Any) -> Any:
        if gradient is None:
            return None
        if variable.get_metadata().get("letters") in ("H", "U"):
            # Of all heads, of which a device has some.
            gradient = layout.psum(gradient, ("tensor",))
        total = sum_gradient(gradient, _of_gradient(spec))  # pyright: ignore[reportArgumentType]
        return as_cotangent(spec, total)

    return tuple(map(of, module.variables, gradients, specs))


def sum_gradient(gradient: Array, spec: P) -> Array:
    """Inside shard_map: a weight's gradient, summed over all tokens.

    Args:
      spec: of the global sum. It is scattered over the axes that cut D. Nothing is
        summed over those that cut another dim: their devices have other parts.
    """
    zero, dim = zero_cut(spec)
    apart = {
        a for axes in spec for a in ((axes,) if isinstance(axes, str) else axes or ())
    }
    tokens = ("data", "fsdp", "ring", "seq")
    others = tuple(axis for axis in tokens if axis not in apart)
    return layout.psum(layout.psum_scatter(gradient, zero, dim), others)


def _of_value(spec: Weight | P) -> Any:
    return spec.value if isinstance(spec, Gathered) else spec


def _of_gradient(spec: Weight | P) -> Any:
    return spec.gradient if isinstance(spec, Gathered) else spec


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
