"""Weights, whole in use, whose gradients are float32 and lie as ZeRO's stage says."""

import re
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh, reshard
from jaxtyping import Array, Float, Int

from ulysses_jax.models.megatron import (
    lies_over_seq,
    project_gathered,
    project_scattered,
)
from ulysses_jax.models.weights import (
    Gathered,
    Weight,
    as_cotangent,
    gradient_spec,
    inside_shard_map,
    value_of,
)
from ulysses_jax.sharding import (
    ACTIVATION,
    Table,
    activation,
    parameter,
    residual,
    zero_cut,
)


def weight(
    rngs: nnx.Rngs,
    letters: str,
    sizes: dict[str, int],
    *,
    std: float,
    table: Table = ACTIVATION,
) -> nnx.Param:
    """A float32 parameter, drawn from a normal distribution, made sharded.

    Args:
      letters: its dims, e.g. "LDNH"; `sharding.parameter` says where they lie.
      sizes: the global size of each letter.
      std: the standard deviation.
      table: where heads and features lie.
    """
    shape = tuple(sizes[letter] for letter in letters)
    spec = parameter(letters, shape, get_abstract_mesh().shape, table)
    values = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec)
    return nnx.Param(values * std)


def constant(
    letters: str, sizes: dict[str, int], value: float, table: Table = ACTIVATION
) -> nnx.Param:
    """A float32 parameter that starts as one number: a bias, or the scale of a norm."""
    shape = tuple(sizes[letter] for letter in letters)
    spec = parameter(letters, shape, get_abstract_mesh().shape, table)
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec))


