"""From a folder's tensors to parameters, each device's pieces where they lie."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import get_abstract_mesh

from ulysses_jax.families.family import Part
from ulysses_jax.tensors.expected import Expected, Path
from ulysses_jax.tensors.files import Tensors
from ulysses_jax.weights.parameter import sharding_of


@dataclass(frozen=True)
class Source:
    """Where a parameter is, or one layer of a stack of them.

    Attributes:
      tensor: its name.
      stored: the letters of the tensor's dims.
      dim, start: the parameter begins there; of a tensor whose parts come in turn, in
        each turn.
      groups, step: how many turns there are, and how far from one to the next.
    """

    tensor: str
    stored: str
    dim: int
    start: int
    groups: int
    step: int


@dataclass(frozen=True)
class Described:
    """A parameter's shape, where it lies, its letters and its dtype."""

    shape: tuple[int, ...]
    sharding: Any
    letters: str
    dtype: Any


def described(module: Any) -> dict[str, Any]:
    """Where an abstract module's parameters lie, on the mesh that is set."""

    def of(variable: Any) -> Described:
        letters = variable.get_metadata()["letters"]
        sharding = sharding_of(variable)
        return Described(variable.shape, sharding, letters, variable.dtype)

    return nnx.to_pure_dict(nnx.state(module), extract_fn=of)


def read_parameters(
    tensors: Tensors, wanted: list[Expected], abstract: dict[str, Any]
) -> dict[str, Any]:
    """The parameters, straight to where they lie.

    Args:
      wanted: as `check_tensors` found them.
      abstract: nested dicts of `Described`.

    A process reads the pieces of its own devices, and holds at most one parameter's
    beside what its devices have.
    """
    sources: dict[Path, dict[int | None, Source]] = {}
    for each in wanted:
        start, step = 0, each.shape[each.dim] // each.groups
        for part, path, layer in each.parts:
            source = Source(each.name, part.stored, each.dim, start, each.groups, step)
            sources.setdefault(path, {})[layer] = source
            sizes = _part_sizes(abstract, path, part)
            start += sizes[each.dim] // each.groups

    def of(path: Path, x: Any) -> jax.Array:
        layers = sources[path]
        last: list[Any] = [None, None]  # copies on other devices are not read again

        def piece(index: Any) -> np.ndarray:
            cut = tuple(s.indices(n)[:2] for s, n in zip(index, x.shape, strict=True))
            if last[0] != cut:
                last[:] = cut, _piece(tensors, layers, x, cut)
            return last[1]

        if get_abstract_mesh().empty:  # bound to no device: a later mesh may take it
            made = jax.device_put(piece(tuple(map(slice, x.shape))))
        else:
            made = jax.make_array_from_callback(x.shape, x.sharding, piece)
        return made.block_until_ready()  # else more of them wait to be copied

    return _mapped(of, abstract)


def _mapped(function: Any, tree: Any, path: Path = ()) -> Any:
    if isinstance(tree, Described):
        return function(path, tree)
    return {name: _mapped(function, x, (*path, name)) for name, x in tree.items()}


def _part_sizes(abstract: dict[str, Any], path: Path, part: Part) -> list[int]:
    """Of the tensor's dims, what a part takes."""
    x: Any = abstract
    for name in path:
        x = x[name]
    own = x.shape[len(x.shape) - len(x.letters) :]
    sizes = dict(zip(x.letters, own, strict=True)) | {"1": 1}
    return [math.prod(sizes[letter] for letter in dim) for dim in part.stored.split()]


def _piece(
    tensors: Tensors,
    layers: dict[int | None, Source],
    like: Described,
    cut: tuple[tuple[int, int], ...],
) -> np.ndarray:
    """In its dtype; of a stack, the layers one after another."""
    letters, shape = like.letters, like.shape
    stacked = len(shape) - len(letters)
    own_shape, own = shape[stacked:], cut[stacked:]
    out = _aligned([stop - start for start, stop in cut], np.dtype(like.dtype))
    if not stacked:
        out[...] = _read(tensors, layers[None], letters, own_shape, own)
        return out
    for place, layer in enumerate(range(*cut[0])):
        out[place] = _read(tensors, layers[layer], letters, own_shape, own)
    return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Not filled, as a CPU device takes it without a copy."""
    size, step = dtype.itemsize * math.prod(shape), 64
    room = np.empty(size + step, np.uint8)
    start = -room.ctypes.data % step
    return room[start : start + size].view(dtype).reshape(shape)


def _read(
    tensors: Tensors,
    source: Source,
    letters: str,
    shape: tuple[int, ...],
    cut: tuple[tuple[int, int], ...],
) -> np.ndarray:
    """A piece of one parameter of one layer, its dims in the order of its letters."""
    bounds = dict(zip(letters, cut, strict=True)) | {"1": (0, 1)}
    sizes = dict(zip(letters, shape, strict=True)) | {"1": 1}
    where: list[list[slice]] = []
    for dim, group in enumerate(source.stored.split()):
        # Letters of one dim: only the first is cut, the others are whole.
        inner = math.prod(sizes[letter] for letter in group[1:])
        assert all(bounds[x] == (0, sizes[x]) for x in group[1:])
        start, stop = bounds[group[0]]
        if dim != source.dim:
            where.append([slice(start * inner, stop * inner)])
            continue
        each = sizes[group[0]] // source.groups  # in a turn
        turns = range(start // each, -(-stop // each))
        where.append([])
        for turn in turns:
            begin = source.start + turn * (source.step - each * inner)
            first, last = max(start, turn * each), min(stop, (turn + 1) * each)
            where[-1].append(slice(begin + first * inner, begin + last * inner))
    order = source.stored.replace(" ", "").replace("1", "")
    read = [tensors.read(source.tensor, each) for each in product(*where)]
    whole = np.concatenate(read, axis=source.dim) if len(read) > 1 else read[0]
    whole = whole.reshape([bounds[x][1] - bounds[x][0] for x in order])
    return whole.transpose([order.index(letter) for letter in letters])
