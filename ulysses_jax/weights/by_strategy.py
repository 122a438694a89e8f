"""How a layer's products go under a strategy: a table, and two functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ulysses_jax import layout
from ulysses_jax.sharding import ACTIVATION, MEGATRON, Table
from ulysses_jax.weights.gathered_tokens import project_gathered, project_scattered
from ulysses_jax.weights.products import project, project_each


@dataclass(frozen=True, repr=False)
class Products:
    """What a layer is handed, so that it need not know where heads and features lie.

    table: of `sharding`, by which its weights are made.
    into: `f(equations, x, weights)`, from `[B, T, D]` to heads or features.
    out_of: `f(equation, x, w)`, from heads or features to `[B, T, D]`.
    by_token: `f(equation, x, w)`, of token shards, between D and a rank.
    """

    table: Table
    into: Callable[..., tuple[Any, ...]]
    out_of: Callable[..., Any]
    by_token: Callable[..., Any]

    def __repr__(self) -> str:
        return f"Products({self.table})"


_MEGATRON = Products(MEGATRON, project_gathered, project_scattered, project)
_OTHERS = Products(ACTIVATION, project_each, project, project)


def products_of(strategy: str) -> Products:
    """The products that go with `model.strategy`.

    Raises:
      ValueError: megatron on a mesh without an axis named tensor, whose cut of heads
        could not be told from ZeRO's.
    """
    axes = layout.axes()
    if strategy == "megatron" and axes and "tensor" not in axes:
        raise ValueError(
            "strategy megatron cuts heads over tensor x seq, and the mesh has "
            f"{', '.join(axes)}: use make_mesh, whose meshes have all axes"
        )
    return _MEGATRON if strategy == "megatron" else _OTHERS
