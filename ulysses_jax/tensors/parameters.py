"""Parameters of a model in the tensors of a folder: where each is, read and written."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import get_abstract_mesh

from ulysses_jax.config import Model
from ulysses_jax.families.config_json import family_of, read_config
from ulysses_jax.families.family import Family, Part
from ulysses_jax.models.sizes import letter_sizes
from ulysses_jax.tensors.files import DTYPES, Tensors
from ulysses_jax.weights.parameter import sharding_of

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Source:
    """Where a parameter is, or one layer of a stack of them.

    Attributes:
      tensor: its name.
      stored: the letters of the tensor's dims.
      dim, start: the parameter begins there.
    """

    tensor: str
    stored: str
    dim: int
    start: int


class Expected(NamedTuple):
    """A tensor that a model's files must have."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Part, Path, int | None], ...]
    """Each with the path of the parameter in the model, and the layer of the stack."""
    dim: int


def expected(family: Family, model: Model) -> list[Expected]:
    """Every tensor of a model, in the files' order."""
    assert model.pattern
    found = []
    for each in family.tensors(model):
        for layer in range(model.num_layers) if each.of_layer else [None]:
            parts = tuple(
                (part, *_place(model, layer, part.path)) for part in each.parts
            )
            shapes = [stored_shape(model, part) for part in each.parts]
            shape = list(shapes[0])
            shape[each.dim] = sum(each_shape[each.dim] for each_shape in shapes)
            name = each.name.format(i=layer)
            found.append(Expected(name, tuple(shape), parts, each.dim))
    return found


def _place(model: Model, layer: int | None, path: Path) -> tuple[Path, int | None]:
    """In `Transformer`: layer i of the depth is in a stack, or one of the rest."""
    if layer is None:
        return path, None
    assert model.pattern
    size = len(model.pattern)
    again, place = divmod(layer, size)
    if again < model.num_layers // size:
        return ("layers", place, *path), again
    return ("rest", place, *path), None


def stored_shape(model: Model, part: Part) -> tuple[int, ...]:
    sizes = letter_sizes(model)
    if part.path == ("position_table",):
        sizes["V"] = model.max_positions or 0
    return tuple(math.prod(sizes[x] for x in dim) for dim in part.stored.split())


def open_source(model: Model) -> tuple[Tensors, list[Expected]]:
    """The tensors of the folder `model.from_`, and which are which of the model's.

    Raises:
      ValueError: as `Tensors` and `check_tensors`.
    """
    assert model.from_
    tensors, family = Tensors(model.from_), family_of(read_config(model.from_))
    name = family.names(tensors.entries)
    wanted = [each._replace(name=name(each.name)) for each in expected(family, model)]
    check_tensors(tensors, wanted)
    _check_tied(tensors, wanted)
    return tensors, wanted


