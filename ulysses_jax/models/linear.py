"""Weights that are sharded at rest and gathered in use (ZeRO-3), with float32 grads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
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
from ulysses_jax.sharding import (
    ACTIVATION,
    Table,
    activation,
    parameter,
    zero_axes,
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gathered:
    """Inside shard_map: a weight that is whole in D, and where its gradient goes.

    Attributes:
      value: in the compute dtype.
      gradient: float32, of its shape, never read: the cotangent of this is the gradient
        of the weight over the device's tokens, which value's dtype could not hold.
    """

    value: Array
    gradient: Array

    def __getitem__(self, _) -> "Gathered":
        return self  # as nnx reads the whole of a Param


def project(
    equation: str, x: Float[Array, "..."], w: Float[Array, "..."] | Gathered
) -> Array:
    """A matrix product with a sharded weight, `project("BTD,DNH->BTNH", x, w)`.

    The weight is cast to x's dtype, then gathered over the axes that hold its D, for
    the product alone: nothing gathered is kept for the backward pass, which gathers
    anew. The weight's gradient is summed over tokens and devices in float32 and arrives
    sharded as the weight.

    Args:
      equation: an einsum of one activation and one weight; its letters, those of
        `sharding.ACTIVATION`, also say how the result is sharded.
      x: global activation, in the compute dtype.
      w: global float32 parameter; inside shard_map a `Gathered`, and x local.

    Returns:
      The activation, x's dtype, global or local as x.

    Costs an all-gather of w forward; an all-gather and a reduce-scatter backward; where
    a letter of the tensor axis is contracted, an all-reduce of the result. Of a weight
    whose heads or features lie over seq: as `models.megatron` says.
    """
    if isinstance(w, Gathered):
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
    w = weights[0]
    if not isinstance(w, Gathered):
        if lies_over_seq(re.split(",|->", equations[0])[1], w):
            return project_gathered(equations, x, weights)
    return tuple(
        project(equation, x, w) for equation, w in zip(equations, weights, strict=True)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_global(equation: str, x: Array, w: Array) -> Array:
    _, w_letters, y_letters = re.split(",|->", equation)
    axes = get_abstract_mesh().shape
    return jnp.einsum(
        equation,
        x,
        reshard(w.astype(x.dtype), activation(w_letters, axes)),
        out_sharding=activation(y_letters, axes),
    )


def _project_forward(equation, x, w):
    return _project_global(equation, x, w), (x, w)


def _project_backward(equation, residuals, dy):
    x, w = residuals
    x_letters, w_letters, y_letters = re.split(",|->", equation)
    axes = get_abstract_mesh().shape
    dx = jnp.einsum(
        f"{y_letters},{w_letters}->{x_letters}",
        dy,
        reshard(w.astype(x.dtype), activation(w_letters, axes)),
        out_sharding=activation(x_letters, axes),
    )
    dw = jnp.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        preferred_element_type=jnp.float32,
        out_sharding=jax.typeof(w).sharding.spec,
    )
    return dx, dw


_project_global.defvjp(_project_forward, _project_backward)


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
    table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """Rows of a sharded table; the gradient is summed in float32 and arrives sharded.

    Args:
      table: global float32 parameter, V over tensor, D over the ZeRO axes.
      ids: global, B over (data, fsdp), T over (ring, seq).
      dtype: the compute dtype.

    Returns:
      `[B, T, D]`, global, in the compute dtype.

    Costs an all-gather of the table over the ZeRO axes forward, a reduce-scatter of its
    float32 gradient backward; an all-reduce of the result over tensor.
    """
    axes = get_abstract_mesh().shape
    zero = zero_axes(table.shape[1], axes)

    def local(table, ids):
        table = all_gather(table.astype(dtype), zero, dim=1)
        ids, mine = _local_ids(ids, table.shape[0])
        return lax.psum(jnp.where(mine[..., None], table[ids], 0), "tensor")

    return jax.shard_map(
        local,
        in_specs=(_table_spec(zero), activation("BT", axes)),
        out_specs=activation("BTD", axes),
        check_vma=False,
    )(table, ids)


def _embed_forward(table, ids, dtype):
    return embed(table, ids, dtype), (table, ids)


def _embed_backward(dtype, residuals, dy):
    table, ids = residuals
    axes = get_abstract_mesh().shape
    zero = zero_axes(table.shape[1], axes)

    def local(ids, dy):
        rows = table.shape[0] // axes["tensor"]
        ids, mine = _local_ids(ids, rows)
        dy = jnp.where(mine[..., None], dy.astype(jnp.float32), 0)
        gradient = jnp.zeros((rows, table.shape[1]), jnp.float32).at[ids].add(dy)
        return sum_gradient(gradient, zero, dim=1)

    gradient = jax.shard_map(
        local,
        in_specs=(activation("BT", axes), activation("BTD", axes)),
        out_specs=_table_spec(zero),
        check_vma=False,
    )(ids, dy)
    return gradient, None


embed.defvjp(_embed_forward, _embed_backward)


def _table_spec(zero: tuple[str, ...]) -> P:
    return P("tensor", zero or None)


def _local_ids(ids: Array, rows: int) -> tuple[Array, Array]:
    """Ids within this device's rows of the vocabulary, and which of them it has."""
    local = ids - lax.axis_index("tensor") * rows
    mine = (local >= 0) & (local < rows)
    return jnp.where(mine, local, 0), mine


def all_gather(x: Array, axes: tuple[str, ...], *, dim: int) -> Array:
    """Inside shard_map: the whole of `dim` from its shards over `axes`."""
    return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def sum_gradient(
    gradient: Array, zero: tuple[str, ...], dim: int, apart: Sequence[str] = ()
) -> Array:
    """Inside shard_map: a weight's gradient, summed over all tokens, sharded as it.

    Args:
      zero, dim: the axes over which a dim of the weight is cut, to be gathered in use.
      apart: axes over which the weight is cut at all: nothing is summed over those that
        are not in zero, whose devices have the gradients of other parts.
    """
    summed = [axis for axis in ("data", "fsdp", "ring", "seq") if axis not in apart]
    others = tuple(axis for axis in summed if axis not in zero)
    if zero:
        gradient = lax.psum_scatter(gradient, zero, scatter_dimension=dim, tiled=True)
    return lax.psum(gradient, others)
