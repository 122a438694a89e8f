"""The feed-forward over tiles of tokens: its hidden activations never exist at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float

from ulysses_jax.memory.tiles import over_tiles
from ulysses_jax.models.gathered import gather, gradient_specs, scatter, specs_of
from ulysses_jax.models.linear import Gathered
from ulysses_jax.sharding import activation

# The parameters, by the names that `FeedForward` has for them.
NAMES = ("gate", "up", "down", "gate_bias", "up_bias")
Weights = dict[str, Array]


def activate(gate: Array | None, up: Array) -> Array:
    """SwiGLU, or GELU in the tanh form where there is no gate."""
    if gate is None:
        return jax.nn.gelu(up, approximate=True)
    return jax.nn.silu(gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def tiled_feed_forward(
    x: Float[Array, "B T D"], weights: Weights, tile_tokens: int
) -> Float[Array, "B T D"]:
    """`activate(x gate, x up) down`, for one tile of a device's tokens after another.

    Args:
      x: global, in the compute dtype, B over (data, fsdp), T over (ring, seq).
      weights: global float32 parameters by NAMES, sharded as `sharding.parameter` says;
        gate and the biases may be missing.
      tile_tokens: how many tokens of a device have hidden activations at a time.

    Returns:
      As x. The output's bias is not added: it would be, once a tensor shard.

    Cost: tile_tokens F / tensor a hidden activation. Keeps x alone; the backward pass
    makes the hidden activations again (one product, or two with a gate). The weights
    are gathered once a pass, not once a tile; their gradients are summed over tiles in
    float32 and scattered once. Over tensor, one all-reduce a pass.

    Source: tiling over the sequence as in Mini-Sequence Transformer, arXiv 2407.15892.
    """
    spec = activation("BTD", get_abstract_mesh().shape)
    specs = specs_of(weights)

    def local(x, weights):
        weights, _ = _gather(weights, specs, x)

        def tile(_sums, _tokens, x):
            hidden = activate(*_hidden_inputs(x, weights))
            return None, jnp.einsum("TF,FD->TD", hidden, weights["down"])

        rows = x.reshape(-1, x.shape[-1])
        _, y = over_tiles(tile, None, None, rows, tile_tokens=tile_tokens)
        return lax.psum(y, "tensor").reshape(x.shape)

    return jax.shard_map(
        local, in_specs=(spec, specs), out_specs=spec, check_vma=False
    )(x, weights)


def _forward(x, weights, tile_tokens):
    return tiled_feed_forward(x, weights, tile_tokens), (x, weights)


def _backward(tile_tokens, residuals, dy):
    x, weights = residuals
    spec = activation("BTD", get_abstract_mesh().shape)
    specs = specs_of(weights)

    def local(x, dy, weights):
        gathered, zeros = _gather(weights, specs, x)

        def tile(sums, x, dy):
            gate, up = _hidden_inputs(x, gathered)
            hidden, pull = jax.vjp(activate, gate, up)
            gradients = {"down": _weight_gradient("TF,TD->FD", hidden, dy)}
            dgate, dup = pull(jnp.einsum("TD,FD->TF", dy, gathered["down"]))
            dx = None
            for name, dh in (("gate", dgate), ("up", dup)):
                if dh is None:
                    continue
                gradients[name] = _weight_gradient("TD,TF->DF", x, dh)
                if f"{name}_bias" in gathered:
                    gradients[f"{name}_bias"] = dh.astype(jnp.float32).sum(axis=0)
                part = jnp.einsum("TF,DF->TD", dh, gathered[name])
                dx = part if dx is None else dx + part
            return jax.tree.map(jnp.add, sums, gradients), dx

        rows = x.reshape(-1, x.shape[-1])
        sums, dx = over_tiles(
            tile, zeros, rows, dy.reshape(rows.shape), tile_tokens=tile_tokens
        )
        return lax.psum(dx, "tensor").reshape(x.shape), scatter(sums, specs)

    return jax.shard_map(
        local,
        in_specs=(spec, spec, specs),
        out_specs=(spec, gradient_specs(specs)),
        check_vma=False,
    )(x, dy, weights)


tiled_feed_forward.defvjp(_forward, _backward)


def _hidden_inputs(x: Array, weights: Weights) -> tuple[Array | None, Array]:
    """Gate (None without one) and up of a tile, local; biases added in float32."""

    def linear(name):
        y = jnp.einsum("TD,DF->TF", x, weights[name])
        bias = weights.get(f"{name}_bias")
        return y if bias is None else (y.astype(jnp.float32) + bias).astype(y.dtype)

    return linear("gate") if "gate" in weights else None, linear("up")


def _weight_gradient(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _gather(weights: Weights, specs: Any, x: Array) -> tuple[Weights, Weights]:
    """Inside shard_map: matrices whole in D, in x's dtype; zeros for gradients."""
    leaves, gathered = gather(weights, specs, x.dtype)
    values = {
        name: w.value if isinstance(w, Gathered) else w
        for name, w in gathered(leaves).items()
    }
    return values, jax.tree.map(jnp.zeros_like, leaves)
