"""Stacks: layers of one kind whose parameters have a leading dim, run by one scan."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from ulysses_jax.models.attention import Angles
from ulysses_jax.weights.gathered import value_of
from ulysses_jax.weights.parameter import check_rngs, has_letters, is_matrix
from ulysses_jax.weights.whole import Unbound, Values, unbind

RunLayer = Callable[..., Float[Array, "B T D"]]
"""`f(layer, values, x, positions, segment_ids, angles=..., in_loop=...)`: runs one
layer, an `Unbound` and its values. in_loop: how many layers run in a
round of a loop, 0 where it goes round once. `run_layer` is the plain one;
`memory.saving` has others."""


def make_stack(make: Callable[[nnx.Rngs], Any], size: int, rngs: nnx.Rngs) -> Any:
    """A module like `make(rngs)`, of `size` layers: each parameter has a leading dim.

    It is a module to look at and to change, not to call: `run_stacks` runs it.
    """
    check_rngs(rngs)
    stack = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(size))
    for _, variable in nnx.to_flat_state(nnx.state(stack)):
        # Of another library's parameters: what it is and how it lies is of one layer.
        if not has_letters(variable):
            of_one = jax.ShapeDtypeStruct(variable.shape[1:], variable.dtype)
            variable.set_metadata(is_matrix=is_matrix(variable, of_one))
            if (said := variable.get_metadata().get("out_sharding")) is not None:
                variable.set_metadata(out_sharding=(None, *said))
    return stack


def run_layer(
    layer: Unbound,
    values: Values,
    x: Array,
    *tokens: Any,
    angles: Angles,
    in_loop: int,
) -> Array:
    """Keeps what the backward pass reads."""
    del in_loop
    return layer.bind(values)(x, *tokens, angles=angles)


def run_stacks(
    stacks: Sequence[Any],
    rest: Sequence[Any],
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    run: RunLayer = run_layer,
) -> Float[Array, "B T D"]:
    """One layer of each stack in turn, as often as they have layers; then the rest.

    Args:
      stacks: all of one size.
      rest: layers.
    """
    of_stacks = [_angles(stack, positions) for stack in stacks]

    def once(place, layer, values, x, _, *, in_loop):
        if place < len(stacks):
            angles = of_stacks[place]
        else:
            angles = _angles(rest[place - len(stacks)], positions)
        ids = positions, segment_ids
        return run(layer, values, x, *ids, angles=angles, in_loop=in_loop), None

    return thread_stacks(stacks, rest, x, once)[0]


def thread_stacks(
    stacks: Sequence[Any],
    rest: Sequence[Any],
    x: Float[Array, "B T D"],
    run: Callable[..., tuple[Array, Any]],
    given: Sequence[Any] | None = None,
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """`run_stacks` where layers are given something of their own, and make something.

    Args:
      run: `f(place, layer, values, x, its_own, in_loop=...)`, of the place of the stack
        among the stacks, or of the layer after them; returns x and what it makes.
      given: for each place what its layers are given, arrays with a leading dim of the
        stack's size; for those of rest without it.

    Returns:
      x, and for each place what its layers made, as given.
    """
    given = [None] * (len(stacks) + len(rest)) if given is None else given
    unbound, values = zip(*map(unbind, stacks), strict=True)
    in_loop = len(stacks) if _size(stacks) > 1 else 0

    def once(x: Array, inputs: Any) -> tuple[Array, Any]:
        made = []
        for place, (layer, own) in enumerate(zip(unbound, inputs, strict=True)):
            x, its = run(place, layer, own[0], x, own[1], in_loop=in_loop)
            made.append(its)
        return x, made

    own = tuple(zip(values, given[: len(stacks)], strict=True))
    x, made = lax.scan(once, x, own)
    for place, layer in enumerate(rest, len(stacks)):
        x, its = run(place, *unbind(layer), x, given[place], in_loop=0)
        made = [*made, its]
    return x, made


def _size(stacks: Sequence[Any]) -> int:
    """Of all stacks; refuses a part that was put into one and is of another size."""
    leading = {
        f"layers[{place}].{'.'.join(map(str, path))}": value_of(
            variable.get_value()
        ).shape[:1]
        for place, stack in enumerate(stacks)
        for path, variable in nnx.to_flat_state(nnx.state(stack))
    }
    sizes = list(leading.values())
    ((size, *_), _), *others = Counter(sizes).most_common()
    if others:
        name = next(name for name, each in leading.items() if each != (size,))
        raise ValueError(
            f"a stack has {size} layers, and its {name} a leading dim of "
            f"{leading[name][0] if leading[name] else 'none'}: make what is put into "
            f"it with ulysses_jax.models.make_stack(make, {size}, rngs)"
        )
    return size


def _angles(layer: Any, positions: Array) -> Angles:
    """What a kind makes of positions once for all layers of a stack, if it does."""
    make = getattr(getattr(layer, "attention", None), "angles", None)
    return None if make is None else make(positions)
