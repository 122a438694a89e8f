"""A run as frozen, validated dataclasses."""

from ulysses_jax.config.memory import (
    Memory,
    attended_features,
    in_pieces,
    kinds_in_pieces,
)
from ulysses_jax.config.model import MOST_HEADS, MOST_LAYERS, Lora, Model, Rope
from ulysses_jax.config.run import (
    Config,
    Curriculum,
    Data,
    Distributed,
    Mesh,
    Run,
    Training,
)

__all__ = [
    "MOST_HEADS",
    "MOST_LAYERS",
    "Config",
    "Curriculum",
    "Data",
    "Distributed",
    "Lora",
    "Memory",
    "Mesh",
    "Model",
    "Rope",
    "Run",
    "Training",
    "attended_features",
    "in_pieces",
    "kinds_in_pieces",
]
