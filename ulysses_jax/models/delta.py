"""A layer's part that reaches other tokens by a state: the gated delta rule."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.attention.delta import CHUNK_TOKENS
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.linear import gated_delta_rule, short_convolution
from ulysses_jax.models.inputs import check_input
from ulysses_jax.models.linear import Convolve
from ulysses_jax.models.norm import unit_rms
from ulysses_jax.models.sizes import STD, letter_sizes, output_std
from ulysses_jax.recur import Delta
from ulysses_jax.weights.by_strategy import products_of
from ulysses_jax.weights.parameter import matrix, vector

FIRST_STEP = 0.01  # of a head that decays by exp(-rate step)


class GatedDelta(nnx.Module):
    """`out(norm(gated_delta_rule(q, k, v, beta, log_decay)) silu(gate))`.

    Queries and keys have `delta_key_heads` heads of `delta_key_size`, values and gates
    `delta_heads` of `delta_value_size`. q, k and v are convolved over
    `model.convolution_tokens` tokens, and go through SiLU; `beta = sigmoid(x beta)`,
    `log_decay = -exp(log_rate) softplus(x decay + decay_bias)`, both in float32. The
    norm is RMSNorm over a head's features, whose scale starts at one, whatever
    `model.norm` is. There is no RoPE.

    Source: Gated DeltaNet, arXiv 2412.06464, figure 1; as in Qwen3-Next, but for how
    parameters start: convolutions as the token itself, rates as 1 to 16 over the heads,
    which forget half in 69 to 4 tokens.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.model = model = complete_model(model)
        self.products = products_of(model.strategy)
        sizes = letter_sizes(model, "delta")
        self.q = matrix(rngs, "DKH", sizes, std=STD)
        self.k = matrix(rngs, "DKH", sizes, std=STD)
        self.v = matrix(rngs, "DNU", sizes, std=STD)
        self.gate = matrix(rngs, "DNU", sizes, std=STD)
        self.beta = matrix(rngs, "DN", sizes, std=STD)
        self.decay = matrix(rngs, "DN", sizes, std=STD)
        self.out = matrix(rngs, "NUD", sizes, std=output_std(model))
        own = np.zeros((sizes["W"], 1, 1), np.float32)
        own[-1] = 1
        self.q_taps = vector("WKH", sizes, own)
        self.k_taps = vector("WKH", sizes, own)
        self.v_taps = vector("WNU", sizes, own)
        rates = np.linspace(1, 16, sizes["N"], dtype=np.float32)
        self.log_rate = vector("N", sizes, np.log(rates))
        self.decay_bias = vector("N", sizes, float(np.log(np.expm1(FIRST_STEP))))
        self.norm = vector("U", sizes, 1.0)

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
        mesh = get_abstract_mesh()
        convolve = partial(short_convolution, mesh=mesh, segment_ids=segment_ids)
        (q, k, v, log_decay, beta), gate = self.inputs(x, convolve)
        out = gated_delta_rule(
            q,
            k,
            v,
            mesh=mesh,
            beta=beta,
            log_decay=log_decay,
            segment_ids=segment_ids,
        )
        return self.project_out(x, checkpoint_name(out, "attended"), gate)

    def inputs(
        self, x: Float[Array, "B T D"], convolve: Convolve
    ) -> tuple[tuple[Array, ...], Array]:
        """As `LinearAttention.inputs`."""
        parts = self.q, self.k, self.v, self.gate, self.beta, self.decay
        letters = "KH", "KH", "NU", "NU", "N", "N"
        into = self.products.into(
            tuple(f"BTD,D{each}->BT{each}" for each in letters),
            x,
            tuple(each[...] for each in parts),
        )
        q, k, v, gate, beta, decay = (
            checkpoint_name(each, "attention_inputs") for each in into
        )
        q, k, v = (
            nnx.silu(convolve(each, taps[...]))
            for each, taps in ((q, self.q_taps), (k, self.k_taps), (v, self.v_taps))
        )
        beta, decay = (each.astype(jnp.float32) for each in (beta, decay))
        rate = jnp.exp(self.log_rate[...])
        log_decay = -rate * nnx.softplus(decay + self.decay_bias[...])
        return (q, k, v, log_decay, nnx.sigmoid(beta)), gate

    def decays(self) -> None:
        """All come from `inputs`."""

    def project_out(
        self, x: Float[Array, "B T D"], out: Float[Array, "B T N U"], gate: Array
    ) -> Float[Array, "B T D"]:
        """As `LinearAttention.project_out`."""
        out = unit_rms(self.model, out) * self.norm[...] * nnx.silu(gate)
        y = self.products.out_of("BTNU,NUD->BTD", out.astype(x.dtype), self.out[...])
        return layout.lay_like(y, x)

    @property
    def recurrence(self) -> Delta:
        """As `gated_delta_rule` makes it of `inputs`."""
        assert self.model.delta_key_size
        return Delta(self.model.delta_key_size**-0.5, CHUNK_TOKENS)

    @property
    def tokens_before(self) -> int:
        """As `LinearAttention.tokens_before`."""
        return self.model.convolution_tokens - 1
