"""Megatron's projections: into heads and features that lie over `seq`, and back."""

import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import get_abstract_mesh, reshard
from jaxtyping import Array, Float

from ulysses_jax.models.weights import Weight, as_cotangent, gradient_spec, value_of
from ulysses_jax.sharding import MEGATRON, activation, residual


def lies_over_seq(letters: str, w: Weight) -> bool:
    """Whether a weight's heads or features are cut over seq, as its type says."""
    spec = jax.typeof(value_of(w)).sharding.spec
    return any(
        letter in "NKF" and "seq" in (axes or ())
        for letter, axes in zip(letters, spec, strict=True)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_gathered(
    equations: tuple[str, ...], x: Float[Array, "B T D"], weights: tuple[Weight, ...]
) -> tuple[Array, ...]:
    """Products of all tokens with weights of local heads or features.

    Args:
      equations: one a weight, e.g. "BTD,DNH->BTNH".
      x: global, in the compute dtype, T over (ring, seq).
      weights: global float32 parameters (or `Gathered`), N, K or F over (tensor, seq).

    Returns:
      Global activations in x's dtype, sharded as `sharding.MEGATRON` says: T whole.

    Cost: one all-gather of x over seq, however many weights there are; it is kept for
    the backward pass, where one reduce-scatter sums dx. Weights are gathered, and their
    gradients summed, as by `linear.project`, over the axes that D lies on.

    Source: arXiv 2205.05198, section 4.2.2, g; here the gathered x is what a backward
    pass finds, where that paper gathers it again.
    """
    return _gathered_forward(equations, x, weights)[0]


def _gathered_forward(equations, x, weights):
    x = _all_tokens(x)
    return tuple(map(partial(_product, x=x), equations, weights)), (x, weights)


def _gathered_backward(equations, residuals, dys):
    x, weights = residuals
    back = []
    for equation in equations:
        x_letters, w_letters, y_letters = _letters(equation)
        back.append(f"{y_letters},{w_letters}->{x_letters}")
    gradients = tuple(
        _weight_gradient(equation, x, dy, w)
        for equation, dy, w in zip(equations, dys, weights, strict=True)
    )
    return _summed_to_tokens(back, dys, weights), gradients


project_gathered.defvjp(_gathered_forward, _gathered_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_scattered(equation: str, x: Array, w: Weight) -> Float[Array, "B T D"]:
    """The product of local heads or features with a weight, summed to token shards.

    Args:
      equation: e.g. "BTNH,NHD->BTD".
      x: global, sharded as `project_gathered` makes it.
      w: a global float32 parameter, N or F over (tensor, seq).

    Returns:
      `[B, T, D]`, global, as `sharding.residual` says.

    Cost: one reduce-scatter over seq and tensor (where `sharding.residual` does not cut
    over tensor, over seq, and an all-reduce of its result over tensor);
    backward, one all-gather of the result's gradient.

    Source: arXiv 2205.05198, section 4.2.2, g-bar.
    """
    return _summed_to_tokens((equation,), (x,), (w,))


def _scattered_forward(equation, x, w):
    return project_scattered(equation, x, w), (x, w)


def _scattered_backward(equation, residuals, dy):
    x, w = residuals
    x_letters, w_letters, y_letters = _letters(equation)
    dy = _all_tokens(dy)
    dx = _product(f"{y_letters},{w_letters}->{x_letters}", w, x=dy)
    return dx, _weight_gradient(equation, x, dy, w)


project_scattered.defvjp(_scattered_forward, _scattered_backward)


def _all_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B S D"]:
    return reshard(x, activation("BSD", get_abstract_mesh().shape))


def _letters(equation: str) -> tuple[str, str, str]:
    x, w, y = re.split(",|->", equation)
    return x, w, y


def _gathered_weight(letters: str, w: Weight, dtype: jnp.dtype) -> Array:
    axes = get_abstract_mesh().shape
    return reshard(value_of(w).astype(dtype), activation(letters, axes, MEGATRON))


def _product(equation: str, w: Weight, *, x: Array) -> Array:
    """Of all tokens; nothing of the activations is sent."""
    _, w_letters, y_letters = _letters(equation)
    return jnp.einsum(
        equation,
        x,
        _gathered_weight(w_letters, w, x.dtype),
        out_sharding=activation(y_letters, get_abstract_mesh().shape, MEGATRON),
    )


def _weight_gradient(equation: str, x: Array, dy: Array, w: Weight) -> Weight:
    """Of all tokens, float32, sharded as the weight's gradient."""
    x_letters, w_letters, y_letters = _letters(equation)
    gradient = jnp.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        preferred_element_type=jnp.float32,
        out_sharding=gradient_spec(w),
    )
    return as_cotangent(w, gradient)


def _summed_to_tokens(
    equations: Sequence[str], xs: Sequence[Array], weights: Sequence[Weight]
) -> Float[Array, "B T D"]:
    """The sum of products that contract local heads or features, to token shards."""
    axes = get_abstract_mesh().shape
    letters = [_letters(equation) for equation in equations]
    gathered = [
        _gathered_weight(each[1], w, xs[0].dtype)
        for each, w in zip(letters, weights, strict=True)
    ]

    spec = residual(xs[0].shape[1], axes)
    over = tuple(axis for axis in ("seq", "tensor") if axis in (spec[1] or ()))

    def local(xs, weights):
        products = [
            jnp.einsum(equation, x, w)
            for equation, x, w in zip(equations, xs, weights, strict=True)
        ]
        total = sum(products[1:], products[0])
        total = lax.psum_scatter(total, over, scatter_dimension=1, tiled=True)
        return total if "tensor" in over else lax.psum(total, "tensor")

    def specs(of: int) -> list:
        return [activation(each[of], axes, MEGATRON) for each in letters]

    return jax.shard_map(
        local,
        in_specs=(specs(0), specs(1)),
        out_specs=spec,
        check_vma=False,
    )(list(xs), gathered)
