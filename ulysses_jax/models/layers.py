"""The layers of a transformer: norms, attention, feed-forward, as Flax NNX modules."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, get_abstract_mesh
from jaxtyping import Array, Float, Int

from ulysses_jax.attend import attend
from ulysses_jax.attention.mask import Mask
from ulysses_jax.config import Memory, Model
from ulysses_jax.models.linear import constant, project, project_each, weight
from ulysses_jax.models.megatron import lies_over_seq
from ulysses_jax.models.residual import to_layer, to_residual
from ulysses_jax.models.rope import apply_rope
from ulysses_jax.models.tiled import NAMES, activate, tiled_feed_forward
from ulysses_jax.models.weights import inside_shard_map
from ulysses_jax.sharding import ACTIVATION, MEGATRON, Table, activation


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


def _table(model: Model) -> Table:
    """Where heads and features lie."""
    return MEGATRON if model.strategy == "megatron" else ACTIVATION


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


def _turn(x: Array, angles: tuple[Array, Array] | None) -> Array:
    return x if angles is None else apply_rope(x, angles)


_QUERY, _KEY = "BTD,DNH->BTNH", "BTD,DKH->BTKH"


class Attention(nnx.Module):
    """Grouped-query self-attention over a sequence that is spread over the mesh."""

    def __init__(self, model: Model, memory: Memory, rngs: nnx.Rngs):
        sizes, table = letter_sizes(model), _table(model)
        self.model, self.memory = model, memory
        self.q = weight(rngs, "LDNH", sizes, std=_STD, table=table)
        self.k = weight(rngs, "LDKH", sizes, std=_STD, table=table)
        self.v = weight(rngs, "LDKH", sizes, std=_STD, table=table)
        self.out = weight(rngs, "LNHD", sizes, std=_output_std(model), table=table)
        biased = model.biases
        self.q_bias = constant("LNH", sizes, 0.0, table) if biased else None
        self.k_bias = constant("LKH", sizes, 0.0, table) if biased else None
        self.v_bias = constant("LKH", sizes, 0.0, table) if biased else None
        self.out_bias = constant("LD", sizes, 0.0) if biased else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        weights = self.q[...], self.k[...], self.v[...]
        q, k, v = project_each((_QUERY, _KEY, _KEY), x, weights)
        k, v = self._finish_keys_values(k, v, angles)
        mask = Mask(
            causal=True,
            window=self.model.window,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
        )
        strategy = self.model.strategy
        out = attend(
            _turn(_add_bias(q, self.q_bias), angles),
            k,
            v,
            mesh=get_abstract_mesh(),
            mask=mask,
            strategy=None if strategy == "auto" else strategy,
            attention=self.model.attention,
            zigzag=bool(self.model.zigzag),
            head_chunks=self.memory.head_chunks or 1,
        )
        return self.project_out(out)

    def queries(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array] | None,
        heads: Callable[[Array], Array] = lambda w: w,
    ) -> Float[Array, "B T N H"]:
        """Of all heads, or of those that `heads` picks from arrays `[..., N, H]`."""
        q = project(_QUERY, x, jax.tree.map(heads, self.q[...]))
        return _turn(_add_bias(q, self.q_bias, heads), angles)

    def keys_values(
        self, x: Float[Array, "B T D"], angles: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        k, v = project_each((_KEY, _KEY), x, (self.k[...], self.v[...]))
        return self._finish_keys_values(k, v, angles)

    def _finish_keys_values(self, k: Array, v: Array, angles) -> tuple[Array, Array]:
        return _turn(_add_bias(k, self.k_bias), angles), _add_bias(v, self.v_bias)

    def project_out(self, out: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return _add_bias(project("BTNH,NHD->BTD", out, self.out[...]), self.out_bias)


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202), or GELU in the tanh form of GPT-2 and Megatron."""

    def __init__(self, model: Model, memory: Memory, rngs: nnx.Rngs):
        sizes, biased, table = letter_sizes(model), model.biases, _table(model)
        gated = model.feed_forward == "swiglu"
        self.tile_tokens = memory.mlp_tile_tokens
        self.gate = weight(rngs, "LDF", sizes, std=_STD, table=table) if gated else None
        self.up = weight(rngs, "LDF", sizes, std=_STD, table=table)
        self.down = weight(rngs, "LFD", sizes, std=_output_std(model), table=table)
        self.gate_bias = constant("LF", sizes, 0.0, table) if biased and gated else None
        self.up_bias = constant("LF", sizes, 0.0, table) if biased else None
        self.down_bias = constant("LD", sizes, 0.0) if biased else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """In tiles where a device has more tokens than memory.mlp_tile_tokens."""
        if self._is_tiled(x):
            named = {name: getattr(self, name) for name in NAMES}
            weights = {name: w[...] for name, w in named.items() if w is not None}
            y: Array = tiled_feed_forward(to_layer(x), weights, self.tile_tokens)
            y = to_residual(y)
        else:
            inputs = [self.up] if self.gate is None else [self.up, self.gate]
            weights = tuple(each[...] for each in inputs)
            up, *gates = project_each(("BTD,DF->BTF",) * len(weights), x, weights)
            up = _add_bias(up, self.up_bias)
            gate = _add_bias(gates[0], self.gate_bias) if gates else None
            y = project("BTF,FD->BTD", activate(gate, up), self.down[...])
        return _add_bias(y, self.down_bias)

    def _is_tiled(self, x: Float[Array, "B T D"]) -> bool:
        """Whether a device has hidden activations of more tokens than a tile's."""
        up, mesh = self.up[...], get_abstract_mesh()
        if self.tile_tokens is None or inside_shard_map():
            return False
        letters = "BSD" if lies_over_seq("DF", up) else "BTD"
        spec = activation(letters, mesh.shape)
        batch, tokens, _ = NamedSharding(mesh, spec).shard_shape(x.shape)
        return batch * tokens > self.tile_tokens


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
