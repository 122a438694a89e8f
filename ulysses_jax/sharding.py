"""Which dim of an array lies on which mesh axes: tables, by the dim's letter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from jax.sharding import PartitionSpec as P


@dataclass(frozen=True, repr=False)
class Table:
    """On which mesh axes the dims of an activation lie, by their letters."""

    name: str
    tokens: tuple[str, ...]
    heads: tuple[str, ...]
    """Features and the vocabulary's parts too, but for V, whose are tensor's alone."""

    def get(self, letter: str) -> tuple[str, ...]:
        """D, H and every other letter are whole on every device."""
        return {
            "B": ("data", "fsdp"),
            "T": self.tokens,
            "V": ("tensor",),
            **dict.fromkeys("NKF", self.heads),
        }.get(letter, ())

    def __repr__(self) -> str:
        return self.name


# The batch, the tokens and the heads or features are spread.
ACTIVATION = Table("ACTIVATION", tokens=("ring", "seq"), heads=("tensor",))

# Megatron's sequence parallelism: heads and features are spread over seq too. What has
# any has all tokens; what has none (the residual stream, norms) lies as above.
MEGATRON = Table("MEGATRON", tokens=("ring", "seq"), heads=("tensor", "seq"))

# One token a row, as in generation: what has no heads or features is whole.
ONE_TOKEN = Table("ONE_TOKEN", tokens=(), heads=("tensor",))

# Parameters, their gradients and their optimizer moments: as activations, and D over
# every axis that would otherwise hold copies (ZeRO over data and sequence together).
ZERO = ("fsdp", "ring", "seq")

# The stage of ZeRO from which on D is cut (arXiv 1910.02054); before, it is whole.
FIRST_STAGE = {"moments": 1, "gradients": 2, "parameters": 3}


def activation(letters: str, axes: Mapping[str, int], table: Table = ACTIVATION) -> P:
    """The spec of an activation, or of a weight gathered for use.

    E.g. `activation("BTNH", mesh.shape)`.

    Args:
      letters: a letter a dim; letters that the table lacks are not sharded: S, then,
        are all tokens.
      axes: the mesh's axes; those it lacks are left out.
      table: ACTIVATION or MEGATRON. T lies on those of its axes that no other letter
        takes.
    """
    taken = _taken(letters, table)
    spread = (
        tuple(
            axis
            for axis in table.get(letter)
            if axis in axes and not (letter == "T" and axis in taken)
        )
        for letter in letters
    )
    return P(*(each or None for each in spread))


def residual(num_tokens: int, axes: Mapping[str, int]) -> P:
    """The spec of the residual stream, `[B, T, D]`: of what is not inside attention or
    feed-forward, and so of what is kept of a layer.

    Tokens lie over tensor too, where it divides a device's (arXiv 2205.05198, section
    4.2.2, over tensor); else as `activation` says.
    """
    spec = activation("BTD", axes)
    over = tuple(axis for axis in ("ring", "seq", "tensor") if axis in axes)
    if axes.get("tensor", 1) == 1 or num_tokens % math.prod(axes[a] for a in over):
        return spec
    return P(spec[0], over, None)


def parameter(
    letters: str,
    shape: tuple[int, ...],
    axes: Mapping[str, int],
    table: Table = ACTIVATION,
) -> P:
    """The spec of a parameter, e.g. `parameter("DNH", (4096, 32, 128), mesh.shape)`.

    D lies on the `zero_axes` that no other letter takes; a vector (D alone, or one a
    layer, LD) is not worth a gather and stays whole. `at_stage` says what of it lies
    so.
    """
    spec = list(activation(letters, axes, table))
    if "D" in letters and letters.strip("L") != "D":
        where, taken = letters.index("D"), _taken(letters, table)
        left = {axis: size for axis, size in axes.items() if axis not in taken}
        spec[where] = zero_axes(shape[where], left) or None
    return P(*spec)


def _taken(letters: str, table: Table) -> set[str]:
    """The axes that letters other than the tokens' lie on."""
    return {a for letter in letters if letter != "T" for a in table.get(letter)}


def zero_axes(width: int, axes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes over which a dim of `width` elements is cut: the most that divide it.

    All of (fsdp, ring, seq) where their product divides the width; else the subset with
    the largest product that does (the trainer says so when it starts).
    """
    present = [axis for axis in ZERO if axis in axes]
    subsets = [
        subset
        for size in range(len(present), -1, -1)
        for subset in combinations(present, size)
        if width % math.prod(axes[axis] for axis in subset) == 0
    ]
    return max(subsets, key=lambda s: math.prod(axes[axis] for axis in s))


def at_stage(spec: P, what: str, stage: int) -> P:
    """How a parameter of spec `parameter(...)` lies, its gradient, or its moments.

    Args:
      what: a name in FIRST_STAGE.
      stage: of ZeRO, 1 to 3.
    """
    if stage >= FIRST_STAGE[what]:
        return spec
    axes, cut = zero_cut(spec)
    return P(*(None if axes and i == cut else each for i, each in enumerate(spec)))


def zero_cut(spec: P) -> tuple[tuple[str, ...], int]:
    """The axes over which a parameter's D is cut (none: it is whole), and the dim."""
    for dim, axes in enumerate(spec):
        names = (axes,) if isinstance(axes, str) else axes or ()
        if names and set(names) <= set(ZERO):
            return tuple(names), dim
    return (), 0
