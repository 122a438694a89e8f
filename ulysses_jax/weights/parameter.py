"""Parameters: made sharded, and what each is, kept with it: its letters, its part.

A parameter is an `nnx.Param` whose metadata say `letters`, its dims of one layer; where
they lie, by `table`; and `is_matrix`: whether activations are multiplied with it. A
matrix is decayed by the optimizer and cut by ZeRO; a vector (a bias, the scale of a
norm) is neither.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding, get_abstract_mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ulysses_jax import layout
from ulysses_jax.sharding import ACTIVATION, Table, parameter


def matrix(
    rngs: nnx.Rngs,
    letters: str,
    sizes: dict[str, int],
    *,
    std: float,
    table: Table = ACTIVATION,
) -> nnx.Param:
    """A float32 matrix, drawn from a normal distribution, made sharded.

    Args:
      letters: its dims, e.g. "DNH"; `sharding.parameter` says where they lie.
      sizes: the global size of each letter.
      std: the standard deviation.
      table: where heads and features lie.

    Raises:
      ValueError: a dim does not divide over the axes that it lies on; rngs are none.
    """
    check_rngs(rngs)
    shape = tuple(sizes[letter] for letter in letters)
    spec = _spec(letters, shape, table)
    if layout.is_explicit():
        values = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec)
    else:
        values = layout.lay(jax.random.normal(rngs.params(), shape, jnp.float32), spec)
    return nnx.Param(values * std, letters=letters, table=table, is_matrix=True)


def check_rngs(rngs: Any) -> None:
    """Refuses a seed or a key in the place of `nnx.Rngs`."""
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(
            f"rngs is a flax.nnx.Rngs, not {type(rngs).__name__}: give nnx.Rngs(0), or "
            "nnx.Rngs(jax.random.key(0))"
        )


def vector(
    letters: str,
    sizes: dict[str, int],
    value: float | np.ndarray,
    table: Table = ACTIVATION,
) -> nnx.Param:
    """A float32 parameter that starts as one number, or as an array that broadcasts to
    its shape: a bias, or the scale of a norm."""
    shape = tuple(sizes[letter] for letter in letters)
    spec = _spec(letters, shape, table)
    if layout.is_explicit():
        values = jnp.full(shape, value, jnp.float32, out_sharding=spec)
    else:
        values = layout.lay(jnp.full(shape, value, jnp.float32), spec)
    return nnx.Param(values, letters=letters, table=table, is_matrix=False)


def _spec(letters: str, shape: tuple[int, ...], table: Table) -> P:
    spec = parameter(letters, shape, layout.axes(), table)
    layout.check_divides(shape, spec)
    return spec


def is_matrix(variable: Any, like: Any = None) -> bool:
    """Whether activations are multiplied with a parameter.

    Of one that does not say, as a user's own: if it has two dims or more.

    Args:
      like: an array of its shape; None: the variable itself.
    """
    said = variable.get_metadata().get("is_matrix")
    return (variable if like is None else like).ndim > 1 if said is None else said


def has_letters(variable: Any) -> bool:
    """Whether it is one of this library's, for `weights.products`."""
    return "letters" in variable.get_metadata()


def stacked_spec_of(variable: Any, array: Any) -> P:
    """`spec_of` where the array may have the leading dim of a stack; it may be a shape,
    and then its type does not say."""
    letters = variable.get_metadata().get("letters")
    if letters is None:
        return said_spec(variable)
    extra = array.ndim - len(letters)
    table = variable.get_metadata()["table"]
    return P(*(None,) * extra, *_spec(letters, array.shape[extra:], table))


def sharding_of(variable: Any) -> Any:
    """Where a parameter, or a stack of them, lies on the mesh that is set; on none, the
    first device."""
    if get_abstract_mesh().empty:
        return SingleDeviceSharding(jax.devices()[0])
    spec = stacked_spec_of(variable, variable)
    return NamedSharding(jax.sharding.get_mesh(), spec)


def said_spec(variable: Any) -> P:
    """How another library's parameter says that it lies (`nnx.with_partitioning`), over
    those axes that the mesh has; whole where it does not say."""
    said = variable.get_metadata().get("out_sharding") or ()
    names = (((each,) if isinstance(each, str) else each or ()) for each in said)
    return P(*(layout.present(tuple(each)) or None for each in names))


def spec_of(variable: Any, array: Array) -> P:
    """How an array lies that a parameter has, without the dim of a stack.

    On Explicit axes as its type says; else as its letters do. Without letters it is
    whole in use, however it lies.
    """
    metadata = variable.get_metadata()
    if "letters" not in metadata:
        return P(*(None,) * array.ndim)
    made = _spec(metadata["letters"], array.shape, metadata["table"])
    return layout.spec_of(array, made)
