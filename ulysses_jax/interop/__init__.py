"""Other people's checkpoints: in, and out again."""

from ulysses_jax.interop.pretrained import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
