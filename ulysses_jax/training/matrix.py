"""A parameter as an optimizer sees it: one layer's matrix, alone or in a stack."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import Array

from ulysses_jax.models.adapter import part_like


@dataclass(frozen=True)
class Matrix:
    """How a parameter's dims make the matrix of one layer."""

    num_dims: int
    """Of one layer; a stack has one more, L, in front."""
    num_row_dims: int | None
    """Of these, the first ones, which are the matrix's rows; None: it is no matrix."""
    num_layers: int | None = None
    """Of its stack; None: it lies in none."""

    def flat(self, x: Array) -> Array:
        """`[D, N, H]` as `[D, N H]`, `[N, H, D]` as `[N H, D]`; L stays in front."""
        if self.num_row_dims is None:
            return x
        start = x.ndim - self.num_dims
        stack, dims = x.shape[:start], x.shape[start:]
        rows = math.prod(dims[: self.num_row_dims])
        return x.reshape(*stack, rows, math.prod(dims[self.num_row_dims :]))

    def is_stack(self, x: Array) -> bool:
        """Whether it is the whole stack, not a layer of it."""
        return x.ndim > self.num_dims


_OF_A_HEAD = ("H", "U")


def matrix_of(letters: str | None, shape: tuple[int, ...], in_stack: bool) -> Matrix:
    """The matrix of a parameter.

    Args:
      letters: its dims of one layer, such as "DNH": heads and their features are one
        side of the matrix; None: it has none, and is one if it has two dims.
      shape: with L in front where it lies in a stack.
      in_stack: whether it does, where letters do not say.
    """
    num_dims = len(shape) - in_stack if letters is None else len(letters)
    sides = letters or "?" * num_dims
    first = 2 if sides[1:2] in _OF_A_HEAD else 1
    rest = sides[first:]
    is_matrix = len(rest) == 1 or rest[1:] in _OF_A_HEAD
    num_layers = shape[0] if len(shape) > num_dims else None
    return Matrix(num_dims, first if is_matrix else None, num_layers)


def map_matrices(f: Any, matrices: dict[str, Any], tree: Any) -> Any:
    """`f(x, its matrix)` of each array that is not masked."""

    def of(x: Any, matrix: Matrix) -> Any:
        return x if _is_masked(x) else f(x, matrix)

    return jax.tree.map(of, tree, part_like(matrices, tree), is_leaf=_is_masked)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
