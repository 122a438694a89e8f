"""What a model or a layer is called with: refused, or filled in and laid out."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from ulysses_jax import layout
from ulysses_jax.config import Model
from ulysses_jax.ids import int32_ids
from ulysses_jax.parallel.zigzag import zigzag_index
from ulysses_jax.sharding import activation
from ulysses_jax.strategies import num_members, strategy_of
from ulysses_jax.weights.gathered import value_of
from ulysses_jax.weights.parameter import has_letters

PerToken = Int[Array, "B T"]


def positions_and_segments(
    model: Model,
    shape: tuple[int, ...],
    positions: PerToken | None,
    segment_ids: PerToken | None,
) -> tuple[PerToken, PerToken | None]:
    """Both as int32, global; B over (data, fsdp), T over (ring, seq).

    Args:
      shape: (batch, tokens), global.
      positions: None: 0, 1, 2, ..., in zigzag order where `model.zigzag` says so.

    Raises:
      ValueError: a batch or tokens that the mesh does not divide; ids of another shape
        or dtype.
    """
    _check_divides(shape)
    if positions is None:
        positions = jnp.broadcast_to(_order(model, shape[1]), shape)
    spec = activation("BT", layout.axes())
    positions = layout.lay(int32_ids(positions, "positions", shape), spec)
    if segment_ids is not None:
        segment_ids = layout.lay(int32_ids(segment_ids, "segment_ids", shape), spec)
    return positions, segment_ids


def check_input(module: Any, x: Any) -> None:
    """Refuses what a layer, or a part of one, cannot be called with.

    Raises:
      ValueError: x is no [B, T, D] of the module's width; the module is a stack, or
        lies on another mesh than the one that is set.
    """
    name, width = type(module).__name__, None
    parts = (module, *vars(module).values())
    parts = [each for each in parts if isinstance(each, nnx.Module)]
    own = [each for part in parts for each in vars(part).values()]
    own = [each for each in own if isinstance(each, nnx.Param) and has_letters(each)]
    arrays = [value_of(each.get_value()) for each in own]
    for variable, array in zip(own, arrays, strict=True):
        letters = variable.get_metadata()["letters"]
        if array.ndim > len(letters):
            raise ValueError(
                f"this {name} is a stack of {array.shape[0]} layers, which is not "
                "called: Transformer.features runs it, as models.stack.run_stacks "
                "does; its first layer alone is nnx.merge(graph, jax.tree.map(lambda "
                "w: w[0], state)), of graph, state = nnx.split(stack)"
            )
        if width is None and "D" in letters:
            width = array.shape[letters.index("D")]
    shape = getattr(x, "shape", None)
    fits = shape is not None and len(shape) == 3 and width in (None, shape[2])
    if not fits or not jnp.issubdtype(x.dtype, jnp.floating):
        what = type(x).__name__ if shape is None else f"{x.dtype} {shape}"
        raise ValueError(
            f"{name} takes floating-point [B, T, D] with a width D of {width}, not "
            f"{what}: token ids go into a Transformer"
        )
    if not layout.inside_shard_map():
        for array in (*arrays, x):
            layout.check_mesh(array)


def _order(model: Model, num_tokens: int) -> Int[Array, "T"]:
    """Where in the sequence each token of a row stands."""
    places = jnp.arange(num_tokens, dtype=jnp.int32)
    if not model.zigzag:
        return places
    ring, seq = layout.degree("ring"), layout.degree("seq")
    said = model.strategy
    strategy = strategy_of(ring, seq) if said == "auto" else said
    return zigzag_index(places, num_tokens, num_members(strategy, ring, seq))


def _check_divides(shape: tuple[int, ...]) -> None:
    for name, size, over in (
        ("rows", shape[0], ("data", "fsdp")),
        ("tokens", shape[1], ("ring", "seq")),
    ):
        degree = layout.degree(*over)
        if size % degree:
            degrees = " x ".join(f"{axis} {layout.degree(axis)}" for axis in over)
            more = -(-size // degree) * degree
            raise ValueError(
                f"{size} {name} do not divide over {degrees} = {degree} devices: pad "
                f"them to {more}"
                + (", with segment_ids that no other token has" * (name == "tokens"))
            )
