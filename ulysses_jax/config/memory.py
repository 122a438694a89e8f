"""What a run does to need less memory."""

from dataclasses import dataclass
from typing import Literal

from ulysses_jax.config.model import Model


@dataclass(frozen=True)
class Memory:
    auto: bool = False
    """The cheapest of the options below that fit, in place of what they say, but for
    loss_tile_tokens and head_chunks; as a whole section, `memory: auto`."""
    remat: Literal["none", "full", "attention", "products"] = "full"
    """What the backward pass recomputes: nothing; each layer from its input; all of it
    but attention, whose output and logsumexp are kept (the memory of a second input,
    and no second attention); or all but attention and what matrix products and
    exchanges give, which leaves norms and activations."""
    offload: tuple[
        Literal["inputs", "attention", "keys", "optimizer", "parameters"], ...
    ] = ()
    """What waits in the host's memory until it is used: inputs, those that remat keeps;
    attention, the outputs that remat attention keeps; keys, and values, of the layer
    that is computed, where sequence_chunk_tokens cuts it; optimizer, its moments;
    parameters, and their gradients."""
    offload_fraction: float = 1.0
    """Of each layer's input that offload inputs moves; the rest stays on the device,
    where the host's memory is what runs out first."""
    loss_tile_tokens: int = 1024
    """Tokens of a device whose logits exist at once."""
    mlp_tile_tokens: int | None = None
    """Tokens of a device whose feed-forward activations exist at once; default: all.
    Tiles of a few thousand lose no speed; a device with fewer tokens has no tiles."""
    head_chunks: int | None = None
    """Groups in which a device's heads are projected, exchanged and attended, one
    group's exchange under another's attention; null: as many as save time, by a model
    of the links that seq runs over (`plan.head_chunks`)."""
    sequence_chunk_tokens: int | None = None
    """Tokens of a device that go through a layer at a time, attention and feed-forward:
    of all others there are only the layer's input, keys and values, in layers of a
    state the input and a state for each of these pieces; default: all."""

    @property
    def recomputes_products(self) -> bool:
        return self.remat in ("full", "attention")

    def kept_features(self, width: int) -> int:
        """Features of a layer's input that stay on the device while the rest moves."""
        return round(width * (1 - self.offload_fraction)) * ("inputs" in self.offload)


def kinds_in_pieces(model: Model, memory: Memory) -> tuple[str, ...]:
    """Of the layers that run as `memory.layer_in_pieces` or `memory.states_in_pieces`,
    which recompute in any case: all in chunks of tokens, in groups of heads those that
    attend."""
    if memory.sequence_chunk_tokens is not None:
        return model.kinds()
    # Under other strategies the strategy itself has the groups.
    groups = (memory.head_chunks or 1) > 1 and memory.recomputes_products
    groups &= model.strategy in ("auto", "ulysses")
    return model.attending_kinds() if groups else ()


def in_pieces(model: Model, memory: Memory) -> bool:
    """Whether there are such layers."""
    return bool(kinds_in_pieces(model, memory))


def attended_features(model: Model, memory: Memory) -> int:
    """Features a token, over all layers, of attention's outputs that `remat` keeps, if
    any's: under attention those of layers that attend, which have a kernel's; else of
    all."""
    attends_alone = memory.remat == "attention"
    kinds = model.attending_kinds() if attends_alone else model.kinds()
    return sum(map(model.attended_features, kinds))
