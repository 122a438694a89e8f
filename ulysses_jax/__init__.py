"""DeepSpeed-Ulysses for JAX: attention over sequences spread over many GPUs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_jax.api import ulysses_attention
    from ulysses_jax.config import Model
    from ulysses_jax.flax_attention import attention_fn
    from ulysses_jax.linear import (
        gated_delta_rule,
        linear_attention,
        short_convolution,
    )
    from ulysses_jax.low_rank import low_rank_attention
    from ulysses_jax.mesh import make_mesh
    from ulysses_jax.models.transformer import Transformer
    from ulysses_jax.parallel.exchange import heads_to_seq, seq_to_heads
else:
    _HOMES = {
        "Model": "config",
        "Transformer": "models.transformer",
        "attention_fn": "flax_attention",
        "gated_delta_rule": "linear",
        "heads_to_seq": "parallel.exchange",
        "linear_attention": "linear",
        "low_rank_attention": "low_rank",
        "make_mesh": "mesh",
        "seq_to_heads": "parallel.exchange",
        "short_convolution": "linear",
        "ulysses_attention": "api",
    }

    def __getattr__(name: str) -> Any:
        """Imports a name when it is asked for: a program whose first line imports this
        package (`python -m ulysses_jax.train`) can do something before JAX is there."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return [*globals(), *_HOMES]


__all__ = [
    "Model",
    "Transformer",
    "attention_fn",
    "gated_delta_rule",
    "heads_to_seq",
    "linear_attention",
    "low_rank_attention",
    "make_mesh",
    "seq_to_heads",
    "short_convolution",
    "ulysses_attention",
]
