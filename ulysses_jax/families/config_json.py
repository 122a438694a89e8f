"""A Hugging Face config.json: read as a `Model` of this library, and written as one."""

import dataclasses
from pathlib import Path
from typing import Any

from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.families.family import Family, Fields
from ulysses_jax.families.gemma import GEMMA3
from ulysses_jax.families.gpt2 import GPT2
from ulysses_jax.families.gpt_oss import GPT_OSS
from ulysses_jax.families.llama import LLAMA, MISTRAL, PHI3, QWEN2, QWEN3
from ulysses_jax.families.qwen3_next import QWEN3_5, QWEN3_NEXT
from ulysses_jax.outside import read_object
from ulysses_jax.run_folder import is_run_folder, stages_in

CONFIG = "config.json"
_MOST_BYTES = 2**20  # a hundred times those of a long one

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, GPT2, PHI3, GPT_OSS),
        *(QWEN3_NEXT, QWEN3_5),
    )
}
"""By the `model_type` that a config.json says."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """What the folder's config.json says.

    Raises:
      ValueError: there is none, or as `outside.read_object`.
    """
    path = Path(folder) / CONFIG
    try:
        return read_object(path, _MOST_BYTES)
    except OSError as error:
        if (path.parent / "adapter_config.json").exists():
            raise ValueError(
                f"{folder} has adapters of PEFT's, without the weights that they are "
                "of: merge them first, in Python "
                "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
                ".save_pretrained(merged)"
            ) from None
        if runs := [path.parent] * is_run_folder(path.parent) or stages_in(path.parent):
            raise ValueError(
                f"{folder} is a run's folder: to train from its last parameters say "
                f"--run.after {runs[-1]} in place of --model.from, or write it as a "
                f"model's folder first (python -m ulysses_jax.export --run {runs[-1]} "
                "--to NEW_FOLDER)"
            ) from None
        raise ValueError(
            f"{folder} is no model's folder: cannot read {path} ({error.strerror}); "
            "give a folder with a config.json and safetensors"
        ) from None


def family_of(values: dict[str, Any], where: str = CONFIG) -> Family:
    """Raises ValueError: a family that this library does not have."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{where} is of model_type {name!r}, which is none of "
            f"{', '.join(FAMILIES)}: its layers would have to be written first"
        )
    return FAMILIES[name]


def model_of(values: dict[str, Any], where: str = CONFIG) -> Model:
    """The model that a config.json describes, completed.

    Raises:
      ValueError: an unknown family, activation, kind of layer or rope; a field that is
        missing or of another type; what the family has and this library has not.
    """
    family = family_of(values, where)
    fields = Fields(values, where)
    fields.only("quantization_config", None, "weights in a number format of their own")
    try:
        return complete_model(family.model_of(fields))
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}") from None


def source_model(folder: str | Path) -> Model:
    """The model of a folder that a run starts from.

    Raises:
      ValueError: as `model_of` and `refuse`.
    """
    values, where = read_config(folder), str(Path(folder) / CONFIG)
    refuse(values, where)
    return dataclasses.replace(
        model_of(values, where), from_=str(Path(folder).absolute())
    )


def refuse(values: dict[str, Any], where: str = CONFIG) -> None:
    """Raises ValueError: of a family of which only a part is here, what is missing."""
    family = family_of(values, where)
    if family.missing is not None:
        raise ValueError(f"{where} is a {family.architecture}: {family.missing}")


def config_of(
    model: Model, source: dict[str, Any] | None, max_tokens: int | None
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
      source: of the folder that it came from, whose other fields are kept.
      max_tokens: of a sequence, that it is for; None: as the source says.

    Raises:
      ValueError: no family has such a model, or nothing says how long a sequence is.
    """
    model = complete_model(model)
    if source is not None and _alike(model_of(source), model):
        kept = dict(source)
        if max_tokens and max_tokens > _longest(source):
            kept[_LONGEST[family_of(source).model_type]] = max_tokens
            # What follows from the length, as dynamic's rope, may not follow it.
            kept = kept if _alike(model_of(kept), model) else dict(source)
        return kept
    for family in _candidates(source):
        said = 0 if source is None else _longest(source)
        longest = max_tokens or said or model.max_positions
        if not longest:
            raise ValueError(
                "config.json says how long a sequence may be: give max_tokens, the "
                "longest that the model was trained for"
            )
        # Phi-3's padding would be 32000, which may be no row of the vocabulary.
        kept = {"pad_token_id": None} if source is None else source
        kept = {n: x for n, x in kept.items() if n not in family.replaced}
        # A null stays: left out, a field would be what transformers takes without it.
        values = {**kept, **family.config_of(model, longest)}
        values |= {
            "architectures": [family.architecture],
            "model_type": family.model_type,
        }
        try:
            same = _alike(model_of(values), model)
        except ValueError:
            continue
        if same:
            return values
    raise ValueError(
        f"none of {', '.join(FAMILIES)} has such a model "
        f"({_unusual(model)}): it cannot be written as a Hugging Face folder; "
        "a run's own folder, runs/..., keeps it"
    )


_LONGEST = dict.fromkeys(FAMILIES, "max_position_embeddings") | {"gpt2": "n_positions"}


def longest_of(folder: str | Path) -> int:
    """The tokens of a sequence that a folder's model is for; 0: it does not say, or is
    not there."""
    try:
        return _longest(read_config(folder))
    except ValueError:
        return 0


def _longest(source: dict[str, Any]) -> int:
    return Fields(source, CONFIG).get(_LONGEST[family_of(source).model_type], 0)


def _candidates(source: dict[str, Any] | None) -> list[Family]:
    """The source's own family first; one of which parts are missing has no models."""
    families = [family for family in FAMILIES.values() if family.missing is None]
    if source is not None:
        families.sort(key=lambda each: each.model_type != source.get("model_type"))
    return families


# How a model is computed and trained, and where it came from: no config.json has a
# word for them.
_OWN = ("attention", "strategy", "zigzag", "compute_dtype", "lora", "from_")


def _alike(one: Model, other: Model) -> bool:
    plain = {name: getattr(Model(), name) for name in _OWN}
    one, other = (dataclasses.replace(each, **plain) for each in (one, other))
    return one == other


def _unusual(model: Model) -> str:
    """The fields that are not the defaults, but for sizes."""
    plain = complete_model(
        Model(width=model.width, num_heads=model.num_heads, num_layers=model.num_layers)
    )
    sizes = ("vocab_size", "head_size", "num_kv_heads", "feed_forward_width")
    sizes += "delta_heads", "delta_key_heads", "delta_key_size", "delta_value_size"
    return ", ".join(
        f"{name} {getattr(model, name)!r}"
        for name in (each.name for each in dataclasses.fields(Model))
        if name not in (*sizes, *_OWN) and getattr(model, name) != getattr(plain, name)
    )
