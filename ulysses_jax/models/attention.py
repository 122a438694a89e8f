"""Grouped-query self-attention over a sequence that is spread over the mesh."""

import dataclasses
from dataclasses import dataclass

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.attend import attend
from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.layouts import layout_of
from ulysses_jax.attention.mask import Mask
from ulysses_jax.complete import complete_model
from ulysses_jax.config import Model
from ulysses_jax.models.adapter import make_adapter, project_into, project_out_of
from ulysses_jax.models.bias import add_bias
from ulysses_jax.models.inputs import check_input, positions_and_segments
from ulysses_jax.models.norm import norm_scale, rms_normed
from ulysses_jax.models.rope import apply_rope, frequencies, rope_angles
from ulysses_jax.models.sizes import STD, letter_sizes, output_std
from ulysses_jax.sharding import activation
from ulysses_jax.strategies import Strategy
from ulysses_jax.weights.by_strategy import products_of
from ulysses_jax.weights.parameter import matrix, vector

# Cosines and sines of RoPE; empty where there is none to turn by; None: not known yet.
Angles = tuple[Float[Array, "B T half"], ...] | None


@dataclass(frozen=True)
class Attend:
    """`ulysses_jax.attend.attend` on the mesh that is set, with a model's options.

    Who acts on a layer from outside may replace it.
    """

    strategy: Strategy | None
    attention: str
    zigzag: bool
    scale: float | None = None
    head_chunks: int = 1

    def __call__(
        self, q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None
    ) -> Array:
        return attend(
            q,
            k,
            v,
            mesh=get_abstract_mesh(),
            mask=mask,
            sinks=sinks,
            **dataclasses.asdict(self),
        )


