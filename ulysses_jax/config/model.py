"""A model as data: its sizes, and the kinds of its layers."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ulysses_jax.strategies import Strategy

# Lists are made of them before anything else is known of a model.
MOST_LAYERS, MOST_HEADS = 2**12, 2**16


@dataclass(frozen=True)
class Rope:
    """Rotary positions: how fast each pair of a head's features turns.

    Pair i turns by `position * base**(-2 i / H)`, where scaling is none.
    """

    base: float = 500_000.0
    window_base: float | None = None
    """Of layers of kind window, which are not scaled then, as in Gemma 3; default: they
    turn as the others."""
    fraction: float = 1.0
    """Of a head's features, the first ones, that are turned at all."""
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    """How a model is stretched to longer sequences than it was trained for
    (`models.rope.frequencies` has the formulas)."""
    factor: float = 1.0
    """By which it is stretched."""
    original_tokens: int | None = None
    """Of a sequence, that it was trained for before; all but linear read it."""
    low_frequency_factor: float = 1.0
    """llama3: what turns fewer times in original_tokens is slowed by factor,"""
    high_frequency_factor: float = 4.0
    """and what turns more often is left."""
    beta_fast: float = 32.0
    """yarn: what turns more often in original_tokens is left,"""
    beta_slow: float = 1.0
    """and what turns fewer times is slowed by factor."""
    truncate: bool = True
    """yarn: these two bounds fall on whole pairs."""
    attention_factor: float | None = None
    """yarn and longrope: cosines and sines are multiplied by it; default: what their
    papers say."""
    short_factors: tuple[float, ...] = ()
    """longrope: by which each pair is slowed, up to original_tokens,"""
    long_factors: tuple[float, ...] = ()
    """and in longer sequences."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of a layer's projections, the only parameters that are trained:
    `x W + (alpha / rank) (x A) B` (arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all",)
    """Names of projections, or globs of them: q, k, v and out of attention; gate, up
    and down of the feed-forward; out_gate, where there is model.attention_gate. all:
    every one that the model has."""


RECURRENT = ("linear", "delta")
"""Kinds of layers whose tokens reach others by a state, in the sequence's order."""


