"""Products of activations with weights that are whole in use and cut as they lie."""

import re
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ulysses_jax import layout
from ulysses_jax.sharding import ACTIVATION, activation, residual
from ulysses_jax.weights.gathered import (
    Gathered,
    Weight,
    as_cotangent,
    gradient_spec,
    is_frozen,
    value_of,
)


def project(
    equation: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."] | Gathered,
    dtype: jnp.dtype | None = None,
) -> Array:
    """A matrix product with a sharded weight, `project("BTD,DNH->BTNH", x, w)`.

    The weight is cast to x's dtype, then gathered over the axes that hold its D, if any
    do, for the product alone: nothing gathered is kept for the backward pass, which
    gathers anew. The weight's gradient is summed over tokens and devices in float32 and
    arrives sharded as `gradient_spec` says.

    Args:
      equation: an einsum of one activation and one weight; its letters, those of
        `sharding.ACTIVATION`, also say how the result is sharded.
      x: global activation, in the compute dtype.
      w: global float32 parameter, or one `Gathered`; inside shard_map a `Gathered`, and
        x local.
      dtype: of the result; None: x's.

    Returns:
      The activation, global or local as x.

    Raises:
      ValueError: x is local to a device, and w is not.

    Costs, where w is cut, an all-gather of w forward, and one backward; a
    reduce-scatter of its gradient where that is cut, else an all-reduce; where a letter
    of the tensor axis is contracted, a reduce-scatter of the result to the residual
    stream, which the next product gathers (on the CPU, and where `sharding.residual`
    does not cut it, an all-reduce).
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if layout.inside_shard_map():
        local = check_local(w)
        return _project_local(equation, dtype, x, local.value, local.gradient)
    return _project_global(equation, dtype, x, w)


def project_each(
    equations: tuple[str, ...], x: Float[Array, "..."], weights: tuple[Weight, ...]
) -> tuple[Array, ...]:
    """`project` of one activation with several weights."""
    pairs = zip(equations, weights, strict=True)
    return tuple(project(equation, x, w) for equation, w in pairs)


def check_local(w: Weight) -> Gathered:
    """The weight; inside shard_map a global one is refused."""
    if not isinstance(w, Gathered):
        raise ValueError(
            "a layer takes global arrays, but it is called inside a shard_map over "
            f"{', '.join(layout.axes())}: call it outside; of this library's own "
            "parts ulysses_jax.seq_to_heads and heads_to_seq belong inside"
        )
    return w


def letters_of(equation: str) -> tuple[str, str, str]:
    """Of the activation, the weight and the result."""
    x, w, y = re.split(",|->", equation)
    return x, w, y


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project_global(equation: str, dtype: jnp.dtype, x: Array, w: Weight) -> Array:
    x_letters, w_letters, y_letters = letters_of(equation)
    return layout.einsum(
        equation,
        layout.lay(x, activation(x_letters, layout.axes())),
        _in_use(w, w_letters, x.dtype),
        _spec(y_letters, x.shape[1]),
        preferred_element_type=dtype,
    )


def _project_forward(equation, dtype, x, w):
    return _project_global(equation, dtype, x, w), (x, w)


def _project_backward(equation, dtype, residuals, dy):
    x, w = residuals
    x_letters, w_letters, y_letters = letters_of(equation)
    num_tokens = x.shape[1]
    x, dy = (
        layout.lay(each, activation(letters, layout.axes()))
        for each, letters in ((x, x_letters), (dy.astype(x.dtype), y_letters))
    )
    dx = layout.einsum(
        f"{y_letters},{w_letters}->{x_letters}",
        dy,
        _in_use(w, w_letters, x.dtype),
        _spec(x_letters, num_tokens),
    )
    dx = layout.lay_like(dx, residuals[0])
    if is_frozen(w):
        return dx, None
    dw = layout.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        gradient_spec(w, w_letters),
        preferred_element_type=jnp.float32,
    )
    return dx, as_cotangent(w, dw)


_project_global.defvjp(_project_forward, _project_backward)


def _in_use(w: Weight, letters: str, dtype: jnp.dtype) -> Array:
    spec = activation(letters, layout.axes())
    return layout.lay(value_of(w).astype(dtype), spec)


def _spec(letters: str, num_tokens: int):
    """Of an activation; one without heads or features, of a width or of a rank, lies as
    the residual stream."""
    axes = layout.axes()
    spec = activation(letters, axes)
    return residual(num_tokens, axes) if letters in ("BTD", "BTR") else spec


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project_local(
    equation: str, dtype: jnp.dtype, x: Array, w: Array, gradient: Array | None
) -> Array:
    x_letters, w_letters, y_letters = letters_of(equation)
    return _product(x_letters, x, w_letters, w, y_letters, dtype)


def _project_local_forward(equation, dtype, x, w, gradient):
    is_trained = None if gradient is None else ()  # by its structure, known to a trace
    return _project_local(equation, dtype, x, w, gradient), (x, w, is_trained)


def _project_local_backward(equation, dtype, residuals, dy):
    x, w, is_trained = residuals
    x_letters, w_letters, y_letters = letters_of(equation)
    dy = dy.astype(x.dtype)
    dx = _product(y_letters, dy, w_letters, w, x_letters, x.dtype)
    dw = None if is_trained is None else local_gradient(equation, x, dy)
    return dx, None, dw


_project_local.defvjp(_project_local_forward, _project_local_backward)


def _product(
    a_letters: str, a: Array, b_letters: str, b: Array, letters: str, dtype: jnp.dtype
) -> Array:
    """Inside shard_map; summed over tensor where that holds a contracted letter."""
    y = jnp.einsum(
        f"{a_letters},{b_letters}->{letters}", a, b, preferred_element_type=dtype
    )
    contracted = set(a_letters) & set(b_letters) - set(letters)
    if any("tensor" in ACTIVATION.get(letter) for letter in contracted):
        y = layout.psum(y, ("tensor",))
    return y


def local_gradient(equation: str, x: Array, dy: Array) -> Array:
    """A weight's, float32, over the tokens at hand."""
    x_letters, w_letters, y_letters = letters_of(equation)
    return jnp.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        preferred_element_type=jnp.float32,
    )
