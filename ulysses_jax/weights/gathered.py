"""A weight: an array as stored, or with it how its gradient lies if that differs, or
that it has none."""

from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ulysses_jax import layout
from ulysses_jax.sharding import ACTIVATION, Table, activation, parameter


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gathered:
    """A weight that is whole in D, and where its gradient goes.

    Attributes:
      value: inside shard_map, local, in the compute dtype; outside, global, as stored.
      gradient: None: the weight is frozen, and no product makes a gradient of it. Else
        float32, of its shape, never read: the cotangent of this is the gradient of the
        weight. Inside shard_map that of the device's tokens, which value's dtype
        could not hold; outside that of all, sharded as this, as value is not (ZeRO-2).
    """

    value: Array
    gradient: Array | None

    def __getitem__(self, _) -> "Gathered":
        return self  # as nnx reads the whole of a Param


Weight = Array | Gathered


def value_of(w: Weight) -> Array:
    """A global weight as stored: float32, whole in D or cut."""
    return w.value if isinstance(w, Gathered) else w


def spec_of(w: Weight, letters: str, table: Table = ACTIVATION) -> P:
    """How a global weight lies in use: its D as its type says, the rest by the table.

    On Auto axes, where types do not say, D as `sharding.parameter` says.
    """
    w, axes = value_of(w), layout.axes()
    made = parameter(letters, w.shape, axes, table)
    said = layout.spec_of(w, made)
    in_use = activation(letters, axes, table)
    return P(
        *(
            theirs if letter == "D" else ours
            for letter, theirs, ours in zip(letters, said, in_use, strict=True)
        )
    )


def is_frozen(w: Any) -> bool:
    return isinstance(w, Gathered) and w.gradient is None


def gradient_spec(w: Weight, letters: str, table: Table = ACTIVATION) -> P:
    """How the gradient of a global weight lies, which is not frozen: it arrives so."""
    return spec_of(slot_of(w), letters, table)


def slot_of(w: Weight) -> Array:
    """The array whose cotangent the gradient is, of a weight that is not frozen."""
    slot = w.gradient if isinstance(w, Gathered) else w
    assert slot is not None
    return slot


def as_cotangent(w: Any, gradient: Any) -> Any:
    """The gradient, in the place that it has in a weight, or in a weight's specs."""
    return Gathered(cast(Any, None), gradient) if isinstance(w, Gathered) else gradient
