"""The feed-forward over tiles of tokens: its hidden activations never exist at once."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float

from ulysses_jax.memory.tiles import over_tiles
from ulysses_jax.models.linear import all_gather, sum_gradient
from ulysses_jax.sharding import activation, parameter, zero_axes

# The parameters by name, each global, float32, and the letters of their dims.
LETTERS = {
    "gate": "DF",
    "up": "DF",
    "down": "FD",
    "gate_bias": "F",
    "up_bias": "F",
}
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
      weights: global float32 parameters by the names of LETTERS, sharded as
        `sharding.parameter` says; gate and the biases may be missing.
      tile_tokens: how many tokens of a device have hidden activations at a time.

    Returns:
      As x. The output's bias is not added: it would be, once a tensor shard.

    Cost: tile_tokens F / tensor a hidden activation. Keeps x alone; the backward pass
    makes the hidden activations again (one product, or two with a gate). The weights
    are gathered once a pass, not once a tile; their gradients are summed over tiles in
    float32 and scattered once. Over tensor, one all-reduce a pass.

    Source: tiling over the sequence as in Mini-Sequence Transformer, arXiv 2407.15892.
    """
    axes = get_abstract_mesh().shape
    spec = activation("BTD", axes)

    def local(x, weights):
        weights = _gather(weights, x)

        def tile(_sums, _tokens, x):
            hidden = activate(*_hidden_inputs(x, weights))
            return None, jnp.einsum("TF,FD->TD", hidden, weights["down"])

        rows = x.reshape(-1, x.shape[-1])
        _, y = over_tiles(tile, None, None, rows, tile_tokens=tile_tokens)
        return lax.psum(y, "tensor").reshape(x.shape)

    return jax.shard_map(
        local, in_specs=(spec, _specs(weights)), out_specs=spec, check_vma=False
    )(x, weights)


def _forward(x, weights, tile_tokens):
    return tiled_feed_forward(x, weights, tile_tokens), (x, weights)


def _backward(tile_tokens, residuals, dy):
    x, weights = residuals
    axes = get_abstract_mesh().shape
    spec = activation("BTD", axes)

    def local(x, dy, weights):
        gathered = _gather(weights, x)
        zeros = {name: jnp.zeros(w.shape, jnp.float32) for name, w in gathered.items()}

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
        gradients = {
            name: sum_gradient(total, *_zero(name, x, axes))
            for name, total in sums.items()
        }
        return lax.psum(dx, "tensor").reshape(x.shape), gradients

    specs = _specs(weights)
    return jax.shard_map(
        local, in_specs=(spec, spec, specs), out_specs=(spec, specs), check_vma=False
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


def _specs(weights: Weights) -> dict[str, P]:
    axes = get_abstract_mesh().shape
    return {
        name: parameter(LETTERS[name], w.shape, axes) for name, w in weights.items()
    }


def _zero(name: str, x: Array, axes) -> tuple[tuple[str, ...], int]:
    """The axes over which a parameter's D is cut, and which dim that is."""
    letters = LETTERS[name]
    if "D" not in letters:
        return (), 0
    return zero_axes(x.shape[-1], axes), letters.index("D")


def _gather(weights: Weights, x: Array) -> Weights:
    """Inside shard_map: matrices whole in D, in x's dtype; biases as they are."""
    axes = get_abstract_mesh().shape

    def whole(name, w):
        if "D" not in LETTERS[name]:
            return w
        zero, dim = _zero(name, x, axes)
        return all_gather(w.astype(x.dtype), zero, dim=dim)

    return {name: whole(name, w) for name, w in weights.items()}
