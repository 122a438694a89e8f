"""A low-rank adapter of a projection: `x W + (alpha / rank) (x A) B`."""

import math
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from ulysses_jax.config import Model
from ulysses_jax.lora import adapted
from ulysses_jax.models.sizes import letter_sizes
from ulysses_jax.sharding import Table
from ulysses_jax.weights.parameter import matrix

ADAPTER = "_adapter"
"""How the name of a module's adapter ends; it begins with that of the projection."""


class Adapter(nnx.Module):
    """A, drawn, and B, which starts at zero; R is the rank.

    Source: arXiv 2106.09685, section 4.1, which leaves the width of A's Gaussian open:
    its variance here is that of PEFT's uniform distribution, 1 / (3 features).
    """

    def __init__(
        self, model: Model, letters: str, inputs: str, table: Table, *, rngs: nnx.Rngs
    ):
        """Args: letters: of the projection; inputs: those first ones that it takes."""
        assert model.lora
        self.scale = model.lora.alpha / model.lora.rank
        self.inputs, self.outputs = inputs, letters.removeprefix(inputs)
        sizes = letter_sizes(model)
        std = 1 / math.sqrt(3 * math.prod(sizes[letter] for letter in inputs))
        self.a = matrix(rngs, f"{inputs}R", sizes, std=std, table=table)
        self.b = matrix(rngs, f"R{self.outputs}", sizes, std=0.0, table=table)


def make_adapter(
    model: Model, name: str, letters: str, inputs: str, table: Table, *, rngs: nnx.Rngs
) -> Adapter | None:
    """Of the projection of this name, where `model.lora` has one."""
    if name not in adapted(model):
        return None
    return Adapter(model, letters, inputs, table, rngs=rngs)


def project_into(
    module: Any, names: tuple[str, ...], x: Float[Array, "B T D"]
) -> tuple[Array, ...]:
    """From `[B, T, D]` to heads or features, by a module's projections of these names.

    Cost: `products.into`'s; an adapter sends what products of R features do, in place
    of D.
    """
    weights = [getattr(module, name) for name in names]
    letters = [weight.get_metadata()["letters"] for weight in weights]
    equations = tuple(f"BTD,{each}->BT{each[1:]}" for each in letters)
    ys = module.products.into(equations, x, tuple(weight[...] for weight in weights))

    def with_adapter(name: str, y: Array) -> Array:
        adapter = getattr(module, f"{name}{ADAPTER}")
        if adapter is None:
            return y
        # Token by token, so that tokens are gathered, where they are, with R features.
        low = module.products.by_token("BTD,DR->BTR", x, adapter.a[...])
        equation = f"BTR,R{adapter.outputs}->BT{adapter.outputs}"
        (more,) = module.products.into((equation,), low, (adapter.b[...],))
        return y + adapter.scale * more

    return tuple(map(with_adapter, names, ys))


def project_out_of(module: Any, name: str, x: Array) -> Float[Array, "B T D"]:
    """From heads or features to `[B, T, D]`, by a module's projection of this name."""
    weight, adapter = getattr(module, name), getattr(module, f"{name}{ADAPTER}")
    letters = weight.get_metadata()["letters"]
    inputs = letters.removesuffix("D")
    y = module.products.out_of(f"BT{inputs},{letters}->BTD", x, weight[...])
    if adapter is None:
        return y
    low = module.products.out_of(f"BT{inputs},{inputs}R->BTR", x, adapter.a[...])
    more = module.products.by_token("BTR,RD->BTD", low, adapter.b[...])
    return y + adapter.scale * more


def split(model: Model, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree of a model's parameters: those that are trained, and those that are not.

    Without `model.lora` all are trained.
    """
    if model.lora is None:
        return tree, {}
    adapters, others = {}, {}
    for name, part in tree.items():
        if str(name).endswith(ADAPTER):
            adapters[name] = part
        elif not isinstance(part, dict):
            others[name] = part
        else:
            inside, left = split(model, part)
            adapters |= {name: inside} if inside else {}
            others |= {name: left} if left else {}
    return adapters, others


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two parts of a tree, as one."""
    return {
        name: joined(one[name], other[name])
        if name in one and name in other
        else one.get(name, other.get(name))
        for name in {**one, **other}
    }


def part_like(tree: Any, like: Any) -> Any:
    """Of a tree, what has a place in `like`."""
    if not isinstance(like, dict):
        return tree
    return {name: part_like(tree[name], part) for name, part in like.items()}
