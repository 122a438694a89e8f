"""The feed-forward of a layer: of each token by itself."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ulysses_jax import layout
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.models.adapter import make_adapter, project_into, project_out_of
from ulysses_jax.models.bias import add_bias
from ulysses_jax.models.inputs import check_input
from ulysses_jax.models.sizes import STD, letter_sizes, output_std
from ulysses_jax.weights.by_strategy import products_of
from ulysses_jax.weights.parameter import matrix, vector


def activate(kind: str, gate: Array | None, up: Array) -> Array:
    """SwiGLU or GEGLU (arXiv 2002.05202), or GELU without a gate; GELU is in the tanh
    form of GPT-2."""
    if gate is None:
        return jax.nn.gelu(up, approximate=True)
    if kind == "geglu":
        return jax.nn.gelu(gate, approximate=True) * up
    return jax.nn.silu(gate) * up


class FeedForward(nnx.Module):
    """`activate(x gate, x up) down`, with biases where the model has them."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        model = complete_model(model)
        self.products = products_of(model.strategy)
        sizes, table = letter_sizes(model), self.products.table
        self.kind = model.feed_forward
        gated, biased = model.is_gated, model.biases
        self.gate = matrix(rngs, "DF", sizes, std=STD, table=table) if gated else None
        self.up = matrix(rngs, "DF", sizes, std=STD, table=table)
        self.down = matrix(rngs, "FD", sizes, std=output_std(model), table=table)
        self.gate_adapter = make_adapter(model, "gate", "DF", "D", table, rngs=rngs)
        self.up_adapter = make_adapter(model, "up", "DF", "D", table, rngs=rngs)
        self.down_adapter = make_adapter(model, "down", "FD", "F", table, rngs=rngs)
        self.gate_bias = vector("F", sizes, 0.0, table) if biased and gated else None
        self.up_bias = vector("F", sizes, 0.0, table) if biased else None
        self.down_bias = vector("D", sizes, 0.0) if biased else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Global, in the compute dtype; lies as x."""
        check_input(self, x)
        names = ("up",) if self.gate is None else ("up", "gate")
        hidden = project_into(self, names, x)
        up, *gate = (checkpoint_name(each, "hidden_activations") for each in hidden)
        up = add_bias(up, self.up_bias)
        gate = add_bias(gate[0], self.gate_bias) if gate else None
        hidden = activate(self.kind, gate, up)
        y = project_out_of(self, "down", hidden)
        return layout.lay_like(add_bias(y, self.down_bias), x)
