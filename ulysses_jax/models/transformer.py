"""One decoder-only transformer that is Llama or GPT by its config."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.ids import as_array, check_below, int32_ids
from ulysses_jax.mesh import allow_promotion
from ulysses_jax.models.inputs import positions_and_segments
from ulysses_jax.models.layer import Layer
from ulysses_jax.models.norm import Norm
from ulysses_jax.models.residual import to_layer, to_residual
from ulysses_jax.models.sizes import STD, letter_sizes
from ulysses_jax.models.stack import RunLayer, make_stack, run_layer, run_stacks
from ulysses_jax.sharding import activation
from ulysses_jax.weights.gathered import Gathered
from ulysses_jax.weights.parameter import matrix
from ulysses_jax.weights.products import project
from ulysses_jax.weights.rows import embed
from ulysses_jax.weights.whole import Unbound, Values, unbind


@partial(jax.jit, static_argnums=0)
def _logits(module: Unbound, values: Values, ids: dict[str, Array]) -> Array:
    model = module.bind(values)
    x = model.features(**ids)
    return project("BTD,VD->BTV", x, model.head, jnp.dtype(jnp.float32))


def _embed_tokens(table: Any, ids: Array, dtype: jnp.dtype) -> Array:
    return to_residual(embed(table, ids, dtype))


class Transformer(nnx.Module):
    """Tokens to logits, `model(tokens)`, on the mesh that is set, or on one device.

    Parameters are float32 and lie as `sharding.parameter` says: made inside `jax.jit`
    they are made sharded, and inside `jax.eval_shape` not at all.

    Attributes:
      layers: for each place in `model.pattern` a stack, a `Layer` whose parameters have
        a leading dim: layer i of stack p is layer `i * len(pattern) + p` of the model.
      rest: the layers that are left where the pattern does not divide the depth.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs, make_layer: Any = Layer):
        """Args: make_layer: `f(model, rngs=..., kind=...)`, called as `Layer` is.

        Raises:
          ValueError: what `complete.complete_model` refuses; dims that do not divide
            over the mesh; a kind that there is not.
        """
        model = complete_model(model)
        assert model.pattern
        sizes = letter_sizes(model)
        self.model = model
        self.embedding = matrix(rngs, "VD", sizes, std=STD)
        # Its rows lie over tensor, as those of a vocabulary do.
        rows = sizes | {"V": model.max_positions or 0}
        learned = model.positions == "learned"
        self.position_table = matrix(rngs, "VD", rows, std=STD) if learned else None

        def make(kind: str, rngs: nnx.Rngs) -> Any:
            return make_layer(model, rngs=rngs, kind=kind)

        repeats, left = divmod(model.num_layers, len(model.pattern))
        self.layers = nnx.List(
            make_stack(partial(make, kind), repeats, rngs) for kind in model.pattern
        )
        self.rest = nnx.List(make(kind, rngs) for kind in model.pattern[:left])
        self.norm = Norm(model)
        tied = model.tied_embeddings
        self.unembedding = None if tied else matrix(rngs, "VD", sizes, std=STD)

    @property
    def head(self) -> Float[Array, "V D"] | Gathered:
        """The output projection, as stored: float32, sharded."""
        owner = self.embedding if self.unembedding is None else self.unembedding
        return owner[...]

    @allow_promotion()
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """The logits of each token's next one, float32.

        Args: as `features`.

        Returns:
          Global, B over (data, fsdp), T over (ring, seq), V over tensor.

        Compiled once for a model and a shape, without jit too.

        Cost: `[B, T, V]` float32. To train, give `features` and `head` to
        `training.loss.cross_entropy`, whose logits exist tile by tile.
        """
        tokens = as_array(tokens, "tokens")
        given = {"positions": positions, "segment_ids": segment_ids}
        ids = {
            name: int32_ids(each, name, tokens.shape)
            for name, each in {"tokens": tokens, **given}.items()
            if each is not None
        }
        self._check_values(ids["tokens"], ids.get("positions"))
        module, values = unbind(self)
        for array in jax.tree.leaves((values, ids)):
            layout.check_mesh(array)
        return _logits(module, values, ids)

    @allow_promotion()
    def features(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        run: RunLayer = run_layer,
    ) -> Float[Array, "B T D"]:
        """The last layer's normed activations.

        Args:
          tokens: global ids, B over (data, fsdp), T over (ring, seq); where the model's
            `zigzag` says so, in zigzag order (`parallel.zigzag.zigzag_order`).
          positions: global, of RoPE or the learned table; None: 0, 1, 2, ...
          segment_ids: global; tokens see only tokens of their own segment. None: one
            document a row.
          run: how a layer is run: `memory.saving.Saving(memory)` has a run's options.

        Returns:
          `[B, T, D]` in the compute dtype, sharded as tokens should be.

        Raises:
          ValueError: ids of another shape or dtype, or, where their values are known,
            of no row of the vocabulary or of the learned table; a batch or tokens that
            the mesh does not divide; more tokens than `max_positions`; arrays that lie
            on another mesh than the one that is set.
        """
        model, axes = self.model, layout.axes()
        tokens = as_array(tokens, "tokens")
        if len(tokens.shape) != 2:
            raise ValueError(f"tokens are [B, T], and have shape {tokens.shape}")
        rows = model.max_positions
        if self.position_table is not None and positions is None:
            assert rows
            if tokens.shape[1] > rows:
                raise ValueError(
                    f"{tokens.shape[1]} tokens, but model.max_positions is {rows}: "
                    "raise it, or give positions below it"
                )
        given = positions
        positions, segment_ids = positions_and_segments(
            model, tokens.shape, positions, segment_ids
        )
        ids = int32_ids(tokens, "tokens", tokens.shape)
        self._check_values(ids, None if given is None else positions)
        ids = layout.lay(ids, activation("BT", axes))
        x = self.embedded(ids, positions, _embed_tokens)
        if segment_ids is not None:
            # A device attends over whole rows: gather the ids once, not in each layer.
            segment_ids = layout.lay(segment_ids, activation("B", axes))
        x = run_stacks(self.layers, self.rest, x, positions, segment_ids, run)
        return to_layer(self.norm(x))

    def embedded(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rows: Callable[..., Array],
    ) -> Float[Array, "B T D"]:
        """What goes into the first layer.

        Args:
          rows: `f(table, ids, dtype)`, of ids as they lie.
        """
        dtype = jnp.dtype(self.model.compute_dtype)
        x = rows(self.embedding[...], tokens, dtype)
        if self.model.embedding_scale != 1:
            x = x * jnp.asarray(self.model.embedding_scale, dtype)
        if self.position_table is not None:
            x = x + rows(self.position_table[...], positions, dtype)
        return x

    def _check_values(self, tokens: Any, positions: Any) -> None:
        """Of ids that are rows of a table."""
        check_below(tokens, "tokens", self.model.vocab_size, "model.vocab_size")
        if self.model.max_positions and positions is not None:
            rows = self.model.max_positions
            check_below(positions, "positions", rows, "model.max_positions")