class Attention(nnx.Module):
    """Causal; every query sees all tokens before it, the last `window` of them, or
    blocks of them by `model.sparse`."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs, kind: str | None = None):
        """Args: kind: full, window or sparse; None: the first of the model's pattern.

        Raises:
          ValueError: another kind; window or sparse where the model has none.
        """
        model = complete_model(model)
        assert model.pattern
        if kind not in (None, "full", "window", "sparse"):
            raise ValueError(
                f"kind {kind!r} is none of Attention: use 'full', 'window' or 'sparse'"
            )
        if kind == "window" and model.window is None:
            raise ValueError(
                "kind 'window' sees the last model.window tokens, and model.window "
                "does not say how many: set it, Model(window=...), or use kind 'full'"
            )
        if kind == "sparse" and model.sparse is None:
            raise ValueError(
                "kind 'sparse' sees blocks by model.sparse, which is not set: set it, "
                "Model(sparse=...), or use kind 'full'"
            )
        self.kind = kind = kind or model.pattern[0]
        self.model, self.is_sparse = model, kind == "sparse"
        self.window = model.window if kind == "window" else None
        self.products = products_of(model.strategy)
        self.attend = Attend(
            strategy=None if model.strategy == "auto" else model.strategy,
            attention=model.attention,
            zigzag=bool(model.zigzag),
            scale=model.attention_scale,
        )
        sizes, table = letter_sizes(model), self.products.table
        self.q = matrix(rngs, "DNH", sizes, std=STD, table=table)
        self.k = matrix(rngs, "DKH", sizes, std=STD, table=table)
        self.v = matrix(rngs, "DKH", sizes, std=STD, table=table)
        self.out = matrix(rngs, "NHD", sizes, std=output_std(model), table=table)
        gated = model.attention_gate
        self.out_gate = (
            matrix(rngs, "DNH", sizes, std=STD, table=table) if gated else None
        )
        self.q_adapter = make_adapter(model, "q", "DNH", "D", table, rngs=rngs)
        self.k_adapter = make_adapter(model, "k", "DKH", "D", table, rngs=rngs)
        self.v_adapter = make_adapter(model, "v", "DKH", "D", table, rngs=rngs)
        self.out_adapter = make_adapter(model, "out", "NHD", "NH", table, rngs=rngs)
        self.out_gate_adapter = make_adapter(
            model, "out_gate", "DNH", "D", table, rngs=rngs
        )
        biased = model.attention_biases != "none"
        self.q_bias = vector("NH", sizes, 0.0, table) if biased else None
        self.k_bias = vector("KH", sizes, 0.0, table) if biased else None
        self.v_bias = vector("KH", sizes, 0.0, table) if biased else None
        has_out = model.attention_biases == "all"
        self.out_bias = vector("D", sizes, 0.0) if has_out else None
        normed = model.query_key_norm
        self.q_norm = norm_scale(model, "H") if normed else None
        self.k_norm = norm_scale(model, "H") if normed else None
        self.sinks = vector("N", sizes, 0.0, table) if model.sinks else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        angles: Angles = None,
    ) -> Float[Array, "B T D"]:
        """Attends over all tokens, in the order in which they lie.

        Args:
          x: global, in the compute dtype, B over (data, fsdp), T over (ring, seq).
          positions: of RoPE; None: 0, 1, 2, ... What a query sees goes by the order of
            the tokens (in zigzag order where `model.zigzag` says so).
          segment_ids: tokens see only those of their own segment.
          angles: `self.angles(positions)`, where they are known: a stack makes them
            once for all of its layers.

        Returns:
          As x, lying as x.

        Raises:
          ValueError: dims that do not fit the mesh, as `ulysses_attention`; what
            `check_input` refuses.
        """
        check_input(self, x)
        if angles is None:
            positions, segment_ids = positions_and_segments(
                self.model, x.shape[:2], positions, segment_ids
            )
            angles = self.angles(positions)
        gated = self.out_gate is not None
        names = ("q", "k", "v", *("out_gate",) * gated)
        q, k, v, *gate = project_into(self, names, x)
        k, v = self._finish_keys_values(k, v, angles)
        mask = Mask(
            causal=True,
            window=self.window,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            layout=self.layout(x.shape[1]),
        )
        q = self._finish_queries(q, angles)
        sinks = None if self.sinks is None else self.sinks[...]
        out = checkpoint_name(self.attend(q, k, v, mask, sinks), "attended")
        return layout.lay_like(self.project_out(out, *gate), x)

    def layout(self, num_tokens: int) -> BlockLayout | None:
        """Which blocks are seen of a sequence of `num_tokens`; None: all."""
        return layout_of(self.model, num_tokens) if self.is_sparse else None

    def angles(self, positions: Int[Array, "B T"]) -> Angles:
        """Of RoPE, lying as the tokens of queries and keys do; empty without RoPE."""
        if self.model.positions != "rope":
            return ()
        assert self.model.head_size
        axes = layout.axes()
        spec = P(*activation("BTNH", axes, self.products.table)[:2])
        positions = layout.lay(positions, spec)
        rope, tokens = self.model.rope, positions.shape[1]
        turns = frequencies(rope, self.model.head_size, tokens, kind=self.kind)
        return rope_angles(positions, *turns)

    def queries(
        self, x: Float[Array, "B T D"], angles: Angles
    ) -> Float[Array, "B T N H"]:
        (q,) = project_into(self, ("q",), x)
        return self._finish_queries(q, angles)

    def keys_values(
        self, x: Float[Array, "B T D"], angles: Angles
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        k, v = project_into(self, ("k", "v"), x)
        return self._finish_keys_values(k, v, angles)

    def gates(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], ...]:
        """What `project_out` takes beside attention's output; none, or one."""
        return () if self.out_gate is None else project_into(self, ("out_gate",), x)

    def project_out(
        self, out: Float[Array, "B T N H"], *gates: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        for gate in gates:
            out = out * nnx.sigmoid(gate)
        return add_bias(project_out_of(self, "out", out), self.out_bias)

    def _finish_queries(self, q: Array, angles: Angles) -> Array:
        return self._turn(self._normed(add_bias(q, self.q_bias), self.q_norm), angles)

    def _finish_keys_values(
        self, k: Array, v: Array, angles: Angles
    ) -> tuple[Array, Array]:
        k = self._normed(add_bias(k, self.k_bias), self.k_norm)
        return self._turn(k, angles), add_bias(v, self.v_bias)

    def _normed(self, x: Array, scale: nnx.Param | None) -> Array:
        if scale is None:
            return x
        return rms_normed(self.model, x, scale).astype(x.dtype)

    def _turn(self, x: Array, angles: Angles) -> Array:
        return apply_rope(x, angles) if angles else x
