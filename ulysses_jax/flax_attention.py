"""`ulysses_attention` in the form that `flax.nnx.MultiHeadAttention` calls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from ulysses_jax.api import PerToken, ulysses_attention
from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.parts import Parts
from ulysses_jax.parallel.ulysses import LocalAttention


def attention_fn(
    mesh: Mesh | AbstractMesh | None = None,
    *,
    attention: LocalAttention | Parts | None = None,
    causal: bool = False,
    window: int | None = None,
    segment_ids: PerToken | None = None,
    layout: BlockLayout | None = None,
    scale: float | None = None,
    head_chunks: int = 1,
) -> Callable[..., Any]:
    """Makes an `attention_fn` for `flax.nnx.MultiHeadAttention`.

    Args: as `ulysses_attention`'s; attention is causal when `causal` or the call's
      `is_causal` says so.

    Returns:
      A function with the signature that `flax.nnx.MultiHeadAttention` calls.

    Raises (when called):
      ValueError: for what the exchange cannot honour: `bias`, a dense `mask` (use
        causal, window or segment_ids), dropout of attention weights, sowing them
        through `module`, and `precision`.
    """

    def fn(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> Array:
        del broadcast_dropout, dropout_rng  # they matter only where dropout does
        refused = {
            "bias": (bias is not None, "leave it out"),
            "mask": (
                mask is not None,
                "a dense [T, S] mask does not exist at these lengths: give attention_fn"
                "(causal=..., window=..., segment_ids=...) or is_causal=True",
            ),
            "dropout": (
                dropout_rate > 0 and not deterministic,
                "attention weights are never whole on a device: set dropout_rate=0 or "
                "deterministic=True",
            ),
            "module": (
                module is not None,
                "attention weights are never whole on a device: set sow_weights=False",
            ),
            "precision": (
                not _is_default(precision),
                "give attention_fn(attention=...) a function that sets it",
            ),
        }
        for name, (present, remedy) in refused.items():
            if present:
                raise ValueError(f"attention_fn cannot honour {name}: {remedy}")
        if dtype is None:
            dtype = jnp.result_type(query, key, value)
        return ulysses_attention(
            query.astype(dtype),
            key.astype(dtype),
            value.astype(dtype),
            mesh=mesh,
            attention=attention,
            causal=causal or is_causal,
            window=window,
            segment_ids=segment_ids,
            layout=layout,
            scale=scale,
            head_chunks=head_chunks,
        )

    return fn


def _is_default(precision: Any) -> bool:
    if isinstance(precision, tuple):
        return all(map(_is_default, precision))
    return precision in (None, "default", jax.lax.Precision.DEFAULT)
