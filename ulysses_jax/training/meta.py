"""What a checkpoint says of the run that saved it, each field of its type."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ulysses_jax.config import Lora, Training
from ulysses_jax.fields import checked, typed
from ulysses_jax.training.checkpoint import Checkpointer


def saved_meta(checkpoints: Checkpointer) -> tuple[int, dict[str, Any]] | None:
    """`latest_meta` of a run's checkpoints.

    Raises:
      ValueError: a field that runs write is missing, or of another type.
    """
    saved = checkpoints.latest_meta()
    if saved is not None:
        check_meta(saved[1], checkpoints.folder / str(saved[0]))
    return saved


def saved_lora(meta: dict[str, Any]) -> Lora | None:
    """The adapters that the run trained; None: all parameters."""
    said = meta["model"].get("lora")
    if said is None:
        return None
    return Lora(said["rank"], float(said["alpha"]), tuple(said["targets"]))


def check_meta(meta: dict[str, Any], folder: Path) -> None:
    """Raises ValueError: as `saved_meta`, of the checkpoint in `folder`."""
    where = f"{folder}: meta"
    model = _typed(dict, meta, "model", where)
    _typed(dict, meta, "data", where)
    lora = _typed(dict | None, model, "lora", f"{where}.model", None)
    if lora is not None:
        hints = (("rank", int), ("alpha", float), ("targets", tuple[str, ...]))
        for name, hint in hints:
            _typed(hint, lora, name, f"{where}.model.lora")
        if len(lora) > len(hints):
            raise ValueError(f"{where}.model.lora has other fields: {_REMEDY}")
        base = _typed(dict, meta, "base", where)
        for name in base:
            _typed(str, base, name, f"{where}.base")
    # Before it had a name it was AdamW.
    meta["optimizer"] = _typed(str, meta, "optimizer", where, "adamw")
    schedule = _typed(dict, meta, "schedule", where, {})
    try:
        checked(replace(Training(), **schedule), "training")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}.schedule: {error}: {_REMEDY}") from None


_REMEDY = "it is no run's; use another run.folder (--run.folder)"
_NEEDED = object()


def _typed(
    hint: Any, said: dict[str, Any], name: str, where: str, default: Any = _NEEDED
) -> Any:
    value = said.get(name, default)
    if value is _NEEDED:
        raise ValueError(f"{where} has no {name}: {_REMEDY}")
    try:
        return typed(hint, value, f"{where}.{name}")
    except ValueError as error:
        raise ValueError(f"{error}: {_REMEDY}") from None
