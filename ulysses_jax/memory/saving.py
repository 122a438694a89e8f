"""How a layer is run under a run's memory options: they act on it from outside."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ulysses_jax.config import Memory, in_pieces
from ulysses_jax.memory.layer_in_pieces import ATTENTION, layer_in_pieces
from ulysses_jax.memory.offload import to_device
from ulysses_jax.memory.states_in_pieces import states_in_pieces
from ulysses_jax.memory.tiled import Tiled
from ulysses_jax.models.attention import Attend, Attention
from ulysses_jax.models.kinds import OF_A_STATE
from ulysses_jax.models.layer import Layer
from ulysses_jax.models.residual import to_layer, to_residual
from ulysses_jax.weights.whole import Unbound, Values

# As models and strategies name what products and exchanges give.
PRODUCTS = ("attention_inputs", "attended", "residual_middle", "hidden_activations")
LAYER_INPUT, KEPT_INPUT = "layer_input", "layer_input_kept"


@dataclass(frozen=True)
class Saving:
    """Runs a layer, to be recomputed in the backward pass as `memory` says.

    `model.features(tokens, run=Saving(Memory(remat="full")))`. A layer may be any
    module that is called as `models.Layer` is. Groups of heads and chunks of the
    sequence are for a `models.Layer` whose attention is a `models.Attention`, and whose
    own calls are theirs; chunks for those of kinds linear and delta, too; others have
    no groups, and chunks are refused.

    memory: `remat` none keeps all that the backward pass reads. full keeps the input of
      every layer and computes the rest again, once. attention also keeps each
      attention's output and logsumexp: its kernel runs once, but its queries, keys and
      values are projected and exchanged again. products keeps what products and
      exchanges give, too, and computes norms and activations again. `offload` inputs,
      or attention, puts these in the host's memory; parameters that lie there come to
      the device one layer at a time, and their gradients go back.
    """

    memory: Memory

    def __call__(
        self,
        layer: Unbound,
        values: Values,
        x: Float[Array, "B T D"],
        *tokens: Any,
        angles: Any,
        in_loop: int,
    ) -> Float[Array, "B T D"]:
        """As `models.stack.RunLayer` says.

        Raises:
          ValueError: sequence_chunk_tokens, and a layer that has no chunks.
        """
        memory = self.memory

        def run(x: Array, values: Values, tokens: Any, angles: Any) -> Array:
            x = _name_input(x, memory)
            values = to_device(values)
            bound = layer.bind(values)
            if memory.sequence_chunk_tokens and _calls_are_of(bound, *OF_A_STATE):
                y: Array = states_in_pieces(
                    layer, memory, to_layer(x), values, tokens[-1]
                )
                return to_residual(y)
            if not _comes_apart(bound):
                _refuse_chunks(bound, memory)
            elif in_pieces(bound.attention.model, memory):
                y = layer_in_pieces(
                    layer, memory, to_layer(x), values, angles, tokens[-1]
                )
                return to_residual(y)
            else:
                bound.attention.attend = dataclasses.replace(
                    bound.attention.attend, head_chunks=memory.head_chunks or 1
                )
            if memory.mlp_tile_tokens:
                _refuse_tiles(bound, memory)
                bound.feed_forward = Tiled(bound.feed_forward, memory.mlp_tile_tokens)
            return bound(x, *tokens, angles=angles)

        if memory.remat != "none":
            run = jax.checkpoint(
                run,
                prevent_cse=_barrier(memory, in_loop),
                policy=_policy(memory),
            )
        return run(x, values, tokens, angles)


def _barrier(memory: Memory, in_loop: int) -> bool:
    """Whether what a layer computes again waits for its gradient.

    A loop keeps XLA from merging the two computations; one trip is no loop. Of several
    layers in a round XLA would compute all again before the first gradient, if nothing
    waited. What products gave would all lie there at once, if it waited too.
    """
    return not in_loop or (in_loop > 1 and memory.remat != "products")


def _comes_apart(layer: Any) -> bool:
    """Whether a layer computes as `memory.take_apart` has it."""
    return _calls_are_of(layer, Attention) and type(layer.attention.attend) is Attend


def _calls_are_of(layer: Any, *kinds: type) -> bool:
    """Whether it is a `models.Layer` of one of these kinds: parts may be others, but
    not what is called."""
    attention = getattr(layer, "attention", None)
    return (
        isinstance(layer, Layer)
        and isinstance(attention, kinds)
        and type(layer).__call__ is Layer.__call__
        and type(layer).add_feed_forward is Layer.add_feed_forward
        and type(attention).__call__ in [kind.__call__ for kind in kinds]
    )


def _refuse_chunks(layer: Any, memory: Memory) -> None:
    if memory.sequence_chunk_tokens:
        attention = type(getattr(layer, "attention", None)).__name__
        raise ValueError(
            f"memory.sequence_chunk_tokens {memory.sequence_chunk_tokens} takes "
            f"layers apart, and {type(layer).__name__} with {attention} is no "
            "ulysses_jax.models.Layer whose attention is a models.Attention, or of kind"
            " linear or delta, and whose calls are theirs: leave it out"
        )


def _refuse_tiles(layer: Any, memory: Memory) -> None:
    if not hasattr(layer, "feed_forward"):
        raise ValueError(
            f"memory.mlp_tile_tokens {memory.mlp_tile_tokens} cuts the part of a layer "
            f"that is named feed_forward, and {type(layer).__name__} has none: name it "
            "so, or leave the option out"
        )


def _name_input(x: Array, memory: Memory) -> Array:
    """As the policy knows it: the features that are kept, and those that are moved."""
    width = memory.kept_features(x.shape[-1])
    if not width:
        return checkpoint_name(x, LAYER_INPUT)
    kept = checkpoint_name(x[..., :width], KEPT_INPUT)
    moved = checkpoint_name(x[..., width:], LAYER_INPUT)
    return jnp.concatenate((kept, moved), axis=-1)


def _policy(memory: Memory) -> Callable[..., Any]:
    kept: tuple[str, ...] = () if memory.remat == "full" else ATTENTION
    if memory.remat == "products":
        kept += PRODUCTS
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
