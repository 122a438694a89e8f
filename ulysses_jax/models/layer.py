"""One layer of a transformer: attention, then a feed-forward, each after its norm."""

from typing import Any

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.models.attention import Angles
from ulysses_jax.models.feed_forward import FeedForward
from ulysses_jax.models.foreign import call
from ulysses_jax.models.inputs import check_input
from ulysses_jax.models.kinds import make_kind
from ulysses_jax.models.norm import Norm


class Layer(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`; with post norms what
    is added is normed too."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs, kind: str | None = None):
        """Of a kind in `models.kinds.KINDS`; None: the first of the model's pattern."""
        model = complete_model(model)
        assert model.pattern
        self.kind = model.pattern[0] if kind is None else kind
        self.attention_norm = Norm(model)
        self.attention: Any = make_kind(self.kind, model, rngs=rngs)
        self.feed_forward_norm = Norm(model)
        self.feed_forward: Any = FeedForward(model, rngs=rngs)
        post = model.post_norms
        self.attention_post_norm = Norm(model) if post else None
        self.feed_forward_post_norm = Norm(model) if post else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        angles: Angles = None,
    ) -> Float[Array, "B T D"]:
        """Args, returns, raises: as `Attention`."""
        check_input(self, x)
        normed = self.attention_norm(x)
        attended = call(self.attention, normed, positions, segment_ids, angles=angles)
        _check(f"the kind {self.kind!r}", attended, x)
        x = self.add_attention(x, attended)
        return self.add_feed_forward(checkpoint_name(x, "residual_middle"))

    def add_attention(
        self, x: Float[Array, "B T D"], attended: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        norm = self.attention_post_norm
        return x + (attended if norm is None else norm(attended))

    def add_feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = call(self.feed_forward, self.feed_forward_norm(x))
        _check("the feed-forward", y, x)
        norm = self.feed_forward_post_norm
        return x + (y if norm is None else norm(y))


def _check(what: str, got: Any, x: Array) -> None:
    shape = getattr(got, "shape", type(got).__name__)
    if shape != x.shape or got.dtype != x.dtype:
        dtype = getattr(got, "dtype", "")
        raise ValueError(
            f"{what} returned {dtype} {shape} for a {x.dtype} x of {x.shape}: it must "
            "return an array like x; y.astype(x.dtype) gives its dtype"
        )
