"""Integers of each token, such as positions, in the one dtype that is compared."""

from typing import Any

import jax
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
        ids = np.asarray(ids)
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
