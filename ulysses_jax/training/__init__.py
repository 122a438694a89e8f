"""From a config to a trained model: `train`, and what it is made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_jax.training.run import train
else:

    def __getattr__(name: str) -> Any:
        """Imports the story when it is asked for: who needs a part takes the part."""
        if name != "train":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ulysses_jax.training.run import train

        return train


__all__ = ["train"]
