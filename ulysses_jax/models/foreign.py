"""Modules of other libraries in a layer: called on Auto axes, whatever the mesh's."""

from typing import Any

import jax
from jaxtyping import Array, Float

from ulysses_jax import layout
from ulysses_jax.models.residual import to_residual
from ulysses_jax.weights.whole import unbind


def call(module: Any, x: Float[Array, "B T D"], *ids: Any, **options: Any) -> Array:
    """`module(x, *ids, **options)`.

    One that has no `products`, which are this library's, runs as if the mesh had Auto
    axes: any code does there, and XLA gathers what it needs.
    """
    if hasattr(module, "products") or not layout.is_explicit():
        return module(x, *ids, **options)
    bare, values = unbind(module)

    def run(values: Any, x: Array, ids: Any, options: Any) -> Array:
        return bare.bind(values)(x, *ids, **options)

    x = to_residual(x) if jax.typeof(x).sharding.mesh.empty else x
    on_auto: Any = jax.sharding.auto_axes(run, out_sharding=jax.typeof(x).sharding.spec)
    return on_auto(values, x, ids, options)
