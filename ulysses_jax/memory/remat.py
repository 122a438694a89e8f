"""Which values of a layer the backward pass finds, and which it computes again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ulysses_jax.config import Memory
from ulysses_jax.memory.offload import to_device

# As every flash attention of this library names what its backward pass needs.
ATTENTION = ("attention_out", "attention_logsumexp")
LAYER_INPUT, KEPT_INPUT = "layer_input", "layer_input_kept"


def run_layers(
    layer: Callable[[Float[Array, "B T D"], Any], Float[Array, "B T D"]],
    x: Float[Array, "B T D"],
    stacked: Any,
    memory: Memory,
) -> Float[Array, "B T D"]:
    """Runs layers in order, to be recomputed in the backward pass as `memory` says.

    Args:
      layer: `f(x, parameters)`.
      stacked: a pytree of parameters, each with a leading dim L. Of those in host
        memory one block at a time is on the device, and their gradients go back.
      memory: `remat` none keeps all that the backward pass reads. full keeps the input
        of every block of `remat_layers` layers and computes the rest again, once.
        attention also keeps each attention's output and logsumexp: its kernel runs
        once, but its queries, keys and values are projected and exchanged again.
        `offload` inputs, or attention, puts these in the host's memory.

    Returns:
      The last layer's result, as x.

    Cost: the input of every block; what the backward pass of one block reads, all its
    layers at once.
    """
    num_layers = memory.remat_layers

    def block(x, parameters):
        x = _name_input(x, memory)
        parameters = to_device(parameters)
        if num_layers == 1:
            return layer(x, parameters), None
        for i in range(num_layers):
            x = layer(x, jax.tree.map(lambda each, i=i: each[i], parameters))
        return x, None

    if num_layers > 1:
        stacked = jax.tree.map(
            lambda each: each.reshape(-1, num_layers, *each.shape[1:]), stacked
        )
    if memory.remat != "none":
        # A loop keeps XLA from merging the two computations; one trip is no loop.
        is_loop = jax.tree.leaves(stacked)[0].shape[0] > 1
        block = jax.checkpoint(block, prevent_cse=not is_loop, policy=_policy(memory))
    x, _ = jax.lax.scan(block, x, stacked)
    return x


def _name_input(x: Array, memory: Memory) -> Array:
    """As the policy knows it: the features that are kept, and those that are moved."""
    width = memory.kept_features(x.shape[-1])
    if not width:
        return checkpoint_name(x, LAYER_INPUT)
    kept = checkpoint_name(x[..., :width], KEPT_INPUT)
    moved = checkpoint_name(x[..., width:], LAYER_INPUT)
    return jnp.concatenate((kept, moved), axis=-1)


def _policy(memory: Memory) -> Callable[..., Any]:
    kept = ATTENTION if memory.remat == "attention" else ()
    offloaded = (LAYER_INPUT,) if "inputs" in memory.offload else ()
    if "attention" in memory.offload:
        kept, offloaded = (), offloaded + kept
    kept = (*kept, KEPT_INPUT)
    if not offloaded:
        return jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )
