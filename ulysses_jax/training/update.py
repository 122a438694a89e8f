"""The step of the optimizer: of the whole state, or of one layer after another."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from ulysses_jax.memory.offload import (
    in_host,
    refetch,
    sum_layers,
    to_device,
    to_memory_of,
    update_layers,
    zeros_like_layers,
)

LAYERS = "layers"
"""The parameters under this name have a leading dim L."""


def update(
    optimizer: optax.GradientTransformationExtraArgs,
    sums: dict[str, Any],
    tokens: Float[Array, ""],
    parameters: dict[str, Any],
    state: optax.OptState,
    finite: Bool[Array, ""] | None = None,
) -> tuple[dict[str, Any], optax.OptState, Float[Array, ""]]:
    """Takes a step along the gradients; streams what lies in host memory.

    Args:
      optimizer: that of `make_optimizer`. It treats each layer's parameters on their
        own but for the norm, which it is given: so it may be given one layer of them.
      sums: the parameters' gradients times `tokens`, float32.
      parameters: float32.
      state: the optimizer's; its moments are dicts as the parameters.
      finite: where it is False, or the gradients' norm is not finite, nothing changes;
        None: whatever they are, the step is taken.

    Returns:
      The parameters and the state, each array in the memory where it was; and the norm
      of all gradients.

    Cost: in place where the arrays are donated. With any of them in host memory the
    device holds those of one layer at a time, then all that are no layer's; gradients
    in host memory cross PCIe twice, the first time for the norm.
    """

    def gradients_of(sums: Any) -> Any:
        return jax.tree.map(lambda x: x / tokens, sums)

    def squares(sums: Any) -> Float[Array, ""]:
        return jnp.square(optax.tree.norm(gradients_of(sums)))

    def step(written: Any, sums: Any) -> tuple[Any, Any]:
        parameters, state = written
        updates, state = optimizer.update(
            gradients_of(sums), state, parameters, norm=norm
        )
        stepped = optax.apply_updates(parameters, updates), state
        if finite is None:
            return stepped
        taken = finite & jnp.isfinite(norm)
        return jax.tree.map(partial(jnp.where, taken), stepped, written)

    if in_host(sums):
        layers, others = _part(sums, LAYERS), _part(sums)
        # The layers' sum waits for all other gradients: beside their collectives its
        # own would, on simulated devices, leave threads to neither, and never end.
        norm = jnp.sqrt(sum_layers(squares, layers, squares(to_device(others))))
    else:
        norm = optax.tree.norm(gradients_of(sums))
    return *_by_layer(step, (parameters, state), sums), norm


def zeros_like(parameters: dict[str, Any]) -> dict[str, Any]:
    """What sums of gradients start from, where the parameters lie."""
    if not in_host(parameters):
        return jax.tree.map(jnp.zeros_like, parameters)
    others = _part(parameters)
    zeros = jax.tree.map(jnp.zeros_like, to_device(others))
    zeros = jax.lax.optimization_barrier(zeros)
    layers = zeros_like_layers(_part(parameters, LAYERS))
    return layers | to_memory_of(others, zeros)


def add(sums: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The sum of two gradients, on the device, layer by layer, where the first lies."""
    return _by_layer(lambda a, b: jax.tree.map(jnp.add, a, b), sums, new)


def _by_layer(body: Callable[[Any, Any], Any], written: Any, read: Any) -> Any:
    """`body(written, read)`; in parts where any of it lies in host memory."""
    if not in_host((written, read)):
        return body(written, read)
    layers = update_layers(body, _part(written, LAYERS), _part(read, LAYERS))
    others = _part(written)
    others = to_memory_of(others, body(*refetch((others, _part(read)))))
    # What is no dict, such as a count, went to each layer; it has changed but once.
    return jax.tree.map(
        lambda x, y: x | y if _is_dict(x) else y, layers, others, is_leaf=_is_dict
    )


def _part(tree: Any, name: str | None = None) -> Any:
    """Each dict of a tree with this name alone; None: without the layers."""

    def pick(x: Any) -> Any:
        if not _is_dict(x):
            return x
        return {k: x[k] for k in x if (k == name if name else k != LAYERS)}

    return jax.tree.map(pick, tree, is_leaf=_is_dict)


def _is_dict(x: Any) -> bool:
    return isinstance(x, dict)
