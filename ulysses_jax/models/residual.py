"""The residual stream: where its tokens lie, and where a layer wants them."""

from jaxtyping import Array, Float

from ulysses_jax import layout
from ulysses_jax.sharding import activation, residual


def to_residual(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Global, to where `sharding.residual` says: over tensor each drops the rest."""
    return layout.lay(x, residual(x.shape[1], layout.axes()))


def to_layer(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Global, to tokens over (ring, seq) alone, as products with weights over tensor
    need them: an all-gather over tensor, if that is above 1."""
    return layout.lay(x, activation("BTD", layout.axes()))