def check_tensors(tensors: Tensors, wanted: list[Expected]) -> None:
    """Refuses a folder whose tensors are not those of the model.

    Raises:
      ValueError: what is missing, what is too many, of another shape, or in a dtype
        that is not read.
    """
    shapes = {each.name: each.shape for each in wanted}
    there = {
        name: entry.shape
        for name, entry in tensors.entries.items()
        if not _is_made(name, shapes)
    }
    for names, what in (
        (sorted(shapes.keys() - there.keys()), "has no {}, which its model needs"),
        (sorted(there.keys() - shapes.keys()), "has {}, which its model has not"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(names[:3]) + more
            raise ValueError(f"{tensors.folder} {what.format(listed)}")
    for name, shape in shapes.items():
        entry = tensors.entries[name]
        if entry.dtype not in DTYPES.values():
            raise ValueError(
                f"{entry.file}: {name} is stored as {entry.dtype}, and read are "
                f"{', '.join(DTYPES)}: save the model in one of them"
            )
        if there[name] != shape:
            raise ValueError(
                f"{tensors.entries[name].file}: {name} has shape "
                f"{list(there[name])}, and in its model it has {list(shape)}"
            )


def _check_tied(tensors: Tensors, wanted: list[Expected]) -> None:
    """Refuses a head of its own in the file of a model whose head is the embedding."""
    head = tensors.entries.get(_HEAD)
    tables = [each.name for each in wanted if each.parts[0][1] == ("embedding",)]
    if head is None or any(each.name == _HEAD for each in wanted):
        return
    step = max(2**24 // max(head.shape[-1], 1), 1)
    for start in range(0, head.shape[0], step):
        rows = (slice(start, min(start + step, head.shape[0])),)
        one, other = (tensors.read(name, rows) for name in (_HEAD, *tables))
        if not np.array_equal(one, other):
            raise ValueError(
                f"{head.file}: {_HEAD} is not the embedding, which config.json ties it "
                "to: say tie_word_embeddings false there"
            )


_HEAD = "lm_head.weight"


def _is_made(name: str, wanted: dict[str, Any]) -> bool:
    """What older files hold too, and is made of the config: masks, rope's frequencies,
    a head that is the embedding."""
    made = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    return name.endswith(made) or (name == _HEAD and name not in wanted)


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
        start = 0
        for part, path, layer in each.parts:
            source = Source(each.name, part.stored, each.dim, start)
            sources.setdefault(path, {})[layer] = source
            sizes = _part_sizes(abstract, path, part)
            start += sizes[each.dim]

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
    sizes = dict(zip(x.letters, own, strict=True))
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
    bounds = dict(zip(letters, cut, strict=True))
    sizes = dict(zip(letters, shape, strict=True))
    where: list[slice] = []
    for dim, group in enumerate(source.stored.split()):
        # Letters of one dim: only the first is cut, the others are whole.
        inner = math.prod(sizes[letter] for letter in group[1:])
        assert all(bounds[x] == (0, sizes[x]) for x in group[1:])
        begin = source.start if dim == source.dim else 0
        start, stop = bounds[group[0]]
        where.append(slice(begin + start * inner, begin + stop * inner))
    order = source.stored.replace(" ", "")
    read = tensors.read(source.tensor, tuple(where))
    read = read.reshape([bounds[x][1] - bounds[x][0] for x in order])
    return read.transpose([order.index(letter) for letter in letters])


def written(
    parameters: dict[Path, "Kept"], wanted: list[Expected], dtype: str
) -> Iterator[np.ndarray]:
    """Every tensor, whole, on every process; a weight with its adapter in it.

    Args:
      parameters: by path.
      wanted: those of one parameter one after another, as `expected` has them: one
        parameter at a time is in host memory.
    """
    held: dict[Path, OnHost] = {}
    for each in wanted:
        paths = [path for _, path, _ in each.parts]
        held = {path: held[path] for path in paths if path in held}  # the last one goes
        for path in paths:
            if path not in held:
                held[path] = OnHost(parameters[path])
        parts = []
        for part, path, layer in each.parts:
            letters, order = parameters[path].letters, part.stored.replace(" ", "")
            values = held[path].layer(layer)
            values = values.transpose([letters.index(letter) for letter in order])
            sizes = dict(zip(order, values.shape, strict=True))
            dims = [math.prod(sizes[x] for x in dim) for dim in part.stored.split()]
            parts.append(values.reshape(dims))
        joined = np.concatenate(parts, axis=each.dim) if len(parts) > 1 else parts[0]
        yield joined.astype(np.dtype(dtype))


class Kept(NamedTuple):
    """A parameter to be written.

    Attributes:
      adapter: what is added, float32: `scale a b`, of two more.
    """

    letters: str
    array: jax.Array
    adapter: tuple["Kept", "Kept", float] | None = None


class OnHost:
    """A parameter, or a stack of them, in this process's memory."""

    def __init__(self, kept: Kept):
        self.array = array = kept.array
        self.adapter = None
        if kept.adapter is not None:
            a, b, self.scale = kept.adapter
            self.adapter = OnHost(a), OnHost(b)
        self.pieces = [
            (shard.index, _on_host(shard.data))
            for shard in array.addressable_shards
            if array.is_fully_addressable and shard.replica_id == 0
        ]

    def layer(self, number: int | None) -> np.ndarray:
        """Whole; of a stack, one layer; with its adapter."""
        whole = self._layer(number)
        if self.adapter is None:
            return whole
        a, b = (each.layer(number) for each in self.adapter)
        added = np.tensordot(a, b, axes=1) * np.float32(self.scale)
        return whole.astype(np.float32) + added

    def _layer(self, number: int | None) -> np.ndarray:
        array, stacked = self.array, number is not None
        if not self.pieces:
            part = array[number] if stacked else array
            return np.asarray(multihost_utils.process_allgather(part, tiled=True))
        pieces = [(i, x[number] if stacked else x) for i, x in self.pieces]
        if len(pieces) == 1:
            return pieces[0][1]
        out = np.empty(array.shape[stacked:], array.dtype)
        for index, piece in pieces:
            out[index[stacked:]] = piece
        return out


def _on_host(x: jax.Array) -> np.ndarray:
    """Of one device; NumPy's own copy of what is not a CPU's would stay with x."""
    (device,) = x.devices()
    if device.platform != "cpu":
        x = jax.device_put(x, jax.local_devices(backend="cpu")[0])
    return np.asarray(x)
