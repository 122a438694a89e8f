"""Which tensors a model's files have, and which parameter each of them is."""

import math
from typing import Any, NamedTuple

import numpy as np

from ulysses_jax.config import Model
from ulysses_jax.families.config_json import family_of, read_config
from ulysses_jax.families.family import Family, Part
from ulysses_jax.models.sizes import letter_sizes
from ulysses_jax.tensors.files import DTYPES, Tensors

Path = tuple[Any, ...]


class Expected(NamedTuple):
    """A tensor that a model's files must have."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Part, Path, int | None], ...]
    """Each with the path of the parameter in the model, and the layer of the stack."""
    dim: int
    groups: int
    """How often the parts come in turn along dim."""


def expected(family: Family, model: Model) -> list[Expected]:
    """Every tensor of a model, in the files' order."""
    kinds = model.kinds()
    found = []
    for each in family.tensors(model):
        for layer in range(model.num_layers) if each.of_layer else [None]:
            kind = None if layer is None else kinds[layer]
            if each.kind not in (None, kind):
                continue
            parts = tuple(
                (part, *_place(model, layer, part.path)) for part in each.parts
            )
            shapes = [stored_shape(model, part, kind) for part in each.parts]
            shape = list(shapes[0])
            shape[each.dim] = sum(each_shape[each.dim] for each_shape in shapes)
            name = each.name.format(i=layer)
            groups = letter_sizes(model, kind)[each.groups] if each.groups else 1
            found.append(Expected(name, tuple(shape), parts, each.dim, groups))
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


def stored_shape(model: Model, part: Part, kind: str | None) -> tuple[int, ...]:
    sizes = letter_sizes(model, kind) | {"1": 1}
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
    if any(tensors.entries[name].shape != head.shape for name in tables):
        raise ValueError(
            f"{head.file}: {_HEAD} has shape {list(head.shape)}, and is not the "
            "embedding, which config.json ties it to: say tie_word_embeddings false "
            "there"
        )
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
