"""One decoder-only transformer that is Llama or GPT by its config."""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import get_abstract_mesh, reshard
from jaxtyping import Array, Float, Int

from ulysses_jax.config import Memory, Model, in_pieces
from ulysses_jax.memory.remat import run_layers
from ulysses_jax.models.layers import Block, Norm, letter_sizes
from ulysses_jax.models.linear import embed, weight
from ulysses_jax.models.pieces import Layer, layer_in_pieces
from ulysses_jax.models.residual import to_layer, to_residual
from ulysses_jax.models.rope import rope_angles
from ulysses_jax.models.weights import Gathered
from ulysses_jax.sharding import activation


class Transformer(nnx.Module):
    """Tokens to the last layer's normed activations; the loss applies `head`.

    Parameters are float32 and lie on the mesh that is set (`jax.set_mesh`, Explicit
    axes) as `sharding.parameter` says. Made inside `jax.jit` they are made sharded, and
    inside `jax.eval_shape` not at all, but with their shardings.
    """

    def __init__(self, model: Model, memory: Memory, rngs: nnx.Rngs):
        sizes = letter_sizes(model)
        self.model, self.memory = model, memory
        self.embedding = weight(rngs, "VD", sizes, std=0.02)
        # Its rows lie over tensor, as those of a vocabulary do.
        rows = sizes | {"V": model.max_positions or 0}
        learned = model.positions == "learned"
        self.position_table = weight(rngs, "VD", rows, std=0.02) if learned else None
        self.layers = Block(model, memory, rngs)
        self.norm = Norm(model, stacked=False)
        tied = model.tied_embeddings
        self.unembedding = None if tied else weight(rngs, "VD", sizes, std=0.02)

    @property
    def head(self) -> Float[Array, "V D"] | Gathered:
        """The output projection, as stored: float32, sharded."""
        owner = self.embedding if self.unembedding is None else self.unembedding
        return owner[...]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Runs the layers; `memory` says what the backward pass finds and recomputes.

        Args:
          tokens: global ids, B over (data, fsdp), T over (ring, seq); where the model's
            `zigzag` says so, in zigzag order (`spreading.zigzag_order`).
          positions: global positions, sharded alike.
          segment_ids: sharded alike; None: one document a row.

        Returns:
          `[B, T, D]` in the compute dtype, sharded alike.
        """
        model, axes = self.model, get_abstract_mesh().shape
        dtype = jnp.dtype(model.compute_dtype)
        x: Array = to_residual(embed(self.embedding[...], tokens, dtype))
        angles = None
        if self.position_table is not None:
            where: Array = embed(self.position_table[...], positions, dtype)
            x = x + to_residual(where)
        else:
            assert model.head_size
            if model.strategy == "megatron":  # its heads turn over whole rows
                positions = reshard(positions, activation("B", axes))
            angles = rope_angles(positions, model.head_size, model.rope_base)
        if segment_ids is not None:
            # A device attends over whole rows: gather the ids once, not in each layer.
            segment_ids = reshard(segment_ids, activation("B", axes))

        graph, stacked = nnx.split(self.layers)

        pieces = Layer(graph, model, self.memory)

        def layer(x, parameters) -> Array:
            if in_pieces(model, self.memory):
                y: Array = layer_in_pieces(
                    pieces, to_layer(x), parameters, angles, segment_ids
                )
                return to_residual(y)
            return nnx.merge(graph, parameters)(x, angles, segment_ids)

        return to_layer(self.norm(run_layers(layer, x, stacked, self.memory)))
