"""Adafactor: means of squares of each layer's rows and columns (arXiv 1804.04235)."""

from typing import Any

import jax
import optax

from ulysses_jax.models.adapter import part_like
from ulysses_jax.training.matrix import map_matrices


def scale_by_adafactor(matrices: dict[str, Any]) -> optax.GradientTransformation:
    """Optax's Adafactor before the learning rate: the second moment factored where both
    sides have 128 or more, clipped to an RMS of 1, times the parameter's own RMS.

    All three are of one layer's matrix, also where it is one of a stack or cut: means
    over a dim that is cut are summed over its axes. Without a first moment, as in the
    paper's section 8.
    """
    one = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )

    def stack_of(num_layers: int | None) -> Any:
        return lambda tree: jax.tree.map(
            lambda matrix: matrix.num_layers == num_layers, part_like(matrices, tree)
        )

    sizes = {matrix.num_layers for matrix in jax.tree.leaves(matrices)}
    return optax.chain(
        *(
            optax.masked(_by_layer(one, matrices), stack_of(size))
            for size in sorted(sizes, key=lambda size: size or 0)
        )
    )


def _by_layer(
    one: optax.GradientTransformation, matrices: dict[str, Any]
) -> optax.GradientTransformation:
    """`one` on each layer's matrix of stacks of one size, or on a layer of each."""

    def flat(tree: Any) -> Any:
        return map_matrices(lambda x, matrix: matrix.flat(x), matrices, tree)

    def are_stacks(tree: Any) -> bool:
        found: list[bool] = []
        map_matrices(lambda x, matrix: found.append(matrix.is_stack(x)), matrices, tree)
        return any(found)

    def init(params: Any) -> Any:
        if not are_stacks(params):
            return one.init(flat(params))
        params = flat(params)
        layer = jax.tree.map(lambda x: x[0], params)
        axes = _axes(jax.eval_shape(one.init, layer))
        return jax.vmap(one.init, out_axes=axes)(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step = one.update
        if are_stacks(updates):
            axes = _axes(state)
            step = jax.vmap(step, in_axes=(0, axes, 0), out_axes=(0, axes))
        new, state = step(flat(updates), state, flat(params))
        return jax.tree.map(lambda x, like: x.reshape(like.shape), new, updates), state

    return optax.GradientTransformation(init, update)


def _axes(state: Any) -> Any:
    """Counts are one for all layers."""
    return jax.tree.map(lambda x: 0 if x.ndim else None, state)
