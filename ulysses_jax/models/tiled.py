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
from ulysses_jax.models.linear import all_gather
from ulysses_jax.models.megatron import lies_over_seq
from ulysses_jax.models.weights import Weight, value_of
from ulysses_jax.sharding import activation

# The parameters, by the names that `FeedForward` has for them.
NAMES = ("gate", "up", "down", "gate_bias", "up_bias")
Weights = dict[str, Weight]


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
    float32 and scattered once. Over tensor, one all-reduce a pass. Where the hidden
    features lie over seq too (Megatron's), x and dy are gathered over seq, y and dx
    scattered: the tiles are of all tokens.

    Source: tiling over the sequence as in Mini-Sequence Transformer, arXiv 2407.15892.
    """
    spec = activation("BTD", get_abstract_mesh().shape)
    specs, over_seq = specs_of(weights), _over_seq(weights)

    def local(x, weights):
        weights, _ = _gather(weights, specs, x)
        x = all_gather(x, over_seq, dim=1)

        def tile(_sums, _tokens, x):
            hidden = activate(*_hidden_inputs(x, weights))
            return None, jnp.einsum("TF,FD->TD", hidden, weights["down"])

        rows = x.reshape(-1, x.shape[-1])
        _, y = over_tiles(tile, None, None, rows, tile_tokens=tile_tokens)
        return _summed(y.reshape(x.shape), over_seq)

    return jax.shard_map(
        local, in_specs=(spec, specs), out_specs=spec, check_vma=False
    )(x, weights)


def _forward(x, weights, tile_tokens):
    return tiled_feed_forward(x, weights, tile_tokens), (x, weights)


def _backward(tile_tokens, residuals, dy):
    x, weights = residuals
    spec = activation("BTD", get_abstract_mesh().shape)
    specs, over_seq = specs_of(weights), _over_seq(weights)

    def local(x, dy, weights):
        gathered, zeros = _gather(weights, specs, x)
        x, dy = (all_gather(each, over_seq, dim=1) for each in (x, dy))

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
        return _summed(dx.reshape(x.shape), over_seq), scatter(sums, specs)

    return jax.shard_map(
        local,
        in_specs=(spec, spec, specs),
        out_specs=(spec, gradient_specs(specs)),
        check_vma=False,
    )(x, dy, weights)


tiled_feed_forward.defvjp(_forward, _backward)


def _over_seq(weights: Weights) -> tuple[str, ...]:
    """The axes over which tokens are gathered: none, or seq for Megatron's weights."""
    return ("seq",) if lies_over_seq("DF", weights["up"]) else ()


def _summed(y: Float[Array, "B T D"], over_seq: tuple[str, ...]) -> Array:
    """Inside shard_map: over hidden features, to the shards that x came from."""
    if over_seq:
        y = lax.psum_scatter(y, over_seq, scatter_dimension=1, tiled=True)
    return lax.psum(y, "tensor")


def _hidden_inputs(x: Array, weights: dict[str, Array]) -> tuple[Array | None, Array]:
    """Gate (None without one) and up of a tile, local; biases added in float32."""

    def linear(name):
        y = jnp.einsum("TD,DF->TF", x, weights[name])
        bias = weights.get(f"{name}_bias")
        return y if bias is None else (y.astype(jnp.float32) + bias).astype(y.dtype)

    return linear("gate") if "gate" in weights else None, linear("up")


def _weight_gradient(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _gather(
    weights: Weights, specs: Any, x: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inside shard_map: matrices whole in D, in x's dtype; zeros for gradients."""
    leaves, gathered = gather(weights, specs, x.dtype)
    values = {name: value_of(w) for name, w in gathered(leaves).items()}
    return values, jax.tree.map(jnp.zeros_like, leaves)
