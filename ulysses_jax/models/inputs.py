"""What a model is called with: positions and segments, filled in and laid out."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from ulysses_jax import layout
from ulysses_jax.config import Model
from ulysses_jax.ids import int32_ids
from ulysses_jax.parallel.zigzag import zigzag_index
from ulysses_jax.sharding import activation
from ulysses_jax.strategies import num_members, strategy_of

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
