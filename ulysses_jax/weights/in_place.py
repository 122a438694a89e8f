"""Products of one token a row: the activations travel, the weights stay as they lie."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.sharding import ONE_TOKEN, activation, zero_cut
from ulysses_jax.weights.by_strategy import Products
from ulysses_jax.weights.gathered import spec_of
from ulysses_jax.weights.products import letters_of


def project_in_place(
    equation: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    dtype: jnp.dtype | None = None,
) -> Array:
    """`weights.products.project` of a few tokens: w is not gathered. No gradient.

    Args:
      equation: e.g. "BTD,DNH->BTNH".
      x: global, in the compute dtype, B over (data, fsdp), T whole, heads and features
        over tensor.
      w: a global parameter, as `sharding.parameter` says; cast to x's dtype.
      dtype: of the result; None: x's.

    Returns:
      Global, lying as x does.

    Cost: an all-gather of the rows over those axes of D that are the batch's too; where
    what a device has is a part of a sum, over D or over heads or features, an
    all-reduce in float32; a result cut in D is gathered.
    """
    x_letters, w_letters, y_letters = letters_of(equation)
    w_spec = spec_of(w, w_letters)
    cut, _ = zero_cut(w_spec)
    summed = {*x_letters} & {*w_letters}
    sums_width = "D" in summed
    over = cut if sums_width else ("tensor",) * bool(summed & {*"NKF"})

    def local(x: Array, w: Array) -> Array:
        x = _rows_of(x, cut)
        if sums_width:
            x = _part(x, cut, x_letters.index("D"))
        y = jnp.einsum(
            equation, x, w.astype(x.dtype), preferred_element_type=jnp.float32
        )
        y = layout.psum(y, over).astype(dtype or x.dtype)
        if "D" in y_letters:
            y = layout.all_gather(y, cut, y_letters.index("D"))
        return _part(y, _shared(cut), 0)

    x_spec, y_spec = (
        activation(letters, layout.axes(), ONE_TOKEN)
        for letters in (x_letters, y_letters)
    )
    return layout.over_devices(local, (x_spec, w_spec), y_spec)(x, w)


def embed_in_place(
    table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """`weights.rows.embed` of a few tokens: the table is not gathered. No gradient.

    Args:
      ids: global, B over (data, fsdp), T whole.

    Cost: an all-reduce over tensor of the device's part of D, and its gather.
    """
    spec = spec_of(table, "VD")
    cut, _ = zero_cut(spec)

    def local(table: Array, ids: Array) -> Array:
        ids = _rows_of(ids, cut)
        first = layout.axis_index("tensor") * table.shape[0]
        mine = (ids >= first) & (ids < first + table.shape[0])
        rows = table[jnp.where(mine, ids - first, 0)].astype(dtype)
        x = layout.psum(jnp.where(mine[..., None], rows, 0), ("tensor",))
        return _part(layout.all_gather(x, cut, 2), _shared(cut), 0)

    ids_spec, x_spec = (
        activation(letters, layout.axes(), ONE_TOKEN) for letters in ("BT", "BTD")
    )
    return layout.over_devices(local, (spec, ids_spec), x_spec)(table, ids)


def _shared(cut: tuple[str, ...]) -> tuple[str, ...]:
    """The axes that hold parts of D and rows of the batch."""
    return tuple(axis for axis in ("data", "fsdp") if axis in cut)


def _rows_of(x: Array, cut: tuple[str, ...]) -> Array:
    """Rows of all devices that have other parts of D."""
    return layout.all_gather(x, _shared(cut), 0)


def _part(x: Array, axes: tuple[str, ...], dim: int) -> Array:
    """What of a dim a device has of its cut over these axes."""
    index, size = 0, x.shape[dim] // layout.degree(*axes)
    for axis in axes:
        index = index * layout.degree(axis) + layout.axis_index(axis)
    return lax.dynamic_slice_in_dim(x, index * size, size, dim) if axes else x


def _project_each(
    equations: tuple[str, ...], x: Array, weights: tuple[Array, ...]
) -> tuple[Array, ...]:
    pairs = zip(equations, weights, strict=True)
    return tuple(project_in_place(equation, x, w) for equation, w in pairs)


IN_PLACE = Products(ONE_TOKEN, _project_each, project_in_place, project_in_place)
"""What a layer is handed in the place of `by_strategy.products_of`."""
