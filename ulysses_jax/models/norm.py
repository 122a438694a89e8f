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
        sizes = letter_sizes(model)
        self.epsilon = model.norm_epsilon
        self.centred = model.norm == "layer"
        self.scale = vector("D", sizes, 1.0)
        self.bias = vector("D", sizes, 0.0) if self.centred else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Global or local; returns x's dtype, lying as x."""
        check_input(self, x)
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - y.mean(axis=-1, keepdims=True)
        variance = jnp.square(y).mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)
