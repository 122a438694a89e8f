"""From configs to trained models: `train`, `train_stages`, `load_run`, their parts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_jax.training.load import load_run
    from ulysses_jax.training.run import train
    from ulysses_jax.training.stages import train_stages
else:
    _HOMES = {"load_run": "load", "train": "run", "train_stages": "stages"}

    def __getattr__(name: str) -> Any:
        """Imports the story when it is asked for: who needs a part takes the part."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = ["load_run", "train", "train_stages"]
