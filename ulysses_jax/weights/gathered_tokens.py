"""Megatron's products: into heads and features that lie over `seq`, and back."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ulysses_jax import layout
from ulysses_jax.sharding import MEGATRON, activation, residual
from ulysses_jax.weights.gathered import (
    Weight,
    as_cotangent,
    gradient_spec,
    is_frozen,
    value_of,
)
from ulysses_jax.weights.products import check_local, letters_of, local_gradient


def project_gathered(
    equations: tuple[str, ...], x: Float[Array, "B T D"], weights: tuple[Weight, ...]
) -> tuple[Array, ...]:
    """Products of all tokens with weights of local heads or features.

    Args:
      equations: one a weight, e.g. "BTD,DNH->BTNH".
      x: global, in the compute dtype, T over (ring, seq); inside shard_map local.
      weights: global float32 parameters (or `Gathered`), N, K or F over (tensor, seq);
        inside shard_map `Gathered` ones.

    Returns:
      Activations in x's dtype, sharded as `sharding.MEGATRON` says: T whole.

    Cost: one all-gather of x over seq, however many weights there are; it is kept for
    the backward pass, where one reduce-scatter sums dx. Weights are gathered, and their
    gradients summed, as by `products.project`, over the axes that D lies on.

    Source: arXiv 2205.05198, section 4.2.2, g; here the gathered x is what a backward
    pass finds, where that paper gathers it again.
    """
    if layout.inside_shard_map():
        for w in weights:
            check_local(w)
    return _gathered(equations, x, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(equations, x, weights):
    return _gathered_forward(equations, x, weights)[0]


def _gathered_forward(equations, x, weights):
    x = _all_tokens(x)
    return tuple(map(partial(_product, x=x), equations, weights)), (x, weights)


def _gathered_backward(equations, residuals, dys):
    x, weights = residuals
    back = []
    for equation in equations:
        x_letters, w_letters, y_letters = letters_of(equation)
        back.append(f"{y_letters},{w_letters}->{x_letters}")
    gradients = tuple(
        _weight_gradient(equation, x, dy, w)
        for equation, dy, w in zip(equations, dys, weights, strict=True)
    )
    return _summed_to_tokens(tuple(back), dys, weights), gradients


_gathered.defvjp(_gathered_forward, _gathered_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_scattered(equation: str, x: Array, w: Weight) -> Float[Array, "B T D"]:
    """The product of local heads or features with a weight, summed to token shards.

    Args:
      equation: e.g. "BTNH,NHD->BTD".
      x: global, sharded as `project_gathered` makes it; inside shard_map local.
      w: a global float32 parameter, N or F over (tensor, seq); inside shard_map a
        `Gathered`.

    Returns:
      `[B, T, D]`, global, as `sharding.residual` says; inside shard_map over seq.

    Cost: one reduce-scatter over seq and tensor (where `sharding.residual` does not cut
    over tensor, and inside shard_map, over seq, and an all-reduce over tensor);
    backward, one all-gather of the result's gradient.

    Source: arXiv 2205.05198, section 4.2.2, g-bar.
    """
    return _summed_to_tokens((equation,), (x,), (w,))


def _scattered_forward(equation, x, w):
    return project_scattered(equation, x, w), (x, w)


def _scattered_backward(equation, residuals, dy):
    x, w = residuals
    x_letters, w_letters, y_letters = letters_of(equation)
    dy = _all_tokens(dy)
    dx = _product(f"{y_letters},{w_letters}->{x_letters}", w, x=dy)
    return dx, _weight_gradient(equation, x, dy, w)


project_scattered.defvjp(_scattered_forward, _scattered_backward)


def _all_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B S D"]:
    if layout.inside_shard_map():
        return layout.all_gather(x, ("seq",), 1)
    return layout.lay(x, activation("BSD", layout.axes()))


def _weight(letters: str, w: Weight, dtype: jnp.dtype) -> Array:
    """Whole in D; inside shard_map it is."""
    value = value_of(w).astype(dtype)
    if layout.inside_shard_map():
        return value
    return layout.lay(value, activation(letters, layout.axes(), MEGATRON))


def _product(equation: str, w: Weight, *, x: Array) -> Array:
    """Of all tokens; nothing of the activations is sent."""
    _, w_letters, y_letters = letters_of(equation)
    w = _weight(w_letters, w, x.dtype)
    if layout.inside_shard_map():
        return jnp.einsum(equation, x, w)
    spec = activation(y_letters, layout.axes(), MEGATRON)
    return layout.einsum(equation, x, w, spec)


def _weight_gradient(equation: str, x: Array, dy: Array, w: Weight) -> Weight | None:
    """Of all tokens, float32, sharded as the weight's gradient; None: it is frozen."""
    if is_frozen(w):
        return None
    if layout.inside_shard_map():
        return as_cotangent(w, local_gradient(equation, x, dy))
    x_letters, w_letters, y_letters = letters_of(equation)
    gradient = layout.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        gradient_spec(w, w_letters, MEGATRON),
        preferred_element_type=jnp.float32,
    )
    return as_cotangent(w, gradient)


def _summed_to_tokens(
    equations: tuple[str, ...], xs: tuple[Array, ...], weights: tuple[Weight, ...]
) -> Float[Array, "B T D"]:
    """The sum of products that contract local heads or features, to token shards."""

    def local(xs, weights, over):
        products = [
            jnp.einsum(equation, x, w)
            for equation, x, w in zip(equations, xs, weights, strict=True)
        ]
        total = layout.psum_scatter(sum(products[1:], products[0]), over, 1)
        return total if "tensor" in over else layout.psum(total, ("tensor",))

    letters = [letters_of(equation) for equation in equations]
    ready = [
        _weight(each[1], w, xs[0].dtype)
        for each, w in zip(letters, weights, strict=True)
    ]
    if layout.inside_shard_map():
        return local(xs, ready, ("seq",))
    axes = layout.axes()
    spec = residual(xs[0].shape[1], axes)
    over = tuple(axis for axis in ("seq", "tensor") if axis in (spec[1] or ()))

    def specs(of: int) -> list:
        return [activation(each[of], axes, MEGATRON) for each in letters]

    run = layout.over_devices(partial(local, over=over), (specs(0), specs(1)), spec)
    return run(list(xs), ready)
