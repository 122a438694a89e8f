"""DeepSpeed-Ulysses for JAX: attention over sequences spread over many GPUs."""

from ulysses_jax.api import attention_fn, ulysses_attention
from ulysses_jax.mesh import make_mesh
from ulysses_jax.parallel.exchange import heads_to_seq, seq_to_heads

__all__ = [
    "attention_fn",
    "heads_to_seq",
    "make_mesh",
    "seq_to_heads",
    "ulysses_attention",
]
