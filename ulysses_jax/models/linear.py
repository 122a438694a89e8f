"""A layer's part that reaches other tokens by a state: linear attention with decay."""

from collections.abc import Callable

import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.attention.linear import CHUNK_TOKENS
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.linear import linear_attention
from ulysses_jax.models.inputs import check_input
from ulysses_jax.models.norm import norm_scale, rms_normed
from ulysses_jax.models.sizes import STD, letter_sizes, output_std
from ulysses_jax.recur import Linear
from ulysses_jax.weights.by_strategy import products_of
from ulysses_jax.weights.parameter import matrix

Convolve = Callable[[Array, Array], Array]
"""`f(x [B, T, N, H], taps [W, N, H])`, of tokens after the W - 1 before or without."""


class LinearAttention(nnx.Module):
    """`out(norm(linear_attention(silu(q), silu(k), v)) sigmoid(gate))`.

    Queries and keys have `num_kv_heads` heads, values and states `num_heads`. Head n of
    N decays by exp(-2^(-8 (n + 1) / N)) a token: the last one forgets half in 177. The
    norm is over a head's features. There is no RoPE: the decays tell what is near.

    Source: Lightning attention's layer as in MiniMax-01, arXiv 2501.08313, whose decays
    also differ by layer.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.model = model = complete_model(model)
        self.products = products_of(model.strategy)
        sizes = letter_sizes(model)
        self.q = matrix(rngs, "DKH", sizes, std=STD)
        self.k = matrix(rngs, "DKH", sizes, std=STD)
        self.v = matrix(rngs, "DNH", sizes, std=STD)
        self.gate = matrix(rngs, "DNH", sizes, std=STD)
        self.out = matrix(rngs, "NHD", sizes, std=output_std(model))
        self.norm = norm_scale(model, "H")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        angles: None = None,
    ) -> Float[Array, "B T D"]:
        """As `models.Attention`; tokens are in the sequence's order, and positions are
        not looked at."""
        check_input(self, x)
        (q, k, v), gate = self.inputs(x)
        out = linear_attention(
            q,
            k,
            v,
            mesh=get_abstract_mesh(),
            decay=self.decays(),
            segment_ids=segment_ids,
        )
        return self.project_out(x, checkpoint_name(out, "attended"), gate)

    def inputs(
        self, x: Float[Array, "B T D"], convolve: Convolve | None = None
    ) -> tuple[tuple[Array, ...], Array]:
        """What the recurrence takes, but for `decays`; and the gate. Nothing is
        convolved."""
        weights = tuple(each[...] for each in (self.q, self.k, self.v, self.gate))
        equations = "BTD,DKH->BTKH", "BTD,DKH->BTKH", "BTD,DNH->BTNH", "BTD,DNH->BTNH"
        q, k, v, gate = (
            checkpoint_name(each, "attention_inputs")
            for each in self.products.into(equations, x, weights)
        )
        return (nnx.silu(q), nnx.silu(k), v), gate

    def decays(self) -> np.ndarray:
        """Of all heads, `[N]`."""
        heads = np.arange(1, self.model.num_heads + 1)
        return np.exp(-(2.0 ** (-8 * heads / len(heads))))

    def project_out(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T N H"], gate: Array
    ) -> Float[Array, "B T D"]:
        """What the layer adds to x, from what the recurrence gave."""
        out = rms_normed(self.model, out, self.norm) * nnx.sigmoid(gate)
        y = self.products.out_of("BTNH,NHD->BTD", out.astype(x.dtype), self.out[...])
        return layout.lay_like(y, x)

    @property
    def recurrence(self) -> Linear:
        """As `linear_attention` makes it of `inputs`."""
        assert self.model.head_size
        return Linear(self.model.head_size**-0.5, CHUNK_TOKENS)

    @property
    def tokens_before(self) -> int:
        """That `inputs` need of those before a token."""
        return 0
