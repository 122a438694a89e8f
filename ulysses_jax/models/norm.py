"""RMSNorm and LayerNorm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.models.inputs import check_input
from ulysses_jax.models.sizes import letter_sizes
from ulysses_jax.weights.parameter import vector


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over D, in float32, as `model.norm` says."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs | None = None):
        del rngs  # it starts as one
        model = complete_model(model)
        self.model = model
        self.centred = model.norm == "layer"
        self.scale = norm_scale(model, "D")
        self.bias = vector("D", letter_sizes(model), 0.0) if self.centred else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Global or local; returns x's dtype, lying as x."""
        check_input(self, x)
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - y.mean(axis=-1, keepdims=True)
        y = rms_normed(self.model, y, self.scale)
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


def norm_scale(model: Model, letter: str) -> nnx.Param:
    """What a norm over one dim learns; it starts as a scale of one."""
    start = 0.0 if model.norm == "zero_centered_rms" else 1.0
    return vector(letter, letter_sizes(model), start)


def rms_normed(
    model: Model, x: Float[Array, "... D"], scale: nnx.Param
) -> Float[Array, "... D"]:
    """RMSNorm over the last dim, in float32, and float32."""
    one = 1.0 if model.norm == "zero_centered_rms" else 0.0
    return unit_rms(model, x) * (one + scale[...])


def unit_rms(model: Model, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x over the root of its mean square, over the last dim, in float32."""
    y = x.astype(jnp.float32)
    variance = jnp.square(y).mean(axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(variance + model.norm_epsilon)