def project(
    equation: str, x: Float[Array, "..."], w: Float[Array, "..."] | Gathered
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

    Returns:
      The activation, x's dtype, global or local as x.

    Costs, where w is cut, an all-gather of w forward, and one backward; a
    reduce-scatter of its gradient where that is cut, else an all-reduce; where a letter
    of the tensor axis is contracted, a reduce-scatter of the result to the residual
    stream, which the next product gathers (on the CPU, and where `sharding.residual`
    does not cut it, an all-reduce). Of a weight whose
    heads or features lie over seq: as `models.megatron` says.
    """
    if inside_shard_map():
        assert isinstance(w, Gathered)
        return _project_local(equation, x, w.value, w.gradient)
    _, w_letters, y_letters = re.split(",|->", equation)
    if not lies_over_seq(w_letters, w):
        return _project_global(equation, x, w)
    if y_letters == "BTD":
        return project_scattered(equation, x, w)
    ys: tuple[Array, ...] = project_gathered((equation,), x, (w,))
    return ys[0]


def project_each(
    equations: tuple[str, ...],
    x: Float[Array, "B T D"],
    weights: tuple[Float[Array, "..."] | Gathered, ...],
) -> tuple[Array, ...]:
    """`project` of one activation with several weights; x is gathered once, if at all.

    Args, returns, cost: as `project`.
    """
    w_letters = re.split(",|->", equations[0])[1]
    if not inside_shard_map() and lies_over_seq(w_letters, weights[0]):
        return project_gathered(equations, x, weights)
    return tuple(
        project(equation, x, w) for equation, w in zip(equations, weights, strict=True)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_global(equation: str, x: Array, w: Weight) -> Array:
    x_letters, w_letters, y_letters = re.split(",|->", equation)
    axes = get_abstract_mesh().shape
    return jnp.einsum(
        equation,
        reshard(x, activation(x_letters, axes)),
        reshard(value_of(w).astype(x.dtype), activation(w_letters, axes)),
        out_sharding=_spec(y_letters, x.shape[1]),
    )


def _project_forward(equation, x, w):
    return _project_global(equation, x, w), (x, w)


def _project_backward(equation, residuals, dy):
    x, w = residuals
    x_letters, w_letters, y_letters = re.split(",|->", equation)
    axes = get_abstract_mesh().shape
    num_tokens = x.shape[1]
    x, dy = (
        reshard(each, activation(letters, axes))
        for each, letters in ((x, x_letters), (dy, y_letters))
    )
    dx = jnp.einsum(
        f"{y_letters},{w_letters}->{x_letters}",
        dy,
        reshard(value_of(w).astype(x.dtype), activation(w_letters, axes)),
        out_sharding=_spec(x_letters, num_tokens),
    )
    dw = jnp.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        preferred_element_type=jnp.float32,
        out_sharding=gradient_spec(w),
    )
    return dx, as_cotangent(w, dw)


_project_global.defvjp(_project_forward, _project_backward)


def _spec(letters: str, num_tokens: int) -> P:
    """Of an activation; without heads or features it is of the residual stream."""
    axes = get_abstract_mesh().shape
    return residual(num_tokens, axes) if letters == "BTD" else activation(letters, axes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_local(equation: str, x: Array, w: Array, gradient: Array) -> Array:
    x_letters, w_letters, y_letters = re.split(",|->", equation)
    return _product(x_letters, x, w_letters, w, y_letters)


def _project_local_forward(equation, x, w, gradient):
    return _project_local(equation, x, w, gradient), (x, w)


def _project_local_backward(equation, residuals, dy):
    x, w = residuals
    x_letters, w_letters, y_letters = re.split(",|->", equation)
    dx = _product(y_letters, dy, w_letters, w, x_letters)
    dw = jnp.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        preferred_element_type=jnp.float32,
    )
    return dx, None, dw


_project_local.defvjp(_project_local_forward, _project_local_backward)


def _product(a_letters: str, a: Array, b_letters: str, b: Array, letters: str) -> Array:
    """Inside shard_map; summed over tensor where that holds a contracted letter."""
    y = jnp.einsum(f"{a_letters},{b_letters}->{letters}", a, b)
    contracted = set(a_letters) & set(b_letters) - set(letters)
    if any("tensor" in ACTIVATION.get(letter, ()) for letter in contracted):
        y = lax.psum(y, "tensor")
    return y


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
    table: Float[Array, "V D"] | Gathered, ids: Int[Array, "B T"], dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """Rows of a sharded table; the gradient is summed in float32 and arrives sharded.

    Args:
      table: global float32 parameter, V over tensor, D whole or over the ZeRO axes, or
        one `Gathered`.
      ids: global, B over (data, fsdp), T over (ring, seq).
      dtype: the compute dtype.

    Returns:
      `[B, T, D]`, global, in the compute dtype.

    Costs an all-gather of the table over the axes of its D forward, a reduce-scatter of
    its float32 gradient, or an all-reduce, backward; an all-reduce of the result over
    tensor.
    """
    axes = get_abstract_mesh().shape
    table = value_of(table)
    spec = jax.typeof(table).sharding.spec

    def local(table, ids):
        table = all_gather(table.astype(dtype), *zero_cut(spec))
        ids, mine = _local_ids(ids, table.shape[0])
        return lax.psum(jnp.where(mine[..., None], table[ids], 0), "tensor")

    return jax.shard_map(
        local,
        in_specs=(spec, activation("BT", axes)),
        out_specs=activation("BTD", axes),
        check_vma=False,
    )(table, ids)


def _embed_forward(table, ids, dtype):
    return embed(table, ids, dtype), (table, ids)


def _embed_backward(dtype, residuals, dy):
    table, ids = residuals
    axes = get_abstract_mesh().shape
    rows, width = value_of(table).shape
    spec = gradient_spec(table)

    def local(ids, dy):
        ids, mine = _local_ids(ids, rows // axes["tensor"])
        dy = jnp.where(mine[..., None], dy.astype(jnp.float32), 0)
        gradient = jnp.zeros((rows // axes["tensor"], width), jnp.float32)
        return sum_gradient(gradient.at[ids].add(dy), spec)

    gradient = jax.shard_map(
        local,
        in_specs=(activation("BT", axes), activation("BTD", axes)),
        out_specs=spec,
        check_vma=False,
    )(ids, dy)
    return as_cotangent(table, gradient), None


embed.defvjp(_embed_forward, _embed_backward)


def _local_ids(ids: Array, rows: int) -> tuple[Array, Array]:
    """Ids within this device's rows of the vocabulary, and which of them it has."""
    local = ids - lax.axis_index("tensor") * rows
    mine = (local >= 0) & (local < rows)
    return jnp.where(mine, local, 0), mine


def all_gather(x: Array, axes: tuple[str, ...], dim: int) -> Array:
    """Inside shard_map: the whole of `dim` from its shards over `axes`, if any."""
    return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def sum_gradient(gradient: Array, spec: P) -> Array:
    """Inside shard_map: a weight's gradient, summed over all tokens.

    Args:
      spec: of the global sum. It is scattered over the axes that cut D. Nothing is
        summed over those that cut another dim: their devices have other parts.
    """
    zero, dim = zero_cut(spec)
    apart = {
        a for axes in spec for a in ((axes,) if isinstance(axes, str) else axes or ())
    }
    tokens = ("data", "fsdp", "ring", "seq")
    others = tuple(axis for axis in tokens if axis not in apart)
    if zero:
        gradient = lax.psum_scatter(gradient, zero, scatter_dimension=dim, tiled=True)
    return lax.psum(gradient, others)
