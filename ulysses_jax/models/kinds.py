"""The kinds of layers, by the names that `model.pattern` has for them."""

from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx

from ulysses_jax.config import Model
from ulysses_jax.models.attention import Attention
from ulysses_jax.models.delta import GatedDelta
from ulysses_jax.models.linear import LinearAttention


def full(model: Model, *, rngs: nnx.Rngs) -> Attention:
    """A query sees all tokens before it."""
    return Attention(model, rngs=rngs, kind="full")


def window(model: Model, *, rngs: nnx.Rngs) -> Attention:
    """A query sees the last `model.window` tokens, its own among them."""
    return Attention(model, rngs=rngs, kind="window")


def sparse(model: Model, *, rngs: nnx.Rngs) -> Attention:
    """A query sees blocks of the tokens before it, by `model.sparse`."""
    return Attention(model, rngs=rngs, kind="sparse")


KINDS: dict[str, Callable[..., Any]] = {
    "full": full,
    "window": window,
    "sparse": sparse,
    "linear": LinearAttention,
    "delta": GatedDelta,
}
"""What makes the part of a layer that reaches other tokens: `f(model, rngs=...)`, a
module that is called as `Attention` is. `docs/architecture.md` says how to add one."""


OF_A_STATE = LinearAttention, GatedDelta
"""The classes of kinds linear and delta."""


def refuse_unknown(kinds: Iterable[str]) -> None:
    """Raises ValueError where one is none of `KINDS`."""
    for kind in kinds:
        if kind not in KINDS and kind == "low_rank":
            raise ValueError(
                "model.pattern has 'low_rank', whose mixtures have tokens of all "
                "places, and this model is causal: use 'linear' or 'delta', or "
                "ulysses_jax.low_rank_attention in an encoder of your own"
            )
        if kind not in KINDS:
            raise ValueError(
                f"model.pattern has {kind!r}, which is no kind of layer: use "
                + ", ".join(map(repr, KINDS))
            )


def make_kind(kind: str, model: Model, *, rngs: nnx.Rngs) -> Any:
    """The module of a kind.

    Raises:
      ValueError: there is no such kind.
    """
    refuse_unknown([kind])
    return KINDS[kind](model, rngs=rngs)
