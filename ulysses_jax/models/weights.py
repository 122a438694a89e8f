"""A weight: an array as stored, or with it how its gradient lies if that differs."""

from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gathered:
    """A weight that is whole in D, and where its gradient goes.

    Attributes:
      value: inside shard_map, local, in the compute dtype; outside, global, as stored.
      gradient: float32, of its shape, never read: the cotangent of this is the gradient
        of the weight. Inside shard_map that of the device's tokens, which value's dtype
        could not hold; outside that of all, sharded as this, as value is not (ZeRO-2).
    """

    value: Array
    gradient: Array

    def __getitem__(self, _) -> "Gathered":
        return self  # as nnx reads the whole of a Param


Weight = Array | Gathered


def value_of(w: Weight) -> Array:
    """A global weight as stored: float32, whole in D or cut."""
    return w.value if isinstance(w, Gathered) else w


def gradient_spec(w: Weight) -> P:
    """How the gradient of a global weight lies: it arrives so."""
    gradient = w.gradient if isinstance(w, Gathered) else w
    return jax.typeof(gradient).sharding.spec


def as_cotangent(w: Any, gradient: Any) -> Any:
    """The gradient, in the place that it has in a weight, or in a weight's specs."""
    return Gathered(cast(Any, None), gradient) if isinstance(w, Gathered) else gradient


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether a parameter at this path is multiplied with, as norms and biases are not.

    The names of those end in scale or bias; they are never cut over the ZeRO axes.
    """
    names = [str(getattr(key, "key", "")) for key in path]
    return not any(name.endswith(("scale", "bias")) for name in names)


def inside_shard_map() -> bool:
    """Whether arrays are local here."""
    return bool(get_abstract_mesh().manual_axes)
