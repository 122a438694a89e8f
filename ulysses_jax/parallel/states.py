"""What shards of a sequence hand on to those after them: states, and last tokens."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

AxisNames = tuple[str, ...]


def state_before(
    change: Array,
    state: Float[Array, "B N H V"],
    *,
    apply: Callable[[Array, Array], Array],
    axis_names: AxisNames,
) -> Float[Array, "B N H V"]:
    """The state that all shards before this one leave; call it inside `shard_map`.

    Args:
      change: what this shard's tokens make of a state that they find is `apply(change,
        it)`, to which they add
      state: what they leave where they find 0.
      apply: `f(change, state)`, linear in both, such as a product; of two changes it
        makes the one that is both: `f(after, before)`.
      axis_names: over which the tokens lie, outermost first.

    Returns:
      Like `state`; of the first shard zeros.

    Cost: the `hops` of the number of shards, all of the state, and all but the last two
    of the change too, as one array: nothing depends on the number of tokens. As much
    backward. `parallel.bytes.state_bytes` has the formula.
    """
    for reach, with_change in hops(lax.axis_size(axis_names))[:-1]:
        # Of as many shards as `reach`, up to this one; then of twice as many. Where
        # there is none, zeros come: they add nothing, and nothing is before them.
        if with_change:
            came, came_change = _come((state, change), reach, axis_names)
            state = state + apply(change, came)
            change = apply(change, came_change)
        else:
            state = state + apply(change, _come(state, reach, axis_names))
    return _come(state, 1, axis_names)


def hops(degree: int) -> list[tuple[int, bool]]:
    """What `state_before` sends: how many shards on, and whether the change goes too.

    1 + ceil(log2(degree - 1)) times, the last two without; never for one shard.
    """
    joined = [2**n for n in range(max(degree - 2, 0).bit_length())]
    found = [(reach, 2 * reach < degree - 1) for reach in joined]
    return found + [(1, False)] * (degree > 1)


def with_before(x: Array, num_tokens: int, axis_names: AxisNames) -> Array:
    """`[B, t, ...]` after the last tokens of the shard before: `[B, n+t, ...]`.

    Args:
      num_tokens: n, at most t where there are axes.
      axis_names: over which the tokens lie; none: one shard.

    Returns:
      Of the first shard zeros come first.
    """
    if axis_names:
        came = _come(x[:, x.shape[1] - num_tokens :], 1, axis_names)
    else:
        came = jnp.zeros((len(x), num_tokens, *x.shape[2:]), x.dtype)
    return jnp.concatenate((came, x), axis=1)


def _come(tree: Any, shards: int, axis_names: AxisNames) -> Any:
    """From so many shards before; zeros where there is none. One array is sent."""
    flat, unravel = ravel_pytree(tree)
    pairs = [(i, i + shards) for i in range(lax.axis_size(axis_names) - shards)]
    return unravel(lax.ppermute(flat, axis_names, pairs))
