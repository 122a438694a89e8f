"""The rotary positions of a config.json, in either of its forms, and `Rope`."""

import math
from typing import Any

from ulysses_jax.config import Rope
from ulysses_jax.families.family import Fields

_NUMBERS = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
# Which of them each type reads, beside what all have.
_READ = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("factor", "attention_factor"),
}
_OLD_NAMES = {"su": "longrope"}
REPLACED = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


def rope_of(
    fields: Fields, *, base: float, layers: str | None = None, partial: bool = False
) -> Rope:
    """The rope of a config.json, in the present form (`rope_parameters`) or the older
    one (`rope_theta` and `rope_scaling`).

    Args:
      base: of the family, where the file says none.
      layers: of files that have a rope a kind of layer, which one.
      partial: of a family that may turn a part of a head.

    Raises:
      ValueError: an unknown type, or a number that the type does not read or lacks.
    """
    said = fields.get("rope_parameters", None, dict) or {}
    if layers is not None:
        said = said.get(layers) or said
    older = fields.get("rope_scaling", None, dict) or {}
    rope = Fields({**older, **said}, f"{fields.where}: rope")
    kind = rope.get("rope_type", None, str) or rope.get("type", "default")
    kind = _OLD_NAMES.get(kind, kind)
    if kind not in _READ:
        raise ValueError(
            f"{fields.where}: rope_type {kind!r} is none of "
            f"{', '.join(map(repr, _READ))}"
        )
    fraction = rope.get("partial_rotary_factor", 0.0) or fields.get(
        "partial_rotary_factor", 1.0
    )
    if fraction != 1 and not partial:
        raise ValueError(
            f"{fields.where}: partial_rotary_factor is {fraction}, and layers of its "
            "model_type turn whole heads"
        )
    given = rope.get("rope_theta", 0.0) or fields.get("rope_theta", base)
    values: dict[str, Any] = {"base": given, "fraction": fraction}
    values["scaling"] = "none" if kind == "default" else kind
    for name in _READ[kind]:
        number = rope.get(name, None, float)
        if number is not None:
            values[_NUMBERS[name]] = number
    longest = fields.get("max_position_embeddings", None, int)
    before = rope.get("original_max_position_embeddings", None, int) or fields.get(
        "original_max_position_embeddings", None, int
    )
    known = {
        *_READ[kind],
        *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
        "original_max_position_embeddings",
    }
    if kind == "dynamic":
        values["original_tokens"] = longest  # whatever else it says
    elif kind == "longrope":
        known |= {"short_factor", "long_factor"}
        for name in ("short", "long"):
            factors = rope.need(f"{name}_factor", list)
            values[f"{name}_factors"] = tuple(float(each) for each in factors)
        values["original_tokens"] = before or longest
        if "factor" not in values and before and longest:
            values["factor"] = longest / before
    elif kind != "default" and kind != "linear":
        values["original_tokens"] = before or longest
        if kind == "yarn":
            known |= {"truncate", "mscale", "mscale_all_dim", "finetuned"}
            values["truncate"] = rope.get("truncate", True)
            if "factor" not in values and before and longest:
                values["factor"] = longest / before
            _take_mscale(rope, values)
    if kind == "default":
        known |= {"factor"}  # of nothing
    if kind not in ("default", "longrope") and "factor" not in values:
        raise ValueError(f"{fields.where}: rope_type {kind} has no factor")
    other = sorted(set(rope.values) - known)
    if other:
        raise ValueError(
            f"{fields.where}: rope_type {kind} has {', '.join(other)}, which this "
            "library does not know"
        )
    return Rope(**values)


def _take_mscale(rope: Fields, values: dict[str, Any]) -> None:
    """DeepSeek's two numbers, of which yarn's factor of cosines and sines is made."""
    one, all_dims = (rope.get(name, 0.0) for name in ("mscale", "mscale_all_dim"))
    factor = values.get("factor", 1.0)
    if one and all_dims and "attention_factor" not in values and factor > 1:
        above, below = (0.1 * m * math.log(factor) + 1 for m in (one, all_dims))
        values["attention_factor"] = above / below


def rope_json(rope: Rope) -> dict[str, Any]:
    """The rope in the older form, which every version reads."""
    fields: dict[str, Any] = {"rope_theta": rope.base}
    if rope.fraction != 1:
        fields["partial_rotary_factor"] = rope.fraction
    if rope.scaling == "none":
        return fields
    scaling: dict[str, Any] = {"rope_type": rope.scaling}
    for name in _READ[rope.scaling]:
        value = getattr(rope, _NUMBERS[name])
        if value is not None:
            scaling[name] = value
    if rope.scaling not in ("linear", "dynamic"):
        scaling["original_max_position_embeddings"] = rope.original_tokens
    if rope.scaling == "yarn" and not rope.truncate:
        scaling["truncate"] = False
    if rope.scaling == "longrope":
        fields["original_max_position_embeddings"] = rope.original_tokens
        scaling["short_factor"] = list(rope.short_factors)
        scaling["long_factor"] = list(rope.long_factors)
    return fields | {"rope_scaling": scaling}
