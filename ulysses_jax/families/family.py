"""What a family of models is: two functions between configs, and names of tensors."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ulysses_jax.config import Model

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A parameter of this library in a tensor of a file.

    Attributes:
      path: in a `models.Layer`, or in the `Transformer`.
      stored: the letters of the tensor's dims, those of one dim together: the "NH D" of
        a `[N*H, D]`; 1 is a dim of one element.
    """

    path: tuple[str, ...]
    stored: str


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: one part, or several along dim `dim`.

    Attributes:
      name: of the tensor; `{i}` is the number of its layer.
      groups: the letter of heads for each of which the parts come in turn, a piece of
        each; empty: every part is whole, one after another.
      kind: of the layers that have it; None: all.
    """

    name: str
    parts: tuple[Part, ...]
    dim: int = 0
    groups: str = ""
    kind: str | None = None

    @property
    def of_layer(self) -> bool:
        return "{i}" in self.name


def stored(name: str, path: str, letters: str) -> Stored:
    """A tensor that is one parameter."""
    return Stored(name, (Part(tuple(path.split(".")), letters),))


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      model_type, architecture: as config.json has them.
      model_of: from config.json's fields.
      config_of: `f(model, max_tokens)`, the fields of a model; None: leave it out. Of a
        model that the family has not, those of another one: who asks compares.
      tensors: every tensor of a model's files.
      replaced: fields of a config.json that `config_of`'s stand for.
      missing: why a whole model cannot be read; None: it can.
    """

    model_type: str
    architecture: str
    model_of: Callable[["Fields"], Model]
    config_of: Callable[[Model, int], dict[str, Any]]
    tensors: Callable[[Model], Sequence[Stored]]
    replaced: tuple[str, ...] = ()
    missing: str | None = None

    def names(self, tensors: Collection[str]) -> Callable[[str], str]:
        """How a file with these tensors names one: older ones, of the model without its
        head, leave the first word out."""
        first = "transformer." if self.model_type == "gpt2" else "model."
        if any(name.startswith(first) for name in tensors):
            return lambda name: name
        return lambda name: name.removeprefix(first)


class Fields:
    """A config.json's fields, each of the type that is asked for."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, name: str, default: Any, kind: type | None = None) -> Any:
        """A field; null and one that is not there are the default.

        Raises:
          ValueError: it is of another type than the default, or than `kind`.
        """
        value = self.values.get(name)
        if value is None:
            return default
        kind = kind or type(default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(
                f"{self.where}: {name} is {value!r}, and must be of type "
                f"{kind.__name__}"
            )
        return value

    def need(self, name: str, kind: type = int, most: int = 2**31 - 1) -> Any:
        """A field that must be there; a whole number is positive, and at most that."""
        value = self.get(name, None, kind)
        if value is None:
            raise ValueError(f"{self.where} has no {name}, which its model_type has")
        if kind is int and value < 1:
            raise ValueError(f"{self.where}: {name} is {value}, and must be positive")
        if kind is int and value > most:
            raise ValueError(
                f"{self.where}: {name} is {value}, and must be at most {most}"
            )
        return value

    def one_of(self, name: str, choices: dict[str, T], default: str) -> T:
        value = self.get(name, default)
        if value not in choices:
            raise ValueError(
                f"{self.where}: {name} is {value!r}, which is none of "
                f"{', '.join(map(repr, choices))}"
            )
        return choices[value]

    def only(self, name: str, value: Any, what: str) -> None:
        """Refuses a field of another value."""
        found = self.values.get(name, value)
        if found is not None and found != value:
            raise ValueError(
                f"{self.where}: {name} is {found!r}, {what}, which this library's "
                "layers have not"
            )


def pattern_of(kinds: Sequence[str]) -> tuple[str, ...]:
    """The fewest kinds that repeat along the depth; the last time may be cut short."""
    kinds = tuple(kinds)
    return next(
        kinds[:size]
        for size in range(1, len(kinds) + 1)
        if kinds[size:] == kinds[:-size]
    )
