"""What a trained model is asked: to go on from a prompt, and how well it predicts."""

from ulysses_jax.inference.context import ContextMemory
from ulysses_jax.inference.generation import generate

__all__ = ["ContextMemory", "generate"]
