"""Integers of each token, such as positions, in the one dtype that is compared."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def int32_ids(ids: Any, name: str, shape: tuple[int, ...]) -> Int[Array, "B T"]:
    """The ids as int32.

    Args:
      ids: JAX arrays of a dtype that int32 holds; of NumPy arrays the values are looked
        at.
      shape: (batch, tokens), global.

    Raises:
      ValueError: another shape or kind; values that int32 may not hold.
    """
    limits = np.iinfo(np.int32)
    is_jax = isinstance(ids, jax.Array)
    if not is_jax:
        ids = as_array(ids, name)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} are integers, not {ids.dtype}")
    if ids.shape != shape:
        raise ValueError(
            f"{name} has shape {ids.shape}, but there are {shape} (batch, tokens)"
        )
    if is_jax:
        if jnp.iinfo(ids.dtype).max > limits.max:
            # Under jit no value is known: they would wrap in silence.
            raise ValueError(
                f"{name} are {ids.dtype}, and int32 does not hold all of its values: "
                "cast them, .astype(jnp.int32), where it holds yours"
            )
    elif ids.size and (ids.min() < limits.min or ids.max() > limits.max):
        raise ValueError(f"{name} {ids.min()} to {ids.max()} exceed int32")
    return ids.astype(np.int32)


def as_array(ids: Any, name: str) -> Any:
    """Lists of rows as NumPy's array; any array as it is.

    Raises:
      ValueError: rows of different lengths.
    """
    if hasattr(ids, "shape"):
        return ids
    try:
        return np.asarray(ids)
    except ValueError:
        raise ValueError(
            f"{name} are rows of different lengths: pad them to one, with segment_ids "
            "that no other token has"
        ) from None


def check_below(ids: Any, name: str, number: int, what: str) -> None:
    """Refuses ids that a table has no rows for, where their values are known.

    Traced ones, and those that other processes have, are let pass: such an id takes a
    row of zeros.

    Args:
      what: the field that says `number`, how many rows there are.

    Raises:
      ValueError: with the least and the greatest id.

    Cost: of a JAX array, a wait for it and a copy to the host.
    """
    if isinstance(ids, jax.core.Tracer):
        return
    if isinstance(ids, jax.Array):
        if not ids.is_fully_addressable:
            return
        ids = jax.device_get(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= number):
        raise ValueError(
            f"{name} are {ids.min()} to {ids.max()}, but {what} is {number}: use ids "
            f"of 0 to {number - 1}"
        )
