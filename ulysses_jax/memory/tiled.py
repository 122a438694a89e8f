"""A feed-forward over tiles of tokens: its hidden activations never exist at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ulysses_jax import layout
from ulysses_jax.memory.tiles import over_tiles
from ulysses_jax.models.foreign import call
from ulysses_jax.models.residual import to_layer, to_residual
from ulysses_jax.sharding import MEGATRON, activation
from ulysses_jax.weights.whole import (
    Unbound,
    Values,
    gather,
    gradient_specs,
    laid_as,
    scatter,
    specs_of,
    unbind,
)


class Tiled(nnx.Module):
    """A module of tokens one by one, called for one tile of them after another.

    Cost: what the module makes of a tile. Keeps x alone; the backward pass calls the
    module again. Its matrices are gathered once a pass, not once a tile; their
    gradients are summed over tiles in float32 and scattered once. Over tensor, and for
    Megatron's over seq, each tile sends what it would: in all, the bytes of the whole.

    Source: tiling over the sequence as in Mini-Sequence Transformer, arXiv 2407.15892.
    """

    def __init__(self, module: Any, tile_tokens: int):
        """Args: tile_tokens: of a device; those with hidden activations at a time."""
        self.module, self.tile_tokens = module, tile_tokens
        self.products = getattr(module, "products", None)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Global, as the module; whole where a device has no more than a tile."""
        tokens = x.shape[0] * x.shape[1]
        tokens //= layout.degree("data", "fsdp", "ring", "seq")
        products = self.products
        tile_tokens = self.tile_tokens
        if products is not None and products.table is MEGATRON:
            # A tile's tokens are gathered over seq, to a part of the features.
            tile_tokens = max(tile_tokens // layout.degree("seq"), 1)
        if tokens <= tile_tokens:
            return call(self.module, x)
        module, values = unbind(self.module)
        y: Array = _in_tiles(module, tile_tokens, to_layer(x), values)
        return layout.lay_like(to_residual(y), x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_tiles(module: Unbound, tile_tokens: int, x: Array, values: Values) -> Array:
    specs, spec = specs_of(module, values), activation("BTD", layout.axes())

    def local(x, values):
        leaves, bound = gather(module, values, specs, x.dtype)

        def tile(_sums, _tokens, x):
            return None, bound(leaves)(x[None])[0]

        rows = x.reshape(-1, x.shape[-1])
        _, y = over_tiles(tile, None, None, rows, tile_tokens=tile_tokens)
        return y.reshape(x.shape)

    return layout.over_devices(local, (spec, specs), spec)(x, values)


def _forward(module, tile_tokens, x, values):
    return _in_tiles(module, tile_tokens, x, values), (x, values)


def _backward(module, tile_tokens, residuals, dy):
    x, values = residuals
    specs, spec = specs_of(module, values), activation("BTD", layout.axes())

    def local(x, dy, values):
        leaves, bound = gather(module, values, specs, x.dtype)

        def tile(sums, x, dy):
            _, pull = jax.vjp(lambda leaves, x: bound(leaves)(x[None])[0], leaves, x)
            gradients, dx = pull(dy)
            return jax.tree.map(jnp.add, sums, gradients), dx

        rows = x.reshape(-1, x.shape[-1])
        sums, dx = over_tiles(
            tile,
            jax.tree.map(jnp.zeros_like, leaves),
            rows,
            dy.reshape(rows.shape),
            tile_tokens=tile_tokens,
        )
        return dx.reshape(x.shape), scatter(module, sums, specs)

    dx, gradients = layout.over_devices(
        local, (spec, spec, specs), (spec, gradient_specs(specs))
    )(x, dy, values)
    return dx, laid_as(values, gradients)


_in_tiles.defvjp(_forward, _backward)
