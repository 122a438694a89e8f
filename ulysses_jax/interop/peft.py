"""Adapters as PEFT has them: a folder of adapter_config.json and its safetensors."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from ulysses_jax.families.family import Family
from ulysses_jax.models.adapter import ADAPTER
from ulysses_jax.tensors.expected import expected
from ulysses_jax.tensors.files import Shape
from ulysses_jax.tensors.writing import Kept, OnHost

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"


def kept_of(model: Any) -> dict[tuple[Any, ...], Kept]:
    """A model's parameters by path, to be written; each adapter with its weight."""
    lora = model.model.lora
    flat = {
        path: Kept(variable.get_metadata()["letters"], variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    found = {}
    for path, kept in flat.items():
        adapter = (*path[:-1], f"{path[-1]}{ADAPTER}")
        if (*adapter, "a") in flat:
            pair = flat[(*adapter, "a")], flat[(*adapter, "b")]
            kept = kept._replace(adapter=(*pair, lora.alpha / lora.rank))
        found[path] = kept
    return found


def check_whole(parameters: dict[tuple[Any, ...], Kept], dtype: str) -> None:
    """Refuses to write weights that have lost bits, which their folder still has.

    Raises:
      ValueError: frozen weights lie in the compute dtype, which is not the file's.
    """
    for kept in parameters.values():
        if kept.array.dtype not in ("float32", dtype):
            raise ValueError(
                f"the frozen weights of this model lie in {kept.array.dtype}, as its "
                f"steps read them, and are to be written in {dtype}: read them anew, "
                "from_pretrained(the run's folder), or run python -m ulysses_jax.export"
            )


def peft_folder(
    model: Any, family: Family, dtype: str
) -> tuple[dict[str, Any], list[Shape], Iterator[np.ndarray]]:
    """The fields of adapter_config.json; the tensors' names and shapes, and they.

    Raises:
      ValueError: the model has no adapters; some are of a part of a tensor, of which
        PEFT has one adapter.
    """
    own, kept = model.model, kept_of(model)
    if own.lora is None:
        raise ValueError(
            "this model has no adapters, model.lora is null: write it whole, with "
            "adapters=False (without --adapters)"
        )
    modules, turned = {}, False
    shapes: list[Shape] = []
    sources: list[Any] = []
    for each in expected(family, own):
        names = [path[-1] for _, path, _ in each.parts if kept[path].adapter]
        if not names:
            continue
        first, *others = each.parts
        if others:
            raise ValueError(
                f"adapters of {', '.join(names)} are of parts of {each.name}, which is "
                f"{len(each.parts)} weights in one, and PEFT has one adapter of the "
                "whole: write the merged weights, with adapters=False (without "
                "--adapters)"
            )
        part, path, layer = first
        turned = part.stored.replace(" ", "") == kept[path].letters  # as in GPT-2
        name = each.name.removesuffix(".weight")
        modules[re.split(r"\.\d+\.", name)[-1]] = None
        adapter = kept[path].adapter
        assert adapter is not None
        for one, letter in zip(adapter[:2], "AB", strict=True):
            shape = _shape(one)
            name_of = f"base_model.model.{name}.lora_{letter}.weight"
            shapes.append(Shape(name_of, shape))
            sources.append((path, one, layer, shape))

    def tensors() -> Iterator[np.ndarray]:
        held: dict[Any, OnHost] = {}
        for path, one, layer, shape in sources:
            held = {key: x for key, x in held.items() if key[0] == path}
            on_host = held.setdefault((path, one.letters), OnHost(one))
            values = on_host.layer(layer).reshape(shape[::-1])
            yield values.T.astype(np.dtype(dtype))

    lora = own.lora
    return (
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": own.from_,
            "r": lora.rank,
            "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
            "target_modules": list(modules),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": turned,
            "inference_mode": True,
        },
        shapes,
        tensors(),
    )


def _shape(kept: Kept) -> tuple[int, int]:
    """Of A or B as PEFT has them: what it gives, what it takes."""
    dims = kept.array.shape[-len(kept.letters) :]
    if kept.letters[0] == "R":
        return math.prod(dims[1:]), dims[0]
    return dims[-1], math.prod(dims[:-1])
