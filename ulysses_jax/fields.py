"""A config's fields one by one: each of its type, in its range."""

import dataclasses
import math
import sys
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def checked(section: T, name: str) -> T:
    """A section of a config with every value of its field's type, in its range.

    Raises:
      ValueError: names the field, what it must be and what it is.
    """
    values = {
        field: typed(hint, getattr(section, field), f"{name}.{field}")
        for field, hint in get_type_hints(type(section)).items()
    }
    for field, value in values.items():
        if dataclasses.is_dataclass(value):  # a section of its own
            values[field] = checked(value, f"{name}.{field}")
    if name != "mesh":  # whose degrees may be -1: `make_mesh` checks them
        _check_ranges(name, values)
    return dataclasses.replace(section, **values)  # pyright: ignore[reportArgumentType]


def typed(hint: Any, value: Any, name: str) -> Any:
    """The value as a field of this type has it: a list as a tuple, a number as float.

    Raises:
      ValueError: it is of another type; says which ones are right.
    """
    options = (
        get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    )
    for option in options:
        if get_origin(option) is Literal:
            words = get_args(option)
            if type(value) in map(type, words) and value in words:
                return value
        elif get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(typed(get_args(option)[0], each, name) for each in value)
        elif option is float and not isinstance(value, bool):
            try:  # YAML reads 3e-4, without a dot, as a string
                return float(value)
            except (TypeError, ValueError, OverflowError):
                continue
        elif type(value) is option:
            return value
    wanted = " or ".join(
        " | ".join(map(repr, get_args(option)))
        if get_origin(option) is Literal
        else "a list"
        if get_origin(option) is tuple
        else "null"
        if option is types.NoneType
        else "true or false"
        if option is bool
        else option.__name__
        for option in options
    )
    raise ValueError(f"{name} must be {wanted}, not {value!r}")


_MAY_BE_ZERO = {
    "seed",
    "validation_fraction",
    "warmup_steps",
    "weight_decay",
    "learning_rate",
    "final_learning_rate",
    "validation_interval_steps",
    "validation_batches",
    "skipped_steps",
    "process_id",
    "beta1",
    "beta2",
    "label_smoothing",
    "z_loss",
}
_BELOW_ONE = {"validation_fraction", "beta1", "beta2", "label_smoothing"}


def _check_ranges(section: str, values: dict[str, Any]) -> None:
    """Numbers are positive, or not negative; counts are int32; fractions below 1."""
    for field, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low = 0 if field in _MAY_BE_ZERO else sys.float_info.min
        name = f"{section}.{field}"
        if value < low or isinstance(value, float) and not math.isfinite(value):
            bound = "not negative" if low == 0 else "positive"
            raise ValueError(f"{name} must be {bound}, not {value}")
        if field == "seed" and value >= 2**32:
            raise ValueError(f"{name} must be below 2^32, not {value}")
        if field != "seed" and isinstance(value, int) and value >= 2**31:
            raise ValueError(f"{name} must be below 2^31, not {value}")
        if field in ("offload_fraction", "fraction") and value > 1:
            raise ValueError(f"{name} must be at most 1, not {value}")
        if field in _BELOW_ONE and value >= 1:
            raise ValueError(f"{name} must be below 1, not {value}")
