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
        memory one layer's at a time are on the device, and their gradients go back.
      memory: `remat` none keeps all that the backward pass reads. full keeps the input
        of every layer and computes the rest again, once. attention also keeps each
        attention's output and logsumexp: its kernel runs once, but its queries, keys
        and values are projected and exchanged again. `offload` inputs, or attention,
        puts these in the host's memory.

    Returns:
      The last layer's result, as x.

    Cost: the input of every layer; what the backward pass of one layer reads.
    """

    def one(x, parameters):
        return layer(_name_input(x, memory), to_device(parameters)), None

    if memory.remat != "none":
        # A loop keeps XLA from merging the two computations; one trip is no loop.
        is_loop = jax.tree.leaves(stacked)[0].shape[0] > 1
        one = jax.checkpoint(one, prevent_cse=not is_loop, policy=_policy(memory))
    x, _ = jax.lax.scan(one, x, stacked)
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
