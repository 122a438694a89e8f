"""The layers of a transformer: norms, attention, feed-forward, as Flax NNX modules."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, get_abstract_mesh
from jaxtyping import Array, Float, Int

from ulysses_jax.api import ulysses_attention
from ulysses_jax.attention.select import ATTENTIONS
from ulysses_jax.config import Memory, Model
from ulysses_jax.models.linear import constant, inside_shard_map, project, weight
from ulysses_jax.models.rope import apply_rope
from ulysses_jax.models.tiled import NAMES, activate, tiled_feed_forward
from ulysses_jax.sharding import activation


def letter_sizes(model: Model) -> dict[str, int]:
    """The size of every letter that a parameter has."""
    assert model.num_kv_heads and model.head_size and model.feed_forward_width
    return {
        "L": model.num_layers,
        "D": model.width,
        "N": model.num_heads,
        "K": model.num_kv_heads,
        "H": model.head_size,
        "F": model.feed_forward_width,
        "V": model.vocab_size,
    }


# Standard deviations as in GPT-2 and Megatron: projections back into the residual
# stream are smaller, so that its variance does not grow with the number of layers.
_STD = 0.02


def _output_std(model: Model) -> float:
    return _STD / math.sqrt(2 * model.num_layers)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over D, in float32."""

    def __init__(self, model: Model, *, stacked: bool = True):
        letters, sizes = "LD" if stacked else "D", letter_sizes(model)
        self.epsilon = model.norm_epsilon
        self.centred = model.norm == "layer"
        self.scale = constant(letters, sizes, 1.0)
        self.bias = constant(letters, sizes, 0.0) if self.centred else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - y.mean(axis=-1, keepdims=True)
        variance = jnp.square(y).mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


def _add_bias(
    y: Array, bias: nnx.Param | None, part: Callable[[Array], Array] = lambda b: b
) -> Array:
    """Adds in float32: the bias's gradient is a sum over all tokens."""
    if bias is None:
        return y
    return (y.astype(jnp.float32) + part(bias[...])).astype(y.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention over a sequence that is spread over the mesh."""

    def __init__(self, model: Model, memory: Memory, rngs: nnx.Rngs):
        sizes = letter_sizes(model)
        self.model, self.memory = model, memory
        self.q = weight(rngs, "LDNH", sizes, std=_STD)
        self.k = weight(rngs, "LDKH", sizes, std=_STD)
        self.v = weight(rngs, "LDKH", sizes, std=_STD)
        self.out = weight(rngs, "LNHD", sizes, std=_output_std(model))
        biased = model.biases
        self.q_bias = constant("LNH", sizes, 0.0) if biased else None
        self.k_bias = constant("LKH", sizes, 0.0) if biased else None
        self.v_bias = constant("LKH", sizes, 0.0) if biased else None
        self.out_bias = constant("LD", sizes, 0.0) if biased else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        k, v = self.keys_values(x, angles)
        out = ulysses_attention(
            self.queries(x, angles),
            k,
            v,
            attention=ATTENTIONS.get(self.model.attention),
            causal=True,
            window=self.model.window,
            segment_ids=segment_ids,
            head_chunks=self.memory.head_chunks,
        )
        return self.project_out(out)

    def queries(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array] | None,
        heads: Callable[[Array], Array] = lambda w: w,
    ) -> Float[Array, "B T N H"]:
        """Of all heads, or of those that `heads` picks from arrays `[..., N, H]`."""
        q = project("BTD,DNH->BTNH", x, jax.tree.map(heads, self.q[...]))
        q = _add_bias(q, self.q_bias, heads)
        return q if angles is None else apply_rope(q, angles)

    def keys_values(
        self, x: Float[Array, "B T D"], angles: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        k = _add_bias(project("BTD,DKH->BTKH", x, self.k[...]), self.k_bias)
        v = _add_bias(project("BTD,DKH->BTKH", x, self.v[...]), self.v_bias)
        return (k if angles is None else apply_rope(k, angles)), v

    def project_out(self, out: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return _add_bias(project("BTNH,NHD->BTD", out, self.out[...]), self.out_bias)


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202), or GELU in the tanh form of GPT-2 and Megatron."""

    def __init__(self, model: Model, memory: Memory, rngs: nnx.Rngs):
        sizes, biased = letter_sizes(model), model.biases
        gated = model.feed_forward == "swiglu"
        self.tile_tokens = memory.mlp_tile_tokens
        self.gate = weight(rngs, "LDF", sizes, std=_STD) if gated else None
        self.up = weight(rngs, "LDF", sizes, std=_STD)
        self.down = weight(rngs, "LFD", sizes, std=_output_std(model))
        self.gate_bias = constant("LF", sizes, 0.0) if biased and gated else None
        self.up_bias = constant("LF", sizes, 0.0) if biased else None
        self.down_bias = constant("LD", sizes, 0.0) if biased else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """In tiles where a device has more tokens than memory.mlp_tile_tokens."""
        tile, is_global = self.tile_tokens, not inside_shard_map()
        if is_global and tile and _local_tokens(x) > tile:
            named = {name: getattr(self, name) for name in NAMES}
            weights = {name: w[...] for name, w in named.items() if w is not None}
            y: Array = tiled_feed_forward(x, weights, tile)
        else:
            up = _add_bias(project("BTD,DF->BTF", x, self.up[...]), self.up_bias)
            gate = None
            if self.gate is not None:
                gate = _add_bias(
                    project("BTD,DF->BTF", x, self.gate[...]), self.gate_bias
                )
            y = project("BTF,FD->BTD", activate(gate, up), self.down[...])
        return _add_bias(y, self.down_bias)


def _local_tokens(x: Float[Array, "B T D"]) -> int:
    """The tokens of a global activation that one device has."""
    axes = get_abstract_mesh().shape
    batch, tokens, _ = NamedSharding(
        get_abstract_mesh(), activation("BTD", axes)
    ).shard_shape(x.shape)
    return batch * tokens


class Block(nnx.Module):
    """All the layers of a model as one: every parameter has a leading dim L."""

    def __init__(self, model: Model, memory: Memory, rngs: nnx.Rngs):
        self.attention_norm = Norm(model)
        self.attention = Attention(model, memory, rngs)
        self.feed_forward_norm = Norm(model)
        self.feed_forward = FeedForward(model, memory, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """One layer; the parameters are those of that layer, without L."""
        x = x + self.attention(self.attention_norm(x), angles, segment_ids)
        return self.add_feed_forward(x)

    def add_feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x + self.feed_forward(self.feed_forward_norm(x))