class StateSizes(NamedTuple):
    """Heads and sizes of a layer of a kind in RECURRENT."""

    num_heads: int
    """Of values, gates and states."""
    num_key_heads: int
    """Of queries and keys."""
    key_size: int
    value_size: int

    @property
    def state_size(self) -> int:
        """Numbers of a head's state."""
        return self.key_size * self.value_size


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer; the defaults are Llama's choices."""

    vocab_size: int = 320
    width: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int | None = None
    """Default: num_heads."""
    head_size: int | None = None
    """Default: width / num_heads."""
    feed_forward_width: int | None = None
    """Default: 4 x width."""
    norm: Literal["rms", "zero_centered_rms", "layer"] = "rms"
    """zero_centered_rms: RMSNorm whose scale is one and what is learned."""
    norm_epsilon: float = 1e-5
    post_norms: bool = False
    """What attention and feed-forward give is normed before it is added, too."""
    query_key_norm: bool = False
    """Queries and keys are normed over a head's features, before they are turned."""
    feed_forward: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    positions: Literal["rope", "learned"] = "rope"
    rope: Rope = field(default_factory=Rope)
    max_positions: int | None = None
    """Rows of a learned position table; default: training.sequence_tokens."""
    biases: bool = False
    """Of attention's and the feed-forward's products."""
    attention_biases: Literal["none", "inputs", "all"] | None = None
    """Of attention's products; inputs: of queries, keys and values. Default: all where
    there are biases, else none."""
    attention_gate: bool = False
    """What attention gives is multiplied by sigmoid(x gate), a number a feature, before
    it is projected."""
    attention_scale: float | None = None
    """By which queries times keys are multiplied; default: 1 / sqrt(head_size)."""
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    """By which a token's embedding is multiplied, in the compute dtype."""
    pattern: tuple[str, ...] | None = None
    """Kinds of layers, which repeat along the depth; the last time may be cut short.
    full: attends to all tokens before; window: to those in model.window; sparse: to
    blocks of them, by model.sparse; linear: linear attention with decay; delta: the
    gated delta rule. Default: window where model.window is set, sparse where
    model.sparse is, else full."""
    window: int | None = None
    """Layers of kind window attend only to keys fewer than this many positions away."""
    sparse: Literal["fixed", "strided", "longformer", "bigbird"] | None = None
    """Which blocks of keys a block of queries sees in layers of kind sparse. fixed: its
    own group of blocks, and the last blocks of each group before; strided: the last
    blocks, and of those before every so many-th; longformer: the last blocks and the
    first; bigbird: these and random ones."""
    sparse_block_tokens: int = 128
    """Tokens of a block."""
    sparse_local_blocks: int = 4
    """Blocks of a group, or the last ones that are seen, its own among them."""
    sparse_global_blocks: int = 1
    """The last of each group (fixed), or the first of all (longformer, bigbird)."""
    sparse_random_blocks: int = 1
    """Of bigbird."""
    sparse_by_head: bool = False
    """Each head sees others: of each group of fixed, or random ones of bigbird."""
    convolution_tokens: int = 4
    """Of layers of kind delta: over how many tokens queries, keys and values are
    convolved, a token's own among them."""
    delta_heads: int | None = None
    """Of layers of kind delta: heads of values, gates and states; default:
    num_heads."""
    delta_key_heads: int | None = None
    """Of these layers' queries and keys; default: num_kv_heads."""
    delta_key_size: int | None = None
    """Of a head of these; default: head_size."""
    delta_value_size: int | None = None
    """Of a head of values; default: head_size."""
    attention: Literal["auto", "cudnn", "mosaic", "blockwise", "reference"] = "auto"
    """What a device computes; auto: the best for the devices and the mask."""
    sinks: bool = False
    """Each head of attention learns the logit of one more key, whose value is 0."""
    strategy: Literal["auto"] | Strategy = "auto"
    """How attention reaches all tokens. ulysses: an exchange over seq; ring: blocks of
    keys go round ring; hybrid: both; all_gather: keys are gathered over seq; megatron:
    activations are, before attention and feed-forward, which split heads and features
    over seq. auto: what the mesh carries, and of ulysses and all_gather that which
    receives fewer bytes."""
    zigzag: bool | None = None
    """Tokens lie in zigzag order over the members that attend block by block, so that
    all work equally under a causal mask; default: where there are such members."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lora: Lora | None = None
    """Adapters, on weights that stay as model.from has them; null: all is trained."""
    from_: str | None = None
    """`from` in a file and on the command line: a Hugging Face folder whose weights a
    run starts from, and whose config.json says all fields above that are not given."""

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward multiplies two products."""
        return self.feed_forward != "gelu"

    def kinds(self) -> tuple[str, ...]:
        """Of every layer of a completed model, from the first on."""
        assert self.pattern, "complete.complete_model fills it in"
        repeats = math.ceil(self.num_layers / len(self.pattern))
        return (self.pattern * repeats)[: self.num_layers]

    def attending_kinds(self) -> tuple[str, ...]:
        """`kinds()` but those of RECURRENT."""
        return tuple(kind for kind in self.kinds() if kind not in RECURRENT)

    def state_sizes(self, kind: str) -> StateSizes:
        """Of a completed model's layers of a kind in RECURRENT."""
        assert self.num_kv_heads and self.head_size
        if kind != "delta":
            sizes = self.head_size, self.head_size
            return StateSizes(self.num_heads, self.num_kv_heads, *sizes)
        assert self.delta_heads and self.delta_key_heads
        assert self.delta_key_size and self.delta_value_size
        return StateSizes(
            self.delta_heads,
            self.delta_key_heads,
            self.delta_key_size,
            self.delta_value_size,
        )

    def attended_features(self, kind: str) -> int:
        """What a layer of a kind gives before it is projected to the width."""
        if kind not in RECURRENT:
            assert self.head_size
            return self.num_heads * self.head_size
        sizes = self.state_sizes(kind)
        return sizes.num_heads * sizes.value_size

    def windows(self) -> tuple[int | None, ...]:
        """Of every layer: how many tokens it sees; None: all."""
        return tuple(self.window if kind == "window" else None for kind in self.kinds())

    @property
    def is_recurrent(self) -> bool:
        """Whether a completed model has layers of a kind in RECURRENT."""
        return not set(RECURRENT).isdisjoint(self.kinds())
